from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Stage, staged
from table import PEERS, TABLE, Cell, Verdict, column

_ABOUT = """# Ways out, tried

Written by `make escapes`. Every case is a program that gets something out, in, or at somebody else when it runs
unconfined; the judge stands outside (what a sink received, whether the victim lives), and the attacker's own word
counts for nothing but the error shown. `n/a` is explained at the end. A case that this host cannot do even unconfined
proves nothing here and is not counted as blocked.

Other sandboxes run the same programs under the same judges, set up as `tests/escapes/peers.py` says: sandlock with its
own network allow-list granting the same destination, its defaults for the rest, and without capabilities; bubblewrap
with all namespaces of its own but, in one column, the network, which it cannot grant by destination."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", action="store_true", help="run the attacks in other sandboxes too")
    parser.addoption("--table", metavar="FILE", help="print the table of cases, and write it to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "escape_row(family, name): a row of the table that is no Attack")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for each in items:
        if each.path.parent == here and each.path.name != "test_must_work.py":
            each.add_marker(pytest.mark.flaky(reruns=0))  # who got out once has got out
    if config.getoption("--peers", default=False):
        return
    ours = [each for each in items if _ring(each) not in PEERS]
    if len(ours) < len(items):
        items[:] = ours


def _ring(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("ring", "")) if callspec is not None else ""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    marker = item.get_closest_marker("escape_row")
    if marker is None or (call.when != "call" and call.excinfo is None):
        return
    report = outcome.get_result()  # type: ignore[attr-defined]
    family, name = marker.args
    where = column(_ring(item) or "call")
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        TABLE.note(family, name, where, Cell(Verdict.INAPPLICABLE, reason.removeprefix("Skipped: ")))
    else:
        TABLE.note(family, name, where, Cell(Verdict.BLOCKED if report.passed else Verdict.ESCAPED))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--table", default=None)
    if path is None or not TABLE.rows:
        return
    TABLE.write(Path(path), _ABOUT)
    terminalreporter.section("ways out")
    terminalreporter.write_line(TABLE.text())


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    # Not below /tmp, where pytest's own folders are: other sandboxes put an empty one there.
    with (
        tempfile.TemporaryDirectory(prefix="ray_guard_stage_", dir="/var/tmp") as folder,
        staged(Path(folder)) as found,
    ):
        yield found


@pytest.fixture
def folder(stage: Stage) -> Path:
    """A new folder that tools may write."""
    made = stage.folder / secrets.token_hex(4)
    made.mkdir()
    return made

"""The chaos suite: what a job loses when something around it breaks. ``make chaos`` prints the table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "escapes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
sys.path.insert(0, str(Path(__file__).parent))

from faults import FAULTS
from harness import Namespace
from stage import Sink

_ABOUT = """# What breaks, and what is lost

Written by `make chaos`. A job makes calls without a pause while something around it is broken; what it knows of its
calls it notes in a file, outside of any tracing, and the evidence is held against that. *Lost*: calls that had begun
and are not in the evidence, or had ended and whose own end is not. *Duplicates*: ids that ended twice, calls under two
ids. *Dead after*: seconds until the last process of the job was gone. Beside it OpenTelemetry's `BatchSpanProcessor`
with its defaults and an OTLP/HTTP exporter, where the same fault can befall it. Both give an endpoint one second, so
that an outage of seconds here is one of minutes with the default of ten."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", metavar="FILE", help="print the table of faults, and write it to FILE")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--faults", default=None)
    if path is None or not FAULTS.rows:
        return
    FAULTS.write(Path(path), _ABOUT)
    terminalreporter.section("what breaks, and what is lost")
    terminalreporter.write_line(FAULTS.text())


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()

"""Runs the suites that meet the kernel on simulated hosts, and says what held: ``make hosts``.

    everywhere.py [all | HOST …] [-- PYTEST ARGUMENT …]

On hosts of an ordinary user all of pytest runs there, as that user. On the others, and for what takes a root outside,
pytest stays where it is and all that it confines is started there (RAY_GUARD_TEST_HOST). What a host cannot do is
skipped by name; what fails, fails here. A host that differs in one respect runs what that respect is about; with PYTEST
ARGUMENTs each runs those. Without them the hosts' rows in docs/hosts.md are written anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import launcher

ROOT_FOLDER: Final = Path(__file__).parents[2]
REAL: Final = "this one"
_ALL: Final = ("tests/escapes", "tests/supervisor", "tests/kernel")
_SOCKETS: Final = (
    *(f"tests/escapes/test_{name}.py" for name in ("destinations", "exhaustion", "inbound", "names", "unix")),
    *(f"tests/supervisor/test_{name}.py" for name in ("counting", "relay", "relay_names", "robustness", "run")),
)
_PROCESSES: Final = (
    *(f"tests/escapes/test_{name}.py" for name in ("bystanders", "keepers", "lifetime", "must_work", "processes")),
    *(f"tests/supervisor/test_{name}.py" for name in ("ends", "leaders", "limits", "popen", "survivors", "terminal")),
)
_FILES: Final = ("tests/escapes/test_files.py", "tests/escapes/test_unix.py")
SUITES: Final = {
    "docker": (*_SOCKETS, *_FILES, "tests/escapes/test_must_work.py"),
    "k8s-landlock-2": _ALL,
    "yama": (*_SOCKETS, "tests/escapes/test_processes.py", "tests/escapes/test_programs.py"),
    "landlock-1": (*_PROCESSES, *_FILES),
    "landlock-4": _PROCESSES,
    "landlock-none": ("tests/escapes/test_destinations.py", "tests/escapes/test_keepers.py"),
}
"""What a host runs by default; those that are not listed, everything."""
_OUTSIDE: Final = {
    "unprivileged": (
        "tests/escapes/test_names.py",
        *(f"tests/supervisor/test_{n}.py" for n in ("names", "relay_names")),
    )
}
"""What of a host of an ordinary user needs a root outside, for a name server and a hosts file."""
DEFAULT: Final = ("docker", "k8s-landlock-2", "yama", "unprivileged", "landlock-1", "landlock-4")
"""Between them every difference there is."""


@dataclass(frozen=True)
class Row:
    """What pytest found on a host."""

    host: str
    status: int
    tests: int
    failed: Sequence[str]
    skipped: Mapping[str, int]
    """How many by each reason."""
    seconds: float

    def __add__(self, other: Row) -> Row:
        return Row(
            self.host,
            self.status or other.status,
            self.tests + other.tests,
            [*self.failed, *other.failed],
            Counter(self.skipped) + Counter(other.skipped),
            self.seconds + other.seconds,
        )

    @property
    def cells(self) -> tuple[str, ...]:
        skipped = sum(self.skipped.values())
        passed = self.tests - skipped - len(self.failed)
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items(), key=lambda s: -s[1]))
        # pytest may also end otherwise than by a failed test: then it counts for nothing
        failed = str(len(self.failed)) if self.status in (0, 1) else f"pytest: {self.status}"
        return self.host, str(passed), failed, str(skipped), reasons, f"{self.seconds:.0f}"


HEAD: Final = ("host", "passed", "failed", "skipped", "why", "seconds")
PAGE: Final = ROOT_FOLDER / "docs/hosts.md"
_BEGIN: Final = "<!-- written by make hosts -->\n"
_END: Final = "<!-- end -->\n"


def read(host: str, status: int, report: Path, seconds: float) -> Row:
    """A row from pytest's own report (junit.xml)."""
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    failed: list[str] = []
    skipped: Counter[str] = Counter()
    for case in cases:
        skip = case.find("skipped")
        if skip is not None:
            skipped[_reason(host, skip.get("message", ""))] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return Row(host, status, len(cases), failed, skipped, seconds)


_ALIKE: Final = {
    "refuses it to everybody": "the host refuses it to everybody",
    "refused, but proves nothing here": "this kernel or network has no such thing, even unconfined",
    "needs root even unconfined": "needs root even unconfined",
    "not this user's even unconfined": "not this user's, even unconfined",
    "cannot be opened unconfined": "a device that cannot be opened, even unconfined",
    "a hosts file of its own needs root": "missing: root, for a hosts file of its own",
    "needs a supervisor of its own": "missing: root, for a supervisor of its own",
    "only root c": "missing: root, to look into the supervisor or to make a device",
    "only root may": "missing: root, to look into the supervisor or to make a device",
}
"""What is said of many in slightly other words, by what those have in common."""


def _reason(host: str, message: str) -> str:
    """A skip's reason without what differs from test to test."""
    for part, reason in _ALIKE.items():
        if part in message:
            return reason
    return " ".join(message.removeprefix(f"{host}: ").removeprefix(f"refused on {host}: ").split()).replace("|", "/")


def both(host: str) -> Row:
    """All that ``host`` runs by default."""
    outside = _OUTSIDE.get(host, ())
    within = [f"--ignore={path}" for path in outside]
    row = run(host, (*SUITES.get(host, _ALL), *within), user=host in launcher.UNPRIVILEGED)
    return row if not outside else row + run(host, outside, user=False)


def run(host: str, arguments: Sequence[str], *, user: bool) -> Row:
    """pytest with ``arguments``; ``user``: on ``host`` itself, else what it confines alone."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    folder = tempfile.mkdtemp(prefix="ray_guard_hosts_", dir="/tmp")
    report = Path(folder, "report.xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    command += [f"--junitxml={report}", *arguments]
    if user:
        home, own = folder, f"{folder}/tmp"
        os.makedirs(own)
        for each in (home, own):
            if os.geteuid() == 0:
                os.chown(each, 65534, 65534)
        environment |= {"HOME": home, "XDG_STATE_HOME": home, "TMPDIR": own}
        environment.pop("XDG_RUNTIME_DIR", None)
        command = [*launcher.prefix(host), *command]
    elif host != REAL:
        environment[launcher.VARIABLE] = host
    began = time.monotonic()
    try:
        status = subprocess.run(command, cwd=ROOT_FOLDER, env=environment, check=False).returncode
        return read(host, status, report, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under HEAD, as Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEAD, ["---"] * len(HEAD), *rows))


def write(page: Path, rows: Sequence[Row]) -> None:
    """Puts ``rows`` into the page's table; rows of other hosts stay."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{page}: no table between {_BEGIN.strip()} and {_END.strip()}")
    known = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    new = {row.host: table([row.cells]).splitlines()[2] for row in rows}
    lines = {**known, **new}
    order = [REAL, *launcher.HOSTS]
    written = "".join(lines[host] + "\n" for host in order if host in lines)
    page.write_text(before + _BEGIN + table([]) + written + _END + after)


def main() -> int:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    given, arguments = words[:at], words[at + 1 :]
    hosts: Sequence[str] = [REAL, *launcher.HOSTS] if given == ["all"] else given or DEFAULT
    hosts = [host for host in hosts if host != "listener"]  # nothing is guarded there: tests/hosts says so
    if os.geteuid() != 0:
        print("not root: only this host and user can be tried", file=sys.stderr)
        hosts = [REAL]
    rows = []
    for host in hosts:
        print(f"\n===== {host}", flush=True)
        rows.append(run(host, arguments, user=host in launcher.UNPRIVILEGED) if arguments else both(host))
        if not arguments and os.geteuid() == 0:
            write(PAGE, rows)
    print("\n" + table([row.cells for row in rows]))
    for row in rows:
        for name in row.failed:
            print(f"FAILED on {row.host}: {name}")
    return int(any(row.status for row in rows))


if __name__ == "__main__":
    sys.exit(main())

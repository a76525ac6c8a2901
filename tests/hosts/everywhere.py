"""Runs the suites that meet the kernel on simulated hosts, and says what held: ``make hosts``.

    everywhere.py [all | HOST …] [-- PYTEST ARGUMENT …]

On hosts of an ordinary user all of pytest runs there, as that user. On the others pytest stays where it is and all that
it confines is started there (RAY_GUARD_TEST_HOST). What a host cannot do is skipped by name; what fails, fails here.
A host that differs in one respect runs what that respect is about; with PYTEST ARGUMENTs each runs those.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

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
DEFAULT: Final = ("docker", "k8s-landlock-2", "yama", "landlock-1")
"""Between them every difference there is. An ordinary user's own host is one of them but for what containers refuse."""


def run(host: str, arguments: Sequence[str]) -> tuple[int, str]:
    """pytest's status and last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "120", *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    home = None
    if host in launcher.UNPRIVILEGED:
        home = tempfile.mkdtemp(prefix="ray_guard_nobody_", dir="/tmp")
        os.makedirs(f"{home}/tmp")
        for folder in (home, f"{home}/tmp"):
            if os.geteuid() == 0:
                os.chown(folder, 65534, 65534)
        environment |= {"HOME": home, "XDG_STATE_HOME": home, "TMPDIR": f"{home}/tmp"}
        environment.pop("XDG_RUNTIME_DIR", None)
        command = [*launcher.prefix(host), *command]
    elif host != REAL:
        environment[launcher.VARIABLE] = host
    try:
        process = subprocess.Popen(command, cwd=ROOT_FOLDER, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        return process.wait(), last
    finally:
        if home is not None:
            shutil.rmtree(home, ignore_errors=True)


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
        began = time.monotonic()
        status, last = run(host, arguments or SUITES.get(host, _ALL))
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)) or last
        rows.append((host, status, f"{counts} in {time.monotonic() - began:.0f} s"))
    print("\nhost            held  tests")
    for host, status, told in rows:
        print(f"{host:<15} {'yes' if status == 0 else 'NO':<5} {told}")
    return int(any(status for _, status, _ in rows))


if __name__ == "__main__":
    sys.exit(main())

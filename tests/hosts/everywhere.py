"""Runs the suites that meet the kernel on every simulated host, and says what held: ``make hosts``.

    everywhere.py [HOST …] [-- PYTEST ARGUMENT …]

On hosts of an ordinary user all of pytest runs there, as that user. On the others pytest stays where it is and all that
it confines is started there (RAY_GUARD_TEST_HOST). What a host cannot do is skipped by name; what fails, fails here.
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

import launcher

ROOT_FOLDER = Path(__file__).parents[2]
SUITES = ("tests/escapes", "tests/supervisor", "tests/kernel")
REAL = "this one"
_HERE = ("docker", "landlock-none", "landlock-4")


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
    given = sys.argv[1:]
    arguments: Sequence[str] = SUITES
    if "--" in given:
        at = given.index("--")
        given, arguments = given[:at], given[at + 1 :]
    hosts = given or [REAL, *_HERE, *launcher.UNPRIVILEGED]
    if os.geteuid() != 0:
        print("not root: only this host and user can be tried", file=sys.stderr)
        hosts = [REAL]
    rows = []
    for host in hosts:
        print(f"\n===== {host}", flush=True)
        began = time.monotonic()
        status, last = run(host, arguments)
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)) or last
        rows.append((host, status, f"{counts} in {time.monotonic() - began:.0f} s"))
    print("\nhost            held  tests")
    for host, status, told in rows:
        print(f"{host:<15} {'yes' if status == 0 else 'NO':<5} {told}")
    return int(any(status for _, status, _ in rows))


if __name__ == "__main__":
    sys.exit(main())

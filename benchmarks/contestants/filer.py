"""What a contestant of files.py runs: a tool that works with files. Standard library only (also for the peers).

    python filer.py plain|guard|sandlock FOLDER

FOLDER may be written, and holds a git repository named ``source``. Reads lines: ``files COUNT`` (creates and deletes
that many), ``clone`` (git clone of ``source``), ``try PATH`` (writes there: 0 where it can). Answers with the
nanoseconds that the tool itself measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

FILES = """
import os, sys, time
began = time.perf_counter_ns()
for n in range(int(sys.argv[1])):
    with open(f'file{n}', 'w') as file: file.write('content')
for n in range(int(sys.argv[1])):
    os.unlink(f'file{n}')
print(time.perf_counter_ns() - began)
"""
CLONE = """
import shutil, subprocess, time
began = time.perf_counter_ns()
subprocess.run(['git', 'clone', '-q', 'source', 'copy'], check=True)
print(time.perf_counter_ns() - began)
shutil.rmtree('copy')
"""
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
Run = Callable[[list[str]], "tuple[int, str]"]


def plain(_folder: str) -> Run:
    def run(command: list[str]) -> tuple[int, str]:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def guard(_folder: str) -> Run:
    import ray_guard

    ray_guard.confine({"egress": {"allow": []}})

    def run(command: list[str]) -> tuple[int, str]:
        with ray_guard.tool_call("bash", {}):
            done = ray_guard.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def sandlock(folder: str) -> Run:
    from sandlock import Sandbox

    def run(command: list[str]) -> tuple[int, str]:
        result = Sandbox(fs_readable=["/"], fs_writable=[folder, "/dev/null"], cwd=folder).run(command)
        output = result.stdout
        return int(result.exit_code), output.decode() if isinstance(output, bytes) else str(output)

    return run


def main() -> None:
    kind, folder = sys.argv[1:]
    os.chdir(folder)
    run = {"plain": plain, "guard": guard, "sandlock": sandlock}[kind](folder)
    for line in sys.stdin:
        what, *words = line.split()
        if what == "try":
            status, _ = run(["/bin/sh", "-c", f"echo x > {words[0]}"])
            print(status)
        else:
            program = {"files": FILES, "clone": CLONE}[what]
            status, output = run([PYTHON, "-I", "-S", "-c", program, *words])
            if status != 0:
                raise SystemExit(f"{kind}: {what} ended with {status}: {output}")
            print(int(output))
        sys.stdout.flush()


if __name__ == "__main__":
    main()

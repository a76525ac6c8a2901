"""A supervisor that a command has just started: what of its starter is left in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness import ROOT, wait

pytestmark = pytest.mark.kernel

COMMAND = str(Path(sys.executable).with_name("ray-guard"))
SECRET = "c0ffee-not-for-the-supervisor"
FORKED = b"ray_guard.supervisor"
SPAWNED = os.fsencode(sys.executable) + b"\0-S\0-E\0-c\0"


def supervisors() -> set[int]:
    """Pids; their zygotes and leaders have the same command line."""
    found = set()
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and Path(f"/proc/{name}/cmdline").read_bytes().startswith((FORKED, SPAWNED)):
                found.add(int(name))
    return {pid for pid in found if parent(pid) not in found}


def parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@contextmanager
def started(folder: Path, *argv: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command that runs a tool under a supervisor of its own, and that supervisor."""
    if ROOT:
        argv = ("unshare", "--mount", *argv)  # nobody's supervisor is found from there
    else:
        with suppress(AssertionError):
            wait(lambda: not supervisors(), "one that nobody needs any more leaves", 10)
        if supervisors():
            pytest.skip("an ordinary user has one supervisor, and others of these tests use it")
    before = supervisors()
    (folder / "policy.yaml").write_text("version: 1\negress: {allow: []}\n")
    # A variable that alters how Python or the loader works makes it spawned; Ray leaves such behind.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
    environment = {**plain, "RAY_GUARD_EVIDENCE": str(folder / "evidence"), "A_SECRET": SECRET, **variables}
    reader, writer = os.pipe()  # what the command has open the supervisor must not keep
    command = [*argv, "run", "--policy", "policy.yaml", "--", "sh", "-c", "echo started; exec sleep 30"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, pass_fds=[writer])
    os.close(writer)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        (supervisor,) = supervisors() - before
        yield process, supervisor
    finally:
        process.terminate()
        process.wait(10)
        assert os.read(reader, 1) == b""
        os.close(reader)
        process.stdout.close()


def status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def held(pid: int) -> set[str]:
    """What it has open."""
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(each))
    return found


@pytest.mark.skipif(not ROOT, reason="a supervisor is not dumpable: only root may look into it")
@pytest.mark.parametrize("how", ["forked", "spawned"])
def test_nothing_of_its_starter_is_left_in_it(tmp_path: Path, how: str) -> None:
    more = {} if how == "forked" else {"PYTHONHASHSEED": "0"}
    with started(tmp_path, COMMAND, **more) as (process, supervisor):
        proc = Path(f"/proc/{supervisor}")
        assert proc.joinpath("cmdline").read_bytes().startswith(FORKED if how == "forked" else SPAWNED)
        assert parent(supervisor) != process.pid
        assert os.getsid(supervisor) == supervisor
        assert proc.joinpath("cwd").readlink() == Path("/")
        for pid in (supervisor, *map(int, proc.joinpath(f"task/{supervisor}/children").read_text().split())):
            assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        own, its = status(process.pid), status(supervisor)
        assert int(own["SigCgt"], 16) & 1 << signal.SIGUSR1 - 1, "the command passes signals on"
        assert not int(its["SigCgt"], 16) & 1 << signal.SIGUSR1 - 1
        assert int(its["SigBlk"], 16) == 0
        pipes = {each for each in held(process.pid) if each.startswith("pipe:")}
        assert pipes
        wait(lambda: not pipes & held(supervisor), "what the command has open stays open there")
    assert wait(lambda: supervisor not in supervisors(), 10), "it ends after its last target"


def test_a_module_that_lies_in_a_tools_way_is_not_loaded(tmp_path: Path) -> None:
    for name in ("logging", "queue", "heapq", "dns"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'a').write(__name__)\n")
    code = f"""
import sys, ray_guard.cli.run
from ray_guard.cli.__main__ import main
sys.path[:0] = [{str(tmp_path)!r}, ""]
main(sys.argv[1:])
"""
    with started(tmp_path, sys.executable, "-c", code):
        time.sleep(0.8)  # its first line is logged by then, with what that loads
    assert not (tmp_path / "loaded").exists()

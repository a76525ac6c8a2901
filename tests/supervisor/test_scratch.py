"""Temporary folders of calls: gone with their call, with their supervisor, or with the next one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Host, Namespace, has_own_supervisors, wait

from ray_guard.kernel import procfs

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


class Hosts:
    """Started one after the other, each with a supervisor of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[tuple[Host, Namespace]] = []

    def add(self, **policy: Any) -> Host:
        namespace = Namespace()
        host = Host({"egress": {"allow": []}, **policy}, self._folder / f"evidence{len(self._made)}", namespace)
        self._made.append((host, namespace))
        return host

    def close(self) -> None:
        for host, namespace in self._made:
            host.close()
            namespace.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


FILL = "mkdir -p $TMPDIR/a/b && echo x > $TMPDIR/a/b/file && ln -s {outside} $TMPDIR/link && echo $TMPDIR"
OPEN = "import builtins; builtins.tool = ray_guard.Popen(['sh', '-c', script + '; sleep 60'], stdout=-1, text=True)\n"
OPEN += "result = builtins.tool.stdout.readline().strip()"


def test_it_is_gone_with_its_call_and_all_with_the_supervisor(base: Path, hosts: Hosts) -> None:
    host = hosts.add()
    folder = Path(host.run("call", ["sh", "-c", FILL.format(outside="/")]).stdout.strip())
    assert folder.parent.parent == base
    wait(lambda: not folder.exists(), "it outlives its call")
    host.close()
    wait(lambda: not os.listdir(base), f"something is left: {os.listdir(base)}", 10)


@pytest.mark.parametrize("within", ["ray_guard.tool_call('keep', {})", "contextlib.nullcontext()"])
def test_it_stays_with_what_a_call_leaves_running(base: Path, hosts: Hosts, within: str) -> None:
    host = hosts.add(survivors="keep")
    code = f"""
import contextlib
with {within}:
    said = ray_guard.run(['sh', '-c', 'sleep 0.7 >/dev/null 2>&1 & echo $TMPDIR'], capture_output=True, text=True)
result = said.stdout.strip()
"""
    folder = Path(host.inside(code))
    time.sleep(0.2)
    assert folder.exists()
    wait(lambda: not folder.exists(), "it outlives what was left running")


@pytest.mark.parametrize("zygote_too", [False, True], ids=["supervisor killed", "both killed"])
def test_what_a_killed_supervisor_has_left_goes(base: Path, hosts: Hosts, tmp_path: Path, zygote_too: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    host = hosts.add()
    folder = Path(host.inside(OPEN, script=FILL.format(outside=outside)))
    assert (folder / "a/b/file").exists(), "positive control: it is there while the call runs"
    zygote = next(pid for pid in procfs.children(host.supervisor) if procfs.children(pid))
    for pid in (zygote, host.supervisor) if zygote_too else (host.supervisor,):
        os.kill(pid, signal.SIGKILL)
    wait(lambda: not host.alive, "the target outlives its supervisor", 10)
    if zygote_too:
        assert folder.exists(), "positive control: nobody was left to take it away"
        os.utime(folder.parent, (0, 0))
        others = [base / "ray_guard.000000000001", base / "ray_guard.0000000000g1", base / "ray_guard.000000000002"]
        others[0].symlink_to(outside)
        for other in others[1:]:
            other.mkdir()
            (other / "file").touch()
        os.utime(others[1], (0, 0))  # a name that we do not give; the next one is too young
        following = hosts.add()
        assert following.run("call", ["true"]).status == 0
        wait(lambda: not folder.exists(), "the next supervisor leaves it", 10)
        time.sleep(0.2)
        assert all((other / "file").exists() for other in others[1:])
        assert others[0].is_symlink()
    wait(lambda: not folder.parent.exists(), "it is left", 10)
    assert (outside / "precious").exists()


def test_what_belongs_to_a_living_supervisor_stays(base: Path, hosts: Hosts) -> None:
    first = hosts.add()
    folder = Path(first.inside(OPEN, script=FILL.format(outside="/")))
    os.utime(folder.parent, (0, 0))
    second = hosts.add()
    assert second.run("call", ["true"]).status == 0
    time.sleep(1.5)  # it looks a second after its first call
    assert (folder / "a/b/file").exists()

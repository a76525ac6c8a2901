"""A process that no signal ends: it sleeps uninterruptibly, in a write to a file system that is frozen."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, Host, Namespace, wait

from ray_guard.kernel import procfs

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not ROOT, reason="missing: root, to mount and freeze")]


class Frozen:
    """A file system in which whoever writes sleeps until :meth:`thaw`."""

    def __init__(self, folder: Path) -> None:
        image, self.place = folder / "image", folder / "frozen"
        self.place.mkdir()
        image.touch()
        os.truncate(image, 16 << 20)
        for argv in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(self.place)]):
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"missing: {argv[0]} of a loop device ({done.stderr.strip()})")
        self._is_frozen = False

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", str(self.place)], check=True)
        self._is_frozen = True

    def thaw(self) -> None:
        if self._is_frozen:
            subprocess.run(["fsfreeze", "--unfreeze", str(self.place)], check=True)
            self._is_frozen = False

    def close(self) -> None:
        self.thaw()
        wait(lambda: subprocess.run(["umount", str(self.place)], capture_output=True).returncode == 0, "still in use")


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Frozen]:
    try:
        made = Frozen(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"missing: {error.filename}")
    try:
        yield made
    finally:
        made.close()


def sleeping(mark: str) -> list[int]:
    """Processes in uninterruptible sleep with that in their command line."""
    found = []
    for pid in procfs.processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            if mark in command and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D":
                found.append(pid)
    return found


def test_it_is_reported_and_its_scope_not_used_again(frozen: Frozen, tmp_path: Path) -> None:
    mark = f"frozen-{secrets.token_hex(4)}"
    script = f"echo x > {frozen.place}/file; : {mark}"
    code = """
import os, time
def leader(pid):
    with open(f'/proc/{pid}/stat') as file: return int(file.read().rpartition(')')[2].split()[1])
with ray_guard.tool_call('stuck', {}):
    tool = ray_guard.Popen(['sh', '-c', f'({script}) & wait'])
    while not sleeps(mark): time.sleep(0.01)
    led = leader(tool.pid)
    began = time.monotonic()
    tool.kill()
    status = tool.wait()
    took = time.monotonic() - began
    try: ray_guard.run(['true']); more = 'started'
    except ray_guard.RayGuardError as error: more = str(error)
with ray_guard.tool_call('next', {}):
    other = ray_guard.Popen(['sleep', '5'])
    next_led = leader(other.pid)
    other.kill()
    other.wait()
result = {'status': status, 'took': took, 'more': more, 'leaders': [led, next_led],
          'violations': [each['kind'] for each in ray_guard.violations()]}
"""
    look = """
import os
def sleeps(mark):
    for name in os.listdir('/proc'):
        if name.isdigit():
            try:
                with open(f'/proc/{name}/cmdline') as file: command = file.read()
                with open(f'/proc/{name}/stat') as file: state = file.read().rpartition(')')[2].split()[0]
            except OSError: continue
            if mark in command and state == 'D': return True
    return False
"""
    namespace = Namespace()
    policy = {"egress": {"allow": []}, "files": {"write": ["cwd", "scratch", str(frozen.place)]}}
    host = Host(policy, tmp_path / "evidence", namespace)
    try:
        assert host.run("call", ["sh", "-c", script]).status == 0, "positive control: the call may write there"
        frozen.freeze()
        said = host.inside(look + code, script=script, mark=mark)
        (stuck,) = sleeping(mark)
        print(f"reported {said['took']:.2f} s after the kill")
        assert said["status"] == -9
        assert 0.9 < said["took"] < 2.5
        assert said["more"].startswith("unkillable: in uninterruptible sleep")
        assert said["violations"] == ["unkillable"]
        assert said["leaders"][0] != said["leaders"][1], "the process that has led it leads again"
        (record,) = [s for s in host.journal() if "ray_guard.process.unkillable" in s["attributes"]]
        assert list(record["attributes"]["ray_guard.process.unkillable"]) == [str(stuck)]
        frozen.thaw()
        wait(lambda: procfs.start_time(stuck) is None or procfs.is_zombie(stuck), "it lives on once it can be killed")
    finally:
        frozen.thaw()
        host.close()
        namespace.close()

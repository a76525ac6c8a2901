"""Device numbers are read from the kernel's own tables, and holders found by them, whatever a path says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from ray_guard.kernel import gpu_devices
from ray_guard.kernel.gpu_devices import Descriptors, nodes
from ray_guard.kernel.gpu_majors import Kind, kind_of, majors, parse_majors

_TABLE = """Character devices:
  1 mem
  5 /dev/tty
195 nvidia-frontend
226 drm
234 nvidia-uvm
235 nvidia-caps
236 nvidia-nvswitch
510 kfd
nonsense

Block devices:
195 nvidia-block
259 blkext
"""


def test_the_table() -> None:
    assert parse_majors(_TABLE) == {
        195: Kind.NVIDIA,
        226: Kind.DRM,
        234: Kind.NVIDIA_CONTROL,
        235: Kind.NVIDIA_CONTROL,
        236: Kind.NVIDIA_CONTROL,
        510: Kind.KFD,
    }
    assert parse_majors("") == {}
    assert parse_majors("Character devices:\n195 something new\n") == {195: Kind.NVIDIA}, "the number is NVIDIA's"


def test_drm_without_a_render_node_is_no_gpu(tmp_path: Path) -> None:
    table, drm = tmp_path / "devices", tmp_path / "drm"
    table.write_text("Character devices:\n226 drm\n")
    assert majors(str(table), str(drm)) == {}
    drm.mkdir()
    (drm / "card0").mkdir()
    assert majors(str(table), str(drm)) == {}
    (drm / "renderD128").mkdir()
    assert majors(str(table), str(drm)) == {226: Kind.DRM}


def test_an_unreadable_table_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        majors(str(tmp_path / "devices"))


@pytest.mark.parametrize(
    ("major", "minor", "kind"),
    [
        (195, 0, Kind.NVIDIA),
        (195, 253, Kind.NVIDIA),
        (195, 254, Kind.NVIDIA_CONTROL),
        (195, 255, Kind.NVIDIA_CONTROL),
        (234, 0, Kind.NVIDIA_CONTROL),
        (226, 128, Kind.DRM),
        (510, 0, Kind.KFD),
        (1, 3, None),
    ],
)
def test_what_a_number_is(major: int, minor: int, kind: Kind | None) -> None:
    assert kind_of(os.makedev(major, minor), parse_majors(_TABLE)) is kind


def test_nodes_are_character_devices(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").write_text("a file")
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").symlink_to("/dev/null")
    (tmp_path / "kfd").symlink_to("/dev/null")
    (tmp_path / "nvidiactl").symlink_to("/dev/null")
    assert [(os.path.basename(node.path), node.kind) for node in nodes(str(tmp_path))] == [
        ("kfd", Kind.KFD),
        ("renderD128", Kind.DRM),
    ]
    assert nodes(str(tmp_path / "missing")) == []


_FULL = os.stat("/dev/full").st_rdev
_STAND_IN = {os.major(_FULL): Kind.NVIDIA}


class Child:
    """A process that opens /dev/full, or lets go of it, when it is told to."""

    def __init__(self, prelude: str = "") -> None:
        program = (
            f"import os, sys\n{prelude}\nheld = []\n"
            "for line in sys.stdin:\n"
            "    held.append(os.open('/dev/full', os.O_RDONLY)) if line[0] == 'o' else os.close(held.pop())\n"
            "    print(flush=True)\n"
        )
        # Not one of the three that every process has may be of the major that stands for a GPU's.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_what_is_opened_and_closed_between_scans_is_seen() -> None:
    descriptors = Descriptors(_STAND_IN)
    with Child() as child:
        pid = child.process.pid
        assert pid not in descriptors.scan()[0]
        for _ in range(3):
            child.tell("open")
            assert descriptors.scan()[0][pid] == {_FULL}
            assert descriptors.scan()[0][pid] == {_FULL}, "remembered while it does not run"
            child.tell("close")
            assert pid not in descriptors.scan()[0]


def test_every_process_has_its_turn() -> None:
    descriptors = Descriptors(_STAND_IN, turns=4)
    with Child() as child:
        descriptors.scan()
        child.tell("open")
        seen = [child.process.pid in descriptors.scan()[0] for _ in range(8)]
        assert any(seen[:4])
        assert seen == sorted(seen), "found once, it stays found"
        with Child("held0 = os.open('/dev/full', os.O_RDONLY); print(flush=True)") as new:
            assert new.process.stdout is not None
            new.process.stdout.readline()
            assert new.process.pid in descriptors.scan()[0], "whoever is new has no turn to wait for"


def test_a_descriptor_that_is_handed_over_is_seen() -> None:
    ours, theirs = socket.socketpair()
    program = (
        "import socket, time; s = socket.socket(fileno=3); kept = socket.recv_fds(s, 1, 1); s.send(b'x'); time.sleep(9)"
    )
    descriptors = Descriptors(_STAND_IN)
    with theirs, ours, open("/dev/full", "rb") as full:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"import os; os.dup2({theirs.fileno()}, 3)\n{program}"],
            pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.pid not in descriptors.scan()[0]
            socket.send_fds(ours, [b"x"], [full.fileno()])
            ours.recv(1)
            assert process.pid in descriptors.scan()[0]
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()


def test_a_process_whose_first_thread_has_ended_still_holds() -> None:
    program = (
        "import ctypes, os, threading, time\n"
        "def hold(): os.open('/dev/full', os.O_RDONLY); print(flush=True); time.sleep(9)\n"
        "threading.Thread(target=hold).start(); time.sleep(0.2); ctypes.CDLL(None).syscall(60, 0)\n"
    )
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.01)
        assert os.listdir(f"/proc/{process.pid}/fd") == [], "this is what there is to see of it"
        assert _FULL in Descriptors(_STAND_IN).scan()[0][process.pid]
    finally:
        process.kill()
        process.communicate()


def test_other_majors_are_passed_over() -> None:
    with Child() as child:
        child.tell("open")
        assert Descriptors({195: Kind.NVIDIA}).scan()[0] == {}
        assert gpu_devices.rendered_by(_FULL) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what a process hides")
def test_whoever_hides_what_it_holds_is_named() -> None:
    hides = "import ctypes; ctypes.CDLL(None).prctl(4, 0)"
    with Child(hides) as child:
        child.tell("open")
        holders, unreadable = Descriptors(_STAND_IN).scan()
        assert child.process.pid in unreadable
        assert child.process.pid not in holders

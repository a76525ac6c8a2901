"""Who is in a tree, and how many processes were born: compared with processes of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray_guard.compute import tree
from ray_guard.kernel import procfs

_PID_MAX = int(Path("/proc/sys/kernel/pid_max").read_text())
_FAMILY = """
import os, sys
born = os.pipe()
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        if os.fork() == 0:
            os.write(born[1], b".")
            os.read(0, 1)
        os.read(0, 1)
        os._exit(0)
zombie = os.fork()
if zombie == 0: os._exit(0)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
for _ in range(int(sys.argv[1])): os.read(born[0], 1)
print('ready', flush=True)
os.read(0, 1)
"""


def test_all_generations_and_zombies_are_members() -> None:
    # More than one page of numbers: the kernel gives them out a page at a time.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _FAMILY, "20"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as family:
        assert family.stdout is not None
        family.stdout.readline()
        members = tree.members(family.pid)
        assert sorted(members) == sorted(set(procfs.descendants(family.pid)))
        family.kill()
    assert len(members) == 41


def test_more_children_than_one_reading_gives() -> None:
    script = "import os\nfor _ in range(900):\n  if os.fork() == 0: os._exit(0)\nprint(1, flush=True)\nos.read(0, 1)"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert len(procfs.children(parent.pid)) == 900
        parent.kill()


def test_births_count_process_numbers_over_the_wrap() -> None:
    said = iter([b"0.1 0.1 0.1 1/100 %d\n" % number for number in (50, 50, 60, _PID_MAX - 5, 305)])
    births = tree.Births(lambda: next(said))
    assert [births.more() for _ in range(4)] == [0, 10, _PID_MAX - 65, 310]


def test_births_see_a_child() -> None:
    births = tree.Births()
    subprocess.run(["true"], check=True)
    assert births.more() >= 1

"""The zygote rehearses a start on itself: what that takes on must not stay with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ray_guard.kernel import landlock

_PROGRAM = """
import json, os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as the zygote has it
os.chdir("/")
os.umask(0o077)
from ray_guard.kernel import borrowing, ipc, landlock, seccomp, syscalls
from ray_guard.egress import rings
from ray_guard.supervisor import domain, embryo, rehearsal, start

def state():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    said = ("Cap", "Seccomp", "NoNewPrivs", "SigBlk", "SigIgn", "Threads")
    kept = {key: status[key].strip() for key in status if key.startswith(said)}
    mask = os.umask(0o077)
    names = [os.readlink(f"/proc/self/ns/{name}") for name in ("ipc", "mnt", "net", "pid", "user")]
    opened = sorted(os.listdir("/proc/self/fd"))
    os.kill(os.getppid(), 0)  # no domain keeps signals in
    return [kept, mask, names, opened, os.getcwd(), os.access("/etc", os.W_OK)]

program = seccomp.encode(rings.call_ring(
    syscalls.MACHINE, landlock=landlock.abi(), borrows=borrowing.works(), own_ipc=ipc.can_be_own(), gpu=False))
system = domain.prepare()
made = start.Start.__new__
before = state()
rehearsal.rehearse(program, system)
after = state()
try:
    os.waitpid(-1, os.WNOHANG)
    children = True
except ChildProcessError:
    children = False
print(json.dumps({"before": before, "after": after, "children": children,
    "read": start.Start.__new__ is not made, "executed": embryo._ignored_signals.cache_info().currsize}))
"""


@pytest.mark.skipif(not landlock.abi(), reason="without Landlock no start gets that far")
def test_a_rehearsal_goes_as_far_as_the_exec_and_leaves_its_process_as_it_was():
    """It reads the start, and gets to the program; capabilities, filter, domain, namespaces, files are as before."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["read"], told["executed"]) == (True, 1)
    assert told["after"] == told["before"]
    assert not told["children"]

"""Whether descriptors of other processes can be taken on this host. Runs in supervisor and zygote.

Docker's and containerd's default profiles refuse pidfd_getfd(2) without CAP_SYS_PTRACE. Where they do, the supervisor
makes every socket of its targets itself (:mod:`ray_guard.egress.made`), and they are filtered accordingly: so this is
asked once, before the zygote is forked, and both go by the same answer.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from ray_guard.kernel import libc
from ray_guard.kernel.trial import Trial


def works() -> bool:
    """Whether a child's descriptor could be taken. Tried once per process; a forked one keeps the answer."""
    return TRIAL.outcome == 0


def _attempt() -> int:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write)
            os.read(read, 1)  # until the parent is done, or gone
        finally:
            os._exit(0)
    try:
        pidfd = os.pidfd_open(pid)
        try:
            taken = libc.pidfd_getfd(pidfd, read)
        finally:
            os.close(pidfd)
    finally:
        os.close(read)
        os.close(write)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0 if taken >= 0 else 1


TRIAL: Final = Trial(_attempt)

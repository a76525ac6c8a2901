"""Whether descriptors of other processes can be taken on this host. Runs in supervisor and zygote.

Docker's and containerd's default profiles refuse pidfd_getfd(2) without CAP_SYS_PTRACE. Where they do, the supervisor
makes every socket of its targets itself (:mod:`ray_guard.egress.made`), and they are filtered accordingly: so this is
asked once, before the zygote is forked, and both go by the same answer.
"""

from __future__ import annotations

import functools
import os
import signal

from ray_guard.kernel import libc


@functools.cache
def works() -> bool:
    """Whether a child's descriptor could be taken. Tried once per process; a forked one keeps the answer."""
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
    except OSError:
        return False
    finally:
        os.close(read)
        os.close(write)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if taken < 0:
        return False
    os.close(taken)
    return True

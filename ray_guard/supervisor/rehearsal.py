"""A start that starts nothing, made in the zygote so that its leaders need not. Runs in the zygote.

A leader is a copy of the zygote, and pays with a page for whatever it is the first to look up, compile or allocate.
What the zygote has done before is there already, in pages that all leaders share: a tenth of a leader's memory.

The start is the real one, of :class:`~ray_guard.supervisor.embryo.Embryo`. What that takes on is its thread's own and
ends with it. It cannot execute anything: nobody answers its notifications, and what it is to execute is no program.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from ray_guard.kernel import seqpacket
from ray_guard.policy.files import LIST, Grant
from ray_guard.supervisor.embryo import Embryo
from ray_guard.supervisor.start import Start


def rehearse(program: bytes, system: Sequence[Grant]) -> None:
    """Goes as far as it can, and leaves nothing behind. What fails here a leader will tell of.

    Args:
        program, system: as a leader gets them.
    """
    with contextlib.suppress(OSError, RuntimeError, seqpacket.BadPacket):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            embryo = Embryo(program, system, (), "")
            if not embryo.announce(theirs):
                return
            try:
                received = seqpacket.receive(ours, socket.MSG_DONTWAIT)  # nothing where it could not be sent
                if received is not None:
                    line, listener = received[1]
                    os.close(listener)  # what is notified from here on fails with ENOSYS
                    _prepare(line)
            finally:
                embryo.await_start(-1)  # nothing may be forked before its thread has gone, which its line's end ends


def _prepare(line: int) -> None:
    start = Start(
        argv=("nothing",),
        executable=os.devnull,
        environment=dict(os.environ),
        umask=0o077,
        group=os.getegid(),
        groups=tuple(sorted(os.getgroups())),
        nice=0,
        limits={},
        affinity=(),
        descriptors=(0, 1, 2),
        terminal=None,
        restore_signals=True,
    )
    view: dict[str, Any] = {
        "layers": [{"system": True, "grants": [("/", LIST)]}],
        "scratch": None,
        "cwd": None,
        "environment": {},
    }
    with contextlib.ExitStack() as stack, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, line) as sock:
        passed = [os.memfd_create("start"), os.memfd_create("view"), os.open("/", os.O_RDONLY | os.O_DIRECTORY)]
        for descriptor in passed:
            stack.callback(os.close, descriptor)
        os.write(passed[0], json.dumps(start._asdict()).encode())
        os.write(passed[1], json.dumps(view).encode())
        seqpacket.send(sock, {"op": "prepare", "joins": False}, [*passed, 0, 1, 2])

"""The witness: does what the zygote does for targets when their supervisor is gone, where the zygote is gone as well.

Runs in the witness, a child of the zygote that never starts anything. It holds what the zygote holds of each target
(:mod:`ray_guard.supervisor.keeping`), so that of two processes that are lost at once none takes with it what a target
has said, nor leaves behind what a target has started. Policy actors are handed over by the zygote alone: with it they
end, as all others.
"""

from __future__ import annotations

import ctypes
import socket
from typing import Final

from ray_guard.kernel import libc, seqpacket
from ray_guard.supervisor.keeping import Keeping

NAME: Final = b"witness"
ALL_DONE: Final = b"\1"
"""The zygote's word when it has seen to everything."""


def run(line: socket.socket, zygote: socket.socket, supervisor: int) -> None:
    """The witness's life.

    Args:
        line: the supervisor's.
        zygote: says :data:`ALL_DONE`, or ends without.
        supervisor: its pid.
    """
    name = ctypes.create_string_buffer(NAME)
    libc.prctl(libc.PR_SET_NAME, ctypes.addressof(name))
    keeping = Keeping()
    while (received := _receive(line)) is not None:
        keeping.obey(*received)
    if zygote.recv(1) == ALL_DONE:
        return
    keeping.unread.shut(supervisor)
    keeping.wards.end()
    keeping.unread.write()


def _receive(line: socket.socket) -> tuple[dict[str, object], list[int]] | None:
    """The supervisor's next word; None: it is gone."""
    while True:
        try:
            return seqpacket.receive(line)
        except seqpacket.BadPacket:
            continue
        except OSError:
            return None

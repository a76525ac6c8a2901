"""The message that a supervisor is about to take in, where others find it should it die over it. Runs in supervisor.

Read from a target's line a message is in nobody's hands but ours until it is journaled. So it is received into memory
that zygote and witness hold too: no further system call is needed, and of a supervisor that is killed they know what it
had read last. Whether it had been journaled by then its log tells.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
from typing import Any, Final

from ray_guard.kernel import seqpacket

_NUMBER: Final = struct.Struct("=q")
_SIZE: Final = _NUMBER.size + seqpacket.PACKET_LIMIT


class Inbox:
    """All lines' own: messages are taken in one after the other."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("ray_guard-inbox", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, _SIZE)
        self._whole = memoryview(mmap.mmap(self._descriptor, _SIZE))
        self._packet = self._whole[_NUMBER.size :]
        self._number = 0

    def fileno(self) -> int:
        return self._descriptor

    def receive(self, line: socket.socket, number: int) -> tuple[dict[str, Any], list[int]] | None:
        """:func:`seqpacket.receive`, without waiting. ``number``: the line's; negative: nobody is to know of it."""
        self._packet[0] = 0  # first: what is here now is of another line
        if number != self._number:
            _NUMBER.pack_into(self._whole, 0, number)
            self._number = number
        return seqpacket.receive_into(line, self._packet, socket.MSG_DONTWAIT)

    def done(self) -> None:
        """The message was taken in."""
        self._packet[0] = 0


def read(descriptor: int) -> tuple[int, dict[str, Any]] | None:
    """Line and message that a supervisor which is gone had not done with; None: there is none."""
    content = os.pread(descriptor, _SIZE, 0)
    if content[_NUMBER.size : _NUMBER.size + 1] != b"{":
        return None
    try:
        message, _ = json.JSONDecoder().raw_decode(content[_NUMBER.size :].decode(errors="replace"))
    except ValueError:
        return None
    return _NUMBER.unpack_from(content)[0], message

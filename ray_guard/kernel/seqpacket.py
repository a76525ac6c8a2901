"""Packets with descriptors between processes of one host: unix(7), SOCK_SEQPACKET, SCM_RIGHTS. Runs everywhere.

One JSON object per packet; descriptors travel beside it. A packet that is cut short, too long or no JSON is an error
that names itself: neither side may guess.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

PACKET_LIMIT: Final = 1 << 17
DESCRIPTOR_LIMIT: Final = 253
"""The kernel's own, SCM_MAX_FD: with less room here a packet that it lets through would arrive cut short."""


# Plain numbers, and an encoder that is kept: a start is a dozen messages, and flags of enum are slow to combine.
_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_CUT: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_ROOM: Final = socket.CMSG_SPACE(4 * DESCRIPTOR_LIMIT)
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


class BadPacket(ValueError):
    """What arrived is no message of ours."""


def send(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = (), flags: int = 0) -> None:
    """Sends one message. Raises OSError (EPIPE, EMSGSIZE …) as sendmsg(2) does."""
    packet = _encode(message).encode()
    if not descriptors:
        sock.send(packet, _NOSIGNAL | flags)
        return
    passed = array.array("i", descriptors)
    sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed.tobytes())], _NOSIGNAL | flags)


def receive(sock: socket.socket, flags: int = 0) -> tuple[dict[str, Any], list[int]] | None:
    """The next message with its descriptors (close-on-exec, now the caller's); None at the end of the connection.

    Raises:
        BadPacket: the packet was no JSON object; its descriptors are closed.
    """
    packet, control, message_flags, _ = _past_reset(sock.recvmsg, PACKET_LIMIT, _ROOM, int(flags) | _CLOEXEC)
    return _taken(packet, control, message_flags)


def receive_into(sock: socket.socket, buffer: memoryview, flags: int = 0) -> tuple[dict[str, Any], list[int]] | None:
    """:func:`receive`, with the packet left in ``buffer``."""
    size, control, message_flags, _ = _past_reset(sock.recvmsg_into, [buffer], _ROOM, int(flags) | _CLOEXEC)
    return _taken(buffer[:size], control, message_flags)


def _past_reset(receive: Callable[..., Any], *arguments: Any) -> Any:
    """Who dies and has not read all itself resets the line: that is said once, before what it had sent."""
    try:
        return receive(*arguments)
    except ConnectionResetError:
        return receive(*arguments)


def _taken(
    packet: bytes | memoryview, control: list[tuple[int, int, bytes]], message_flags: int
) -> tuple[dict[str, Any], list[int]] | None:
    descriptors = _descriptors(control) if control else []
    try:
        if message_flags & _CUT:
            raise BadPacket("a packet was too long")
        if not packet:
            return None
        return decode(packet), descriptors
    except BadPacket:
        close_all(descriptors)
        raise


def decode(packet: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a packet. Raises :class:`BadPacket`."""
    try:
        message = json.loads(str(packet, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadPacket(f"not JSON: {bytes(packet[:60])!r}") from error
    if not isinstance(message, dict):
        raise BadPacket(f"not an object: {bytes(packet[:60])!r}")
    return message


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found += numbers
    return found


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

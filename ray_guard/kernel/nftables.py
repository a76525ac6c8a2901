"""nf_tables over netlink: a table of our own, and what it takes to stop packets by control group. Runs in supervisor.

By netlink rather than by ``nft``: that need not be installed, and a table that a socket *owns* is nobody else's to
change or flush, and is gone with the socket, however its holder ends (NFT_TABLE_F_OWNER, Linux 5.12). Source:
``include/uapi/linux/netfilter/nf_tables.h``, ``nfnetlink.h``; nft(8) for what the expressions mean.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final

_SUBSYSTEM: Final = 10
_BATCH_BEGIN, _BATCH_END, _ERROR = 0x10, 0x11, 2
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE, _NEW_SET, _NEW_ELEMENT, _DELETE_ELEMENT = 0, 3, 6, 9, 12, 14
_REQUEST, _ACKNOWLEDGE, _EXCLUSIVE, _CREATE, _APPEND = 1, 4, 0x200, 0x400, 0x800
_NESTED: Final = 0x8000
_INET: Final = 1  # NFPROTO_INET
_OWNER: Final = 2
_TIMEOUT: Final = 0x10
_OUTPUT: Final = 3  # NF_INET_LOCAL_OUT
_ACCEPT, _DROP, _GOTO = 1, 0, -4
_REGISTER: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_PATIENCE_S: Final = 5.0

GROUP: Final = (46, 8)
"""Key of a set: a control group of version 2, by its inode. The first number says so to nft(8), the second is bytes."""
PORT: Final = (13, 2)
"""Key of a set: a port, the high byte first."""
Message = tuple[int, int, bytes]
"""(type, flags, attributes)."""


def _attribute(number: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)


def _nested(number: int, *inner: bytes) -> bytes:
    return _attribute(number | _NESTED, b"".join(inner))


def _text(number: int, text: str) -> bytes:
    return _attribute(number, text.encode() + b"\0")


def _number(number: int, value: int) -> bytes:
    return _attribute(number, struct.pack(">i" if value < 0 else ">I", value))


# -- expressions -------------------------------------------------------------------------------------------------------


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *attributes))


def _cmp(value: bytes, *, equal: bool = True) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, int(not equal)), _nested(3, _attribute(1, value)))


def _transport(protocol: int, offset: int, size: int) -> bytes:
    """It is of that protocol; loads ``size`` bytes of its header."""
    is_it = _expression("meta", _number(1, _REGISTER), _number(2, 16)) + _cmp(bytes([protocol]))
    return is_it + _expression("payload", _number(1, _REGISTER), _number(2, 2), _number(3, offset), _number(4, size))


def in_group(level: int, groups: str) -> bytes:
    """The sending socket was made in a group that set ``groups`` holds, ``level`` below the hierarchy's root."""
    return _expression("socket", _number(1, 3), _number(2, _REGISTER), _number(3, level)) + _lookup(groups)


def _lookup(name: str) -> bytes:
    return _expression("lookup", _text(1, name), _number(2, _REGISTER))


def off_loopback() -> bytes:
    """It leaves this node."""
    return _expression("meta", _number(1, _REGISTER), _number(2, 9)) + _cmp(struct.pack("=H", 772), equal=False)


def in_connection() -> bytes:
    """It is TCP and does not ask for a connection."""
    asks = _nested(4, _attribute(1, b"\x12")), _nested(5, _attribute(1, b"\0"))
    masked = _expression("bitwise", _number(1, _REGISTER), _number(2, _REGISTER), _number(3, 1), *asks)
    return _transport(socket.IPPROTO_TCP, 13, 1) + masked + _cmp(b"\x02", equal=False)


def to_port(protocol: int, ports: str) -> bytes:
    """It goes to a port that set ``ports`` holds, by that transport protocol (``socket.IPPROTO_…``)."""
    return _transport(protocol, 2, 2) + _lookup(ports)


def _verdict(*code: bytes) -> bytes:
    return _expression("immediate", _number(1, 0), _nested(2, _nested(2, *code)))


def accept() -> bytes:
    return _verdict(_number(1, _ACCEPT))


def drop() -> bytes:
    return _verdict(_number(1, _DROP))


def go_to(chain: str) -> bytes:
    return _verdict(_number(1, _GOTO), _text(2, chain))


# -- the table ---------------------------------------------------------------------------------------------------------


class Table:
    """A table of family inet in this network namespace, and whoever has the socket owns it.

    Changes are made by :meth:`commit`, all of one call or none.

    Raises:
        OSError: EPERM without CAP_NET_ADMIN; EOPNOTSUPP, EPROTONOSUPPORT before Linux 5.12 or without nf_tables.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12)
        try:
            self._socket.settimeout(_PATIENCE_S)
            self._socket.bind((0, 0))
            self.commit([(_NEW_TABLE, _CREATE | _EXCLUSIVE, _text(1, name) + _number(2, _OWNER))])
        except BaseException:
            self._socket.close()
            raise

    def set_of(self, name: str, key: tuple[int, int], number: int) -> Message:
        """A set of keys (GROUP, PORT) for good or for a while. ``number``: none other of the same commit has it."""
        parts = _text(1, self.name), _text(2, name), _number(3, _TIMEOUT), _number(4, key[0]), _number(5, key[1])
        return _NEW_SET, _CREATE, b"".join((*parts, _number(10, number)))

    def chain(self, name: str, *, at_output: bool) -> Message:
        """``at_output``: every packet that leaves this node passes it, else those that are sent there."""
        parts = [_text(1, self.name), _text(3, name)]
        if at_output:
            parts += [_nested(4, _number(1, _OUTPUT), _number(2, 0)), _number(5, _ACCEPT), _text(7, "filter")]
        return _NEW_CHAIN, _CREATE, b"".join(parts)

    def rule(self, chain: str, *expressions: bytes) -> Message:
        """One more, behind those that are there."""
        return (
            _NEW_RULE,
            _CREATE | _APPEND,
            _text(1, self.name) + _text(2, chain) + _nested(4, *expressions),
        )

    def add(self, name: str, keys: Iterable[bytes], *, seconds: int = 0) -> Message:
        """``seconds``: how long they are in it; 0: until they are removed."""
        return _NEW_ELEMENT, _CREATE, self._elements(name, keys, seconds)

    def remove(self, name: str, keys: Iterable[bytes]) -> Message:
        return _DELETE_ELEMENT, 0, self._elements(name, keys)

    def _elements(self, name: str, keys: Iterable[bytes], seconds: int = 0) -> bytes:
        ends = _attribute(4, struct.pack(">Q", 1000 * seconds)) if seconds else b""
        elements = [_nested(1, _nested(1, _attribute(1, key)), ends) for key in keys]
        return _text(1, self.name) + _text(2, name) + _nested(3, *elements)

    def commit(self, messages: Sequence[Message]) -> None:
        """Raises OSError: nothing was changed."""
        first = self._sequence + 1
        packets = [self._packet(_BATCH_BEGIN, 0, b"", 0, _SUBSYSTEM)]
        for kind, flags, attributes in messages:
            packets.append(self._packet(_SUBSYSTEM << 8 | kind, flags | _ACKNOWLEDGE, attributes, _INET, 0))
        packets.append(self._packet(_BATCH_END, 0, b"", 0, _SUBSYSTEM))
        self._socket.send(b"".join(packets))
        awaited = set(range(first + 1, first + 1 + len(messages)))
        failed = 0
        while awaited:
            data = self._socket.recv(1 << 16)
            while data:
                length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if kind == _ERROR and sequence >= first:
                    (code,) = struct.unpack_from("=i", data, _HEADER.size)
                    failed = failed or -code
                    awaited.discard(sequence)
                    if code and sequence not in range(first + 1, first + 1 + len(messages)):
                        awaited.clear()  # the batch itself was refused
                data = data[length + 3 & ~3 :]
        if failed:
            raise OSError(failed, os.strerror(failed), f"nftables {self.name}")

    def _packet(self, kind: int, flags: int, attributes: bytes, family: int, resource: int) -> bytes:
        self._sequence += 1
        body = struct.pack("=BB", family, 0) + struct.pack(">H", resource) + attributes
        return _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0) + body

    def close(self) -> None:
        """Takes the table away."""
        self._socket.close()

"""Decoding ``struct sockaddr``: the bytes a target passed, as one canonical destination. Pure; in the supervisor."""

from __future__ import annotations

import errno
import os
import struct
from functools import lru_cache

from ray_guard.named import NamedTuple
from ray_guard.policy.destination import canonical_packed

AF_UNSPEC, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 0, 1, 2, 10, 16
_UNIX_LENGTH = 110  # sizeof(struct sockaddr_un)
STORAGE = 128
"""sizeof(struct sockaddr_storage): a longer address is EINVAL to the kernel too."""


class BadAddress(Exception):
    """The address cannot be meant; ``errno`` is what the kernel would say."""

    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.errno = error


class Inet(NamedTuple):
    """An IPv4 or IPv6 destination: canonical spelling, so that every disguise of an address is the same value."""

    address: str
    port: int


class Unix(NamedTuple):
    """A unix destination: a path, or None for an abstract or unnamed address; the abstract one's name."""

    path: bytes | None
    name: bytes = b""


class Netlink(NamedTuple):
    port_id: int
    groups: int


class Unspecified(NamedTuple):
    """AF_UNSPEC: connect() dissolves the association."""


Address = Inet | Unix | Netlink | Unspecified


@lru_cache(maxsize=4096)
def decode(raw: bytes) -> Address:
    """What ``raw`` names.

    Raises:
        BadAddress: EINVAL for a truncated address, EAFNOSUPPORT for a family that nobody may reach.
    """
    if len(raw) < 2:
        raise BadAddress(errno.EINVAL)
    (family,) = struct.unpack_from("=H", raw)
    if family == AF_INET:
        if len(raw) < 16:
            raise BadAddress(errno.EINVAL)
        return Inet(canonical_packed(raw[4:8]), raw[2] << 8 | raw[3])
    if family == AF_INET6:
        if len(raw) < 24:
            raise BadAddress(errno.EINVAL)
        return Inet(canonical_packed(raw[8:24]), raw[2] << 8 | raw[3])
    if family == AF_UNIX:
        if len(raw) > _UNIX_LENGTH:
            raise BadAddress(errno.EINVAL)
        path = raw[2:]
        if not path or path[0] == 0:
            return Unix(None, path[1:].rstrip(b"\0"))
        return Unix(path.split(b"\0", 1)[0])
    if family == AF_NETLINK:
        if len(raw) < 12:
            raise BadAddress(errno.EINVAL)
        return Netlink(*struct.unpack_from("=II", raw, 4))
    if family == AF_UNSPEC:
        return Unspecified()
    raise BadAddress(errno.EAFNOSUPPORT)


def encode_path(path: bytes) -> bytes:
    """The unix address of ``path``. Where it is too long the kernel says so."""
    return struct.pack("=H", AF_UNIX) + path + b"\0"


def through_descriptor(descriptor: int) -> bytes:
    """The unix address that reaches the pinned socket ``descriptor``, whatever happens to its path meanwhile."""
    return encode_path(os.fsencode(f"/proc/self/fd/{descriptor}"))

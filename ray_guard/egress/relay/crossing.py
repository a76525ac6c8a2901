"""A crossing: one relayed connection from the decision to its end, and who is told of it. Runs in the supervisor."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ray_guard.egress.relay.leases import Lease
from ray_guard.egress.relay.proxy import Handshake, Proxied
from ray_guard.kernel import libc
from ray_guard.policy.budgets import Account, Exceeded

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate
    from ray_guard.egress.relay.doors import Room

Name = tuple[str, int]
Socket = socket.SocketType
"""The C type under socket.socket: made of a known descriptor it asks the kernel nothing."""
CONNECT_S: Final = 140.0
"""More than the kernel tries: for a proxy that takes the connection and says nothing."""
_UNDER_WAY: Final = (-errno.EINPROGRESS, -errno.EALREADY, -errno.EINTR)


class End(NamedTuple):
    """How a flow ended: bytes ``sent`` and ``received``, ``exact`` or at least so many; and what was spoken."""

    sent: int
    received: int
    exact: bool
    why: str
    """Why it was cut; empty: it ended by itself, or with its scope."""
    protocol: str | None
    verified: bool | None
    """None: no name was to be verified."""
    name: str | None


class Owner(Protocol):
    """Whose flow it is: told what becomes of it."""

    @property
    def account(self) -> Account:
        """The innermost scope that is charged."""

    @property
    def proxied(self) -> Proxied | None:
        """By way of which proxy; None: to the destination itself."""

    @property
    def speech(self) -> Mapping[str, Any]:
        """What may be spoken, for :class:`~ray_guard.egress.relay.speech.choice.Speech`; or, with ``model``, for
        :class:`~ray_guard.egress.relay.model.dialogue.Dialogue`."""

    def relayed(self, crossing: Crossing) -> None:
        """Both ends stand."""

    def failed(self, error: int) -> None:
        """It was never connected."""

    def heard(self, message: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """What is said of a dialogue with a model, as often as there is something to say; a question is answered.
        Of any other: what its first bytes are (``seen``)."""

    def over_budget(self, exceeded: Exceeded) -> None:
        """It wants more than is left, and is cut."""

    def left(self, crossing: Crossing, end: End) -> None:
        """It has ended."""


class Crossing:
    """See the module.

    Args:
        number: what the mover calls it.
        upstream: not connected yet; closed once the mover has it, or nobody.
        cookie: of the target's socket.
        raw: where that was to be connected, a ``sockaddr``.
        holder: (thread, descriptor) in the target.
    """

    __slots__ = (
        *("_handshake", "cookie", "deadline", "failed", "gate", "holder", "lease", "local", "moving"),
        *("number", "owner", "raw", "room", "tool_name", "upstream", "way"),
    )

    def __init__(
        self,
        number: int,
        upstream: socket.socket,
        *,
        cookie: int,
        raw: bytes,
        holder: tuple[int, int],
        owner: Owner,
        gate: Gate,
    ) -> None:
        self.number = number
        self.upstream = upstream
        self.cookie = cookie
        self.raw = raw
        self.holder = holder
        self.owner = owner
        self.gate = gate
        self.way = b""
        """The address of ours that the target's socket was connected to; empty: to none yet."""
        self.room: Room | None = None
        self.tool_name: Name = ("", 0)
        self.local: Name | None = None
        """The upstream connection's own end."""
        self.lease: Lease | None = None
        self.moving = False
        """The mover has it."""
        self.failed = False
        """The upstream will not be; the target's socket is about to learn it."""
        self.deadline = time.monotonic() + CONNECT_S
        """When it is given up, as long as the mover does not have it."""
        self._handshake: Handshake | None = None

    @property
    def family(self) -> int:
        """Of the loopback address that stands for the destination: IPv4 for an IPv4-mapped one."""
        return int(socket.AF_INET if self.mapped else self.raw[0])

    @property
    def mapped(self) -> bool:
        """Whether the destination is an IPv4-mapped IPv6 address."""
        return self.raw[0] == socket.AF_INET6 and self.raw[8:20] == bytes(10) + b"\xff\xff"

    def ask(self) -> int:
        """Begins the upstream connect, or asks how it goes: 0, EINPROGRESS, or why there is none."""
        proxied = self.owner.proxied
        if self.local is None:
            there = self.raw if proxied is None else proxied.address
            result = libc.connect(self.upstream.fileno(), there)
            if result in _UNDER_WAY:
                return errno.EINPROGRESS
            if result not in (0, -errno.EISCONN):
                return -result if proxied is None else errno.ECONNREFUSED
            self.local = plain_name(self.upstream, there[0])
            self._handshake = None if proxied is None else Handshake(proxied)
        return 0 if self._handshake is None else self._handshake.step(self.upstream)


def full_name(sock: Socket, family: int) -> tuple[Any, ...]:
    """The socket's own address. (An object that was told another family reads too little of it.)"""
    same = Socket(family, int(socket.SOCK_STREAM), 0, sock.fileno())
    try:
        name: tuple[Any, ...] = same.getsockname()
        return name
    finally:
        same.detach()


def plain_name(sock: Socket, family: int) -> Name:
    """Address and port of a socket; an IPv4-mapped one as IPv4."""
    host, port = full_name(sock, family)[:2]
    return (host.removeprefix("::ffff:"), port) if "." in host else (host, port)

"""The relay's front: the two connections of a relayed flow, in the right order. Runs in the supervisor.

The upstream comes first, so that the target is told what a direct connect would have told it. Then the target's own
socket is connected to one of ours, in one of two ways:

- *door*: a listener on loopback. Who comes through it is told by the address it comes from: the supervisor has just
  connected the duplicate, so it knows that address; everybody else is reset.
- *waiting room*: where the target does not wait (O_NONBLOCK) and the upstream takes its time, its socket must be seen
  connecting meanwhile. So it is connected to a listener that takes in nothing (a socket filter drops every packet), and
  stays in SYN_SENT. Once the upstream stands, a socket of ours connects *to it* from that listener's port: crossed SYNs
  are a connection (RFC 9293, simultaneous open). Nobody can be connected to the waiting room but by that.

The duplicate of the target's socket is not kept while it waits; whose socket was connected to is asked of the kernel.
What the target can tell: getpeername() gives the relay's own address.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ray_guard.egress import sockaddr
from ray_guard.egress.relay.leases import KINDS, Lease
from ray_guard.egress.relay.proxy import Handshake, Proxied
from ray_guard.kernel import libc, seqpacket
from ray_guard.kernel.seccomp import Notification
from ray_guard.kernel.sock_diag import SO_COOKIE, connection_cookie
from ray_guard.policy.budgets import Account, Exceeded

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Waiting

log = logging.getLogger("ray_guard.relay")

FLOWS_LIMIT: Final = 8192
"""Relayed flows of one supervisor; a connect beyond it fails with ENOBUFS."""
STEPS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
"""Each step of a connect that is made is an edge: connected, then what a proxy answers."""
MOVER_LOST: Final = "mover_lost"
_CONNECT_S: Final = 140.0
"""More than the kernel tries: a proxy that takes the connection and says nothing."""
_JOIN_S: Final = 2.0
"""How long a target's end that was connected may take to come through the door."""
_SO_ATTACH_FILTER, _SO_DOMAIN, _SO_NETNS_COOKIE, _TCP_INFO = 26, 39, 71, socket.TCP_INFO
_DROP: Final = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K: keep 0 bytes
_CLOSED, _SYN_SENT = 7, 2
_PARKED: Final = -1
_DISSOLVE: Final = struct.pack("=H14x", sockaddr.AF_UNSPEC)
_LOOPBACK: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_MAPPED: Final = bytes(10) + b"\xff\xff"
_WILDCARDS: Final = ("0.0.0.0", "::", "::ffff:0.0.0.0")  # noqa: S104 - compared, not bound
_ATTEMPTS: Final = 5

Name = tuple[str, int]
_Socket = socket.SocketType
"""The C type under socket.socket: made of a known descriptor it asks the kernel nothing."""


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
    """Whose flow it is: told what becomes of it, each at most once."""

    @property
    def account(self) -> Account:
        """The innermost scope that is charged."""

    @property
    def proxied(self) -> Proxied | None:
        """By way of which proxy; None: to the destination itself."""

    @property
    def speech(self) -> Mapping[str, Any]:
        """What may be spoken, for :class:`~ray_guard.egress.relay.speech.choice.Speech`."""

    def relayed(self, crossing: Crossing) -> None:
        """Both ends stand."""

    def failed(self, error: int) -> None:
        """It was never connected."""

    def over_budget(self, exceeded: Exceeded) -> None:
        """It wants more than is left, and is cut."""

    def left(self, crossing: Crossing, end: End) -> None:
        """It has ended."""


class Crossing:
    """One relayed connection, from the decision to its end."""

    __slots__ = (
        *("cookie", "deadline", "gate", "handshake", "holder", "lease", "local", "moving"),
        *("number", "owner", "raw", "tool_name", "upstream", "way"),
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
        self.cookie = cookie
        self.raw = raw
        self.holder = holder
        self.owner = owner
        self.upstream = upstream
        """Closed once the mover has it, or nobody."""
        self.way: bytes = b""
        """The address of ours that the target's socket was connected to; empty: to none yet."""
        self.tool_name: Name = ("", 0)
        self.local: Name | None = None
        """The upstream connection's own end."""
        self.lease: Lease | None = None
        self.moving = False
        """The mover has it."""
        self.deadline = time.monotonic() + _CONNECT_S
        """When it is given up, as long as the mover does not have it."""
        self.gate = gate
        self.handshake: Handshake | None = None

    def ask(self) -> int:
        """Begins the upstream connect, or asks how it goes: 0, EINPROGRESS, or why there is none."""
        proxied = self.owner.proxied
        if self.local is None:
            there = self.raw if proxied is None else proxied.address
            result = libc.connect(self.upstream.fileno(), there)
            if result in (-errno.EINPROGRESS, -errno.EALREADY, -errno.EINTR):
                return errno.EINPROGRESS
            if result not in (0, -errno.EISCONN):
                return -result if proxied is None else errno.ECONNREFUSED
            self.local = _name(self.upstream, there)
            self.handshake = None if proxied is None else Handshake(proxied)
        return 0 if self.handshake is None else self.handshake.step(self.upstream)


class _Doors:
    """Our listening sockets of one family, on loopback."""

    def __init__(self, family: int) -> None:
        self.family = family
        self.door = socket.socket(family, socket.SOCK_STREAM)
        self.room = socket.socket(family, socket.SOCK_STREAM)
        self.closed = socket.socket(family, socket.SOCK_STREAM)
        """Bound and not listening: who connects to it is refused."""
        for sock in (self.door, self.room, self.closed):
            sock.setblocking(False)
        self.room.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        code = ctypes.create_string_buffer(_DROP, len(_DROP))
        program = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(code))
        self.room.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        for sock in (self.door, self.room, self.closed):
            sock.bind((_LOOPBACK[socket.AddressFamily(family)], 0))
        self.door.listen(4096)
        self.room.listen(1)
        self.names: tuple[Name, ...] = tuple(sock.getsockname()[:2] for sock in (self.door, self.room, self.closed))

    def raw(self, sock: socket.socket, *, mapped: bool) -> bytes:
        """The address of ``sock`` as a target's socket takes it."""
        host, port = sock.getsockname()[:2]
        packed = socket.inet_pton(self.family, host)
        if self.family == socket.AF_INET and not mapped:
            return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + packed + bytes(8)
        if mapped:
            packed = _MAPPED + packed
        return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + bytes(4)

    def close(self) -> None:
        for sock in (self.door, self.room, self.closed):
            sock.close()


class Relay:
    """All relayed flows of one supervisor.

    Args:
        loop: the supervisor's.
    """

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self.start: Callable[[socket.socket], None] = lambda _line: None
        """Starts a mover at the other end of a line; set by whoever has a zygote."""
        self.opened: Callable[[], None] = lambda: None
        """Called when there are more :meth:`endpoints`."""
        self._doors: dict[int, _Doors] = {}
        self._numbers = itertools.count(1)
        self._crossings: dict[int, Crossing] = {}
        self._by_cookie: dict[int, Crossing] = {}
        self._expected: dict[Name, Crossing] = {}
        self._connecting: set[Crossing] = set()
        self._leases: dict[int, Lease] = {}
        self._lease_of: dict[Account, Lease] = {}
        self._line: socket.socket | None = None
        self._outbox: deque[tuple[dict[str, Any], tuple[socket.socket, ...]]] = deque()
        self._recalling = False
        self._asked: list[dict[str, Any]] = []
        self._sweeping = False

    def endpoints(self) -> frozenset[Name]:
        """Our own listening addresses: nobody's destination."""
        return frozenset(name for doors in self._doors.values() for name in doors.names)

    # -- connecting ----------------------------------------------------------------------------------------------------

    def asked_again(self, sock: _Socket, cookie: int) -> int | None:
        """The errno for a connect on a socket that is relayed already; None: it is not, or not any more."""
        crossing = self._by_cookie.get(cookie)
        if crossing is None:
            return None
        state = _state(sock)
        if state == _SYN_SENT:
            return errno.EALREADY
        if state != _CLOSED:
            return -libc.connect(sock.fileno(), crossing.way) if crossing.way else errno.EALREADY
        if not crossing.way:  # its connect is waiting in another thread
            return errno.EALREADY
        self.dissolve(cookie)
        # Told once how it failed, by the kernel; but not of the address that was asked for, lest it be connected there.
        pair = self._pair(crossing)
        return -libc.connect(sock.fileno(), pair.raw(pair.closed, mapped=_is_mapped(crossing.raw)))

    def dissolve(self, cookie: int) -> None:
        """The target's socket is not connected any more."""
        crossing = self._by_cookie.get(cookie)
        if crossing is not None and not crossing.moving:
            self._give_up(crossing, errno.ECONNABORTED)
        elif crossing is not None:
            del self._by_cookie[cookie]  # its end is told by the mover

    def connect(
        self,
        gate: Gate,
        notification: Notification,
        sock: _Socket,
        raw: bytes,
        *,
        cookie: int,
        owner: Owner,
    ) -> int:
        """Connects a target's socket, by way of ours: the errno to answer with, or that the call is parked."""
        holder = (notification.pid, notification.arg0 & 0xFFFFFFFF)
        try:
            upstream = self._upstream_for(sock, raw, holder, owner.proxied)
        except OSError as failure:
            error = failure.errno or errno.ENETUNREACH
            owner.failed(error)
            return error
        crossing = Crossing(
            next(self._numbers), upstream, cookie=cookie, raw=raw, holder=holder, owner=owner, gate=gate
        )
        self._crossings[crossing.number] = self._by_cookie[cookie] = crossing
        error = crossing.ask()
        if error == errno.EINPROGRESS:
            error = crossing.ask()  # on this host it stands by now
        if error == 0:
            return self._through_the_door(crossing, sock)
        if error != errno.EINPROGRESS:
            return self._give_up(crossing, error)
        if os.get_blocking(sock.fileno()):
            return self._park(notification, crossing, sock)
        return self._into_the_waiting_room(crossing, sock)

    def _upstream_for(
        self, sock: _Socket, raw: bytes, holder: tuple[int, int], proxied: Proxied | None
    ) -> socket.socket:
        """A socket to connect to ``raw`` with, as the target's own would be. Raises OSError where that could not."""
        (family,) = struct.unpack_from("=H", raw)
        if len(self._crossings) >= FLOWS_LIMIT:
            raise OSError(errno.ENOBUFS, "too many relayed flows")
        if sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN) != family:
            raise OSError(errno.EAFNOSUPPORT, "a socket of another family")
        if _state(sock) != _CLOSED:
            raise OSError(errno.EISCONN, "connected already")
        upstream = socket.socket(family if proxied is None else proxied.address[0], socket.SOCK_STREAM)
        try:
            upstream.setblocking(False)
            if _network(sock) != _network(upstream):
                log.warning("a socket of thread %d is of another network namespace", holder[0])
                raise OSError(errno.ENETUNREACH, "a socket of another network namespace")
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound = _full_name(sock, family)
            if (
                bound[0] not in _WILDCARDS and proxied is None
            ):  # whoever chose its own address means the way out; the port is taken by it
                upstream.bind((bound[0], 0, *bound[2:]))
        except OSError:
            upstream.close()
            raise
        return upstream

    def _pair(self, crossing: Crossing) -> _Doors:
        (family,) = struct.unpack_from("=H", crossing.raw)
        family = int(socket.AF_INET if _is_mapped(crossing.raw) else family)
        doors = self._doors.get(family)
        if doors is None:
            doors = self._doors[family] = _Doors(family)
            self._loop.watch(doors.door.fileno(), select.EPOLLIN, lambda _events: self._accept(doors))
            self.opened()
        return doors

    # -- by the door ---------------------------------------------------------------------------------------------------

    def _park(self, notification: Notification, crossing: Crossing, sock: _Socket) -> int:
        duplicate = sock.fileno()

        def step() -> int:
            if crossing.upstream.fileno() < 0:
                return errno.ETIMEDOUT  # given up meanwhile
            error = crossing.ask()
            if error == errno.EINPROGRESS:
                return _PARKED
            if error:
                return self._give_up(crossing, error)
            target = _Socket(int(socket.AF_INET), int(socket.SOCK_STREAM), 0, duplicate)
            try:
                return self._through_the_door(crossing, target)
            finally:
                target.detach()

        def release() -> None:
            if not crossing.way:  # the target is gone, or has waited as long as its socket allows
                self._give_up(crossing, errno.ETIMEDOUT)

        watched = os.dup(crossing.upstream.fileno())
        outcome = crossing.gate.park(notification, watched, duplicate, step, release)
        if outcome != _PARKED:
            os.close(watched)
            release()
        return outcome

    def _through_the_door(self, crossing: Crossing, sock: _Socket) -> int:
        pair = self._pair(crossing)
        way = pair.raw(pair.door, mapped=_is_mapped(crossing.raw))
        for _ in range(_ATTEMPTS):  # an interruption may be a tick meant for somebody else
            result = crossing.gate.connect(sock.fileno(), way)
            if result != -errno.EINTR:
                break
        else:  # our own door is crowded
            sock.shutdown(socket.SHUT_RDWR)
            return self._give_up(crossing, errno.EAGAIN)
        if result not in (0, -errno.EINPROGRESS):
            return self._give_up(crossing, -result)
        crossing.way = way
        crossing.tool_name = _name(sock, crossing.raw)
        crossing.deadline = time.monotonic() + _JOIN_S
        self._expected[crossing.tool_name] = crossing
        self._accept(pair)
        return -result

    def _accept(self, pair: _Doors) -> None:
        while True:
            try:
                accepted, peer = pair.door.accept()
            except OSError:
                return
            crossing = self._expected.pop(peer[:2], None)
            if crossing is None:  # a stranger: reset
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                accepted.close()
            else:
                self._move(crossing, accepted)

    # -- by the waiting room -------------------------------------------------------------------------------------------

    def _into_the_waiting_room(self, crossing: Crossing, sock: _Socket) -> int:
        pair = self._pair(crossing)
        way = pair.raw(pair.room, mapped=_is_mapped(crossing.raw))
        result = libc.connect(sock.fileno(), way)
        if result != -errno.EINPROGRESS:
            return self._give_up(crossing, -result)
        crossing.way = way
        crossing.tool_name = _name(sock, crossing.raw)
        self._loop.watch(crossing.upstream.fileno(), STEPS, lambda _events: self._upstream_ready(crossing))
        return errno.EINPROGRESS

    def _upstream_ready(self, crossing: Crossing) -> None:
        error = crossing.ask()
        if error == errno.EINPROGRESS:
            return
        self._loop.forget(crossing.upstream.fileno())
        if error:
            self._refuse(crossing)
            self._give_up(crossing, error)
            return
        self._meet(crossing)

    def _meet(self, crossing: Crossing) -> None:
        """Connects a socket of ours to the target's, which waits."""
        pair = self._pair(crossing)
        ours = socket.socket(pair.family, socket.SOCK_STREAM)
        ours.setblocking(False)
        try:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            ours.bind(pair.room.getsockname())
        except OSError as error:
            ours.close()
            self._give_up(crossing, error.errno or errno.EADDRINUSE)
            return
        crossing.deadline = time.monotonic() + _JOIN_S

        def step(_events: int = 0) -> None:
            error = ours.connect_ex(crossing.tool_name)
            if error in (errno.EINPROGRESS, errno.EALREADY, errno.EINTR) and time.monotonic() < crossing.deadline:
                return
            self._loop.forget(ours.fileno())
            if error == errno.EISCONN:
                error = 0
            # The target may have closed its socket, and that port may be anybody's by now: whose is it?
            room = pair.room.getsockname()[:2]
            if error == 0 and connection_cookie(pair.family, crossing.tool_name, room) != crossing.cookie:
                error = errno.ECONNABORTED
            if error or crossing.upstream.fileno() < 0:
                ours.close()
                self._give_up(crossing, error or errno.ECONNABORTED)
            else:
                self._move(crossing, ours)

        self._loop.watch(ours.fileno(), select.EPOLLOUT, step)
        step()

    def _refuse(self, crossing: Crossing) -> None:
        """Lets the socket in the waiting room fail: with ECONNREFUSED, however the upstream failed."""
        duplicate = crossing.gate.retake(*crossing.holder)
        if duplicate < 0:
            return  # it fails as any connect that nobody answers
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=duplicate) as sock:
            pair = self._pair(crossing)
            try:
                (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
                if cookie != crossing.cookie or _state(sock) != _SYN_SENT or os.get_blocking(duplicate):
                    return
                libc.connect(duplicate, _DISSOLVE)
                libc.connect(duplicate, pair.raw(pair.closed, mapped=_is_mapped(crossing.raw)))
            except OSError:
                pass

    # ------------------------------------------------------------------------------------------------------------------

    def _give_up(self, crossing: Crossing, error: int) -> int:
        """It will not be; returns ``error``."""
        if self._crossings.pop(crossing.number, None) is not None:
            if self._by_cookie.get(crossing.cookie) is crossing:
                del self._by_cookie[crossing.cookie]
            self._expected.pop(crossing.tool_name, None)
            self._connecting.discard(crossing)
            if crossing.upstream.fileno() >= 0:
                self._loop.forget(crossing.upstream.fileno())
                crossing.upstream.close()
            crossing.owner.failed(error)
        return error

    def _sweep_later(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(_JOIN_S / 2, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        now = time.monotonic()
        for crossing in [each for each in self._connecting if now >= each.deadline]:
            self._give_up(crossing, errno.ETIMEDOUT)
        if self._connecting:
            self._sweep_later()

    # -- the mover -----------------------------------------------------------------------------------------------------

    def _move(self, crossing: Crossing, ours: socket.socket) -> None:
        """Hands both ends to the mover."""
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A target's end that has closed and vanished must not leave its other half standing for ever.
        for option, seconds in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
            ours.setsockopt(socket.IPPROTO_TCP, option, seconds)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        lease = self._lease(crossing.owner.account)
        crossing.lease = lease
        crossing.moving = True
        self._connecting.discard(crossing)
        crossing.owner.relayed(crossing)
        limited = [lease.limited[kind] for kind in KINDS]
        message = {"op": "flow", "flow": crossing.number, "lease": lease.number, "limited": limited}
        self._tell({**message, "speech": crossing.owner.speech}, (ours, crossing.upstream))

    def _lease(self, account: Account) -> Lease:
        lease = self._lease_of.get(account)
        if lease is None:
            lease = self._lease_of[account] = Lease(next(self._numbers), account)
            self._leases[lease.number] = lease
            account.on_close(lambda: self._scope_ended(lease))
        lease.flows += 1
        return lease

    def _scope_ended(self, lease: Lease) -> None:
        for crossing in [each for each in self._crossings.values() if each.lease is lease]:
            self.finish(crossing)
        self._drop(lease)

    def _drop(self, lease: Lease) -> None:
        if lease.flows == 0 and lease.account.closing:
            self._lease_of.pop(lease.account, None)
            self._leases.pop(lease.number, None)

    def _tell(self, message: dict[str, Any], passed: tuple[socket.socket, ...] = ()) -> None:
        if self._line is None:
            self._start_mover()
        self._outbox.append((message, passed))
        if len(self._outbox) == 1:
            self._send()

    def _send(self) -> None:
        while self._outbox and self._line is not None:
            message, passed = self._outbox[0]
            try:
                seqpacket.send(self._line, message, [sock.fileno() for sock in passed])
            except BlockingIOError:
                self._loop.forget(self._line.fileno())
                self._loop.watch(self._line.fileno(), select.EPOLLIN | select.EPOLLOUT, self._line_ready)
                return
            except OSError:
                self._lost()
                return
            self._outbox.popleft()
            for sock in passed:
                sock.close()

    def _start_mover(self) -> None:
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.start(theirs)
        line.setblocking(False)
        self._line = line
        self._loop.watch(line.fileno(), select.EPOLLIN, self._line_ready)

    def _line_ready(self, events: int) -> None:
        line = self._line
        if line is None:
            return
        if events & select.EPOLLOUT:
            self._loop.forget(line.fileno())
            self._loop.watch(line.fileno(), select.EPOLLIN, self._line_ready)
            self._send()
        if events & ~select.EPOLLOUT and self._line is line:
            self._hear(line)

    def _hear(self, line: socket.socket) -> None:
        try:
            received = seqpacket.receive(line)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            self._lost()
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        for number, kind, used, returned in message["books"]:
            lease = self._leases.get(number)
            if lease is not None:
                lease.settle(kind, used, returned)
        operation = message["op"]
        if operation == "need":
            self._needed(message)
        elif operation == "ended":
            self._over(message)
        elif operation == "recalled":
            self._recalling = False
            asked, self._asked = self._asked, []
            for each in asked:
                self._needed(each, recalled=True)

    def _needed(self, message: dict[str, Any], *, recalled: bool = False) -> None:
        lease, kind, need = self._leases.get(message["lease"]), message["kind"], message["need"]
        if lease is None:
            return
        answer = {"op": "grant", "lease": lease.number, "kind": kind, "amount": 0}
        took = lease.take(kind, need, message["wish"])
        if isinstance(took, int):
            self._tell({**answer, "amount": took})
        elif not recalled and any(other.out[each] for other in self._leases.values() for each in KINDS):
            # What others hold and do not need now may be room for this one.
            self._asked.append(message)
            if not self._recalling:
                self._recalling = True
                self._tell({"op": "recall"})
        else:
            lease.exceeded = took
            self._tell({**answer, "op": "spent"})

    def _over(self, message: dict[str, Any]) -> None:
        crossing = self._crossings.get(message["flow"])
        if crossing is not None:
            if message["why"] == "budget" and crossing.lease is not None and crossing.lease.exceeded is not None:
                crossing.owner.over_budget(crossing.lease.exceeded)
            why = "" if message["why"] == "ended" else message["why"]
            found = [message.get(each) for each in ("protocol", "verified", "name")]
            self._gone(crossing, End(message["sent"], message["received"], True, why, *found))

    def _gone(self, crossing: Crossing, end: End) -> None:
        del self._crossings[crossing.number]
        if self._by_cookie.get(crossing.cookie) is crossing:
            del self._by_cookie[crossing.cookie]
        if crossing.lease is not None:
            crossing.lease.flows -= 1
            self._drop(crossing.lease)
        crossing.owner.left(crossing, end)

    def finish(self, crossing: Crossing) -> None:
        """Its scope has ended: what was on its way still goes out, within half a second."""
        if crossing.moving:
            self._tell({"op": "finish", "flow": crossing.number})
        else:
            self._give_up(crossing, errno.ECANCELED)

    def _lost(self) -> None:
        """The mover has died, and all flows with it. What it had been granted counts as used."""
        line, self._line = self._line, None
        if line is None:
            return
        log.error("the mover is gone, and %d flows with it", len(self._crossings))
        self._loop.forget(line.fileno())
        line.close()
        for _, passed in self._outbox:
            for sock in passed:
                sock.close()
        self._outbox.clear()
        self._recalling = False
        self._asked.clear()
        for lease in self._leases.values():
            lease.lost()
        for crossing in [each for each in self._crossings.values() if each.moving]:
            self._gone(crossing, End(0, 0, False, MOVER_LOST, None, None, None))

    def close(self) -> None:
        """The supervisor ends: the mover, and with it all flows, does too."""
        if self._line is not None:
            self._loop.forget(self._line.fileno())
            self._line.close()
            self._line = None
        for doors in self._doors.values():
            self._loop.forget(doors.door.fileno())
            doors.close()
        self._doors.clear()


def _is_mapped(raw: bytes) -> bool:
    return raw[0] == socket.AF_INET6 and raw[8:20] == _MAPPED


def _state(sock: _Socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0]


def _network(sock: _Socket) -> bytes:
    """Which network namespace the socket is of; empty before Linux 5.14, which does not say."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return b""


def _full_name(sock: _Socket, family: int) -> tuple[Any, ...]:
    """The socket's own address. (An object that was told another family reads too little of it.)"""
    same = _Socket(family, int(socket.SOCK_STREAM), 0, sock.fileno())
    try:
        name: tuple[Any, ...] = same.getsockname()
        return name
    finally:
        same.detach()


def _name(sock: _Socket, raw: bytes) -> Name:
    """Address and port of a socket that was asked to connect to ``raw``; an IPv4-mapped one as IPv4."""
    host, port = _full_name(sock, raw[0])[:2]
    return (host.removeprefix("::ffff:"), port) if "." in host else (host, port)

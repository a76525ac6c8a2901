"""The relay's front: the two connections of a relayed flow, in the right order. Runs in the supervisor.

The upstream comes first, so that the target is told what a direct connect would have told it. Then the target's own
socket is connected to one of ours (:mod:`ray_guard.egress.relay.doors`), in one of two ways:

- by the *door*, a listener on loopback. Who comes through it is told by the address it comes from: the supervisor has
  just connected the duplicate, so it knows that address; everybody else is reset;
- by a *waiting room*, where the target does not wait (O_NONBLOCK) and the upstream takes its time: its socket must be
  seen connecting meanwhile.

The duplicate of the target's socket is not kept while it waits there; whose socket was met is asked of the kernel. What
the target can tell: getpeername() gives our address.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ray_guard.egress.relay import STEPS
from ray_guard.egress.relay.crossing import Crossing, Name, Owner, Socket, full_name, plain_name
from ray_guard.egress.relay.desk import Desk
from ray_guard.egress.relay.doors import Door, Meeting, Room, reject
from ray_guard.egress.relay.proxy import Proxied
from ray_guard.kernel.seccomp import Notification
from ray_guard.log import logger

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Waiting

log = logger("ray_guard.relay")

FLOWS_LIMIT: Final = 8192
"""Relayed flows of one supervisor; a connect beyond it fails with ENOBUFS."""
_NEAR_S: Final = 0.005
"""How long a caller that does not wait is kept all the same: what is near has answered by then, and needs no room."""
_JOIN_S: Final = 2.0
"""How long a target's end that was connected may take to come through the door."""
_SWEEP_S: Final = 1.0
_ATTEMPTS: Final = 5
_SO_DOMAIN, _SO_NETNS_COOKIE = 39, 71
_SYN_SENT, _CLOSED = 2, 7
_WILDCARDS: Final = ("0.0.0.0", "::", "::ffff:0.0.0.0")  # noqa: S104 - compared, not bound


class Relay:
    """All relayed flows of one supervisor.

    Args:
        loop: the supervisor's.
        parked: what the gate calls a call that is waited for.
    """

    def __init__(self, loop: Waiting, parked: int) -> None:
        self._loop = loop
        self._parked = parked
        self.start: Callable[[socket.socket], None] = lambda _line: None
        """Starts a mover at the other end of a line; set by whoever has a zygote."""
        self.opened: Callable[[], None] = lambda: None
        """Called when there are more :meth:`endpoints`."""
        self.led: Callable[[int], None] = lambda _port: None
        """Called before the socket of a target is led to a port on loopback that is none of :meth:`ports`."""
        self._desk = Desk(loop, lambda line: self.start(line), self._forget)  # noqa: PLW0108 - it is set later
        self._doors: dict[int, Door] = {}
        self._numbers = itertools.count(1)
        self._by_cookie: dict[int, Crossing] = {}
        self._connecting: set[Crossing] = set()
        self._expected: dict[Name, Crossing] = {}
        self._count = 0
        self._sweeping = False

    def endpoints(self) -> frozenset[Name]:
        """Our own listening addresses: nobody's destination."""
        return frozenset(door.name() for door in self._doors.values())

    def ports(self) -> frozenset[int]:
        """Where sockets of targets are led to for good: these, and those where every connect is refused."""
        return frozenset(port for door in self._doors.values() for port in door.ports())

    # -- connecting ----------------------------------------------------------------------------------------------------

    def asked_again(self, sock: Socket, cookie: int) -> int | None:
        """The errno for a connect on a socket that is relayed already; None: it is not, or not any more."""
        crossing = self._by_cookie.get(cookie)
        if crossing is None:
            return None
        state = _state(sock)
        if state == _SYN_SENT or not crossing.way:  # it waits; or its connect does, in another thread
            return errno.EALREADY
        if state != _CLOSED:
            return -crossing.gate.connect(sock.fileno(), crossing.way)
        self.dissolve(cookie)
        # Told once how it failed, by the kernel; but not of the address that was asked for, lest it be connected there.
        return -crossing.gate.connect(sock.fileno(), self._door(crossing).closed(mapped=crossing.mapped))

    def dissolve(self, cookie: int) -> None:
        """The target's socket is not connected any more."""
        crossing = self._by_cookie.pop(cookie, None)
        if crossing is not None and not crossing.moving:
            self._give_up(crossing, errno.ECONNABORTED)

    def finish(self, crossing: Crossing) -> None:
        """Its scope has ended: what was on its way still goes out, within half a second."""
        self._desk.finish(crossing)

    def connect(
        self, gate: Gate, notification: Notification, sock: Socket, raw: bytes, *, cookie: int, owner: Owner
    ) -> int:
        """Connects a target's socket, by way of ours: the errno to answer with, or that the call is parked."""
        holder = (notification.pid, notification.arg0 & 0xFFFFFFFF)
        try:
            upstream = self._upstream_for(sock, raw, holder, owner.proxied)
        except OSError as failure:
            error = failure.errno or errno.ENETUNREACH
            owner.failed(error)
            return error
        number = next(self._numbers)
        crossing = Crossing(number, upstream, cookie=cookie, raw=raw, holder=holder, owner=owner, gate=gate)
        self._by_cookie[cookie] = crossing
        self._connecting.add(crossing)
        self._count += 1
        self._sweep_later()
        error = crossing.ask()
        if error == errno.EINPROGRESS:
            error = crossing.ask()  # on this host it stands by now
        if error == errno.EINPROGRESS:
            return self._park(notification, crossing, sock)
        return self._give_up(crossing, error) if error else self._through_the_door(crossing, sock)

    def _upstream_for(
        self, sock: Socket, raw: bytes, holder: tuple[int, int], proxied: Proxied | None
    ) -> socket.socket:
        """A socket to connect to ``raw`` with, as the target's own would be. Raises OSError where that could not."""
        (family,) = struct.unpack_from("=H", raw)
        if self._count >= FLOWS_LIMIT:
            raise OSError(errno.ENOBUFS, "too many relayed flows")
        if sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN) != family:
            raise OSError(errno.EAFNOSUPPORT, "a socket of another family")
        state = _state(sock)
        if state != _CLOSED:
            raise OSError(errno.EALREADY if state == _SYN_SENT else errno.EISCONN, "connected already")
        upstream = socket.socket(family if proxied is None else proxied.address[0], socket.SOCK_STREAM)
        try:
            upstream.setblocking(False)
            if _network(sock) != _network(upstream):
                log.warning("a socket of thread %d is of another network namespace", holder[0])
                raise OSError(errno.ENETUNREACH, "a socket of another network namespace")
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound = full_name(sock, family)
            if bound[0] not in _WILDCARDS and proxied is None:
                # Whoever chose its own address means the way out. The port is taken, by that socket itself.
                upstream.bind((bound[0], 0, *bound[2:]))
        except OSError:
            upstream.close()
            raise
        return upstream

    def _park(self, notification: Notification, crossing: Crossing, sock: Socket) -> int:
        """Waits for the upstream: as long as the target does, which is not long where it means not to."""
        duplicate = sock.fileno()
        patient = os.get_blocking(duplicate)
        room_at = time.monotonic() + _NEAR_S

        def step() -> int:
            if crossing.upstream.fileno() < 0:
                return errno.ETIMEDOUT  # given up meanwhile
            error = crossing.ask()
            if error == errno.EINPROGRESS and (patient or time.monotonic() < room_at):
                return self._parked
            if error not in (0, errno.EINPROGRESS):
                return self._give_up(crossing, error)
            target = Socket(int(socket.AF_INET), int(socket.SOCK_STREAM), 0, duplicate)
            try:
                enter = self._into_a_room if error else self._through_the_door
                return enter(crossing, target)
            finally:
                target.detach()

        def release() -> None:
            if not crossing.way:  # the target is gone, or has waited as long as its socket allows
                self._give_up(crossing, errno.ETIMEDOUT)

        watched = os.dup(crossing.upstream.fileno())
        outcome = crossing.gate.park(notification, (watched, duplicate), step, release)
        if outcome != self._parked:
            os.close(watched)
            release()
        elif not patient:
            self._loop.later(_NEAR_S, lambda: crossing.gate.nudge(notification))
        return outcome

    # -- by the door ---------------------------------------------------------------------------------------------------

    def _door(self, crossing: Crossing) -> Door:
        door = self._doors.get(crossing.family)
        if door is None:
            door = self._doors[crossing.family] = Door(crossing.family)
            self._loop.watch(door.fileno(), select.EPOLLIN, lambda _events: self._accept(door))
            self.opened()
        return door

    def _through_the_door(self, crossing: Crossing, sock: Socket) -> int:
        door = self._door(crossing)
        way = door.address(mapped=crossing.mapped)
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
        crossing.tool_name = plain_name(sock, crossing.raw[0])
        crossing.deadline = time.monotonic() + _JOIN_S
        self._expected[crossing.tool_name] = crossing
        self._accept(door)
        return -result

    def _accept(self, door: Door) -> None:
        while (came := door.accept()) is not None:
            accepted, peer = came
            crossing = self._expected.pop(peer, None)
            if crossing is None:
                reject(accepted)
            else:
                self._move(crossing, accepted)

    # -- by a waiting room ---------------------------------------------------------------------------------------------

    def _into_a_room(self, crossing: Crossing, sock: Socket) -> int:
        try:
            room = crossing.room = Room(crossing.family)
            self.led(room.port())
        except OSError as error:
            return self._give_up(crossing, error.errno or errno.ENOBUFS)
        way = room.address(mapped=crossing.mapped)
        result = crossing.gate.connect(sock.fileno(), way)
        if result != -errno.EINPROGRESS:
            return self._give_up(crossing, -result)
        crossing.way = way
        crossing.tool_name = plain_name(sock, crossing.raw[0])
        self._loop.watch(crossing.upstream.fileno(), STEPS, lambda _events: self._upstream_ready(crossing, room))
        self._upstream_ready(crossing, room)  # it may have been ready just before it was watched
        return errno.EINPROGRESS

    def _upstream_ready(self, crossing: Crossing, room: Room) -> None:
        error = crossing.ask() if crossing.upstream.fileno() >= 0 else errno.EINPROGRESS
        if error == errno.EINPROGRESS:
            return
        self._loop.forget(crossing.upstream.fileno())
        if error:
            self._fail(crossing, error)
            return
        try:
            meeting = room.meet(crossing.tool_name, crossing.cookie)
        except OSError as failure:
            self._give_up(crossing, failure.errno or errno.EADDRINUSE)
            return
        crossing.deadline = time.monotonic() + _JOIN_S
        self._loop.watch(meeting.ours.fileno(), select.EPOLLOUT, lambda _events: self._meet(crossing, meeting))
        self._meet(crossing, meeting)

    def _meet(self, crossing: Crossing, meeting: Meeting) -> None:
        error = meeting.step()
        if error == errno.EINPROGRESS and time.monotonic() < crossing.deadline:
            return
        self._loop.forget(meeting.ours.fileno())
        if error or crossing.upstream.fileno() < 0:
            meeting.ours.close()
            self._give_up(crossing, error or errno.ECONNABORTED)
        else:
            self._move(crossing, meeting.ours)

    def _fail(self, crossing: Crossing, error: int) -> None:
        """There is no upstream: the socket in the waiting room learns it when it sends its SYN again."""
        crossing.failed = True
        self._leave_connecting(crossing)
        self._connecting.add(crossing)  # so that it is forgotten in the end
        crossing.owner.failed(error)

    # ------------------------------------------------------------------------------------------------------------------

    def _move(self, crossing: Crossing, ours: socket.socket) -> None:
        """Both ends stand."""
        if crossing.owner.account.closing:  # its scope has ended meanwhile
            reject(ours)
            self._give_up(crossing, errno.ECANCELED)
            return
        self._connecting.discard(crossing)
        self._desk.move(crossing, ours)
        self._close_room(crossing)

    def _give_up(self, crossing: Crossing, error: int) -> int:
        """It will not be; returns ``error``."""
        if self._by_cookie.get(crossing.cookie) is crossing:
            del self._by_cookie[crossing.cookie]
        if crossing in self._connecting:
            self._leave_connecting(crossing)
            if not crossing.failed:
                crossing.owner.failed(error)
        return error

    def _leave_connecting(self, crossing: Crossing) -> None:
        self._connecting.discard(crossing)
        self._expected.pop(crossing.tool_name, None)
        self._close_room(crossing)
        if crossing.upstream.fileno() >= 0:
            self._loop.forget(crossing.upstream.fileno())
            crossing.upstream.close()
            self._count -= 1

    @staticmethod
    def _close_room(crossing: Crossing) -> None:
        if crossing.room is not None:
            crossing.room.close()
            crossing.room = None

    def _forget(self, crossing: Crossing) -> None:
        """A flow has ended."""
        self._count -= 1
        if self._by_cookie.get(crossing.cookie) is crossing:
            del self._by_cookie[crossing.cookie]

    def _sweep_later(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Gives up what takes too long, and what nobody waits for any more."""
        self._sweeping = False
        now = time.monotonic()
        for crossing in list(self._connecting):
            if now >= crossing.deadline or crossing.gate.closed:
                self._give_up(crossing, errno.ETIMEDOUT)
        if self._connecting:
            self._sweep_later()

    def close(self) -> None:
        """The supervisor ends: all flows do too."""
        self._desk.close()
        for door in self._doors.values():
            self._loop.forget(door.fileno())
            door.close()
        self._doors.clear()


def _state(sock: Socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _network(sock: Socket) -> bytes:
    """Which network namespace the socket is of; empty before Linux 5.14, which does not say."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return b""

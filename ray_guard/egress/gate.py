"""The gate: decode a notified call, have it judged, act on the supervisor's own copy, answer. Runs in the supervisor.

One :class:`Gate` per listener. It holds no policy and writes no record: the :class:`Judge` behind it decides, accounts
and journals before anything is done on the target's behalf. Nothing a target passes can raise out of here.

Things that do not work, and what is done instead:

- answering CONTINUE to a call that carries a destination: its memory can change after the check;
- toggling O_NONBLOCK for the wait: it belongs to the file description that the target shares. A blocking connect is
  begun under an interval timer instead: interrupted, it goes on in the background and is awaited by epoll;
- keeping the duplicate of a socket: it would suppress the FIN of the target's close;
- reading SO_ERROR to learn how a connect went: it clears the error. connect() is asked a second time.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import functools
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakSet

from ray_guard.egress import sockaddr
from ray_guard.egress.made import MadeSockets
from ray_guard.egress.relay import STEPS
from ray_guard.egress.threads import Threads
from ray_guard.kernel import borrowing, libc, procfs
from ray_guard.kernel.seccomp import Listener, Notification
from ray_guard.kernel.seqpacket import DESCRIPTOR_LIMIT
from ray_guard.kernel.sock_diag import SO_COOKIE, unix_file
from ray_guard.kernel.syscalls import NUMBERS
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.decide import Operation
from ray_guard.policy.destination import Transport

if TYPE_CHECKING:
    from ray_guard.egress.relay.crossing import Owner
    from ray_guard.egress.relay.datagrams import Datagrams
    from ray_guard.egress.relay.datagrams import Owner as DatagramOwner
    from ray_guard.egress.relay.front import Relay

log = logger("ray_guard.gate")

_NONBLOCK, _CLOEXEC, _TYPE = 0o4000, 0o2000000, 0xF
_MSG_DONTWAIT, _MSG_NOSIGNAL, _MSG_ZEROCOPY, _MSG_FASTOPEN = 0x40, 0x4000, 0x4000000, 0x20000000
_STREAM, _SEQPACKET = 1, 5
_CONNECTION_ORIENTED = (_STREAM, _SEQPACKET)
"""Socket types that ignore an address given to send: it must not be judged as a destination either."""
_Socket = socket.SocketType
"""The C type under socket.socket: made of a known descriptor it asks the kernel nothing."""
_AF_INET, _SOCK_STREAM, _SOL_SOCKET, _SO_TYPE = (
    int(socket.AF_INET),
    int(socket.SOCK_STREAM),
    socket.SOL_SOCKET,
    socket.SO_TYPE,
)
_EPOLLIN: Final = int(select.EPOLLIN)
_CONNECT: Final = NUMBERS["connect"]
_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_PARKED: Final = -1
"""Outcome of a call that is waited for: the duplicate is kept until then."""
_UNANSWERED: Final = -2
"""Outcome of a call that needs no answer here: it has one, or will be asked again."""
_INTERRUPTED: Final = -errno.EINTR
_BEGUN: Final = frozenset({0, -errno.EINPROGRESS, _INTERRUPTED})
_STANDING: Final = _BEGUN | {-errno.EALREADY, -errno.EISCONN}
_PATIENCE_S: Final = 0.002
"""How long a blocking call may hold up the supervisor before it is interrupted and awaited."""
_REST_S: Final = 0.05
_ASK_AGAIN_S: Final = 0.01
_PENDING_LIMIT: Final = 1024
_PAYLOAD_LIMIT: Final = 1 << 20
_ENTRIES_LIMIT: Final = 1024


class Attempt(Protocol):
    """A granted connect, while it is being made."""

    def connected(self, cookie: int, holder: tuple[int, int]) -> None:
        """TCP: it was made or, nonblocking, begun. ``holder``: (thread, descriptor) in the target."""

    def associated(self, local: tuple[str, int] | None) -> None:
        """A datagram socket: its sends without an address go there from now on."""

    def failed(self, error: int) -> None: ...


class NameServer(Protocol):
    """The guard's own, to which one socket is led in place of the name server it asked for."""

    def address(self, raw: bytes, *, stream: bool) -> bytes:
        """The ``sockaddr`` to use in place of ``raw``. Raises BadAddress."""

    def expect(self, source: tuple[str, int], *, stream: bool) -> None:
        """The socket's own address, from which its queries will come."""

    def line(self) -> socket.socket | None:
        """What is put in the place of a datagram socket that cannot send; None: it can. Raises OSError."""


class Ruling(NamedTuple):
    """The judge's word. ``error`` is 0 where the call is granted, else what the target gets; negative: ask again.

    ``resolver``: not there, but to the guard's own name server. ``mute``: a datagram socket is connected, to learn its
    own address, and never sends again.
    """

    error: int
    attempt: Attempt | None = None
    relayed: Owner | None = None
    """Set where it does not go direct: the connect is made by :class:`~ray_guard.egress.relay.front.Relay`."""
    resolver: NameServer | None = None
    mute: bool = False
    counted: DatagramOwner | None = None
    """Set where datagrams are counted one by one: they go by :class:`~ray_guard.egress.relay.datagrams.Datagrams`."""


class Judge(Protocol):
    """Decides, accounts and journals; the gate does the rest."""

    def rule(
        self,
        operation: Operation,
        transport: Transport,
        tid: int,
        *,
        address: str = "",
        port: int = 0,
        path: str | None = None,
        inode: tuple[int, int] | None = None,
        size: int = 0,
    ) -> Ruling:
        """``path`` None with transport UNIX: abstract or unnamed. ``size``: payload bytes to be sent at once."""

    def again(self, address: sockaddr.Inet, cookie: int, tid: int) -> Attempt | None:
        """Grants a TCP connect that :meth:`rule` has granted before and would grant now; None: ask there."""

    def known_flow(self, cookie: int, address: str, port: int) -> bool:
        """Whether the TCP socket ``cookie`` already has a granted flow to this destination (connect asked again)."""

    def dissolved(self, cookie: int, info: bytes) -> None:
        """The socket was disconnected by AF_UNSPEC; ``info`` is its last ``struct tcp_info``."""

    def may_take(self, name: bytes, tid: int) -> bool:
        """Whether thread ``tid`` may bind the abstract unix address ``name`` (without its NULs)."""

    def make_socket(self, duplicate: int, raw: bytes, tid: int) -> int:
        """bind(2) of a unix socket to a path for thread ``tid``, where it may make one; 0 or ``-errno``."""

    def bound(self, pinned: int) -> None:
        """The target made the unix socket ``pinned`` (O_PATH, now the judge's): its own processes may connect to it."""

    def listening(self, address: str, port: int) -> None:
        """A TCP socket of the target now listens."""

    def counts(self) -> bool:
        """Whether bytes are limited: then no datagram comes in but by way of whoever counts it."""

    def hears(self) -> bool:
        """Whether datagrams may come in at all: the policy grants some to be sent, which are answered."""

    def may_borrow(self, pid: int) -> bool:
        """Whether its processes may read, or take descriptors of, process ``pid`` (policy actors, in their tree)."""

    def fault(self, what: str) -> None:
        """Something could not be judged and was refused."""


class Waiting(Protocol):
    """What the gate needs of the supervisor's loop."""

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None: ...
    def forget(self, descriptor: int) -> None: ...
    def later(self, seconds: float, callback: Callable[[], None]) -> None: ...


class Impatience:
    """Interrupts what blocks, again and again, so that one slow peer holds up nobody else.

    The timer goes on ticking while calls keep coming and stops when there have been none for a while: two system calls
    per connect would cost more than a few needless ticks. One per process, in its main thread.
    """

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._ticking = False
        self._used = False
        signal.signal(signal.SIGALRM, lambda _signal, _frame: None)  # to interrupt is all it does
        signal.siginterrupt(signal.SIGALRM, True)

    def begin(self) -> None:
        """To be called before a call that may block."""
        self._used = True
        if not self._ticking:
            self._ticking = True
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S, _PATIENCE_S)
            self._loop.later(_REST_S, self._rest)

    def end(self) -> None:
        """Before the process ends: the interpreter gives the signal its deadly default back while it still runs."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _rest(self) -> None:
        if self._used:
            self._used = False
            self._loop.later(_REST_S, self._rest)
        else:
            self._ticking = False
            signal.setitimer(signal.ITIMER_REAL, 0)


def deafen(sock: _Socket) -> bool:
    """Nothing that is sent to this socket is ever received: a port to send from is free, one to be called on is not.

    False: it goes on hearing, for this kernel lets no filter be attached without CAP_NET_ADMIN.

    Raises:
        OSError: it could not be done for another reason.
    """
    if sock.getsockopt(_SOL_SOCKET, _SO_LOCK_FILTER):
        return True  # no target may lock one: rings
    nothing = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)  # BPF_RET, of 0 bytes
    try:
        sock.setsockopt(_SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(nothing)))
    except PermissionError:
        return False
    sock.setsockopt(_SOL_SOCKET, _SO_LOCK_FILTER, 1)  # for good: its owner cannot take it off
    return True


def mute_datagram_socket(family: int, protocol: int) -> socket.socket:
    """A datagram socket that can be connected and asked for its address, but can never send; nor hear: :func:`deafen`.

    SEND_SHUTDOWN is checked where the kernel allocates the first fragment of any datagram (``sock_alloc_send_pskb``),
    whatever call, option or address it comes with, and nothing takes it off a UDP socket again: measured for sendto,
    sendmsg, MSG_MORE, UDP_CORK, UDP_SEGMENT, MSG_ZEROCOPY, sendfile, splice, AF_UNSPEC and IPV6_ADDRFORM.
    """
    muted = socket.socket(family, socket.SOCK_DGRAM, protocol)
    try:
        deafen(muted)
        _mute(muted)
    except OSError:
        muted.close()
        raise
    return muted


def _mute(sock: _Socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # said of an unconnected socket, but the flag is set all the same
            raise


class _Views:
    """Socket methods for the duplicate of the moment, which is closed by its number.

    To make a socket object costs a system call; one duplicate after the other gets the same number.
    """

    def __init__(self) -> None:
        self._number = -1
        self._sock: _Socket | None = None

    def of(self, descriptor: int) -> _Socket:
        """Good until the next call, never to be closed. It, or a method of it, raises OSError where it is no socket."""
        sock = self._sock
        if sock is None or descriptor != self._number:
            if sock is not None:
                sock.detach()
            self._sock = None
            sock = self._sock = _Socket(_AF_INET, _SOCK_STREAM, 0, descriptor)
            self._number = descriptor
        return sock


class _Pending(NamedTuple):
    """A call that is waited for on the target's behalf."""

    notification: Notification
    descriptors: tuple[int, ...]
    retry: Callable[[], int]
    deadline: float | None
    late_error: int
    release: Callable[[], None]


class Means:
    """What all gates of one supervisor share."""

    def __init__(self, loop: Waiting) -> None:
        self.loop = loop
        self.impatience = Impatience(loop)
        self.views = _Views()
        self.borrows = borrowing.works()
        self.made: WeakSet[MadeSockets] = WeakSet()
        self.start_mover: Callable[[socket.socket], None] = lambda _line: None
        """Starts a mover of relayed bytes at the other end of a line; set by whoever has a zygote."""
        self.relay_opened: Callable[[], None] = lambda: None
        """Called when the relay listens at more ports; set by whoever must know."""
        self.relaying: Relay | None = None
        """The relay, once anything goes by it."""
        self._datagrams: Datagrams | None = None

    @property
    def relay(self) -> Relay:
        """Made for the first that goes by it: most policies need none, and every cold start would load it."""
        if self.relaying is None:
            from ray_guard.egress.relay.front import Relay

            self.relaying = Relay(self.loop, _PARKED)
            self.relaying.start = self.start_mover
            self.relaying.opened = self.relay_opened
        return self.relaying

    @property
    def datagrams(self) -> Datagrams:
        """Made for the first that is counted, like :attr:`relay`."""
        if self._datagrams is None:
            from ray_guard.egress.relay.datagrams import Datagrams

            self._datagrams = Datagrams(self.loop)
        return self._datagrams

    def threads(self) -> Threads:
        """For one ring: how its descriptors are come by on this host."""
        return Threads() if self.borrows else MadeSockets(self.loop, self.made)


Handler = Callable[["Gate", Notification], None]
NO_HANDLERS: Final[Mapping[str, Handler]] = MappingProxyType({})


class Gate:
    """Answers one listener.

    Args:
        listener: the notifications' descriptor.
        judge: whoever owns the processes behind it.
        means: shared by all gates of one supervisor.
        gone: called once, when the last filtered process has ended.
        more: handlers of calls that are not about egress, by the system call's name. Each gets this gate, to read the
            caller with, and answers the notification itself.
    """

    def __init__(
        self,
        listener: Listener,
        judge: Judge,
        means: Means,
        gone: Callable[[], None],
        more: Mapping[str, Handler] = NO_HANDLERS,
    ) -> None:
        self.listener = listener
        self._judge = judge
        self._loop = means.loop
        self._threads = means.threads()
        self._known_thread = self._threads.known()
        self._made = self._threads if isinstance(self._threads, MadeSockets) else None
        self._impatience = means.impatience
        self._means = means
        self._views = means.views
        self._gone = gone
        self._pending: dict[int, _Pending] = {}
        self._sweeping = False
        by_name: dict[str, Callable[[Notification], None]] = {
            "connect": self._connect,
            "bind": self._bind,
            "listen": self._listen,
            "sendto": self._sendto,
            "sendmsg": self._sendmsg,
            "sendmmsg": self._sendmmsg,
            "socket": self._socket,
            "pidfd_getfd": self._pidfd_getfd,
            "process_vm_readv": self._process_vm,
            "process_vm_writev": self._process_vm,
        }
        self._handlers = {NUMBERS[name]: handler for name, handler in by_name.items() if name in NUMBERS}
        self.hand_over(more)
        self._loop.watch(listener.fd, select.EPOLLIN, self.ready)

    def hand_over(self, more: Mapping[str, Handler]) -> None:
        """From now on these handle the calls of that name: see ``more`` above."""
        handlers = {name: functools.partial(handler, self) for name, handler in more.items()}
        self._handlers |= {NUMBERS[name]: handler for name, handler in handlers.items() if name in NUMBERS}

    def ready(self, events: int) -> None:
        """The loop's callback: one notification, or the end."""
        if not events & _EPOLLIN:
            self.close()
            self._gone()
            return
        notification = self.listener.receive()
        if notification is not None:
            self._handle(notification)

    def _handle(self, notification: Notification) -> None:
        try:
            number = notification.nr
            if number == _CONNECT and self._connect_again(notification):
                return
            handler = self._handlers.get(number)
            if handler is None:
                self.refuse(notification, errno.EPERM)
            else:
                handler(notification)
        except sockaddr.BadAddress as bad:
            self.refuse(notification, bad.errno)
        except Exception as fault:  # fail closed, and live on: other targets depend on this process
            log.exception("notification %d of thread %d", notification.nr, notification.pid)
            self._judge.fault(f"{type(fault).__name__}: {fault}")
            self.refuse(notification, errno.EPERM)

    def close(self) -> None:
        """Lets go of the listener and of everything awaited for it: pending calls then fail with ENOSYS."""
        for pending in list(self._pending.values()):
            self._drop(pending)
        if self.listener.fd >= 0:
            self._loop.forget(self.listener.fd)
            os.close(self.listener.fd)
            self.listener.fd = -1
            self._threads.close()

    # ------------------------------------------------------------------------------------------------------------------
    # reading the target

    def refuse(self, notification: Notification, error: int) -> None:
        self.listener.answer(notification.id, error=error)

    def read(self, notification: Notification, address: int, length: int) -> bytes:
        """``length`` bytes of the caller's memory.

        Raises:
            BadAddress: EFAULT, or the caller is unreadable or gone.
        """
        if length == 0:
            return b""
        data = self._threads.read(notification.pid, address, length)
        if isinstance(data, int):
            if data != -errno.EFAULT:
                self._judge.fault(f"memory of thread {notification.pid} is unreadable: {os.strerror(-data)}")
            raise sockaddr.BadAddress(errno.EFAULT if data == -errno.EFAULT else errno.EPERM)
        if not self.listener.is_valid(notification.id):  # the pid may be another's by now
            raise sockaddr.BadAddress(errno.EPERM)
        return data

    def read_address(self, notification: Notification, pointer: int, length: int) -> bytes:
        length &= 0xFFFFFFFF
        if length > sockaddr.STORAGE:  # negative lengths too
            raise sockaddr.BadAddress(errno.EINVAL)
        return self.read(notification, pointer, length)

    def take(self, notification: Notification, number: int) -> int:
        """A duplicate of the caller's descriptor; the caller of this function closes it."""
        duplicate = self._threads.descriptor(notification.pid, number & 0xFFFFFFFF)
        if duplicate >= 0:
            return duplicate
        if duplicate in (-errno.EBADF, -errno.EISCONN):
            raise sockaddr.BadAddress(-duplicate)
        self._judge.fault(f"descriptors of thread {notification.pid} are unreachable: {os.strerror(-duplicate)}")
        raise sockaddr.BadAddress(errno.EPERM)

    # ------------------------------------------------------------------------------------------------------------------
    # connect

    def _connect(self, notification: Notification) -> None:
        if self._made is not None and self._made.asked_again(notification.pid, notification.arg0 & 0xFFFFFFFF):
            self.listener.answer(notification.id)
            return
        raw = self.read_address(notification, notification.arg1, notification.arg2)
        address = sockaddr.decode(raw)
        duplicate = self.take(notification, notification.arg0)
        outcome = _PARKED
        try:
            if isinstance(address, sockaddr.Unix):
                outcome = self._connect_unix(notification, duplicate, address)
            else:
                sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
                try:
                    outcome = self._connect_socket(notification, sock, raw, address)
                finally:
                    sock.detach()
        except OSError as error:  # not a socket
            outcome = error.errno or errno.EINVAL
        except BaseException:
            os.close(duplicate)
            raise
        if outcome != _PARKED:
            os.close(duplicate)  # first: while it is held, the target's close would send no FIN
            if outcome != _UNANSWERED:
                self.listener.answer(notification.id, error=outcome)

    def _connect_again(self, notification: Notification) -> bool:
        """The short way, for a thread and a TCP destination that were here before; False: nothing was done.

        Most connects of a training job repeat one that was granted, and each step costs all of them.
        """
        call, tid, _, _, _, _, number, pointer, length, _, _, _ = notification
        thread = self._known_thread(tid)
        if thread is None or not 0 < length <= sockaddr.STORAGE:
            return False
        try:
            raw = os.pread(thread.memory, length, pointer)
            address = sockaddr.decode(raw)
        except (OSError, OverflowError, sockaddr.BadAddress):
            return False
        if len(raw) != length or not isinstance(address, sockaddr.Inet):
            return False
        if not self.listener.is_valid(call):
            return True  # the caller is gone
        number &= 0xFFFFFFFF
        duplicate = libc.pidfd_getfd(thread.pidfd, number)
        if duplicate < 0:
            return False
        outcome = _UNANSWERED
        try:
            try:
                sock = self._views.of(duplicate)
                kind = sock.getsockopt(_SOL_SOCKET, _SO_TYPE)
                cookie = int.from_bytes(sock.getsockopt(_SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
            except OSError:  # no socket
                return False
            if kind != _STREAM:
                return False
            attempt = self._judge.again(address, cookie, tid)
            if attempt is None:
                return False
            self._impatience.begin()
            result = libc.connect(duplicate, raw)
            if result == _INTERRUPTED:  # mostly by a tick that was meant for another: then it is made by now
                result = libc.connect(duplicate, raw)
                if result == -errno.EALREADY:
                    result = _INTERRUPTED
            if result in _BEGUN:
                attempt.connected(cookie, (tid, number))
            else:
                attempt.failed(-result)
            outcome = -result if result != _INTERRUPTED else self._await_connect(notification, sock, raw, attempt)
        finally:
            if outcome != _PARKED:
                os.close(duplicate)  # first: while it is held, the target's close would send no FIN
        if outcome != _PARKED:
            self.listener.answer(call, error=outcome)
        return True

    def _connect_socket(self, notification: Notification, sock: _Socket, raw: bytes, address: sockaddr.Address) -> int:
        """The errno to answer with (0: connected), or one of _PARKED and _UNANSWERED."""
        kind = sock.getsockopt(_SOL_SOCKET, _SO_TYPE)
        if not isinstance(address, sockaddr.Inet):
            return self._connect_special(sock, kind, raw, address)
        cookie: int | None = None
        attempt: Attempt | None = None
        if kind == _STREAM:
            cookie = int.from_bytes(sock.getsockopt(_SOL_SOCKET, SO_COOKIE, 8), "little")
            relaying = self._means.relaying
            again = None if relaying is None else relaying.asked_again(sock, cookie)
            if again is not None:
                return again
        if cookie is None or not self._judge.known_flow(cookie, address.address, address.port):
            transport = Transport.UDP if cookie is None else Transport.TCP
            ruling = self._judge.rule(
                Operation.CONNECT, transport, notification.pid, address=address.address, port=address.port
            )
            if ruling.error:
                if ruling.error > 0:
                    return ruling.error
                self._loop.later(_ASK_AGAIN_S, lambda: self._ask_again(notification))
                return _UNANSWERED
            elsewhere = self._connect_elsewhere(notification, sock, raw, ruling, cookie)
            if elsewhere is not None:
                return elsewhere
            attempt = ruling.attempt
        # else: a nonblocking connect asks again how it went
        self._impatience.begin()
        result = libc.connect(sock.fileno(), raw)
        if attempt is not None:
            if result in _BEGUN:
                if cookie is None:
                    attempt.associated(_name(sock))
                else:
                    attempt.connected(cookie, (notification.pid, notification.arg0 & 0xFFFFFFFF))
            else:
                attempt.failed(-result)
        elif cookie is not None and result not in _STANDING:  # it has failed meanwhile: what comes next is a new one
            self._judge.dissolved(cookie, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
        if result == -errno.EINTR:
            return self._await_connect(notification, sock, raw, attempt)
        return -result

    def _connect_elsewhere(
        self, notification: Notification, sock: _Socket, raw: bytes, ruling: Ruling, cookie: int | None
    ) -> int | None:
        """The outcome where the target is connected to the relay or the resolver instead; None: it goes direct."""
        if ruling.relayed is not None and cookie is not None:
            return self._means.relay.connect(self, notification, sock, raw, cookie=cookie, owner=ruling.relayed)
        if ruling.counted is not None:
            return self._means.datagrams.connect(sock, raw, ruling.counted)
        if ruling.resolver is not None:
            return self._connect_resolver(notification, sock, raw, ruling.resolver, stream=cookie is not None)
        if ruling.mute:
            _mute(sock)
        return None

    # what the relay needs of a gate

    def connect(self, descriptor: int, raw: bytes) -> int:
        """connect(2) that is interrupted where it blocks: 0 or ``-errno``."""
        self._impatience.begin()
        return libc.connect(descriptor, raw)

    @property
    def closed(self) -> bool:
        return self.listener.fd < 0

    def park(
        self,
        notification: Notification,
        descriptors: tuple[int, int],
        step: Callable[[], int],
        release: Callable[[], None],
    ) -> int:
        """Parks a connect until the upstream is ready; see :meth:`_wait`. ``descriptors``: that, and the duplicate."""
        sock = _Socket(_AF_INET, _SOCK_STREAM, 0, descriptors[1])
        timeout = _timeout(sock, socket.SO_SNDTIMEO)
        sock.detach()
        late = errno.EINPROGRESS
        return self._wait(
            notification, descriptors, step, events=STEPS, timeout=timeout, late_error=late, release=release
        )

    def nudge(self, notification: Notification) -> None:
        """Tries a parked call again now."""
        pending = self._pending.get(notification.id)
        if pending is not None:
            self._retry(pending)

    def _connect_resolver(
        self, notification: Notification, sock: _Socket, raw: bytes, resolver: NameServer, *, stream: bool
    ) -> int:
        """A connect to a name server, whichever: it reaches the guard's own."""
        line = None if stream else resolver.line()
        if line is not None:
            with line:
                line.setblocking(os.get_blocking(sock.fileno()))
                self.listener.replace_descriptor(notification.id, line.fileno(), notification.arg0 & 0xFFFFFFFF)
            return 0
        there = resolver.address(raw, stream=stream)
        self._impatience.begin()
        result = libc.connect(sock.fileno(), there)
        if result in _BEGUN and (own := _name(sock)) is not None:
            resolver.expect(own, stream=stream)
        return -result if result != -errno.EINTR else self._await_connect(notification, sock, there, None)

    def _await_connect(self, notification: Notification, sock: _Socket, raw: bytes, attempt: Attempt | None) -> int:
        """A blocking connect that takes its time: it goes on in the background, and is asked again when it is done."""
        duplicate = sock.fileno()

        def step() -> int:
            self._impatience.begin()
            result = libc.connect(duplicate, raw)
            if result in (-errno.EINTR, -errno.EALREADY):
                return _PARKED
            if result and attempt is not None:
                attempt.failed(-result)
            return -result

        timeout = _timeout(sock, socket.SO_SNDTIMEO)
        return self._wait(
            notification, (duplicate,), step, events=select.EPOLLOUT, timeout=timeout, late_error=errno.EINPROGRESS
        )

    def _connect_special(self, sock: _Socket, kind: int, raw: bytes, address: sockaddr.Address) -> int:
        if isinstance(address, sockaddr.Netlink):
            if address.port_id:  # the kernel alone, no process
                return errno.EPERM
        elif kind == _STREAM:
            # AF_UNSPEC resets the byte counts of a TCP socket: they are settled first, after sending has ended.
            cookie = int.from_bytes(sock.getsockopt(_SOL_SOCKET, SO_COOKIE, 8), "little")
            with contextlib.suppress(OSError):  # never connected
                sock.shutdown(socket.SHUT_RDWR)
            self._judge.dissolved(cookie, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
            if self._means.relaying is not None:
                self._means.relaying.dissolve(cookie)
        return -libc.connect(sock.fileno(), raw)

    def _ask_again(self, notification: Notification) -> None:
        if self.listener.fd >= 0 and self.listener.is_valid(notification.id):
            self._handle(notification)

    def _connect_unix(self, notification: Notification, duplicate: int, address: sockaddr.Unix) -> int:
        pinned = self.pin(notification, address)
        parked = False
        try:
            error = self._judge_unix(notification, pinned)
            if error:
                return error
            through = sockaddr.through_descriptor(pinned)

            def step() -> int:
                for _ in range(2):  # one interruption may be a tick meant for somebody else
                    self._impatience.begin()
                    result = libc.connect(duplicate, through)
                    if result != -errno.EINTR:
                        return -result
                return _PARKED  # the peer's queue is full; this connect has left nothing behind

            outcome = step()
            if outcome == _PARKED:
                outcome = self._wait(
                    notification, (duplicate, pinned), step, events=None, timeout=None, late_error=errno.EAGAIN
                )
                parked = outcome == _PARKED
            return outcome
        finally:
            if not parked:
                os.close(pinned)

    def pin(self, notification: Notification, address: sockaddr.Unix) -> int:
        """An O_PATH descriptor of the socket that the path means *to the target*, right now.

        Raises:
            BadAddress: EACCES for abstract addresses, else what looking the path up gave.
        """
        if address.path is None:
            self._judge.rule(Operation.CONNECT, Transport.UNIX, notification.pid)
            raise sockaddr.BadAddress(errno.EACCES)
        path = _as_seen(_as_the_target(address.path, notification.pid), notification.pid)
        folder = None
        try:
            if not path.startswith(b"/"):
                folder = os.open(f"/proc/{notification.pid}/cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            return os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            raise sockaddr.BadAddress(error.errno or errno.ENOENT) from error
        finally:
            if folder is not None:
                os.close(folder)

    def _judge_unix(self, notification: Notification, pinned: int, size: int = 0) -> int:
        found = os.fstat(pinned)
        if not stat.S_ISSOCK(found.st_mode):
            return errno.ECONNREFUSED
        path = os.readlink(f"/proc/self/fd/{pinned}")
        inode = (found.st_dev, found.st_ino)
        return self._judge.rule(
            Operation.CONNECT, Transport.UNIX, notification.pid, path=path, inode=inode, size=size
        ).error

    # ------------------------------------------------------------------------------------------------------------------
    # waiting on a target's behalf

    def _wait(
        self,
        notification: Notification,
        descriptors: tuple[int, ...],
        retry: Callable[[], int],
        *,
        events: int | None,
        timeout: float | None,
        late_error: int,
        release: Callable[[], None] = lambda: None,
    ) -> int:
        """Parks a call: retried when ``events`` come (None: at every sweep) until its outcome is an errno.

        ``descriptors``, the socket's duplicate first, are closed in the end, however it comes; ``release`` is called.
        Returns _PARKED, or EAGAIN: too many are parked already.
        """
        if len(self._pending) >= _PENDING_LIMIT:
            self._judge.fault("too many calls are pending")
            return errno.EAGAIN
        deadline = None if timeout is None else time.monotonic() + timeout
        pending = _Pending(notification, descriptors, retry, deadline, late_error, release)
        self._pending[notification.id] = pending
        if events is not None:
            self._loop.watch(descriptors[0], events, lambda _events: self._retry(pending))
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(0.02, self._sweep)
        return _PARKED

    def _retry(self, pending: _Pending) -> None:
        outcome = pending.retry()
        if outcome != _PARKED:
            self._drop(pending)
            if outcome != _UNANSWERED:
                self.listener.answer(pending.notification.id, error=outcome)

    def _drop(self, pending: _Pending) -> None:
        if self._pending.pop(pending.notification.id, None) is not None:
            self._loop.forget(pending.descriptors[0])
            for descriptor in pending.descriptors:
                os.close(descriptor)
            pending.release()

    def _sweep(self) -> None:
        """Ends what nobody waits for any more, and what has waited as long as its socket allows."""
        now = time.monotonic()
        for pending in list(self._pending.values()):
            if not self.listener.is_valid(pending.notification.id):
                # The target is gone: an attempt left alone would go on for two minutes.
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pending.descriptors[0])) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
                self._drop(pending)
            elif pending.deadline is not None and now >= pending.deadline:
                self._drop(pending)
                self.listener.answer(pending.notification.id, error=pending.late_error)
            else:
                self._retry(pending)
        if self._pending:
            self._loop.later(0.05, self._sweep)
        else:
            self._sweeping = False

    # ------------------------------------------------------------------------------------------------------------------
    # bind, listen

    def _bind(self, notification: Notification) -> None:
        raw = self.read_address(notification, notification.arg1, notification.arg2)
        address = sockaddr.decode(raw)
        duplicate = self.take(notification, notification.arg0)
        try:
            if isinstance(address, sockaddr.Unix):
                result = self._bind_unix(notification, duplicate, raw, address)
            elif isinstance(address, sockaddr.Inet):
                result = self._bind_inet(notification, duplicate, raw, address)
            elif isinstance(address, sockaddr.Netlink):
                result = libc.bind(duplicate, raw)
            else:
                result = -errno.EAFNOSUPPORT
        finally:
            os.close(duplicate)
        self.listener.answer(notification.id, error=-result)

    def _bind_inet(self, notification: Notification, duplicate: int, raw: bytes, address: sockaddr.Inet) -> int:
        if address.port:  # port 0 to send from is free
            transport = Transport.TCP if _type(duplicate) == _STREAM else Transport.UDP
            ruling = self._judge.rule(
                Operation.BIND, transport, notification.pid, address=address.address, port=address.port
            )
            if ruling.error:
                return -ruling.error
        elif _type(duplicate) != _STREAM and self._judge.counts():
            from ray_guard.egress.relay.datagrams import is_mapped, loopback

            raw = loopback(raw[0], 0, mapped=is_mapped(raw))
        elif _type(duplicate) != _STREAM and not self._judge.hears():
            sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
            try:
                if not deafen(sock):
                    return -errno.EPERM
            finally:
                sock.detach()
        result = libc.bind(duplicate, raw)
        if result == -errno.EADDRINUSE and self._made is not None:
            self._made.sweep()  # by one, perhaps, that a target has closed and is still held here
            result = libc.bind(duplicate, raw)
        return result

    def _bind_unix(self, notification: Notification, duplicate: int, raw: bytes, address: sockaddr.Unix) -> int:
        if address.path is None:
            if self._judge.may_take(address.name, notification.pid):
                return libc.bind(duplicate, raw)
            self._judge.rule(Operation.BIND, Transport.UNIX, notification.pid)
            return -errno.EACCES
        path = _as_the_target(address.path, notification.pid)
        # The name is made by this process, so it must be made where, and with the mode, the target would.
        home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        mask = os.umask(procfs.umask(notification.pid))
        try:
            os.chdir(f"/proc/{notification.pid}/cwd")
            folder, name = os.path.split(path)
            if name not in (b"", b".", b".."):  # none of which can be made: the kernel says so
                where = os.fsdecode(os.path.join(os.path.realpath(folder or b"."), name))
                ruling = self._judge.rule(Operation.BIND, Transport.UNIX, notification.pid, path=where)
                if ruling.error:
                    return -ruling.error
            named = raw if path == address.path else sockaddr.encode_path(path)
            result = self._judge.make_socket(duplicate, named, notification.pid)
            if result == 0:
                pinned = os.open(_as_seen(path, notification.pid), os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._claim(duplicate, pinned, notification.pid)
            return result
        except OSError as error:
            return -(error.errno or errno.EACCES)
        finally:
            os.umask(mask)
            os.fchdir(home)
            os.close(home)

    def _claim(self, duplicate: int, pinned: int, tid: int) -> None:
        """Makes the bound socket file the target's own, if it is the one that was bound.

        The path may mean another by now: a folder or a name swapped in between would make somebody else's socket,
        docker.sock for one, the target's own. So the kernel is asked which file the socket is bound to.
        """
        try:
            bound = unix_file(os.fstat(duplicate).st_ino)
            found = (procfs.mounted_device(pinned, tid), os.fstat(pinned).st_ino & 0xFFFFFFFF)
        except OSError as error:
            os.close(pinned)
            self._judge.fault(f"what a unix socket is bound to cannot be asked: {error}")
            return
        if bound == found:
            self._judge.bound(pinned)
        else:
            os.close(pinned)

    def _listen(self, notification: Notification) -> None:
        duplicate = self.take(notification, notification.arg0)
        try:
            sock = socket.socket(fileno=duplicate)
        except OSError as error:  # not a socket
            os.close(duplicate)
            raise sockaddr.BadAddress(error.errno or errno.ENOTSOCK) from error
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                address, port = sock.getsockname()[:2]
                ruling = self._judge.rule(Operation.LISTEN, Transport.TCP, notification.pid, address=address, port=port)
                if ruling.error:
                    self.refuse(notification, ruling.error)
                    return
            sock.listen(min(notification.arg1 & 0xFFFFFFFF, 0x7FFFFFFF))
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                self._judge.listening(*sock.getsockname()[:2])
            self.listener.answer(notification.id)
        except OSError as error:
            self.refuse(notification, error.errno or errno.EINVAL)
        finally:
            sock.close()

    # ------------------------------------------------------------------------------------------------------------------
    # datagrams, and everything else that sends with an address

    def _sendto(self, notification: Notification) -> None:
        raw = self.read_address(notification, notification.arg4, notification.arg5)
        flags, size = notification.arg3 & 0xFFFFFFFF, notification.arg2
        duplicate = self.take(notification, notification.arg0)
        try:
            kind = _type(duplicate)
            if size > _PAYLOAD_LIMIT and kind != _STREAM:  # a short write is a stream's right alone
                raise sockaddr.BadAddress(errno.EMSGSIZE)
            data = self.read(notification, notification.arg1, min(size, _PAYLOAD_LIMIT))
            message = _Message(data, raw if kind not in _CONNECTION_ORIENTED else b"", b"", [])
            outcome = self._connect_first(notification, duplicate, raw) if flags & _MSG_FASTOPEN else 0
            if outcome == 0:
                outcome = self._send(notification, duplicate, flags & ~_MSG_FASTOPEN, [message], lambda sent: sent[0])
        except BaseException:
            os.close(duplicate)
            raise
        self._sent(notification, duplicate, outcome)

    def _connect_first(self, notification: Notification, duplicate: int, raw: bytes) -> int:
        """MSG_FASTOPEN names a destination in a send: it is connected to like any other, then the data follows.

        Where the connect takes its time the send ends with it, 0 bytes long: the caller sends again, as it may have to.
        """
        sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
        try:
            address = sockaddr.decode(raw)
            if not isinstance(address, sockaddr.Inet) or sock.getsockopt(_SOL_SOCKET, _SO_TYPE) != _STREAM:
                return errno.EOPNOTSUPP
            return self._connect_socket(notification, sock, raw, address)
        finally:
            sock.detach()

    def _sent(self, notification: Notification, duplicate: int, outcome: int) -> None:
        if outcome != _PARKED:
            os.close(duplicate)
            if outcome != _UNANSWERED:
                self.refuse(notification, outcome)

    def _sendmsg(self, notification: Notification) -> None:
        self._send_messages(notification, [notification.arg1], notification.arg2, lambda sent: sent[0])

    def _sendmmsg(self, notification: Notification) -> None:
        count = min(notification.arg2 & 0xFFFFFFFF, _ENTRIES_LIMIT)
        entries = [notification.arg1 + 64 * i for i in range(count)]

        def report(sent: list[int]) -> int:
            # The kernel would store each entry's length; the caller (glibc's resolver for one) checks it.
            if self.listener.is_valid(notification.id):
                for pointer, length in zip(entries, sent, strict=False):
                    libc.write_word(notification.pid, pointer + 56, length)
            return len(sent)

        self._send_messages(notification, entries, notification.arg3, report)

    def _send_messages(
        self, notification: Notification, headers: list[int], flags: int, report: Callable[[list[int]], int]
    ) -> None:
        if flags & _MSG_FASTOPEN:
            self.refuse(notification, errno.EOPNOTSUPP)  # programs fall back to connect
            return
        duplicate = self.take(notification, notification.arg0)
        messages: list[_Message] = []
        try:
            kind = _type(duplicate)
            for header in headers:
                try:
                    messages.append(self._read_message(notification, header, kind))
                except sockaddr.BadAddress:
                    if not messages:
                        raise
                    break  # as the kernel does: what comes before a bad entry is sent
                if sum(len(message.data) for message in messages) >= _PAYLOAD_LIMIT:
                    break  # a series may end early; held whole it would fill this process's memory
            outcome = self._send(notification, duplicate, flags & 0xFFFFFFFF, messages, report)
        except BaseException:
            os.close(duplicate)
            for message in messages:
                message.close()
            raise
        self._sent(notification, duplicate, outcome)

    def _read_message(self, notification: Notification, header: int, kind: int) -> _Message:
        """One ``struct msghdr`` with all it points to, read once.

        Raises:
            BadAddress: EFAULT, EMSGSIZE, EINVAL as the kernel; EPERM for control messages nobody may send.
        """
        fields = struct.unpack("=QIxxxxQQQQIxxxx", self.read(notification, header, 56))
        name, name_length, vector, vector_length, control, control_length, _flags = fields
        if vector_length > _ENTRIES_LIMIT:
            raise sockaddr.BadAddress(errno.EMSGSIZE)
        if name_length < 1 << 31:  # longer than any address: cut short, as the kernel does here and nowhere else
            name_length = min(name_length, sockaddr.STORAGE)
        address = self.read_address(notification, name, name_length) if name else b""
        room = _PAYLOAD_LIMIT
        parts = []
        spans = self.read(notification, vector, 16 * vector_length)
        for base, length in struct.iter_unpack("=QQ", spans):
            if length > room and kind != _STREAM:
                raise sockaddr.BadAddress(errno.EMSGSIZE)
            part = min(length, room)
            parts.append(self.read(notification, base, part))
            room -= part
        if control_length > 1 << 14:
            raise sockaddr.BadAddress(errno.ENOBUFS)
        ancillary, descriptors = b"", list[int]()
        if control and control_length:
            raw = self.read(notification, control, control_length)
            ancillary, descriptors = self._ancillary(notification, raw)
        return _Message(b"".join(parts), address if kind not in _CONNECTION_ORIENTED else b"", ancillary, descriptors)

    def _ancillary(self, notification: Notification, raw: bytes) -> tuple[bytes, list[int]]:
        """Control messages that may be sent, as (harmless ones, descriptors to pass on)."""
        passed: list[int] = []
        kept = b""
        at = 0
        try:
            while at + 16 <= len(raw):
                length, level, kind = struct.unpack_from("=Qii", raw, at)
                if length < 16 or at + length > len(raw):
                    raise sockaddr.BadAddress(errno.EINVAL)
                data = raw[at + 16 : at + length]
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i", data[: len(data) // 4 * 4])
                    if len(passed) + len(numbers) > DESCRIPTOR_LIMIT:
                        raise sockaddr.BadAddress(errno.EINVAL)
                    for number in numbers:
                        passed.append(self.take(notification, number))
                        if _sends_anywhere(passed[-1]):
                            raise sockaddr.BadAddress(errno.EPERM)
                elif (level, kind) in _HARMLESS_CONTROL:
                    kept += raw[at : at + ((length + 7) & ~7)]
                else:
                    raise sockaddr.BadAddress(errno.EPERM)
                at += (length + 7) & ~7
        except BaseException:
            for descriptor in passed:
                os.close(descriptor)
            raise
        return kept, passed

    def _send(
        self,
        notification: Notification,
        duplicate: int,
        flags: int,
        messages: list[_Message],
        report: Callable[[list[int]], int],
    ) -> int:
        """Sends the messages one by one, each judged; an errno, _PARKED (the socket is full) or _UNANSWERED (it is).

        As in sendmmsg(2) the first failure ends the series, and is told only where nothing was sent.
        """
        sent: list[int] = []
        blocking = not flags & _MSG_DONTWAIT and os.get_blocking(duplicate)
        flags = flags & ~_MSG_ZEROCOPY | _MSG_DONTWAIT | _MSG_NOSIGNAL

        def let_go() -> None:
            for message in messages:
                message.close()

        def finish(error: int) -> int:
            let_go()
            if error and not sent:
                return error
            self.listener.answer(notification.id, value=report(sent) if messages else 0)
            return _UNANSWERED

        def step() -> int:
            while len(sent) < len(messages):
                message = messages[len(sent)]
                if not message.granted:
                    try:
                        error = self._judge_message(notification, duplicate, message)
                    except sockaddr.BadAddress as bad:  # after earlier ones were sent it only ends the series
                        error = bad.errno
                    if error:
                        return finish(error)
                    message.granted = True
                result = message.send(duplicate, flags)
                if result == -errno.EAGAIN and blocking:
                    return _PARKED
                if message.resolver is not None and result >= 0:
                    _expect(message.resolver, duplicate)
                if result < 0 and result != -errno.EINTR:
                    return finish(-result)
                if result >= 0:
                    sent.append(result)
            return finish(0)

        outcome = step()
        if outcome != _PARKED:
            return outcome
        sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
        timeout = _timeout(sock, socket.SO_SNDTIMEO)
        sock.detach()
        outcome = self._wait(
            notification,
            (duplicate,),
            step,
            events=select.EPOLLOUT,
            timeout=timeout,
            late_error=errno.EAGAIN,
            release=let_go,
        )
        return outcome if outcome == _PARKED else finish(outcome)

    def _judge_message(self, notification: Notification, duplicate: int, message: _Message) -> int:
        """Judges where one message goes; pins a unix destination so that it goes nowhere else."""
        if not message.address:
            return 0
        address = sockaddr.decode(message.address)
        if isinstance(address, sockaddr.Inet):
            ruling = self._judge.rule(
                Operation.SEND,
                Transport.UDP,
                notification.pid,
                address=address.address,
                port=address.port,
                size=len(message.data),
            )
            if ruling.resolver is not None:
                self._send_to_resolver(notification, duplicate, message, ruling.resolver)
            if ruling.counted is not None:
                return self._send_counted(duplicate, message, ruling.counted)
            return ruling.error
        if isinstance(address, sockaddr.Netlink):
            return 0 if address.port_id == 0 and address.groups == 0 else errno.EPERM
        if isinstance(address, sockaddr.Unix):
            pinned = self.pin(notification, address)
            message.pin(pinned)
            return self._judge_unix(notification, pinned, size=len(message.data))
        return errno.EAFNOSUPPORT

    def _send_counted(self, duplicate: int, message: _Message, owner: DatagramOwner) -> int:
        sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
        try:
            way = self._means.datagrams.way(sock, message.address, owner)
        except OSError as error:
            return error.errno or errno.ENOBUFS
        finally:
            sock.detach()
        if not way.takes(len(message.data)):
            return errno.EACCES
        message.go_by(way.far)
        return 0

    def _send_to_resolver(
        self, notification: Notification, duplicate: int, message: _Message, resolver: NameServer
    ) -> None:
        """A message to a name server, whichever: it goes to the guard's own.

        Raises:
            BadAddress: there is none for that socket.
        """
        line = resolver.line()
        if line is None:
            message.address = resolver.address(message.address, stream=False)
            message.resolver = resolver
            return
        with line:
            line.setblocking(os.get_blocking(duplicate))
            self.listener.replace_descriptor(notification.id, line.fileno(), notification.arg0 & 0xFFFFFFFF)
            os.dup2(line.fileno(), duplicate, inheritable=False)
        message.address = b""

    # ------------------------------------------------------------------------------------------------------------------
    # descriptors made or borrowed

    def _socket(self, notification: Notification) -> None:
        """Sockets that only this process may create: mute datagram sockets, netlink without the right to change.

        Where it may not take a target's own, all of them.
        """
        family, kind, protocol = (notification.arg0 & 0xFFFFFFFF, notification.arg1, notification.arg2 & 0xFFFFFFFF)
        try:
            if family == socket.AF_NETLINK:
                with libc.without_capabilities():
                    made = socket.socket(family, kind & _TYPE, protocol)
            elif kind & _TYPE == socket.SOCK_DGRAM:
                made = mute_datagram_socket(family, protocol)
            else:
                made = socket.socket(family, kind & _TYPE, protocol)
            if self._made is not None:
                self._made.hold(made.dup())
        except OSError as error:
            self.refuse(notification, error.errno or errno.EAFNOSUPPORT)
            return
        with made:
            made.setblocking(not kind & _NONBLOCK)
            self.listener.answer_with_descriptor(notification.id, made.fileno(), close_on_exec=bool(kind & _CLOEXEC))

    def _pidfd_getfd(self, notification: Notification) -> None:
        caller = procfs.thread_group(notification.pid)
        owner = None if caller is None else procfs.traced_pid(caller, notification.arg0 & 0xFFFFFFFF)
        if owner is None or not self._judge.may_borrow(owner):
            self.refuse(notification, errno.EPERM)
            return
        borrowed = self._threads.descriptor(owner, notification.arg1 & 0xFFFFFFFF)
        if borrowed < 0:
            self.refuse(notification, -borrowed)
            return
        try:
            self.listener.answer_with_descriptor(notification.id, borrowed, close_on_exec=True)
        finally:
            os.close(borrowed)

    def _process_vm(self, notification: Notification) -> None:
        pid = notification.arg0 & 0xFFFFFFFF  # in a register: what is checked is what is executed
        if self._judge.may_borrow(pid):
            self.listener.proceed(notification.id)
        else:
            self.refuse(notification, errno.EPERM)


def _as_seen(path: bytes, tid: int) -> bytes:
    """``path``, where a thread may see a /dev/shm of its call's own."""
    return b"/proc/%d/root%s" % (tid, path) if path.startswith(b"/dev/shm/") else path


_SOL_UDP, _IP_TOS, _IP_TTL, _IP_PKTINFO = 17, 1, 2, 8
_IPV6_PKTINFO, _IPV6_HOPLIMIT, _IPV6_TCLASS, _UDP_SEGMENT = 50, 52, 67, 103
_HARMLESS_CONTROL = frozenset(
    {
        (socket.IPPROTO_IP, _IP_TOS),
        (socket.IPPROTO_IP, _IP_TTL),
        (socket.IPPROTO_IP, _IP_PKTINFO),
        (socket.IPPROTO_IPV6, _IPV6_PKTINFO),
        (socket.IPPROTO_IPV6, _IPV6_HOPLIMIT),
        (socket.IPPROTO_IPV6, _IPV6_TCLASS),
        (_SOL_UDP, _UDP_SEGMENT),
    }
)
"""Control messages that choose how, never where to, a datagram goes: no source routes, marks or credentials."""


class _Message:
    """One message, read whole from the target. ``address`` is empty where none was given or the socket ignores it."""

    __slots__ = ("_by", "_control", "_to_close", "address", "data", "granted", "resolver")

    def __init__(self, data: bytes, address: bytes, control: bytes, descriptors: list[int]) -> None:
        self.data = data
        self.address = address
        self.granted = False
        self.resolver: NameServer | None = None
        self._by: socket.socket | None = None
        self._to_close = list(descriptors)
        self._control = control
        if descriptors:
            passed = array.array("i", descriptors).tobytes()
            self._control += struct.pack("=Qii", 16 + len(passed), socket.SOL_SOCKET, socket.SCM_RIGHTS) + passed
            self._control += bytes(-len(passed) % 8)

    def pin(self, descriptor: int) -> None:
        """From here on the message goes to this unix socket, whatever happens to its path."""
        self._to_close.append(descriptor)
        self.address = sockaddr.through_descriptor(descriptor)

    def go_by(self, sock: socket.socket) -> None:
        """It is sent from this socket, which is connected, in place of the target's."""
        self._by, self.address = sock, b""

    def send(self, descriptor: int, flags: int) -> int:
        """Bytes sent, or ``-errno``."""
        if self._by is not None:
            descriptor = self._by.fileno()  # -1 where that has ended while this waited
        return libc.sendmsg(descriptor, self.data, self.address, self._control, flags)

    def close(self) -> None:
        while self._to_close:
            os.close(self._to_close.pop())


def _sends_anywhere(descriptor: int) -> bool:
    """Whether it is a socket whose sendmsg chooses the destination: made by a tool, it must not become its actor's.

    The actor ring looks at no sendmsg (see rings.actor_ring); there such sockets are mute from their making on.
    """
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    return _type(descriptor) not in _CONNECTION_ORIENTED


def _as_the_target(path: bytes, tid: int) -> bytes:
    """``path``, where looked up by this process, as thread ``tid`` means it."""
    for own in (b"/proc/self/", b"/proc/thread-self/"):
        if path.startswith(own):
            return b"/proc/%d/" % tid + path[len(own) :]
    return path


def _type(descriptor: int) -> int:
    try:
        sock = _Socket(_AF_INET, _SOCK_STREAM, 0, descriptor)
    except OSError as error:
        raise sockaddr.BadAddress(error.errno or errno.ENOTSOCK) from error
    try:
        return sock.getsockopt(_SOL_SOCKET, _SO_TYPE)
    finally:
        sock.detach()


def _name(sock: _Socket) -> tuple[str, int] | None:
    """The socket's own address, whatever family it was said to have."""
    try:
        family = sock.getsockopt(_SOL_SOCKET, socket.SO_DOMAIN)
        itself = _Socket(family, _SOCK_STREAM, 0, sock.fileno())  # else an IPv6 address would be cut short
    except OSError:
        return None
    try:
        name = itself.getsockname()
    except OSError:
        return None
    finally:
        itself.detach()
    return (name[0], name[1]) if isinstance(name, tuple) and len(name) in (2, 4) else None


def _expect(resolver: NameServer, duplicate: int) -> None:
    """Tells where a query has come from that was sent without a connect; a wildcard address sends from loopback."""
    sock = _Socket(_AF_INET, _SOCK_STREAM, 0, duplicate)
    try:
        own = _name(sock)
    finally:
        sock.detach()
    if own is not None:
        resolver.expect(own, stream=False)


def _timeout(sock: _Socket, option: int) -> float | None:
    """The socket's own limit for a blocking call, in seconds; None: it waits for ever."""
    try:
        seconds, microseconds = struct.unpack("=qq", sock.getsockopt(_SOL_SOCKET, option, 16))
    except OSError:
        return None
    return float(seconds + microseconds / 1e6) or None

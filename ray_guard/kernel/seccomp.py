"""seccomp(2): assembling filters, installing them, and the user notification ioctls.

Runs in target and zygote (install) and supervisor (notifications). :func:`assemble` is pure.
Source: seccomp(2), seccomp_unotify(2), ``include/uapi/linux/{seccomp,filter}.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import signal
import struct
import sys
from collections.abc import Sequence
from enum import Enum
from typing import Final

from ray_guard.kernel import libc
from ray_guard.kernel.syscalls import AUDIT_ARCH, LAST_KNOWN, TABLES
from ray_guard.named import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# filters

SECCOMP_RET_KILL_PROCESS: Final = 0x80000000
SECCOMP_RET_ERRNO: Final = 0x00050000
SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_TSYNC: Final = 1 << 0
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH: Final = 1 << 4
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5


def refuse(error: int) -> int:
    """The filter action that fails the call with ``error`` without executing it; 0: it succeeds, doing nothing."""
    return SECCOMP_RET_ERRNO | error


NOTIFY: Final = SECCOMP_RET_USER_NOTIF
ALLOW: Final = SECCOMP_RET_ALLOW


class Test(Enum):
    """How a :class:`When` compares the low (or high) 32 bits of an argument, after masking."""

    EQUAL = "equal"
    DIFFERENT = "different"


class When(NamedTuple):
    """A condition on one argument. The kernel reads ``int`` arguments by their low half, so that is the default."""

    argument: int
    test: Test
    value: int
    mask: int = 0xFFFFFFFF
    high: bool = False


def equals(argument: int, value: int, *, mask: int = 0xFFFFFFFF) -> When:
    return When(argument, Test.EQUAL, value, mask)


def differs(argument: int, value: int, *, mask: int = 0xFFFFFFFF) -> When:
    return When(argument, Test.DIFFERENT, value, mask)


class Rule(NamedTuple):
    """When system call ``name`` is made and all ``conditions`` hold, the filter returns ``action``."""

    name: str
    action: int
    conditions: tuple[When, ...] = ()


def pointer_given(name: str, action: int, argument: int, *conditions: When) -> tuple[Rule, Rule]:
    """The two rules that hold where a 64-bit pointer argument is not NULL."""
    return (
        Rule(name, action, (When(argument, Test.DIFFERENT, 0), *conditions)),
        Rule(name, action, (When(argument, Test.DIFFERENT, 0, high=True), *conditions)),
    )


class Instruction(NamedTuple):
    """``struct sock_filter``."""

    code: int
    jt: int
    jf: int
    k: int


_LD_ABS, _ALU_AND, _JA, _JEQ, _JGT, _JGE, _RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16
_X32_BIT = 0x40000000


def assemble(rules: Sequence[Rule], machine: str, *, default: int = ALLOW) -> tuple[Instruction, ...]:
    """A filter program: the first rule that holds decides, else ``default``.

    A foreign architecture (i386 by ``int 0x80``), x32 and numbers this version does not know are answered ENOSYS:
    they would bypass every rule by another number.

    Args:
        rules: in order of precedence.
        machine: ``platform.machine()`` of the target.

    Raises:
        KeyError: the architecture is not supported.
    """
    numbers = TABLES[machine]
    nosys = refuse(errno.ENOSYS)
    program = [
        Instruction(_LD_ABS, 0, 0, _OFFSET_ARCH),
        Instruction(_JEQ, 1, 0, AUDIT_ARCH[machine]),
        Instruction(_RET, 0, 0, nosys),
        Instruction(_LD_ABS, 0, 0, _OFFSET_NR),
        Instruction(_JGT, 0, 1, LAST_KNOWN),  # the x32 bit is above it too
        Instruction(_RET, 0, 0, nosys),
    ]
    by_number: dict[int, list[Rule]] = {}
    for rule in rules:
        number = numbers.get(rule.name)
        if number is not None:
            by_number.setdefault(number, []).append(rule)
    program += _search(sorted(by_number.items()), default)
    return tuple(program)


def _search(rules: Sequence[tuple[int, Sequence[Rule]]], default: int) -> list[Instruction]:
    """Finds the rules of the number in the accumulator by halving: the kernel walks the program for every number there
    is when it is installed, and for every call afterwards whose answer depends on an argument."""
    if len(rules) > 1:
        half = len(rules) // 2
        below, above = _search(rules[:half], default), _search(rules[half:], default)
        # Conditional jumps reach 255 instructions, others any.
        return [Instruction(_JGE, 0, 1, rules[half][0]), Instruction(_JA, 0, 0, len(below)), *below, *above]
    program = [Instruction(_RET, 0, 0, default)]
    for number, its_rules in rules:
        body = program
        for rule in reversed(its_rules):
            body = [*_assemble_rule(rule), *body]
        program = [Instruction(_JEQ, 1, 0, number), Instruction(_RET, 0, 0, default), *body]
    return program


def _assemble_rule(rule: Rule) -> list[Instruction]:
    """Where all conditions hold it returns, else it goes on behind itself."""
    body: list[Instruction] = [Instruction(_RET, 0, 0, rule.action)]
    for when in reversed(rule.conditions):
        load = [Instruction(_LD_ABS, 0, 0, _OFFSET_ARGS + 8 * when.argument + (4 if when.high else 0))]
        if when.mask != 0xFFFFFFFF:
            load.append(Instruction(_ALU_AND, 0, 0, when.mask))
        over = len(body)  # a failed test jumps behind the rule's return
        if over > 250:
            raise ValueError(f"rule for {rule.name} has too many conditions")
        equal = when.test is Test.EQUAL
        jump = Instruction(_JEQ, 0, over, when.value) if equal else Instruction(_JEQ, over, 0, when.value)
        body = [*load, jump, *body]
    return body


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def encode(program: Sequence[Instruction]) -> bytes:
    """``struct sock_filter[]``."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


Program = Sequence[Instruction] | bytes
"""What :func:`assemble` gives, or :func:`encode`: to encode takes longer than to install."""


def _install(program: Program, flags: int) -> int:
    code = program if isinstance(program, bytes) else encode(program)
    prog = _SockFprog(len(code) // 8, code)
    return libc.syscall(libc.NR_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(prog))


def _install_listener(program: Program, flags: int) -> int:
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    flags |= SECCOMP_FILTER_FLAG_NEW_LISTENER
    try:
        return _install(program, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.19 the flag is unknown
            raise
        return _install(program, flags)


def install_on_process(program: Sequence[Instruction]) -> int:
    """Filters every thread of this process, now and for good, and returns the listener.

    Raises:
        OSError: EBUSY where a listener is already present, ESRCH where a thread has a filter of its own.
    """
    return _install_listener(program, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH)


def install_on_thread(program: Program) -> int:
    """Filters the calling thread and what it will start, and returns the listener: for a single-threaded child."""
    return _install_listener(program, 0)


def stack_on_thread(program: Sequence[Instruction]) -> None:
    """Adds a filter without a listener to the calling thread."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    _install(program, 0)


# ---------------------------------------------------------------------------------------------------------------------
# notifications

_IOCTL_RECV, _IOCTL_SEND, _IOCTL_ID_VALID = 0xC0502100, 0xC0182101, 0x40082102
_IOCTL_ADDFD, _IOCTL_SET_FLAGS = 0x40182103, 0x40082104
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADDFD = struct.Struct("=QIIII")
_SYNC_WAKE_UP = 1
_FLAG_CONTINUE = 1
_ADDFD_FLAG_SETFD, _ADDFD_FLAG_SEND = 1, 2
_O_CLOEXEC = 0o2000000
_ZERO = bytes(80)
_TICK = frozenset({signal.SIGALRM})
_CROWD: Final = 16
_ERESTARTNOINTR: Final = 513
"""The kernel's own: on the way back to a process that has a signal to see to it begins the call anew."""
_OLDEST, _LATER = 1 << 14, 1 << 12
"""How far back a call may wait for its answer, and how many notifications one round of the loop may receive."""
_ioctl = fcntl.ioctl
_tuple = tuple.__new__


class Notification(NamedTuple):
    """``struct seccomp_notif``: ``pid`` is the id of the calling *thread* in the listener's pid namespace."""

    id: int
    pid: int
    flags: int
    nr: int
    arch: int
    instruction_pointer: int
    arg0: int
    arg1: int
    arg2: int
    arg3: int
    arg4: int
    arg5: int


class Listener:
    """The supervisor's end of a filter: one per actor or tool call.

    Its buffers are kept: fcntl.ioctl takes a bytearray in half the time of bytes.
    """

    __slots__ = ("_buffer", "_caller", "_crowd", "_here", "_id", "_response", "_whole", "fd", "last", "sync_wake_up")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(80)
        self._whole = memoryview(self._buffer)
        self._id = bytearray(8)
        self._response = bytearray(24)
        self._caller = 0
        self._crowd = 0
        self._here = False
        self.last = 0
        """Id of the notification that was received last."""
        self.sync_wake_up = self._wake_up_here(here=True)
        """Whether the kernel has the flag (Linux 6.6)."""

    def _wake_up_here(self, *, here: bool) -> bool:
        """Has the woken side run at once on the waker's CPU. That halves the round trip of a caller that comes alone.

        Of callers that come together each would stand in the way of the next one's answer: they run elsewhere.
        """
        try:
            _ioctl(self.fd, _IOCTL_SET_FLAGS, _SYNC_WAKE_UP if here else 0)
        except OSError:
            return False
        self._here = here
        return True

    def _met(self, tid: int) -> None:
        """Tells one caller from many by whether the next one is another."""
        if tid == self._caller:
            if self._crowd:
                self._crowd -= 1
                if self._crowd == 0 and not self._here:
                    self._wake_up_here(here=True)
        else:
            self._caller = tid
            if self._crowd < _CROWD:
                self._crowd += 1
                if self._crowd == _CROWD:
                    self._wake_up_here(here=False)

    def receive(self) -> Notification | None:
        """The next notification; None where the caller has gone meanwhile. Poll first: this call can block."""
        buffer = self._buffer
        self._whole[:] = _ZERO
        try:
            _ioctl(self.fd, _IOCTL_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                return None
            raise
        notification = _tuple(Notification, _NOTIFICATION.unpack(buffer))
        self.last = notification[0]
        tid = notification[1]
        if (tid != self._caller or self._crowd) and self.sync_wake_up:
            self._met(tid)
        return notification

    def is_valid(self, notification_id: int) -> bool:
        """Whether the caller still waits: only then is what was read of it by pid certainly its own."""
        self._id[:] = notification_id.to_bytes(8, sys.byteorder)
        try:
            _ioctl(self.fd, _IOCTL_ID_VALID, self._id)
        except OSError:
            return False
        return True

    def answer(self, notification_id: int, value: int = 0, error: int = 0) -> bool:
        """Completes the call: ``value`` is returned, or the call fails with ``error`` (> 0). False: caller gone."""
        return self._send(notification_id, value, -error, 0)

    def proceed(self, notification_id: int) -> bool:
        """Lets the kernel execute the call as it stands.

        Only for calls whose decisive arguments are in registers: memory can change after it was checked.
        """
        return self._send(notification_id, 0, 0, _FLAG_CONTINUE)

    def stale(self, about: int) -> list[int]:
        """Notifications that a process which is gone has received and not answered: nobody is told of them again.

        To be asked before anything is received here. Ids count upwards, and one is valid only from when it was received
        until it was answered.

        Args:
            about: the last that it had received, or one shortly before.
        """
        return [id for id in range(max(1, about - _OLDEST), about + _LATER) if self.is_valid(id)]

    def restart(self, notification_id: int) -> bool:
        """Has the caller make its call once more, to be notified anew. It must have a signal pending."""
        return self._send(notification_id, 0, -_ERESTARTNOINTR, 0)

    def _send(self, notification_id: int, value: int, negated: int, flags: int) -> bool:
        _RESPONSE.pack_into(self._response, 0, notification_id, value, negated, flags)
        try:
            _ioctl(self.fd, _IOCTL_SEND, self._response)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINPROGRESS):
                return False
            raise
        return True

    def answer_with_descriptor(self, notification_id: int, descriptor: int, *, close_on_exec: bool) -> bool:
        """Installs a duplicate of ``descriptor`` in the caller and completes the call with its number there."""
        flags = _O_CLOEXEC if close_on_exec else 0
        return self._add(_ADDFD.pack(notification_id, _ADDFD_FLAG_SEND, descriptor, 0, flags))

    def replace_descriptor(self, notification_id: int, descriptor: int, number: int) -> bool:
        """Puts a duplicate of ``descriptor``, close-on-exec, in the place of the caller's ``number``.

        The call itself is still to be answered. False: the caller is gone.
        """
        return self._add(_ADDFD.pack(notification_id, _ADDFD_FLAG_SETFD, descriptor, number, _O_CLOEXEC))

    def _add(self, request: bytes) -> bool:
        # Interrupted, the kernel has answered already, without the descriptor: the caller would take 0 for its number.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _TICK)
        try:
            fcntl.ioctl(self.fd, _IOCTL_ADDFD, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return True

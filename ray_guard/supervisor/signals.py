"""Signals of a tool, where Landlock does not scope them (before its sixth version). Runs in the supervisor.

Within its call a tool may signal whom it likes, outside nobody: as in a Landlock scope, with three differences.
kill(-1) and pidfd_send_signal are refused. Who is signalled by another process sees the supervisor as the sender:
between the judgement and a call that is let through a number could become a stranger's, so the signal is sent from
here, to what was judged. And SIGIO goes to the process, or group, that asks for it.

A process leaves its group, or makes one, only after that has been told to the call's leader: see
:mod:`ray_guard.supervisor.groups`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from ray_guard.kernel import libc, procfs
from ray_guard.kernel.syscalls import NUMBERS
from ray_guard.supervisor.bystanders import Within, member

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification

_SIGINFO: Final = 128
"""``sizeof(siginfo_t)``."""


class Signals:
    """The handlers of one call's gate.

    Args:
        is_within: whether a process is the call's.
        announce: tells the call's leader of a process group; False: it could not be told.
    """

    def __init__(self, is_within: Within, announce: Callable[[int], bool]) -> None:
        self._is_within = is_within
        self._announce = announce

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "kill": self._kill,
            "tkill": lambda gate, n: self._to_thread(gate, n, _signed(n.arg0), n.arg1),
            "tgkill": lambda gate, n: self._to_thread(gate, n, _signed(n.arg1), n.arg2, group=_signed(n.arg0)),
            "rt_sigqueueinfo": lambda gate, n: self._with_information(gate, n, n.arg2, n.arg1),
            "rt_tgsigqueueinfo": lambda gate, n: self._with_information(gate, n, n.arg3, n.arg1, n.arg2),
            "fcntl": self._own,
            "setsid": lambda gate, n: self._new_group(gate, n, procfs.thread_group(n.pid)),
            "setpgid": self._set_group,
        }

    # -- who is signalled ----------------------------------------------------------------------------------------------

    def _kill(self, gate: Gate, n: Notification) -> None:
        who, number = _signed(n.arg0), _signed(n.arg1)
        if who > 0:
            self._to_process(gate, n, who, lambda pidfd: signal.pidfd_send_signal(pidfd, number))
            return
        group, own = -who, procfs.thread_group(n.pid)
        if own is not None and group == _group_of(own):
            gate.listener.proceed(n.id)  # the caller is in it: it is nobody else's meanwhile
        elif (some := member(group)) == 0:
            gate.refuse(n, errno.ESRCH)
        elif not self._is_within(some):
            gate.refuse(n, errno.EPERM)
        else:
            _answer(gate, n, lambda: os.killpg(group, number))

    def _to_process(self, gate: Gate, n: Notification, who: int, send: Callable[[int], None]) -> None:
        """``send``, to what is judged: it gets a descriptor of that."""
        process = procfs.thread_group(who)
        if process is not None and process == procfs.thread_group(n.pid):
            gate.listener.proceed(n.id)  # to itself, and before the call returns
            return
        try:
            pidfd = os.pidfd_open(process or who)
        except OSError as error:
            gate.refuse(n, error.errno or errno.ESRCH)
            return
        try:
            if self._is_within(process or who):
                _answer(gate, n, lambda: send(pidfd))
            else:
                gate.refuse(n, errno.EPERM)
        finally:
            os.close(pidfd)

    def _to_thread(self, gate: Gate, n: Notification, tid: int, number: int, *, group: int | None = None) -> None:
        """There are no descriptors of threads before Linux 6.9: it is signalled at once, by its number."""
        process = procfs.thread_group(tid)
        if process is None or (group is not None and group != process):
            gate.refuse(n, errno.ESRCH if tid > 0 and (group is None or group > 0) else errno.EINVAL)
        elif process == procfs.thread_group(n.pid):
            gate.listener.proceed(n.id)
        elif not self._is_within(process):
            gate.refuse(n, errno.EPERM)
        else:
            _answer(gate, n, lambda: libc.syscall(NUMBERS["tgkill"], process, tid, _signed(number)))

    def _with_information(self, gate: Gate, n: Notification, pointer: int, *words: int) -> None:
        """rt_sigqueueinfo(2) and rt_tgsigqueueinfo(2): ``words`` are what comes between the process and ``pointer``."""
        process = procfs.thread_group(_signed(n.arg0))
        if process is not None and process == procfs.thread_group(n.pid):
            gate.listener.proceed(n.id)
            return
        if process is None or not self._is_within(process):
            gate.refuse(n, errno.ESRCH if process is None else errno.EPERM)
            return
        information = ctypes.create_string_buffer(gate.read(n, pointer, _SIGINFO), _SIGINFO)
        name = "rt_sigqueueinfo" if len(words) == 1 else "rt_tgsigqueueinfo"
        arguments = (process, *map(_signed, words), ctypes.addressof(information))
        _answer(gate, n, lambda: libc.syscall(NUMBERS[name], *arguments))

    def _own(self, gate: Gate, n: Notification) -> None:
        """F_SETOWN: who gets SIGIO, or whatever F_SETSIG says."""
        who, own = _signed(n.arg2), procfs.thread_group(n.pid)
        if own is not None and (who == own or -who == _group_of(own)):
            gate.listener.proceed(n.id)
        else:
            gate.refuse(n, errno.EPERM)

    # -- groups --------------------------------------------------------------------------------------------------------

    def _set_group(self, gate: Gate, n: Notification) -> None:
        who = _signed(n.arg0) or procfs.thread_group(n.pid) or 0
        group = _signed(n.arg1) or who
        if group != who:
            gate.listener.proceed(n.id)  # one of its session, which is known already, or the kernel refuses
        elif self._is_within(who):
            self._new_group(gate, n, who)
        else:
            gate.refuse(n, errno.ESRCH)

    def _new_group(self, gate: Gate, n: Notification, first: int | None) -> None:
        """``first``: the process that is going to lead it, one of the call's."""
        if first is not None and self._announce(first):
            gate.listener.proceed(n.id)
        else:
            gate.refuse(n, errno.EPERM)


def _answer(gate: Gate, n: Notification, act: Callable[[], object]) -> None:
    try:
        if gate.listener.is_valid(n.id):
            act()
    except (OSError, ValueError, OverflowError) as error:
        gate.refuse(n, (error.errno if isinstance(error, OSError) else None) or errno.EINVAL)
    else:
        gate.listener.answer(n.id)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def _signed(argument: int) -> int:
    """The ``int`` that a register holds."""
    return (argument & 0xFFFFFFFF ^ 0x80000000) - 0x80000000

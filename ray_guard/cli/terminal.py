"""A terminal of its own for what ``ray-guard run`` starts on one, and the traffic between the two.

The user's terminal is not handed to a tool, which could change it for whatever comes after; and a tool leads a session,
whose keys (Ctrl-C, Ctrl-Z), /dev/tty and job control need a terminal that is that session's.

    user's terminal ◀──raw──▶ this process ◀── master │ slave ──▶ the tool's 0, 1, 2 and /dev/tty

Where input and output both are the terminal it is in raw mode, so that every key reaches the tool's own terminal, which
makes of it what the tool wants. In a pipeline it stays as it is: lines go in as they are typed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import termios
import time
import tty
from collections.abc import Callable
from types import FrameType
from typing import Final, Self

from ray_guard.client.start import Control

_CHUNK: Final = 1 << 16
_STANDARD: Final = (0, 1, 2)
_SIZE: Final = bytes(8)
_ABANDONED_S: Final = 0.02
"""How often to look again at a terminal that nobody has open just now: the tool may yet, or is about to end."""
_OFLAG, _LFLAG, _CC = 1, 3, 6


class Terminal:
    """See the module.

    Attributes:
        slave: what the tool gets in place of the user's terminal.
        numbers: those of its standard descriptors that are the terminal.
    """

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers = numbers
        self._own = numbers[-1] if 1 not in numbers else 1
        self._is_raw = 0 in numbers and 1 in numbers
        self._master, self.slave = os.openpty()
        os.set_blocking(self._master, False)
        self._pending = b""
        self._hears_input = 0 in numbers
        self._saved = termios.tcgetattr(self._own)
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        attributes = termios.tcgetattr(self._own)
        if not self._is_raw:  # the user's terminal does both already
            attributes[_OFLAG] &= ~termios.OPOST
            attributes[_LFLAG] &= ~termios.ECHO
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)
        self._resize()

    @classmethod
    def of_this_process(cls) -> Self | None:
        """None: no standard descriptor is a terminal."""
        numbers = tuple(number for number in _STANDARD if os.isatty(number))
        return cls(numbers) if numbers else None

    # -- the user's terminal -------------------------------------------------------------------------------------------

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._own) == os.getpgrp()
        except OSError:  # it is not this session's: nobody else changes it either
            return True

    def _take(self) -> None:
        """Every key comes through from here on. In the background the terminal is somebody else's."""
        if self._is_raw and self._in_foreground():
            tty.setraw(self._own, termios.TCSADRAIN)

    def _give_back(self) -> None:
        if self._is_raw and self._in_foreground():
            try:
                termios.tcsetattr(self._own, termios.TCSADRAIN, self._saved)
            except termios.error:
                pass  # it has been hung up

    def _resize(self) -> None:
        try:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, fcntl.ioctl(self._own, termios.TIOCGWINSZ, _SIZE))
        except OSError:
            pass  # a terminal without a size

    # -- the traffic ---------------------------------------------------------------------------------------------------

    def attend(self, control: Control) -> None:
        """Carries everything to and fro until the tool has ended. The user's terminal is then as it was."""
        os.close(self.slave)
        handlers: dict[int, Callable[[int, FrameType | None], object]] = {
            signal.SIGWINCH: lambda _number, _frame: self._resize(),
            signal.SIGCONT: lambda _number, _frame: self._take(),
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        waker = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._take()
        try:
            while control.wait(0.0) is None:
                self._step(control)
            self._pass_output()
        finally:
            self._give_back()
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)
            for descriptor in (self._master, self._woken, self._wake):
                os.close(descriptor)

    def _step(self, control: Control) -> None:
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        poll.register(self._master, select.POLLIN | (select.POLLOUT if self._pending else 0))
        if self._hears_input and not self._pending and self._in_foreground():
            poll.register(0, select.POLLIN)
        for descriptor, events in poll.poll():
            if descriptor == self._woken:
                os.read(self._woken, 512)
            elif descriptor == self._master:
                if events & select.POLLOUT:
                    self._write_pending()
                if events & ~select.POLLOUT and not self._pass_output(once=True):
                    time.sleep(_ABANDONED_S)
            elif descriptor == 0:
                self._pass_input(control)

    def _pass_output(self, *, once: bool = False) -> bool:
        """What the tool has written, to the user; False: nobody has the tool's terminal open."""
        while True:
            try:
                data = os.read(self._master, _CHUNK)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno == errno.EIO:
                    return False
                raise
            try:
                while data:
                    data = data[os.write(self._own, data) :]
            except OSError:
                return True  # the user has hung up, and the signal for it is on its way
            if once:
                return True

    def _pass_input(self, control: Control) -> None:
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if not data:
            self._hears_input = False
            if self._is_raw:
                control.signal(signal.SIGHUP)  # the terminal is gone
                return
            data = self._key(termios.VEOF)
        stop = self._key(termios.VSUSP)
        if self._is_raw and stop and stop in data and self._stops_tool(control):
            before, _, after = data.partition(stop)
            self._pending += before
            self._write_pending()
            self._suspend(control)
            data = after
        self._pending += data
        self._write_pending()

    def _key(self, index: int) -> bytes:
        key = termios.tcgetattr(self._master)[_CC][index]
        return key if isinstance(key, bytes) and key != b"\0" else b""

    def _write_pending(self) -> None:
        try:
            self._pending = self._pending[os.write(self._master, self._pending) :]
        except BlockingIOError:
            pass  # the tool does not read: what is typed meanwhile waits in the user's terminal
        except OSError:
            self._pending = b""

    # -- Ctrl-Z --------------------------------------------------------------------------------------------------------

    def _stops_tool(self, control: Control) -> bool:
        """Whether Ctrl-Z would stop the tool itself: its terminal makes signals of keys, and it is in the foreground.

        The kernel would not: nobody in the tool's session could wake it again. A shell's jobs are the shell's business.
        """
        if not termios.tcgetattr(self._master)[_LFLAG] & termios.ISIG:
            return False
        try:
            return os.tcgetpgrp(self._master) == control.pid
        except OSError:
            return False

    def _suspend(self, control: Control) -> None:
        """Stops the tool and this process, as Ctrl-Z does to any; goes on with both when somebody wakes this one."""
        self._pass_output()
        try:
            os.killpg(control.pid, signal.SIGSTOP)
        except OSError:
            return
        self._give_back()
        os.kill(0, signal.SIGTSTP)
        self._take()
        self._resize()
        try:
            os.killpg(control.pid, signal.SIGCONT)
        except OSError:
            pass  # it was ended meanwhile

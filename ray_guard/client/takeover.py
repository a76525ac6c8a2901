"""``subprocess: confine``: within a tool call, plain subprocess takes the zygote's way too. Runs in target.

So that the tools of other frameworks need no change. What is replaced is the one place where the standard library
starts a child for subprocess, os.popen and asyncio, and os.system. Outside of tool calls all of it stays what it is:
an actor's own processes are of the actor ring. So do those that are started by other means, wherever: os.fork,
os.posix_spawn, multiprocessing, and native code (uvloop, for one).

    Popen._execute_child ─ in a call? ─▶ process.start ─▶ supervisor        (subprocess, os.popen, asyncio)
    watcher.add_child_handler ─ a tool? ─▶ its control line                 (asyncio: no child, so no waitpid)
    os.waitpid ─ a tool? ─▶ refused, with the reason
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from ray_guard.client import carry, process
from ray_guard.client.start import Control

#: how asyncio learns that a child has ended, by version of Python and host
_WATCHERS: Final = (
    *("PidfdChildWatcher", "ThreadedChildWatcher", "SafeChildWatcher", "FastChildWatcher", "MultiLoopChildWatcher"),
    *("_PidfdChildWatcher", "_ThreadedChildWatcher"),
)

_demanded = contextvars.ContextVar("ray_guard_demanded", default=False)
"""Whether a start here is to be confined whatever the policy says of plain subprocess."""


class _Takeover:
    """Installed once; tests take it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._originals: list[tuple[Any, str, Any]] = []
        self._watches = False
        self.plain_confined = False

    def install(self, *, confine_plain: bool) -> None:
        """Puts the wrappers on. ``confine_plain``: plain subprocess within a tool call is confined from now on."""
        with self._lock:
            self.plain_confined = self.plain_confined or confine_plain
            if self._originals:
                return
            popen = subprocess.Popen
            for name, wrapper in (
                ("_execute_child", _executing),
                ("_internal_poll", _polling),
                ("_wait", _waiting),
                ("send_signal", _signalling),
            ):
                self._replace(popen, name, wrapper)
            self._replace(os, "system", _system)
            self._replace(os, "waitpid", _waitpid)

    def watch(self) -> None:
        """Has asyncio's watchers know tools; where it is not loaded, nobody there waits for one."""
        events = sys.modules.get("asyncio.unix_events")
        if events is None:
            return
        with self._lock:
            if self._watches:
                return
            self._watches = True
            for name in _WATCHERS:
                watcher = getattr(events, name, None)
                if watcher is not None and "add_child_handler" in vars(watcher):
                    self._replace(watcher, "add_child_handler", _watching)

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))
        setattr(owner, name, functools.wraps(original)(wrap(original)))

    def remove(self) -> None:
        with self._lock:
            while self._originals:
                owner, name, original = self._originals.pop()
                setattr(owner, name, original)
            self._watches = self.plain_confined = False


_takeover = _Takeover()
install_takeover = _takeover.install
remove_takeover = _takeover.remove


def _is_confined_here() -> bool:
    """Whether a process started here and now is a tool."""
    if _demanded.get():
        return True
    if not _takeover.plain_confined or process.is_inside_call():
        return False
    node = carry.current()
    return node is not None and node.call is not None


@contextlib.contextmanager
def demanded() -> Iterator[None]:
    """Within, whatever is started here is a tool."""
    token = _demanded.set(True)
    try:
        yield
    finally:
        _demanded.reset(token)


# --- subprocess -------------------------------------------------------------------------------------------------------


def _control_of(popen: subprocess.Popen[Any]) -> Control | None:
    return cast("Control | None", popen.__dict__.get("_ray_guard_control"))


def _executing(original: Callable[..., None]) -> Callable[..., None]:
    def _execute_child(self: subprocess.Popen[Any], *positional: Any, **keywords: Any) -> None:
        if not _is_confined_here():
            original(self, *positional, **keywords)
            return
        self.__dict__["_ray_guard_control"] = process.start(self, *positional, **keywords)
        _takeover.watch()

    return _execute_child


def _polling(original: Callable[..., int | None]) -> Callable[..., int | None]:
    def _internal_poll(self: subprocess.Popen[Any], *positional: Any, **keywords: Any) -> int | None:
        control = _control_of(self)
        return original(self, *positional, **keywords) if control is None else process.collect(self, control, 0.0)

    return _internal_poll


def _waiting(original: Callable[..., int]) -> Callable[..., int]:
    def _wait(self: subprocess.Popen[Any], timeout: float | None) -> int:
        control = _control_of(self)
        return original(self, timeout=timeout) if control is None else process.await_end(self, control, timeout)

    return _wait


def _signalling(original: Callable[..., None]) -> Callable[..., None]:
    def send_signal(self: subprocess.Popen[Any], sig: int) -> None:
        control = _control_of(self)
        if control is None:
            original(self, sig)
        elif self.poll() is None:
            control.signal(sig)

    return send_signal


# --- os ---------------------------------------------------------------------------------------------------------------


def _system(original: Callable[..., int]) -> Callable[..., int]:
    def system(command: str | bytes | os.PathLike[str]) -> int:
        if not _is_confined_here():
            return original(command)
        with subprocess.Popen(os.fsdecode(command), shell=True) as shell:  # noqa: S602 - what os.system is
            try:
                code = shell.wait()
            except BaseException:
                shell.kill()
                raise
        return -code if code < 0 else code << 8  # a wait status

    return system


def _waitpid(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def waitpid(pid: int, options: int, /) -> tuple[int, int]:
        if process.tool(pid) is not None:
            remedy = "use the wait() or poll() of its Popen"
            raise ChildProcessError(errno.ECHILD, f"process {pid} is a tool and no child of this process: {remedy}")
        return original(pid, options)

    return waitpid


# --- asyncio ----------------------------------------------------------------------------------------------------------


def _watching(original: Callable[..., None]) -> Callable[..., None]:
    import asyncio  # it is loaded, else nobody would watch

    def add_child_handler(watcher: Any, pid: int, callback: Callable[..., object], *args: Any) -> None:
        control = process.tool(pid)
        if control is None:
            original(watcher, pid, callback, *args)
            return
        loop = asyncio.get_running_loop()
        # A descriptor of its own: poll() may take the end in first, and close the line, which is then seen to end.
        line = os.dup(control.fileno())

        def ended() -> None:
            told = control.wait(0.0)
            if told is None:
                return
            loop.remove_reader(line)
            os.close(line)
            callback(pid, os.waitstatus_to_exitcode(int(told["status"])), *args)

        loop.add_reader(line, ended)

    return add_child_handler

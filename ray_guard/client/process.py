"""``run`` and ``Popen``: subprocess look-alikes whose tree the supervisor starts, confines and ends. Runs in target.

All around the start itself (pipes, text, timeouts) is subprocess's own; see :mod:`ray_guard.client.start` for the rest.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from ray_guard.client import carry, environment
from ray_guard.client import channel as channels
from ray_guard.client.scope import outermost, traceparent
from ray_guard.client.start import (
    CALL_VARIABLE,
    Control,
    checked_descriptor,
    standard_descriptor,
    start_message,
)
from ray_guard.errors import NotEnforced

_DESCRIPTORS_LIMIT: Final = 200
"""Well below what one packet may carry on its way from here to the leader."""
#: private, but the one place where subprocess starts a child
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]  # noqa: SLF001


_tools: weakref.WeakValueDictionary[int, Control] = weakref.WeakValueDictionary()


def tool(pid: int) -> Control | None:
    """The line to the tool that was started here, runs under ``pid``, and has not been waited for yet."""
    control = _tools.get(pid)
    return control if control is not None and control.exited is None else None


def is_inside_call() -> bool:
    """Whether this process is a tool itself: confined, without a line to the supervisor."""
    return channels.current() is None and CALL_VARIABLE in os.environ


def start(process: subprocess.Popen[Any], *positional: Any, **keywords: Any) -> Control:
    """What ``Popen._execute_child`` does, with these arguments, the confined way. Raises as :class:`Popen` does."""
    given = _SIGNATURE.bind(process, *positional, **keywords).arguments
    _refuse(given)
    channel = channels.current()
    if channel is None:
        raise NotEnforced(["subprocess"], "this process is not guarded: use ray_guard.guard or ray_guard.confine")
    argv = _argv(given["args"])
    executable = given["executable"]
    if given["shell"]:
        argv = ["/bin/sh" if executable is None else executable, "-c", *argv]
    standard = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
    numbers = [0, 1, 2, *sorted({int(number) for number in given["pass_fds"]} - {0, 1, 2})]
    if min(numbers) < 0:
        raise ValueError("bad value(s) in fds_to_keep")  # as subprocess says it; and so below
    if len(numbers) > _DESCRIPTORS_LIMIT:
        raise ValueError(f"pass_fds: at most {_DESCRIPTORS_LIMIT - 3} descriptors travel to a tool")
    opened: list[int] = []
    try:
        descriptors = [
            checked_descriptor(pipe) if pipe != -1 else standard_descriptor(own, opened)
            for own, pipe in enumerate(standard)
        ]
        descriptors += [checked_descriptor(number) for number in numbers[3:]]
        folder = os.open("." if given["cwd"] is None else given["cwd"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.append(folder)
        node = carry.current()
        payload = start_message(
            argv,
            executable=executable,
            environment={**_variables(given["env"]), **_own_variables(node)},
            umask=int(given["umask"]),
            numbers=numbers,
            restore_signals=bool(given["restore_signals"]),
        )
        try:
            segments = None if node is None else node.segments
            control = Control(channel, payload, folder, descriptors, _place(node), segments=segments)
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = os.fsdecode(argv[0] if executable is None else executable)
            raise
    finally:
        for descriptor in opened:
            os.close(descriptor)
    process.pid = control.pid
    _tools[control.pid] = control
    process._child_created = True  # type: ignore[attr-defined]  # noqa: SLF001 - as _execute_child does
    close: Callable[..., None] = process._close_pipe_fds  # type: ignore[attr-defined]  # noqa: SLF001
    close(*(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))
    return control


def _refuse(given: Mapping[str, Any]) -> None:
    """What no tool can be started with. Raises NotEnforced, which says why."""
    if given.get("preexec_fn") not in (None, os.setsid, os.setpgrp):  # these two: it leads both anyway
        raise NotEnforced(["preexec_fn"], "it would run in a tool process before the filter stands")
    for name in ("gid", "gids", "uid"):
        if given.get(name) is not None:
            option = {"gid": "group", "gids": "extra_groups", "uid": "user"}[name]
            raise NotEnforced([option], "a tool is its requester's user: another one's files and signals are not its")
    if given.get("process_group", -1) > 0:
        raise NotEnforced(["process_group"], "a tool leads a session and a process group of its own: 0 is that")


def _argv(args: Any) -> list[Any]:
    if isinstance(args, (str, bytes, os.PathLike)):
        return [args]
    argv = list(args)
    if not argv:
        raise IndexError("list index out of range")
    return argv


def _variables(given: Mapping[Any, Any] | None) -> Mapping[Any, Any]:
    if given is None:
        return environment.inherited(os.environ)
    return environment.given({os.fsdecode(key): os.fsdecode(value) for key, value in given.items()}, os.environ)


def _own_variables(node: carry.Node | None) -> dict[str, str]:
    variables = {CALL_VARIABLE: "1" if node is None or node.call is None else node.call}
    parent = traceparent()
    if parent is not None:
        variables["TRACEPARENT"] = parent
    return variables


def _place(node: carry.Node | None) -> dict[str, Any]:
    """Where in the traces a start belongs."""
    if node is None:
        return outermost()
    return {"span": node.call, "trace": node.trace, "parent": node.span, "identity": node.identity}


def collect(process: subprocess.Popen[Any], control: Control, timeout: float | None) -> int | None:
    """The return code, taken in where the tool has ended within ``timeout`` seconds (None: whenever it does)."""
    if process.returncode is None:
        ended = control.wait(timeout)
        if ended is not None and process.returncode is None:
            process.returncode = os.waitstatus_to_exitcode(int(ended["status"]))
            control.close()
    return process.returncode


def await_end(process: subprocess.Popen[Any], control: Control, timeout: float | None) -> int:
    """The return code. Raises TimeoutExpired where the tool has not ended within ``timeout`` seconds (None: never)."""
    code = collect(process, control, timeout)
    if code is None:
        raise subprocess.TimeoutExpired(process.args, timeout or 0.0)
    return code


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` whose process tree is confined and owned by the current tool call.

    Args, attributes and methods are subprocess's. The tool leads a session and a process group of its own; ``pid`` is
    real, but no child of this process: ``os.waitpid(pid)`` fails. Outside of any tool call the process is a call of its
    own.

    Raises:
        OSError: as subprocess does, where the program cannot be started.
        ValueError: a descriptor that may not be passed on.
        NotEnforced: the guard cannot start or hold it (``preexec_fn``, other users), or this process is not guarded.
    """

    _control: Control | None = None

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        if is_inside_call():  # confined already; not of this class, so __init__ is left out
            return subprocess.Popen(*args, **keywords)
        return object.__new__(cls)

    def __init__(self, args: Any, *positional: Any, **keywords: Any) -> None:
        super().__init__(args, *positional, **keywords)

    def _execute_child(self, *positional: Any, **keywords: Any) -> None:
        self._control = start(self, *positional, **keywords)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        return self.returncode if self._control is None else collect(self, self._control, 0.0)

    def _wait(self, timeout: float | None) -> int:
        return cast("int", self.returncode) if self._control is None else await_end(self, self._control, timeout)

    def send_signal(self, sig: int) -> None:
        """Sends a signal to the tool. As in subprocess, to one that has ended it does nothing."""
        if self.poll() is None and self._control is not None:
            self._control.signal(sig)


def run(
    *popenargs: Any,
    input: Any = None,  # noqa: A002 - subprocess's own name
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **kwargs: Any,
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run``, confined and owned by the current tool call. See :class:`Popen`."""
    if input is not None:
        if kwargs.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        kwargs["stdin"] = subprocess.PIPE
    if capture_output:
        if kwargs.get("stdout") is not None or kwargs.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        kwargs["stdout"] = kwargs["stderr"] = subprocess.PIPE
    with Popen(*popenargs, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            process.kill()
            process.wait()
            expired.stdout, expired.stderr = process.communicate()
            raise
        except BaseException:
            process.kill()
            raise
        code = process.poll()
    if check and code:
        raise subprocess.CalledProcessError(code, process.args, output=stdout, stderr=stderr)
    return subprocess.CompletedProcess(process.args, code or 0, stdout, stderr)

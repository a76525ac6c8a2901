"""``run`` and ``Popen``: subprocess look-alikes whose tree the supervisor starts, confines and ends. Runs in target.

The tool is not this process's child: the zygote starts it, outside this actor's filter, so that it has a listener of
its own. What subprocess learns from waitpid comes here on a line of its own (*control*), one per process.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from ray_guard.client import carry
from ray_guard.client import channel as channels
from ray_guard.client.channel import Channel, receive_answer
from ray_guard.client.scope import traceparent
from ray_guard.errors import NotEnforced, SupervisorLost
from ray_guard.kernel import seqpacket

START_TIMEOUT_S: Final = 30.0
_DESCRIPTORS_LIMIT: Final = 200
"""Well below what one packet may carry on its way from here to the leader."""
CALL_VARIABLE: Final = "RAY_GUARD_CALL"
"""Set in a tool's environment: there everything is confined already, and ``run`` is plain subprocess."""

#: what a tool must not inherit: credentials, and what would lead it to Ray's control plane
_SECRET = re.compile(
    r"RAY_(?!GUARD_CALL$).*|AWS_.*|AZURE_.*|GOOGLE_.*|GCP_.*|GCLOUD_.*|ALIBABA_CLOUD_.*|ALIYUN_.*|OSS_.*|HF_TOKEN|"
    r"HUGGING_?FACE.*TOKEN|WANDB_API_KEY|OPENAI_.*|ANTHROPIC_.*|SSH_AUTH_SOCK|SSH_AGENT_PID|GPG_AGENT_INFO|"
    r"DBUS_SESSION_BUS_ADDRESS|KUBECONFIG|KUBERNETES_.*|DOCKER_HOST|DOCKER_CONFIG|LD_PRELOAD|OTEL_.*|"
    r".*(_TOKEN|_SECRET|_PASSWORD|_PASSWD|_API_KEY|_ACCESS_KEY|_PRIVATE_KEY|_CREDENTIALS?)",
    re.IGNORECASE,
)

#: private, but the one place where subprocess starts a child: all around it (pipes, text, timeouts) stays its own
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]  # noqa: SLF001
_LIMITS: Final = tuple(name for name in dir(resource) if name.startswith("RLIMIT_"))


def tool_environment(environ: dict[str, str]) -> dict[str, str]:
    """The environment a tool inherits: without credentials and without Ray's addresses."""
    return {key: value for key, value in environ.items() if not _is_secret(key)}


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    return _SECRET.fullmatch(name) is not None


def is_inside_call() -> bool:
    """Whether this process is a tool itself: confined, without a line to the supervisor."""
    return channels.current() is None and CALL_VARIABLE in os.environ


def start_message(
    argv: Sequence[str | bytes | os.PathLike[str]],
    *,
    executable: str | bytes | os.PathLike[str] | None,
    environment: dict[Any, Any],
    umask: int,
    numbers: Sequence[int],
    restore_signals: bool,
) -> bytes:
    """What the leader needs to know, as the content of a memory file (argv and environment may be long)."""
    return json.dumps(
        {
            "argv": [os.fsdecode(word) for word in argv],
            "executable": None if executable is None else os.fsdecode(executable),
            "environment": {os.fsdecode(key): os.fsdecode(value) for key, value in environment.items()},
            "umask": _own_umask() if umask < 0 else umask,
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
            "affinity": sorted(os.sched_getaffinity(0)),
            "descriptors": list(numbers),
            "new_group": True,
            "restore_signals": restore_signals,
        }
    ).encode()


def _own_umask() -> int:
    with open("/proc/self/status", "rb", buffering=0) as file:  # asking os.umask would set it for all threads
        for line in file.read(4096).splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o022


class Control:
    """The line to one tool.

    Args:
        channel: of the process that starts it.
        payload: see :func:`start_message`.
        folder: the working folder, as an open descriptor.
        descriptors: the tool's own, in the order of the payload's numbers.

    Raises:
        OSError: the program cannot be started, with exec's own errno.
        NotEnforced: the guard cannot hold it.
        SupervisorLost: nobody answers.
    """

    def __init__(self, channel: Channel, payload: bytes, folder: int, descriptors: Sequence[int]) -> None:
        self._lock = threading.Lock()
        self._channel = channel  # kept open: its end is the end of what was started over it
        self.exited: dict[str, Any] | None = None
        node = carry.current()
        message = {
            "op": "start",
            "span": None if node is None else node.call,
            "trace": None if node is None else node.trace,
            "parent": None if node is None else node.span,
            "identity": {} if node is None else node.identity,
        }
        memory = os.memfd_create("ray_guard-start", os.MFD_CLOEXEC)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                os.write(memory, payload)
                channel.pass_on(message, [theirs.fileno(), memory, folder, *descriptors])
            self._sock.settimeout(START_TIMEOUT_S)
            answer, _ = receive_answer(self._sock)
        except BaseException:
            self._sock.close()
            raise
        finally:
            os.close(memory)
        self._sock.settimeout(None)
        if answer.get("op") == "failed":
            self._sock.close()
            number = int(answer["errno"])
            raise OSError(number, os.strerror(number))
        self.pid = int(answer["pid"])

    def wait(self, timeout: float | None) -> dict[str, Any] | None:
        """The tool's end, within ``timeout`` seconds (None: whenever it comes); None: it still runs.

        A supervisor that is lost has ended the tool: then the status is that of SIGKILL.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._take(0.0):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._readable(left)
        return self.exited

    def _readable(self, timeout: float | None) -> bool:
        poll = select.poll()  # not select.select: a large actor has descriptors beyond 1024
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def _take(self, timeout: float) -> bool:
        """Takes in the tool's end if it has been told, in whichever thread comes first."""
        with self._lock:
            if self.exited is None and self._readable(timeout):
                try:
                    message, _ = receive_answer(self._sock)
                except SupervisorLost:
                    message = {"op": "exited", "status": int(signal.SIGKILL)}
                if message.get("op") == "exited":
                    self.exited = message
            return self.exited is not None

    def signal(self, number: int) -> None:
        try:
            seqpacket.send(self._sock, {"op": "signal", "number": int(number)})
        except OSError:
            pass  # it has ended meanwhile

    def close(self) -> None:
        self._sock.close()


def checked_descriptor(number: int) -> int:
    """A descriptor that a tool may have. Raises ValueError for one that would be a way out."""
    mode = os.fstat(number).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(number)) as sock:
            if sock.family != socket.AF_UNIX or sock.getpeername() or sock.getsockname():
                raise ValueError(
                    f"descriptor {number} is a connected socket, which no rule could judge any more: "
                    "pass a pipe, a file or a socketpair"
                )
    elif stat.S_ISDIR(mode):
        raise ValueError(f"descriptor {number} is a folder: pass files, pipes or socketpairs")
    return number


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
        given = _SIGNATURE.bind(self, *positional, **keywords).arguments
        for name, plain in (("preexec_fn", None), ("gid", None), ("gids", None), ("uid", None)):
            if given.get(name, plain) is not plain:
                raise NotEnforced([name], "it would run in a tool process before the filter stands, or change its user")
        channel = channels.current()
        if channel is None:
            raise NotEnforced(["subprocess"], "this process is not guarded: use ray_guard.guard or ray_guard.confine")
        argv = _argv(given["args"])
        executable = given["executable"]
        if given["shell"]:
            argv = [*(["/bin/sh", "-c"] if executable is None else [executable, "-c"]), *argv]
        standard = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        numbers = [0, 1, 2, *sorted({int(number) for number in given["pass_fds"]} - {0, 1, 2})]
        if len(numbers) > _DESCRIPTORS_LIMIT:
            raise ValueError(f"pass_fds: at most {_DESCRIPTORS_LIMIT - 3} descriptors travel to a tool")
        opened: list[int] = []
        try:
            descriptors = [
                checked_descriptor(pipe) if pipe != -1 else standard_descriptor(own, opened)
                for own, pipe in enumerate(standard)
            ]
            descriptors += [checked_descriptor(number) for number in numbers[3:]]
            folder = os.open(given["cwd"] or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.append(folder)
            environment = given["env"] if given["env"] is not None else tool_environment(dict(os.environ))
            payload = start_message(
                argv,
                executable=executable,
                environment={**environment, **own_variables()},
                umask=int(given["umask"]),
                numbers=numbers,
                restore_signals=bool(given["restore_signals"]),
            )
            try:
                self._control = Control(channel, payload, folder, descriptors)
            except OSError as error:
                if error.filename is None and error.errno is not None:
                    error.filename = os.fsdecode(argv[0])
                raise
        finally:
            for descriptor in opened:
                os.close(descriptor)
        self.pid = self._control.pid
        self._child_created = True
        close: Callable[..., None] = self._close_pipe_fds  # type: ignore[attr-defined]
        close(*(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        return self._collect(0.0)

    def _wait(self, timeout: float | None) -> int:
        if self._collect(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return cast("int", self.returncode)

    def _collect(self, timeout: float | None) -> int | None:
        if self.returncode is None and self._control is not None:
            ended = self._control.wait(timeout)
            if ended is not None and self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(int(ended["status"]))
                self._control.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Sends a signal to the tool. As in subprocess, to one that has ended it does nothing."""
        if self.poll() is None and self._control is not None:
            self._control.signal(sig)


def _argv(args: Any) -> list[Any]:
    if isinstance(args, (str, bytes, os.PathLike)):
        return [args]
    argv = list(args)
    if not argv:
        raise IndexError("list index out of range")  # as subprocess says it
    return argv


def standard_descriptor(number: int, opened: list[int]) -> int:
    """This process's own standard descriptor for a tool to inherit; /dev/null where it is closed or a network socket.

    A unix socket is fine here: under a service manager that is where output goes.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return number
        with socket.socket(fileno=os.dup(number)) as sock:
            if sock.family == socket.AF_UNIX:
                return number
    except OSError:
        pass  # closed
    opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    return opened[-1]


def own_variables() -> dict[str, str]:
    node = carry.current()
    variables = {CALL_VARIABLE: "1" if node is None or node.call is None else node.call}
    parent = traceparent()
    if parent is not None:
        variables["TRACEPARENT"] = parent
    return variables


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

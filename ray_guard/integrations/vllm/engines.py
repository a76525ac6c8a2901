"""target: names vLLM's processes as those that may use the actor's GPUs, and tells their phases.

vLLM starts ``VLLM::EngineCore`` and ``VLLM::Worker`` processes by fork or spawn, workers from within the core. None of
them has a line to the supervisor, and none should: they say who they are on a named pipe of the process that holds the
engine, which registers them. They do so when vLLM loads its plugins there, before any of them touches a device.

What is said on the pipe proves nothing (see :mod:`ray_guard.compute.engines`); the supervisor registers only processes
that this actor has started and that are no tool's.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from ray_guard.client import channel, engine
from ray_guard.client.engine import EngineProcess, Phase
from ray_guard.errors import RayGuardError

logger = logging.getLogger("ray_guard")

LINE: Final = "RAY_GUARD_ENGINES"
"""The variable that names the pipe to vLLM's processes."""
_STOP: Final = b"\n"


class Engines:
    """The processes of one engine. In a process that is not guarded nothing is told."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._known: dict[int, EngineProcess] = {}
        self._phase = Phase.LOAD
        self._resting = Phase.ROLLOUT
        """The phase outside of what is being done to it: ROLLOUT or SLEEP."""
        self._doing = 0
        self._requests: ExitStack | None = None
        self._folder: str | None = None
        self._reader: threading.Thread | None = None
        self._barred = False

    def pids(self) -> tuple[int, ...]:
        """Those that are registered."""
        with self._lock:
            return tuple(self._known)

    # The pipe ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While vLLM starts an engine: what it starts finds the pipe in its environment. Raises OSError."""
        if channel.current() is None:
            yield
            return
        self._folder = tempfile.mkdtemp(prefix="ray_guard-engines-")
        path = os.path.join(self._folder, "line")
        os.mkfifo(path, 0o600)
        # Both ends here: it never reports its end, whoever comes and goes.
        line = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._reader = threading.Thread(target=self._read, args=(line,), name="ray_guard-engines", daemon=True)
        self._reader.start()
        before = os.environ.get(LINE)
        os.environ[LINE] = path
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            if before is None:
                os.environ.pop(LINE, None)
            else:
                os.environ[LINE] = before

    def _read(self, line: int) -> None:
        with os.fdopen(line, "rb", buffering=0) as pipe:
            kept = b""
            while True:
                *words, kept = (kept + pipe.read(4096)).split(b"\n")
                for each in words:
                    if not each:  # _STOP
                        return
                    self._heard(each)

    def _heard(self, words: bytes) -> None:
        try:
            what, _, word = words.decode("ascii").partition(" ")
            if what == "phase":
                self.enter(Phase(word))
            elif what == "engine":
                self.register(int(word))
        except (ValueError, RayGuardError):
            logger.warning("ray_guard: an engine process said what is not understood: %r", words[:100], exc_info=True)

    def close(self) -> None:
        """The engine is gone."""
        folder, self._folder = self._folder, None
        if folder is None:
            return
        _say(os.path.join(folder, "line"), _STOP)
        shutil.rmtree(folder, ignore_errors=True)

    # What is told -----------------------------------------------------------------------------------------------------

    def register(self, pid: int) -> None:
        """Names ``pid`` as an engine process, in the phase that all are in. Raises SupervisorLost."""
        if channel.current() is None or self._barred:
            return
        with self._lock:
            try:
                process = engine.register(pid, self._phase)
            except RayGuardError as error:
                # gpu: none, or a process that has ended again: it is no engine then, and may not open a GPU.
                self._barred = "gpu" in getattr(error, "features", ())
                logger.info("ray_guard: process %d is not registered as an engine: %s", pid, error)
                return
            process.answers_requests()
            self._known[pid] = process
            if self._requests is not None:
                self._requests.enter_context(process.request())

    def enter(self, phase: Phase) -> None:
        """All are in ``phase`` from here on. Raises SupervisorLost."""
        with self._lock:
            if phase in (Phase.ROLLOUT, Phase.SLEEP):
                self._resting = phase
            self._phase = phase
            for process in self._known.values():
                process.enter(phase)

    @contextmanager
    def doing(self, phase: Phase) -> Iterator[None]:
        """While something is done to the engine from outside; several may overlap. Raises SupervisorLost."""
        with self._lock:
            self._doing += 1
            resting = self._resting
            self.enter(phase)
            self._resting = resting
        try:
            yield
        finally:
            with self._lock:
                self._doing -= 1
                if self._doing == 0:
                    self.enter(self._resting)

    def rest(self, phase: Phase) -> None:
        """What the phase is, as soon as nothing is being done to it any more."""
        with self._lock:
            self._resting = phase
            if self._doing == 0:
                self.enter(phase)

    def busy(self, any_request: bool) -> None:  # noqa: FBT001 - the ledger's callback
        """The first request has come, or the last has gone. Raises SupervisorLost."""
        with self._lock:
            if any_request and self._requests is None:
                self._requests = ExitStack()
                for process in self._known.values():
                    self._requests.enter_context(process.request())
            elif not any_request and self._requests is not None:
                requests, self._requests = self._requests, None
                requests.close()


def announce() -> None:
    """In a process that vLLM has started: says that it is an engine's."""
    _say(os.environ.get(LINE), f"engine {os.getpid()}\n".encode())


def announce_phase(phase: Phase) -> None:
    """In a process that vLLM has started: says what the engine is doing."""
    _say(os.environ.get(LINE), f"phase {phase.value}\n".encode())


def _say(path: str | None, words: bytes) -> None:
    if not path:
        return
    try:
        line = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO):  # whoever holds the engine has gone
            logger.warning("ray_guard: %s: %s", path, error)
        return
    try:
        os.write(line, words)
    except OSError as error:
        logger.warning("ray_guard: %s: %s", path, error)
    finally:
        os.close(line)

"""The supervisor's end of its GPU helper: started when it is needed, again when it is lost. Runs in the supervisor.

The helper knows nothing of whoever started the supervisor: a fixed environment, no user site, no working folder to
import from.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Final, NamedTuple, cast

from ray_guard.egress.gate import Waiting
from ray_guard.kernel import nvml
from ray_guard.kernel.nvml import Reading
from ray_guard.log import logger

log = logger("ray_guard.gpu")

LOAD_S: Final = 10.0
"""How long NVML may take to be loaded; without a persistent driver every GPU is started then."""
_END_S: Final = 0.1
_LINE_LIMIT: Final = 4 << 20
_ARGV: Final = (sys.executable, "-I", "-m", "ray_guard.supervisor.gpu_helper")
_ENVIRONMENT: Final[Mapping[str, str]] = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
"""Nothing of the caller's: LD_* would choose another library, and an MPS client's variables break NVML."""


class Held(NamedTuple):
    """A process that holds GPU devices (numbers as ``st_rdev``); None: what it holds cannot be read."""

    pid: int
    start_time: int
    devices: tuple[int, ...] | None


class Census(NamedTuple):
    """Who held a GPU at ``monotonic`` seconds."""

    monotonic: float
    held: tuple[Held, ...]


class Poller:
    """A running helper.

    Args:
        loop: the supervisor's.
        counted: called with each census.
        read: called with each reading of all GPUs.
        known: called once, when NVML is loaded or is known not to be.
        lost: called once, when the helper has ended by itself.
    """

    def __init__(
        self,
        loop: Waiting,
        counted: Callable[[Census], None],
        read: Callable[[list[Reading]], None],
        known: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self.began = time.monotonic()
        self.missing: str | None = ""
        """Why NVML tells nothing; "": that is not known yet; None: it works."""
        self.about: dict[str, Any] = {}
        self._loop = loop
        self._counted, self._read, self._known, self._lost = counted, read, known, lost
        self._buffer = b""
        self._closed = False
        import subprocess  # not with this module: where there is no GPU no helper is started, but every start waits

        self._helper = subprocess.Popen(
            _ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(_ENVIRONMENT), cwd="/", bufsize=0
        )
        self._lifeline, self._lines = cast("IO[bytes]", self._helper.stdin), cast("IO[bytes]", self._helper.stdout)
        os.set_blocking(self._lines.fileno(), False)
        loop.watch(self._lines.fileno(), select.EPOLLIN, lambda _events: self._ready())
        loop.later(LOAD_S, self._impatient)

    @property
    def pid(self) -> int:
        return self._helper.pid

    def _impatient(self) -> None:
        if self.missing == "" and not self._closed:
            self._decide(f"NVML did not answer within {LOAD_S:g} s")

    def _decide(self, missing: str | None) -> None:
        self.missing = missing
        if missing is not None:
            log.warning("GPUs are not measured: %s", missing)
        self._known()

    def _ready(self) -> None:
        try:
            chunk = os.read(self._lines.fileno(), 1 << 20)
        except BlockingIOError:
            return
        if not chunk or len(self._buffer) > _LINE_LIMIT:
            self.close()
            self._lost()
            return
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            if self._closed:
                return
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("the GPU helper said %r: %s", line[:200], error)

    def _take(self, message: dict[str, Any]) -> None:
        if "census" in message:
            told = message["census"]
            held = [Held(int(pid), int(start), tuple(map(int, devices))) for pid, start, devices in told["holders"]]
            held += [Held(int(pid), int(start), None) for pid, start in told["unreadable"]]
            self._counted(Census(float(told["monotonic"]), tuple(held)))
        elif "readings" in message:
            self._read([nvml.from_wire(each) for each in message["readings"]])
        elif "nvml" in message:
            self.about = dict(message["nvml"])
            error = self.about.get("error")
            self._decide(None if error is None else str(error))

    def close(self) -> None:
        """Ends it, and hardly waits: it may hang within the driver."""
        if self._closed:
            return
        from subprocess import TimeoutExpired

        self._closed = True
        self._loop.forget(self._lines.fileno())
        self._lifeline.close()
        self._lines.close()
        self._helper.kill()
        try:
            self._helper.wait(_END_S)
        except TimeoutExpired:
            log.warning("the GPU helper (pid %d) does not end: it waits for the driver", self.pid)
            self._helper.returncode = 0  # nobody can do more about it

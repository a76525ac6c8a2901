"""The line to a courier, which takes checkpoints off the host. Runs in the supervisor."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import IO, cast

from ray_guard.egress.made import Waiting
from ray_guard.log import logger

log = logger("ray_guard.courier")


class Courier:
    """One destination's (:mod:`ray_guard.evidence.courier`); it ends with this process, after what it was given last.

    Args:
        told: called with why checkpoints do not arrive, whenever that begins.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, loop: Waiting, spelled: str, environ: Mapping[str, str], told: Callable[[str], None]) -> None:
        self._loop = loop
        self._told = told
        # -P: the working folder, which a tool may write to, is no place to import from.
        argv = [sys.executable, "-P", "-m", "ray_guard.evidence.courier", spelled]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env={**os.environ, **environ}, bufsize=0
        )
        self._out, self._back = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        os.set_blocking(self._out.fileno(), False)
        loop.watch(self._back.fileno(), select.EPOLLIN, lambda _events: self._ready())

    def take(self, key: str, note: str) -> None:
        """Also beside the loop. What it has no room for is left out: the next checkpoint stands for this one too."""
        line = json.dumps({"key": key, "checkpoint": note}).encode() + b"\n"
        try:
            os.write(self._out.fileno(), line)  # shorter than PIPE_BUF: whole or not at all
        except (OSError, ValueError) as error:
            log.warning("a checkpoint is not taken off the host: %s", error)

    def _ready(self) -> None:
        said = os.read(self._back.fileno(), 1 << 16).decode(errors="replace")
        if not said:
            self._loop.forget(self._back.fileno())
            self._told("the courier has ended")
            return
        for why in said.splitlines():
            if why:
                self._told(why)
            else:
                log.info("checkpoints arrive again")

    def close(self) -> None:
        """Tells it that nothing more comes; it delivers what it has."""
        self._out.close()
        self._process.returncode = 0  # it is not waited for

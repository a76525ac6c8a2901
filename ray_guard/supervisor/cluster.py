"""What the supervisor knows of the Ray cluster: its endpoints, re-read on a miss. Runs in the supervisor.

The supervisor holds no ray. A helper (``ray_guard.actors.directory``) reads the node and worker tables for it and
answers one line per question; it is started when the first target of a cluster arrives and lives while one is here.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any, Final, cast

from ray_guard.egress.gate import Waiting
from ray_guard.log import logger
from ray_guard.policy.destination import canonical_address

log = logger("ray_guard.cluster")

REREAD_S: Final = 1.0
"""Least time between two readings: a target that sweeps addresses must not load the cluster's control plane."""
END_S: Final = 2.0
"""How long the helper has to do what it was asked last."""
PATIENCE_S: Final = 3.0
"""How long a connect that missed waits for the reading it caused."""

Endpoint = tuple[str, int]


class Directory:
    """The endpoints of one cluster.

    Args:
        argv: the helper's command.
        environ: its environment: the target's, for it must be able to log in to the cluster.
        changed: called whenever the endpoints are others than before.
    """

    def __init__(
        self, argv: Sequence[str], environ: dict[str, str], loop: Waiting, changed: Callable[[], None]
    ) -> None:
        self.endpoints: frozenset[Endpoint] = frozenset()
        self.control: frozenset[Endpoint] = frozenset()
        """What takes jobs or commands: the job API, the client server, agents' HTTP. Nobody reaches it unnamed."""
        self.nodes = 0
        self._loop = loop
        self._changed = changed
        self._asked = self._read = float("-inf")
        self._buffer = b""
        self._awaited: deque[Callable[[dict[str, Any]], None]] = deque()
        """Who takes the next answers: the helper gives them in the order of the questions."""
        self._helper = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, cwd="/", bufsize=0
        )
        self._question, self._answers = cast("IO[bytes]", self._helper.stdin), cast("IO[bytes]", self._helper.stdout)
        os.set_blocking(self._answers.fileno(), False)
        loop.watch(self._answers.fileno(), select.EPOLLIN, self._answered)
        self.reread()

    def include(self, endpoints: Sequence[Sequence[Any]]) -> None:
        """Adds what the trusted start of an actor already knew, so that it need not wait for the first reading."""
        known = frozenset(_endpoint(entry) for entry in endpoints)
        if not known <= self.endpoints:
            self.endpoints |= known
            self._changed()

    def fresh(self, since: float) -> bool:
        """Whether a reading asked for at or after ``since`` (monotonic) has come; asks for one where that is due.

        A dead helper, or one that is silent, gives no reading: what was missed stays missed.
        """
        if self._read >= since:
            return True
        if time.monotonic() - since > PATIENCE_S or self._helper.poll() is not None:
            return True
        if self._asked < since and time.monotonic() - self._asked >= REREAD_S:
            self.reread()
        return False

    def reread(self) -> None:
        self._asked = time.monotonic()
        self.ask({"op": "read"}, self._take)

    def ask(self, question: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> None:
        """``take`` is called with the answer, later; ``{"error": …}`` where there will be none."""
        try:
            self._question.write(json.dumps(question).encode() + b"\n")
        except OSError as error:
            log.warning("the cluster's directory cannot be asked: %s", error)
            self._loop.later(0, partial(take, {"error": str(error)}))
            return
        self._awaited.append(take)

    def _answered(self, _events: int) -> None:
        try:
            chunk = os.read(self._answers.fileno(), 1 << 20)
        except BlockingIOError:
            return
        if not chunk:
            self._loop.forget(self._answers.fileno())
            log.warning("the cluster's directory has ended")
            while self._awaited:
                self._awaited.popleft()({"error": "the cluster's directory has ended"})
            return
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            try:
                answer = json.loads(line)
            except ValueError:
                answer = {"error": f"no JSON: {line[:200]!r}"}
            if self._awaited:
                self._awaited.popleft()(answer if isinstance(answer, dict) else {"error": "no object"})

    def _take(self, answer: dict[str, Any]) -> None:
        try:
            endpoints = frozenset(_endpoint(entry) for entry in answer["endpoints"])
            control = frozenset(_endpoint(entry) for entry in answer.get("control", ()))
            self.nodes = len(answer.get("nodes", ()))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the cluster's directory answered %.200r: %s", answer, error)
            return
        self._read = self._asked
        if (endpoints, control) != (self.endpoints, self.control):
            self.endpoints, self.control = endpoints, control
            self._changed()

    def close(self) -> None:
        self._loop.forget(self._answers.fileno())
        self._question.close()
        self._answers.close()
        try:
            self._helper.wait(END_S)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()


def _endpoint(entry: Sequence[Any]) -> Endpoint:
    address, port = entry
    return canonical_address(str(address)), int(port)

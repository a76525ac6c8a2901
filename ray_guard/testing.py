"""Shipped fakes, for our own tests and for those of programs that use ray_guard. Run in test processes only."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ray_guard.errors import SupervisorLost


class RecordingChannel:
    """A channel to a supervisor that keeps what it is sent and answers what it was told to.

    Args:
        answers: by ``op``, what :meth:`request` returns: a dict, or what makes one of the message. Reservations of
            tokens are granted where nothing else is said.
        identity: attributes that the channel knows of this process, such as ``{"rl.run.id": "r1"}``.
    """

    def __init__(
        self,
        answers: dict[str, dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]] | None = None,
        identity: dict[str, str] | None = None,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.answers = {"reserve": {"ok": True, "scope": "actor", "unknown": False}, **(answers or {})}
        self.identity = identity or {}
        self.lost = False
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        # Through JSON, as on the real one: what cannot be written must fail here too.
        self.send_packet(json.dumps(message, allow_nan=False).encode())

    def send_packet(self, packet: bytes) -> None:
        if self.lost:
            raise SupervisorLost("the recording channel was told to be lost")
        with self._lock:
            self.messages.append(json.loads(packet))

    def request(
        self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout: float | None = None
    ) -> dict[str, Any]:
        return self.exchange(message, descriptors, timeout)[0]

    def exchange(
        self,
        message: dict[str, Any],
        descriptors: Sequence[int] = (),  # noqa: ARG002 - the real channel's signature
        timeout: float | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], list[int]]:
        self.send(message)
        answer = self.answers.get(str(message.get("op")))
        if answer is None:
            raise SupervisorLost(f"no answer was prepared for {message!r}")
        return answer(message) if callable(answer) else answer, []

    def warnings(self) -> list[str]:
        return []

    def sent(self, op: str, **values: Any) -> list[dict[str, Any]]:
        """The messages of one ``op`` that hold `values`, in the order in which they came."""
        with self._lock:
            found = list(self.messages)
        return [m for m in found if m.get("op") == op and all(m.get(k) == v for k, v in values.items())]

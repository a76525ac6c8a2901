"""target: where the messages of this process's scopes go, if anywhere.

A confined process has a channel, and there evidence is binding: a span that cannot be journaled is a call that must
not start, so :class:`~ray_guard.errors.SupervisorLost` reaches the caller. An unguarded process (a driver) may have an
observer; there a failure is logged once and forgotten, because observers never change a verdict nor break a tool.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray_guard.client import channel as _channel
from ray_guard.client.carry import Quotas
from ray_guard.client.spans import clean_text, to_json, warn_once
from ray_guard.errors import SupervisorLost

_RETRY_S = 1.0


class Wire(Protocol):
    """What the scopes need of a channel. ``send_packet(bytes)`` is used where it exists: it saves a json.dumps."""

    def send(self, message: dict[str, Any]) -> None: ...

    def request(
        self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout: float | None = None
    ) -> dict[str, Any]: ...


def base_identity(wire: Wire | None) -> dict[str, str | int]:
    """The identity that every span of this process has: the run, where it is known."""
    identity = getattr(wire, "identity", None)
    run = identity.get("rl.run.id") if isinstance(identity, Mapping) else getattr(identity, "run_id", None)
    run = run or os.environ.get("RAY_GUARD_RUN_ID")
    return {"rl.run.id": clean_text(str(run), 256)} if run else {}


class Outlet:
    """One channel, seen from the scopes."""

    __slots__ = ("_send", "binding", "identity", "identity_json", "wire")

    def limits(self, scope: str) -> Mapping[str, float]:
        """What the policy says of tokens and FLOPs in that scope."""
        found: Mapping[str, float] = getattr(self.wire, "quotas", {}).get(scope, {})
        return found

    def quota(self, scope: str, name: str, limits: Mapping[str, float]) -> Quotas:
        """A limited scope, as other nodes are told of it."""
        if not limits:
            return ()
        return (
            (scope, name, getattr(self.wire, "account", ""), limits if getattr(self.wire, "leases", False) else None),
        )

    def __init__(self, wire: Wire, *, binding: bool) -> None:
        self.wire = wire
        self.binding = binding
        self.identity = base_identity(wire)
        self.identity_json = to_json(self.identity)
        direct: Callable[[bytes], object] | None = getattr(wire, "send_packet", None)
        self._send = direct if direct is not None else self._send_as_dict

    def _send_as_dict(self, packet: bytes) -> None:
        self.wire.send(json.loads(packet))

    def post(self, packet: bytes) -> None:
        """Hands one message over.

        Raises:
            SupervisorLost: the channel of a confined process is dead.
        """
        try:
            self._send(packet)
        except SupervisorLost:
            if self.binding:
                raise
            warn_once("observer", "ray_guard: the supervisor is gone; spans of this process are not journaled")
        except Exception:  # noqa: BLE001 - e.g. memory: the tool goes on
            warn_once("post", "ray_guard: a span message could not be sent")


class _Finder:
    """Finds the outlet anew for each scope (a process may be confined at any time), without paying for it."""

    __slots__ = ("_last", "_look_again")

    def __init__(self) -> None:
        self._last: Outlet | None = None
        self._look_again = 0.0

    def find(self) -> Outlet | None:
        """The outlet of this process right now."""
        wire: Wire | None = _channel.current()
        binding = wire is not None
        if wire is None:
            # Where there is nothing to observe, asking is not free; a supervisor may come up later, so ask again.
            now = time.monotonic()
            if now < self._look_again:
                return None
            try:
                wire = _channel.observer()
            except Exception:  # noqa: BLE001 - whatever keeps a supervisor from starting, a driver goes on
                warn_once("observer", "ray_guard: no evidence folder can be reached; spans are not journaled")
            if wire is None:
                self._look_again = now + _RETRY_S
                return None
        last = self._last
        if last is not None and last.wire is wire and last.binding is binding:
            return last
        self._last = found = Outlet(wire, binding=binding)
        return found


_finder = _Finder()
outlet = _finder.find

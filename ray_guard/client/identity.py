"""Who a target is, as it tells its supervisor. Runs in the target, and in ``ray-guard run``."""

from __future__ import annotations

import os
import re

from ray_guard.named import NamedTuple


class Identity(NamedTuple):
    """Empty fields are unknown; ``evidence`` names a folder and is never empty."""

    evidence: str
    run_id: str = ""
    service_name: str = "ray_guard"
    job_id: str = ""
    node_id: str = ""
    actor_id: str = ""
    actor_name: str = ""

    def as_message(self) -> dict[str, str]:
        fields = self._asdict()
        del fields["evidence"]
        return fields


def from_environment(service_name: str, evidence: str | None = None) -> Identity:
    """The identity of a program that belongs to no actor; ``evidence`` comes before ``RAY_GUARD_EVIDENCE``."""
    return Identity(
        evidence=evidence or os.environ.get("RAY_GUARD_EVIDENCE") or _default_evidence(),
        run_id=os.environ.get("RAY_GUARD_RUN_ID") or f"run-{os.urandom(4).hex()}",
        service_name=named_service(service_name),
    )


def named_service(default: str) -> str:
    """``service.name`` as the standard variables say it: ``OTEL_SERVICE_NAME``, else ``OTEL_RESOURCE_ATTRIBUTES``."""
    named = os.environ.get("OTEL_SERVICE_NAME", "").strip()
    if not named:
        pairs = (item.partition("=") for item in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
        named = next((_decoded(value.strip()) for key, _, value in pairs if key.strip() == "service.name"), "")
    return named or default


def _decoded(text: str) -> str:
    # Not urllib's: that loads longer than all else here, and ``ray-guard run`` waits for it.
    raw = re.sub(rb"%([0-9a-fA-F]{2})", lambda found: bytes((int(found[1], 16),)), text.encode())
    return raw.decode("utf-8", "replace")


def _default_evidence() -> str:
    """Where evidence goes when nobody named a folder: the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "ray_guard", "evidence")

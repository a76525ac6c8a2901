"""What a relayed connection needs beyond a direct one. Runs in the supervisor; loaded with the first that is relayed.

Most policies relay nothing, and a cold start would wait for what is loaded here.
"""

from __future__ import annotations

from typing import Any

from ray_guard.egress.relay.desk import MOVER_LOST
from ray_guard.egress.relay.proxy import Proxied
from ray_guard.egress.relay.speech.tags import foreign
from ray_guard.policy.decide import Decision, Reason, Request
from ray_guard.supervisor.model_calls import ModelCalls
from ray_guard.supervisor.model_calls import speech as model_speech

__all__ = ["MOVER_LOST", "ModelCalls", "Proxied", "model_speech", "speech"]


def speech(request: Request, decision: Decision, *, judged: bool) -> dict[str, Any]:
    """See :class:`~ray_guard.egress.relay.speech.choice.Speech`. ``judged``: its first bytes are, while it is open."""
    denied = foreign(decision.rule, request.port) if decision.reason is Reason.RULE else frozenset()
    expected = {protocol.value: sorted(names) for protocol, names in decision.expected}
    if decision.proxy is not None:  # it is asked for one name: no other may be meant
        expected = {key: [decision.name] for key, names in expected.items() if decision.name in names}
    return {"expected": expected, "denied": sorted(denied), "port": request.port, "judged": judged}

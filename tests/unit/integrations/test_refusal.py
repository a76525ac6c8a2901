"""A refusal is ray_guard's error, has a status in vLLM's server, and crosses actor calls without vLLM."""

from __future__ import annotations

import pickle

import pytest

from ray_guard.errors import BudgetExceeded, EgressDenied, NotEnforced, RayGuardError, SupervisorLost

exceptions = pytest.importorskip("vllm.exceptions", reason="vLLM is not installed: make env installs it")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BudgetExceeded("tokens", 9, 5, "episode", "ab"), 429),
        (NotEnforced(["budgets.actor.flops"], "unknown"), 501),
        (SupervisorLost("gone"), 503),
        (EgressDenied("tcp://192.0.2.1:22", "not_listed"), 403),
        (RayGuardError("ended"), 403),
    ],
)
def test_both_at_once(error: RayGuardError, status: int) -> None:
    from ray_guard.integrations.vllm import refusal

    found = refusal.of(error)
    assert isinstance(found, type(error))
    assert isinstance(found, exceptions.GracefulHTTPError)
    assert found.http_status == status
    assert str(found) == found.message == str(error)
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(error)
    assert again.args == error.args

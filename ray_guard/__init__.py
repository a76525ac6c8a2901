"""ray_guard: kernel-enforced egress and compute budgets for Ray actors, with a span for every tool call.

The public names, nothing else (see README.md). Names are loaded when first used, so that ``import ray_guard`` stays
cheap and pulls in neither ray nor what a worker does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_guard.actors.guard import guard as guard
    from ray_guard.client.aio import create_subprocess_exec as create_subprocess_exec
    from ray_guard.client.aio import create_subprocess_shell as create_subprocess_shell
    from ray_guard.client.confine import confine as confine
    from ray_guard.client.decorator import tool as tool
    from ray_guard.client.process import Popen as Popen
    from ray_guard.client.process import run as run
    from ray_guard.client.scope import attach as attach
    from ray_guard.client.scope import chat as chat
    from ray_guard.client.scope import context as context
    from ray_guard.client.scope import episode as episode
    from ray_guard.client.scope import iteration as iteration
    from ray_guard.client.scope import record_reward as record_reward
    from ray_guard.client.scope import tool_call as tool_call
    from ray_guard.client.scope import turn as turn
    from ray_guard.client.scope import violations as violations
    from ray_guard.errors import BudgetExceeded as BudgetExceeded
    from ray_guard.errors import EgressDenied as EgressDenied
    from ray_guard.errors import NotEnforced as NotEnforced
    from ray_guard.errors import PolicyError as PolicyError
    from ray_guard.errors import RayGuardError as RayGuardError
    from ray_guard.errors import SupervisorLost as SupervisorLost
    from ray_guard.policy.model import Budget as Budget
    from ray_guard.policy.model import Budgets as Budgets
    from ray_guard.policy.model import Egress as Egress
    from ray_guard.policy.model import Policy as Policy

_HOMES = {
    "ray_guard.actors.guard": ("guard",),
    "ray_guard.client.aio": ("create_subprocess_exec", "create_subprocess_shell"),
    "ray_guard.client.confine": ("confine",),
    "ray_guard.client.decorator": ("tool",),
    "ray_guard.client.process": ("Popen", "run"),
    "ray_guard.client.scope": (
        "attach",
        "chat",
        "context",
        "episode",
        "iteration",
        "record_reward",
        "tool_call",
        "turn",
        "violations",
    ),
    "ray_guard.errors": (
        "BudgetExceeded",
        "EgressDenied",
        "NotEnforced",
        "PolicyError",
        "RayGuardError",
        "SupervisorLost",
    ),
    "ray_guard.policy.model": ("Budget", "Budgets", "Egress", "Policy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the names are those of _HOMES


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ray_guard' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""target: whether tokens or FLOPs are limited here, and in the processes that start here. Standard library only."""

from __future__ import annotations

import os
from typing import Final

from ray_guard.client import channel, confine

_MARK: Final = "RAY_GUARD_VLLM"
_LIMITED: Final = "limited"


def limits() -> tuple[str, ...]:
    """The keys by which this process's policies limit tokens or FLOPs, where they are enforced."""
    found = []
    for policy in confine.policies():
        budgets = policy.get("budgets")
        if policy.get("mode") != "enforce" or not isinstance(budgets, dict):
            continue
        for scope, limited in budgets.items():
            for kind in ("tokens", "flops"):
                if isinstance(limited, dict) and limited.get(kind) is not None:
                    found.append(f"budgets.{scope}.{kind}")
    return tuple(dict.fromkeys(found))


def mark() -> None:
    """Tells the processes that this one starts (not its tools) what they are under."""
    if channel.current() is not None:
        os.environ[_MARK] = _LIMITED if limits() else ""


def unmetered() -> bool:
    """Whether this process was started by a guarded one whose tokens are limited, and has no line to be metered by."""
    return channel.current() is None and os.environ.get(_MARK) == _LIMITED

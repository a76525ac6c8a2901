"""What the programs share: who they are confined as, and how they say what they found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray_guard

MODEL = sys.argv[1]
NAME = "tiny"
_SAID = Path(sys.argv[2])

ENGINE: dict[str, Any] = {
    "model": MODEL,
    "served_model_name": NAME,
    "dtype": "float32",  # bfloat16 takes kernels that not every CPU has
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
}

#: what vLLM needs of the outside: its own sockets, and those by which its workers meet
EGRESS = {"allow": ["unix:///tmp/*", "collectives"]}


def say(name: str, value: Any) -> None:
    with _SAID.open("a") as out:
        out.write(json.dumps([name, value]) + "\n")


def confine(**policy: Any) -> None:
    ray_guard.confine({"role": "policy", "gpu": "engine", "egress": EGRESS, **policy})


def refused(action: Callable[[], Any]) -> Any:
    """What an action was refused with, as data."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it was is what is asked
        return described(error)
    return None


def described(error: BaseException) -> dict[str, Any]:
    found: dict[str, Any] = {"type": type(error).__name__, "text": str(error)}
    if isinstance(error, ray_guard.BudgetExceeded):
        found |= {"kind": error.kind, "value": error.value, "limit": error.limit, "scope": error.scope}
    return found


def counted(output: Any) -> dict[str, Any]:
    """What vLLM itself says of a finished request."""
    return {
        "id": output.request_id,
        "input": len(output.prompt_token_ids),
        "output": sum(len(each.token_ids) for each in output.outputs),
        "cached": output.num_cached_tokens,
        "reasons": [each.finish_reason for each in output.outputs],
    }

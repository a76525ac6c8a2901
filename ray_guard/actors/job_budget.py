"""supervisor's helper: the parts of a limit that holds over several nodes, claimed in the cluster's GCS.

A limit is cut into parts, and a part is whose key it is: the GCS writes a key that must be new for one writer alone.
So the parts that all nodes have together never pass the limit, whoever asks at the same moment, and no process has to
live for that, be found, or be restarted with what it knew. A part whose owner has died stays claimed: what it had used
of it nobody knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final, Protocol

NAMESPACE: Final = b"ray_guard"
TIMEOUT_S: Final = 2.0
_MOST: Final = 4096
"""Parts of one limit."""


class Store(Protocol):
    """What is needed of the GCS's key-value store."""

    def put_new(self, key: str, value: str) -> bool:
        """Whether there was no such key, and now is."""
        ...

    def delete(self, key: str) -> None: ...

    def delete_all(self, prefix: str) -> None: ...

    def keys(self, prefix: str) -> Iterable[str]: ...


class Gcs:
    """The GCS itself. Logs in as Ray does."""

    def __init__(self, address: str) -> None:
        from ray import _raylet

        raylet: Any = _raylet
        self._client: Any = raylet.GcsClient(address=address)

    def put_new(self, key: str, value: str) -> bool:
        return bool(self._client.internal_kv_put(key.encode(), value.encode(), False, NAMESPACE, timeout=TIMEOUT_S))

    def delete(self, key: str) -> None:
        self._client.internal_kv_del(key.encode(), False, NAMESPACE, timeout=TIMEOUT_S)

    def delete_all(self, prefix: str) -> None:
        self._client.internal_kv_del(prefix.encode(), True, NAMESPACE, timeout=TIMEOUT_S)

    def keys(self, prefix: str) -> Iterable[str]:
        return [key.decode() for key in self._client.internal_kv_keys(prefix.encode(), NAMESPACE, timeout=TIMEOUT_S)]


def claim(store: Store, question: dict[str, Any], nodes: int) -> dict[str, Any]:
    """Gives parts of a limit back and claims others.

    Args:
        store: where.
        question: ``name`` of the limit, ``holder`` (who asks), ``parts`` (how many it has), ``give`` (numbers of those
            given back), ``least`` (how many are needed, where there are as many; 0: none).
        nodes: how many may ask. One takes its share of half of what is free, so that there is some left for the others
            and for later.

    Returns:
        ``claimed``: numbers of the parts that are the holder's now; ``free``: how many nobody has.
    """
    parts, least = int(question["parts"]), int(question["least"])
    if not 0 < parts <= _MOST:
        raise ValueError(f"a limit has 1 to {_MOST} parts, not {parts}")
    prefix = f"share/{question['name']}/"
    for number in question.get("give", ()):
        store.delete(f"{prefix}{int(number)}")
    taken = {int(key.removeprefix(prefix)) for key in store.keys(prefix)}
    free = [number for number in range(parts) if number not in taken]
    wanted = max(least, len(free) // (2 * max(1, nodes))) if least else 0
    claimed: list[int] = []
    start = int.from_bytes(os.urandom(4)) % max(1, len(free))  # those who ask at once try different ones
    for number in free[start:] + free[:start]:
        if len(claimed) == wanted:
            break
        try:
            if store.put_new(f"{prefix}{number}", str(question["holder"])):
                claimed.append(number)
        except Exception:  # whatever ails the GCS now: what is claimed already must be told
            if not claimed:
                raise
            break
    return {"claimed": claimed, "free": max(0, len(free) - len(claimed))}


def began(store: Store, question: dict[str, Any]) -> dict[str, Any]:
    """When a job began: the earliest that any node has said.

    Args:
        store: where.
        question: ``name`` of the job, ``at``: when it began for whoever asks (seconds since 1970).

    Returns:
        ``began``: in the same unit, by the clocks of the nodes.
    """
    prefix = f"began/{question['name']}/"
    mine = int(1000 * float(question["at"]))
    if not any(int(key.removeprefix(prefix)) <= mine for key in store.keys(prefix)):
        store.put_new(f"{prefix}{mine}", "")
    return {"began": min(int(key.removeprefix(prefix)) for key in store.keys(prefix)) / 1000}


def forget(store: Store, question: dict[str, Any]) -> dict[str, Any]:
    """A limit is over, whoever has parts of it: an episode has ended (``name``)."""
    store.delete_all(f"share/{question['name']}/")
    return {}

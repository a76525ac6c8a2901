"""driver, target: the job's registry of policies, in the GCS.

A driver writes a policy when it first submits work under it. Workers are told ids alone and read the policy here, so
that who submits work cannot say what it may do. Entries are small, keyed by their content's hash and never deleted: a
detached actor that is restarted after its job has ended finds its policy still.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Final

from ray_guard.actors import documents, internals
from ray_guard.errors import NotEnforced

WAIT: Final = "RAY_GUARD_REGISTRY_WAIT"
"""Seconds that a worker waits for its policy (default 5): workers that Ray starts early may be ahead of the driver."""
_PAUSE_S: Final = 0.05

_published: set[tuple[object, str]] = set()


def publish(texts: Iterable[str]) -> tuple[str, ...]:
    """Writes the documents that this process has not written yet, and returns the ids of all."""
    ids = []
    for text in texts:
        policy_id = documents.identify(text)
        ids.append(policy_id)
        written = (internals.job_and_cluster(), policy_id)
        if written not in _published or internals.in_client_mode():
            internals.put(f"policy/{policy_id}", text)
            _published.add(written)
    return tuple(ids)


def look_up(policy_id: str) -> documents.Wired:
    """The policy with that id.

    Raises:
        NotEnforced: there is none, or the entry is not what the id says.
    """
    deadline = time.monotonic() + float(os.environ.get(WAIT, "5"))
    while True:
        text = internals.get(f"policy/{policy_id}")
        if text is not None:
            return documents.read(text, policy_id)
        if time.monotonic() >= deadline:
            raise NotEnforced(("ray.policy",), f"the job's registry has no policy {policy_id}")
        time.sleep(_PAUSE_S)

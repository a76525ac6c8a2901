"""driver, target: a policy as it travels between processes: a canonical text and its id.

The id is the hash of the text, so that a worker which was told an id cannot be given another policy under it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any, Final

from ray_guard.errors import NotEnforced
from ray_guard.policy.model import Policy
from ray_guard.records import Role

MARK: Final = "__ray_guard_policies__"
"""Where a guarded class or function keeps its documents: texts, so that unpickling one loads no models."""


def canonical(policy: Policy) -> str:
    """The document of `policy`: what was set, in one spelling."""
    if policy.role is None:
        policy = Policy.model_validate({**policy.model_dump(mode="json", exclude_unset=True), "role": Role.ENV})
    return json.dumps(policy.model_dump(mode="json", exclude_unset=True), sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=256)
def identify(document: str) -> str:
    """The id of a document: 64 hex digits."""
    return hashlib.sha256(document.encode()).hexdigest()


def read(document: str, expected: str) -> Policy:
    """The policy in `document`.

    Raises:
        NotEnforced: it is not the one that `expected` is the id of.
    """
    if identify(document) != expected:
        raise NotEnforced(("ray.policy",), f"the registry's entry for policy {expected} is another document")
    return Policy.model_validate_json(document)


def of(guarded: Any) -> tuple[str, ...]:
    """The documents that `guarded` is under, its base classes' first; empty where it is not guarded."""
    if isinstance(guarded, type):
        found = [each for base in reversed(guarded.__mro__) for each in vars(base).get(MARK, ())]
    else:
        found = list(getattr(guarded, MARK, ()))
    return tuple(dict.fromkeys(found))


def mark(guarded: Any, document: str) -> None:
    """Puts `guarded` under `document` too."""
    own = vars(guarded).get(MARK, ())
    setattr(guarded, MARK, tuple(dict.fromkeys((*own, document))))

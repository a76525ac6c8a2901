"""driver, target: a policy as it travels between processes: a canonical text and its id.

The id is the hash of the text, so that a worker which was told an id cannot be given another policy under it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ray_guard.errors import NotEnforced
from ray_guard.policy.enforcement import unenforced
from ray_guard.records import Mode, Role

if TYPE_CHECKING:
    from ray_guard.policy.model import Policy

MARK: Final = "__ray_guard_policies__"
"""Where a guarded class or function keeps its documents: texts, so that unpickling one loads no models."""


@dataclass(frozen=True)
class Wired:
    """A policy as it goes to the supervisor, which checks it once more: all that confining a process takes of one.

    Not the model itself: pydantic and the models are two thirds of what a worker would spend on confining itself
    (115 of 180 ms).
    """

    wire: Mapping[str, Any]

    @property
    def mode(self) -> Mode:
        return Mode(self.wire["mode"])

    def to_wire(self) -> dict[str, Any]:
        return dict(self.wire)


def canonical(policy: Policy) -> str:
    """The document of `policy`: its message, in one spelling. A role that is not said is ``env``."""
    wire = policy.to_wire()
    if wire["role"] is None:
        wire["role"] = Role.ENV.value
    return json.dumps(wire, sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=256)
def identify(document: str) -> str:
    """The id of a document: 64 hex digits."""
    return hashlib.sha256(document.encode()).hexdigest()


def read(document: str, expected: str) -> Wired:
    """The policy in `document`.

    Raises:
        NotEnforced: it is not the one that `expected` is the id of.
    """
    if identify(document) != expected:
        raise NotEnforced(("ray.policy",), f"the registry's entry for policy {expected} is another document")
    return Wired(json.loads(document))


@functools.lru_cache(maxsize=256)
def unenforced_in(document: str) -> tuple[str, ...]:
    """The keys of a policy that is to be enforced which this version does not hold."""
    wire = json.loads(document)
    return unenforced(wire) if wire["mode"] == Mode.ENFORCE else ()


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

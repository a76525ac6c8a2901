"""What follows a finding: the policy's ``detect``. Pure, standard library only.

Runs wherever a policy is read, and in the supervisor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from ray_guard.detect import OTHER, Kind
from ray_guard.errors import PolicyError
from ray_guard.policy.values import meant

TAG: Final = "tag"
VIOLATION: Final = "violation"
ACTIONS: Final = (TAG, VIOLATION, "kill_call", "end_episode", "kill_actor")
"""From the mildest to the strictest."""
ALL: Final = "all"

Actions = Mapping[str, str]
"""By kind of finding (a :class:`ray_guard.detect.Kind`, or ``other``) the strictest action that lists it."""

NOTHING: Final[Actions] = MappingProxyType({})
_WORDS: Final = (*(kind.value for kind in Kind), OTHER)


def word(value: object) -> str:
    """A kind of finding, or ``all``. Raises PolicyError."""
    known = [ALL, *_WORDS]
    if isinstance(value, str) and value in known:
        return str(value)
    raise PolicyError("", value, f"one of {', '.join(known)}{meant(value, known)}")


def rules(value: object) -> str:
    """The path of a Sigma rule, or of a folder that holds some. Raises PolicyError."""
    if not isinstance(value, str | os.PathLike) or not os.path.isabs(path := os.fspath(value)) or "\0" in path:
        raise PolicyError("", value, "the absolute path of a Sigma rule, or of a folder of them")
    return os.path.normpath(path)


def actions(said: Mapping[str, Sequence[str]], *, enforced: bool) -> Actions:
    """What a policy lists, by kind.

    Args:
        said: by action, words.
        enforced: the policy enforces; else what it lists is tagged, for a policy in mode ``report`` ends nobody.
    """
    found: dict[str, str] = {}
    for action in ACTIONS:
        for each in said.get(action, ()):
            for kind in _WORDS if each == ALL else (each,):
                found[kind] = action if enforced else TAG
    return found


def stricter(ours: Actions, theirs: Actions) -> Actions:
    """For each kind the stricter of two."""
    return {
        kind: max((each[kind] for each in (ours, theirs) if kind in each), key=ACTIONS.index)
        for kind in {**ours, **theirs}
    }


def acts(policy: Actions) -> bool:
    """Whether a finding ends anything, whatever ``on_violation`` says."""
    return not {TAG, VIOLATION}.issuperset(policy.values())

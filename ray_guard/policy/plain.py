"""A policy that is right at first sight, read without the models: pydantic costs more than starting a tool does.

Runs in the target before it is confined. Standard library only. The values are judged by the same functions
(:mod:`ray_guard.policy.values`); what is not right at first sight goes to the models, which say what is wrong with it.
That both read the same is a property test's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from ray_guard.errors import PolicyError
from ray_guard.policy import detection, values
from ray_guard.policy.budgets import Scope
from ray_guard.policy.load import read_policy

_Read = Callable[[Any], Any]


class _NotAtFirstSight(Exception):
    """Carries nothing: what is wrong is the models' to say."""


def wire_of(policy: object) -> dict[str, Any]:
    """What ``Policy.of(policy).to_wire()`` gives: the message of a policy, a mapping like one, or a policy file.

    Raises:
        PolicyError: as the models do.
    """
    given = read_policy(policy) if isinstance(policy, str | os.PathLike) else policy
    wire = read(given) if isinstance(given, Mapping) else None
    if wire is not None:
        return wire
    from ray_guard.policy.model import Policy

    return Policy.of(policy).to_wire()


def read(policy: Mapping[str, Any]) -> dict[str, Any] | None:
    """The message of ``policy``; None: it is not right at first sight."""
    explicit: list[str] = []
    try:
        wire = _section(policy, _KEYS, explicit, "")
        if wire["detect"]["rules"] and not any(wire["detect"][action] for action in detection.ACTIONS):
            raise _NotAtFirstSight
    except (PolicyError, _NotAtFirstSight, UnicodeEncodeError):
        return None
    wire["set"] = explicit
    return wire


def _section(given: object, keys: Mapping[str, Any], explicit: list[str], prefix: str) -> dict[str, Any]:
    """Every key of a mapping: as it was given, or its default. ``explicit`` takes the dotted keys that were given."""
    if type(given) is not dict or not given.keys() <= keys.keys():
        raise _NotAtFirstSight
    read: dict[str, Any] = {}
    for key, kind in keys.items():
        if isinstance(kind, Mapping):
            read[key] = _section(given.get(key, {}), kind, explicit, f"{prefix}{key}.")
        elif isinstance(kind, Scope):
            read[key] = _limits(given.get(key, {}), explicit, f"{prefix}{key}.")
        else:
            take, default = kind
            if key in given:
                read[key] = take(given[key])
                explicit.append(prefix + key)
            else:
                read[key] = list(default) if isinstance(default, list) else default
    return read


def _limits(given: object, explicit: list[str], prefix: str) -> dict[str, Any]:
    if type(given) is not dict or not given.keys() <= _LIMITS.keys():
        raise _NotAtFirstSight
    limits = {}
    for kind, take in _LIMITS.items():
        if kind not in given:
            continue
        explicit.append(prefix + kind)
        if given[kind] is not None:
            limits[kind] = take(given[kind])
    return limits


def _text(value: object) -> str:
    if type(value) is not str:
        raise _NotAtFirstSight
    value.encode()  # a lone surrogate is no text
    return value


def _one_of(*words: str) -> _Read:
    def take(value: object) -> str:
        if type(value) is not str or value not in words:
            raise _NotAtFirstSight
        return value

    return take


def _truth(value: object) -> bool:
    if type(value) is not bool:
        raise _NotAtFirstSight
    return value


def _checked(check: Callable[[object], object]) -> _Read:
    return lambda value: _text(check(value))


def _or_none(take: _Read) -> _Read:
    return lambda value: None if value is None else take(value)


def _list_of(take: _Read) -> _Read:
    def take_all(value: Any) -> list[Any]:
        if type(value) not in (list, tuple):
            raise _NotAtFirstSight
        return [take(each) for each in value]

    return take_all


def _places(*words: str) -> _Read:
    return _list_of(_checked(lambda value: values.place(value, words)))


def _seconds(value: object) -> float:
    return float(values.parse_seconds(value))


def _flops(value: object) -> float:
    return float(values.parse_flops(value))


_LIMITS: Final[Mapping[str, _Read]] = {
    "egress_bytes": values.parse_size,
    "egress_sent_bytes": values.parse_size,
    "egress_received_bytes": values.parse_size,
    "connections": values.parse_count,
    "wall_seconds": _seconds,
    "cpu_seconds": _seconds,
    "processes": values.parse_count,
    "memory": values.parse_size,
    "gpu_seconds": _seconds,
    "gpu_memory": values.parse_size,
    "tokens": values.parse_count,
    "flops": _flops,
}

#: how each key is taken and what it is when it is not given; a mapping is a section, a scope its limits
_KEYS: Final[Mapping[str, Any]] = {
    "version": (values.version, 1),
    "mode": (_one_of("enforce", "report"), "enforce"),
    "role": (_or_none(_one_of("tool", "env", "policy")), None),
    "egress": {
        "allow": (_list_of(_checked(values.destination)), []),
        "proxy": (_or_none(_checked(values.proxy)), None),
        "listen": (_list_of(_checked(values.port)), []),
        "verify_names": (_truth, True),
    },
    "model_endpoint": (_or_none(_checked(values.endpoint)), None),
    "gpu": (_one_of("none", "engine", "any"), "none"),
    "files": {
        "read": (_places("system", "env", "cwd", "scratch"), ["system", "env", "cwd"]),
        "write": (_places("cwd", "scratch"), ["cwd", "scratch"]),
        "hide": (_places(), []),
        "protect": (_places(), []),
    },
    "budgets": {"call": Scope.CALL, "episode": Scope.EPISODE, "actor": Scope.ACTOR, "job": Scope.JOB},
    "subprocess": (_one_of("confine", "plain"), "confine"),
    "survivors": (_one_of("kill", "keep"), "kill"),
    "on_violation": (_one_of("deny", "kill_call", "end_episode", "kill_actor"), "deny"),
    "detect": {
        **{action: (_list_of(_checked(detection.word)), []) for action in detection.ACTIONS},
        "rules": (_list_of(_checked(detection.rules)), []),
    },
    "require": (_list_of(_one_of("egress", "processes", "files", "gpu")), ["egress", "processes", "files"]),
}

"""The error model: everything ray_guard raises on purpose, in one place.

Runs everywhere (driver, target, supervisor, later).

    RayGuardError
    ├── PolicyError      the policy itself is wrong: names the key, the value and what would be right
    │   └── UnknownArchitecture   a model configuration whose cost is not understood
    ├── NotEnforced      the policy is right, but this host, process or version cannot hold it; names what is missing
    ├── EgressDenied     a destination was refused (raised by the guard's own API only; a refused system call
    │                    surfaces as the ordinary OSError)
    ├── BudgetExceeded   a limit of a scope was reached; carries type, value, limit, scope and source
    ├── BadPath          a file or folder that is not what it was given as; carries path and reason
    └── SupervisorLost   the supervisor does not answer any more: nothing is granted from here on

All of them survive pickling, because Ray carries exceptions between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class RayGuardError(Exception):
    """Base of every error that ray_guard raises on purpose."""


class PolicyError(RayGuardError, ValueError):
    """A policy that cannot be meant: unknown key, impossible size, malformed destination.

    Args:
        key: dotted path of the offending key, as in the file (``egress.allow[2]``).
        value: the offending value, as given.
        remedy: what would be right.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)
        self.key = key
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.key}: {self.value!r} is not usable: {self.remedy}"


class UnknownArchitecture(PolicyError):
    """A model configuration whose cost is not understood: what it says may not be guessed from."""


class BadPath(RayGuardError):
    """A file or folder that is not what it was given as.

    Args:
        path: as given.
        why: what is wrong with it, and what would help.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


class NotEnforced(RayGuardError):
    """Something the policy asks for cannot be enforced here, so nothing was started.

    Args:
        features: what is missing: policy keys (``egress.proxy``) or host features (``seccomp.user_notification``).
        detail: why, and what would help.
    """

    def __init__(self, features: Iterable[str], detail: str = "") -> None:
        self.features = tuple(features)
        self.detail = detail
        super().__init__(self.features, detail)

    def __str__(self) -> str:
        named = ", ".join(self.features)
        return f"not enforced: {named}" + (f": {self.detail}" if self.detail else "")


class EgressDenied(RayGuardError, PermissionError):
    """A destination that the policy does not grant.

    Args:
        destination: what was asked for, canonical (``tcp://198.51.100.7:22``).
        reason: the decision's reason, as in the span's ``ray_guard.egress.reason``.
    """

    def __init__(self, destination: str, reason: str) -> None:
        super().__init__(destination, reason)
        self.destination = destination
        self.reason = reason

    def __str__(self) -> str:
        return f"egress to {self.destination} denied: {self.reason}"


class BudgetExceeded(RayGuardError):
    """A limit was reached.

    Args:
        kind: the limit's name in the policy (``egress_bytes``).
        value: what was used or asked for, in the limit's own unit (bytes, seconds, count, tokens, FLOPs).
        limit: the limit, in the same unit.
        scope: ``call``, ``episode``, ``actor`` or ``job``.
        source: id of the scope that ran out.
    """

    def __init__(self, kind: str, value: float, limit: float, scope: str, source: str) -> None:
        super().__init__(kind, value, limit, scope, source)
        self.kind = kind
        self.value = value
        self.limit = limit
        self.scope = scope
        self.source = source

    def __str__(self) -> str:
        return f"{self.scope} {self.source}: {self.kind} {self.value:g} exceeds the limit of {self.limit:g}"


class SupervisorLost(RayGuardError, ConnectionError):
    """The supervisor is gone or answers nonsense. Fail closed: the guarded process is about to end."""


_BY_NAME: dict[str, type[RayGuardError]] = {
    error.__name__: error
    for error in (RayGuardError, PolicyError, NotEnforced, EgressDenied, BudgetExceeded, SupervisorLost)
}


def of_violation(violation: Mapping[str, Any]) -> RayGuardError:
    """The error that names a violation, as ``violations()`` gives it."""
    kind, reason = str(violation.get("kind")), str(violation.get("reason") or "")
    limit, value = violation.get("limit"), violation.get("value")
    if isinstance(limit, (int, float)) and isinstance(value, (int, float)):
        scope = reason.removesuffix(" budget")
        source = violation.get("source") or violation.get("span") or ""
        return BudgetExceeded(kind, value, limit, scope or "episode", str(source))
    if violation.get("destination"):
        return EgressDenied(str(violation["destination"]), reason)
    return RayGuardError(f"{kind}: {reason}")


def to_wire(error: RayGuardError) -> dict[str, Any]:
    """The error as plain data, for a message between processes."""
    return {"error": type(error).__name__, "args": [list(a) if isinstance(a, tuple) else a for a in error.args]}


def from_wire(message: dict[str, Any]) -> RayGuardError:
    """The error that :func:`to_wire` described; an unknown one becomes a plain :class:`RayGuardError`."""
    error = _BY_NAME.get(str(message.get("error")))
    if error is None:
        return RayGuardError(str(message))
    return error(*message.get("args", ()))

"""Which keys of a policy this version, on this host, does not hold.

Runs wherever a guard starts. Standard library only. Nothing that is parsed is silently ignored: what a policy says and
:func:`unenforced` names makes the guard refuse to start in enforce mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from ray_guard.errors import PolicyError
from ray_guard.policy import detection
from ray_guard.policy.destination import AddressRule, GroupRule, NameRule, UnixRule, parse_rule

SUPPORTED: Final = frozenset(
    {
        "mode",
        "role",
        "egress.allow.address",
        "egress.allow.cluster",
        "egress.allow.collectives",
        "egress.allow.name",
        "egress.allow.unix",
        "egress.listen",
        "egress.proxy",
        "egress.verify_names",
        *(
            f"budgets.{scope}.{kind}"
            for scope in ("call", "episode", "actor", "job")
            for kind in (
                "egress_bytes",
                "egress_sent_bytes",
                "egress_received_bytes",
                "connections",
                "cpu_seconds",
                "gpu_seconds",
                "tokens",
                "flops",
                "gpu_memory",
                "memory",
                "processes",
                "wall_seconds",
            )
        ),
        "gpu.engine",
        "gpu.none",
        "model_endpoint",
        *(f"on_violation.{action}" for action in ("deny", "kill_call", "end_episode", "kill_actor")),
        *(f"detect.{key}" for key in (*detection.ACTIONS, "rules")),
        "subprocess.confine",
        "subprocess.plain",
        "survivors.kill",
        "survivors.keep",
        "require.egress",
        "require.gpu",
        "require.processes",
        "require.files",
        *(f"files.{key}" for key in ("read", "write", "hide", "protect")),
    }
)
"""What this version enforces on a host that offers everything. A caller removes what its host does not offer.

Names are dotted keys. Where a key is held for some values only the value follows (``survivors.kill``), and the kind of
destination follows ``egress.allow``: ``address``, ``name``, ``unix``, ``cluster``, ``collectives``. ``gpu.none`` holds
for tools; where an actor's own process is concerned the caller removes it.
"""

_ASKS_NOTHING: Final[Mapping[str, tuple[object, ...]]] = {
    "egress.proxy": (None,),
    "model_endpoint": (None,),
    "gpu": ("any",),
    **{f"detect.{key}": ([],) for key in (*detection.ACTIONS, "rules")},
    "files.hide": ([],),
    "files.protect": ([],),
}
_BY_VALUE: Final = frozenset({"gpu", "subprocess", "survivors", "on_violation"})


def unenforced(wire: Mapping[str, Any], supported: frozenset[str] = SUPPORTED) -> tuple[str, ...]:
    """The keys that a policy sets and that are not enforced, dotted, in the policy's order.

    A destination is named by its place (``egress.allow[0]``), a requirement by its word (``require.files``), any other
    key by itself. Keys that the policy leaves at their default are not named.

    Args:
        wire: as :meth:`ray_guard.Policy.to_wire` gives it, or an intersection of several.
        supported: see :data:`SUPPORTED`.

    Raises:
        PolicyError: the message does not say which keys were set, or is no policy.
    """
    if not isinstance(wire, Mapping):
        raise PolicyError("policy", wire, "a mapping")
    if set(wire) == {"all"}:
        return tuple(dict.fromkeys(key for each in _list(wire["all"]) for key in unenforced(each, supported)))
    explicit = wire.get("set")
    if not isinstance(explicit, list) or not all(isinstance(key, str) for key in explicit):
        raise PolicyError("set", explicit, "a policy in a message lists the keys that were set")
    return tuple(name for key in explicit for name in _unenforced(key, _value(wire, key), wire, supported))


def _unenforced(key: str, value: object, wire: Mapping[str, Any], supported: frozenset[str]) -> Iterator[str]:
    if key in supported or _asks_nothing(key, value, wire):
        return
    if key == "egress.allow":
        for index, entry in enumerate(_list(value)):
            if f"egress.allow.{_kind(entry)}" not in supported:
                yield f"egress.allow[{index}]"
    elif key == "require":
        for word in _list(value):
            if f"require.{word}" not in supported:
                yield f"require.{word}"
    elif key not in _BY_VALUE or f"{key}.{value}" not in supported:
        yield key


def _asks_nothing(key: str, value: object, wire: Mapping[str, Any]) -> bool:
    """Whether there is nothing to enforce in ``key`` being ``value``."""
    if key == "version" or value in _ASKS_NOTHING.get(key, ()):
        return True
    if key == "egress.verify_names":  # it concerns names alone
        return not value or not any(_kind(entry) == "name" for entry in _list(_value(wire, "egress.allow")))
    return key.startswith("budgets.") and value is None


def _kind(entry: object) -> str:
    match parse_rule(entry):
        case AddressRule():
            return "address"
        case NameRule():
            return "name"
        case UnixRule():
            return "unix"
        case GroupRule(group=group):
            return group.value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise PolicyError("policy", value, "a list")
    return list(value)


def _value(wire: Mapping[str, Any], key: str) -> object:
    value: Any = wire
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value

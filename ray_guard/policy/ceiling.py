"""What a call's own sockets can ever have to send, by its policy alone: the ceiling that nftables holds. Pure.

Below it stands the decision about every connect; this is what is left when something has got around that. A call that
can only reach the guard itself has no packet to send elsewhere: whatever names it is granted, the relay goes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from ray_guard.policy.destination import AddressRule, GroupRule, NameRule, Transport, UnixRule, parse_rule
from ray_guard.records import Mode


class Ceiling(IntEnum):
    """The later the lower."""

    OPEN = 0
    """Some destination is reached directly: there is none."""
    GUARD = 1
    """The guard's relay and resolver, on this node's loopback."""
    NOTHING = 2
    """No packet at all."""


def ceiling(wires: Iterable[Mapping[str, Any]], *, exact: bool) -> Ceiling:
    """The lowest that one of these policies (see ``CompiledPolicy.wires``) has for a tool.

    Args:
        exact: a byte cap around the call must hold on the byte, so that TCP flows to addresses are relayed too.
    """
    return max((_of(wire, exact=exact) for wire in wires), default=Ceiling.OPEN)


def _of(wire: Mapping[str, Any], *, exact: bool) -> Ceiling:
    egress = wire["egress"]
    if wire.get("mode") != Mode.ENFORCE.value or egress["listen"]:
        return Ceiling.OPEN
    lowest = Ceiling.NOTHING if wire.get("model_endpoint") is None else Ceiling.GUARD
    for entry in egress["allow"]:
        rule = parse_rule(entry)
        if isinstance(rule, UnixRule | GroupRule):  # no packet, and not for tools
            continue
        relayed = isinstance(rule, NameRule) or (
            exact and isinstance(rule, AddressRule) and rule.transport is Transport.TCP
        )
        lowest = min(lowest, Ceiling.GUARD if relayed else Ceiling.OPEN)
    return lowest

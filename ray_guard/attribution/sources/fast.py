"""Suricata's ``fast.log``, and the same by syslog; Snort's has the same form. Runs later. Pure.

``03/07/2026-03:40:11.123456  [Drop] [**] [1:20:4] message [**] [Classification: …] [Priority: 3] {TCP} a:1 -> b:2``:
civil time without zone, in Snort's without year. An ICMP packet has its type and code in the ports' place.
"""

from __future__ import annotations

import re
from typing import Final

from ray_guard.attribution.observation import Action, Endpoint, Observation, address, endpoint, protocol
from ray_guard.attribution.sources import header
from ray_guard.attribution.sources.line import Unusable

_ALERT: Final = re.compile(
    r"(?:\[(?P<action>w?[Dd]rop|[Bb]lock|[Rr]eject|[Aa]llow|[Pp]ass|[Aa]lert)\] )?(?:\[\*\*\] )?"
    r"\[\d+:(?P<rule>\d+):\d+\] (?P<message>.*?) ?(?:\[\*\*\] )?"
    r"(?:\[Classification: (?P<class>[^\]]*)\] )?\[Priority: (?P<priority>\d+)\]:? "
)
_FLOW: Final = re.compile(r"\{(?P<proto>[^}\s]{1,20})\} (?P<src>[\w.:%\[\]]+) -> (?P<dst>[\w.:%\[\]]+)$")
_LONGEST: Final = 1 << 12
"""Characters: Suricata writes two thousand at most."""
#: not ``wDrop``: it would have been dropped, were it not for watching alone
_DROPS: Final = frozenset({"Drop", "drop", "Block", "block", "Reject", "reject"})
_WITH_PORTS: Final = frozenset({"tcp", "udp", "sctp"})


def recognises(text: str) -> bool:
    return "[Priority: " in text and len(text) <= _LONGEST and _ALERT.search(text) is not None


def read(text: str) -> Observation:
    """The alert in a line.

    Raises:
        Unusable: it is of no flow.
        BadTime: it has no time.
    """
    alert = _ALERT.search(text)
    if alert is None:
        raise Unusable("malformed", "no [gid:sid:rev] and [Priority: …] of an alert")
    flow = _FLOW.search(text, alert.end())
    if flow is None:
        raise Unusable("fields", f"an alert without addresses: {alert['message']:.80}")
    found = header.taken(text[: alert.start()])
    proto = protocol(flow["proto"].removeprefix("PROTO:").lstrip("0") or "0")
    src, dst = (_end(flow[side], proto) for side in ("src", "dst"))
    return Observation(
        found.time,
        src=src,
        dst=dst,
        proto=proto,
        action=Action.DENIED if alert["action"] in _DROPS else Action.ALLOWED,
        rule=alert["rule"],
        signature=alert["message"].strip('"'),
        severity=alert["priority"],
        node=found.node,
    )


def _end(written: str, proto: str) -> Endpoint:
    """One side; IPv6 has no brackets, and its last group is the port."""
    ip, _, port = written.rpartition(":")
    if proto in _WITH_PORTS or address(written) is None:
        return endpoint(ip, port if proto in _WITH_PORTS else None)
    return endpoint(written)

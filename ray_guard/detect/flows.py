"""Judges what a call does over time: where it connects, what it asks for, how much it sends. Runs later, and live.

No I/O and no clock of its own: times come with the records. What one call may be remembered with is bounded, and so is
the number of calls; a sweep over addresses costs as much memory as its first few hundred.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from ray_guard.detect import METADATA_ADDRESSES, Finding, Kind
from ray_guard.detect.payloads import carries

WINDOW_NS: Final = 60 * 10**9
PORTS: Final = 12
"""Ports of one host that were tried in vain within the window."""
HOSTS: Final = 24
"""Hosts that were tried in vain at one port within the window."""
LABELS: Final = 30
"""Different names below one domain, long ones, within the window."""
SENT_BYTES: Final = 64 << 20
"""Sent to one peer, and ten times what came back."""
_LONG: Final = 16
_SSH_PORT: Final = 22
_DNS_PORT: Final = 53
_CALLS: Final = 4096
_KEYS: Final = 256
_TRIED: Final = 64


class Flow(NamedTuple):
    """What is recorded of one connection, datagram destination or question for a name.

    Attributes:
        time_ns: when it began, Unix time.
        address, port: of the peer; an empty address: none.
        name: that was meant or asked for; empty: none.
        in_vain: it was refused, or failed.
        sent, received: payload bytes; 0 where nobody knows yet.
        protocol: what its first bytes look like (``ray_guard.egress.protocol``); empty: unknown.
    """

    time_ns: int
    address: str
    port: int
    name: str = ""
    in_vain: bool = False
    sent: int = 0
    received: int = 0
    protocol: str = ""


class _Recent:
    """Different things that were seen within the window, for each of some keys."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, OrderedDict[str, int]] = OrderedDict()

    def add(self, key: str, thing: str, at: int) -> int:
        """How many there are now under ``key``."""
        seen = self._seen.setdefault(key, OrderedDict())
        self._seen.move_to_end(key)
        if len(self._seen) > _KEYS:
            self._seen.popitem(last=False)
        seen[thing] = at
        seen.move_to_end(thing)
        while len(seen) > _TRIED or at - next(iter(seen.values())) > WINDOW_NS:
            seen.popitem(last=False)
        return len(seen)


class _Call:
    def __init__(self) -> None:
        self.ports = _Recent()
        self.hosts = _Recent()
        self.names = _Recent()
        self.sent: OrderedDict[str, tuple[int, int]] = OrderedDict()


class Flows:
    """All calls; ask :meth:`judge` once for each record, in their order."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, _Call] = OrderedDict()

    def judge(self, call: str, flow: Flow) -> Finding | None:
        """The first thing that is wrong with what ``call`` has done so far, this flow included."""
        known = self._calls.setdefault(call, _Call())
        self._calls.move_to_end(call)
        if len(self._calls) > _CALLS:
            self._calls.popitem(last=False)
        if flow.protocol == "stratum":
            return Finding(Kind.MINING, "flow.stratum")
        if flow.protocol == "ssh" and flow.port != _SSH_PORT:
            return Finding(Kind.REVERSE_TUNNEL, "flow.ssh")
        if flow.address in METADATA_ADDRESSES:
            return Finding(Kind.METADATA, "flow.metadata")
        if flow.name and flow.port == _DNS_PORT:
            return _asks(known, flow)
        if flow.in_vain and flow.address:
            if known.ports.add(flow.address, str(flow.port), flow.time_ns) >= PORTS:
                return Finding(Kind.PROBING, "flow.ports")
            if known.hosts.add(str(flow.port), flow.address, flow.time_ns) >= HOSTS:
                return Finding(Kind.PROBING, "flow.hosts")
        return _sends(known, flow)


def _asks(known: _Call, flow: Flow) -> Finding | None:
    labels = flow.name.rstrip(".").split(".")
    if len(labels) < 3:
        return None
    if carries([label.encode("utf-8", "replace") for label in labels]):
        return Finding(Kind.DNS_TUNNEL, "flow.dns_label")
    front = ".".join(labels[:-2])
    if len(front) >= _LONG and known.names.add(".".join(labels[-2:]), front, flow.time_ns) >= LABELS:
        return Finding(Kind.DNS_TUNNEL, "flow.dns_names")
    return None


def _sends(known: _Call, flow: Flow) -> Finding | None:
    if not flow.sent:
        return None
    peer = flow.name or flow.address
    sent, received = known.sent.pop(peer, (0, 0))
    sent, received = known.sent[peer] = (sent + flow.sent, received + flow.received)
    if len(known.sent) > _KEYS:
        known.sent.popitem(last=False)
    if sent >= SENT_BYTES and sent >= 10 * received:
        return Finding(Kind.EXFILTRATION, "flow.bytes_sent")
    return None

"""What stands before a message that went by syslog, the journal, ``dmesg`` or a container runtime. Runs later. Pure.

A classic syslog line says neither year nor zone; ``dmesg -T``, OpenWrt's ``logread`` and the journal's outputs each
have a header of their own. A relay puts one of its own before that of the machine: the innermost is true.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

from ray_guard.attribution import times
from ray_guard.attribution.observation import Semantics, Time
from ray_guard.attribution.times import BadTime

#: a priority, with the length that syslog over TCP may say before it; what ``dmesg -x`` says in its stead
_PRIORITY: Final = re.compile(r"(?:\d{1,5} )?<\d{1,3}>(?:1 )?|[a-z]{4,8} *:[a-z]{3,6} *: ")
_CONTAINER: Final = re.compile(r"(\S+) std(?:out|err) [FP] ")
_NODE: Final = r"(?P<node>[^\s:\[]+|(?:[0-9A-Fa-f]*:){2,7}[0-9A-Fa-f]*) "
_DATA: Final = r"(?:-|(?:\[(?:[^\]\\]|\\.)*\])+)"
_PROGRAM: Final = (
    r"(?:\w+\.\w+ )?(?:kernel: ?|\S+\[\d+\]: |(?:ulogd|suricata|snort): ?|"
    rf"(?:kernel|ulogd|suricata|snort|-) (?:-|\d+) (?:-|\w+) {_DATA} ?\ufeff?)?(?:message repeated \d+ times: \[ ?)?"
)
_FROM: Final = re.compile(_NODE + _PROGRAM)
_FROM_HERE: Final = re.compile(r"(?:\[\d+\.\d+\] )?(?P<node>)" + _PROGRAM)
_AGAIN: Final = re.compile(r"(?:<\d{1,3}>)?(?:1 )?(?=\d{4}-\d\d-\d\dT|[A-Z][a-z]{2} [ \d]\d (?:\d{4} )?\d\d:\d\d:)")
_WEEKDAY: Final = re.compile(r"[A-Z][a-z]{2} (?=\d{4}-)")
_ZONE: Final = re.compile(r"(?:[A-Z]{3,5}|[+-]\d\d(?::?\d\d)?) ")
_UPTIME: Final = re.compile(r"(?:<\d+>|[a-z]+ *:[a-z]+ *: )?\[ *\d+\.\d+\]|\d+,\d+,\d+,")
_RELAYS: Final = 4


class Header(NamedTuple):
    """What a header says.

    Args:
        node: who wrote the message; empty where that is not said.
        rest: what follows it.
    """

    time: Time
    node: str
    rest: str


def taken(text: str) -> Header:
    """The header that a text begins with.

    Raises:
        BadTime: it begins with none that is known.
    """
    priority = _PRIORITY.match(text)
    body = text[priority.end() :] if priority is not None else text
    contained = _CONTAINER.match(body) if " std" in body else None
    try:
        found = _one(body[contained.end() :] if contained is not None else body)
    except BadTime:
        if contained is None:
            if _UPTIME.match(text):
                raise BadTime("seconds since boot alone; write the log with `dmesg -T` or `journalctl -k`") from None
            raise
        return Header(times.iso(contained[1], Semantics.INGEST), "", body[contained.end() :])
    for _ in range(_RELAYS):
        again = _AGAIN.match(found.rest)
        if again is None:
            break
        try:
            inner = _one(found.rest[again.end() :])
        except BadTime:
            break
        found = inner._replace(node=inner.node or found.node)
    return found


def _one(text: str) -> Header:
    time, sender, rest = _stamp(text)
    return Header(time, *_written_by(sender, rest))


@lru_cache(maxsize=1024)
def _written_by(sender: re.Pattern[str], rest: str) -> tuple[str, str]:
    """(node, message) of what stands behind the time."""
    found = sender.match(rest + " ")
    if found is None:
        return "", rest
    # syslog-ng names the relays too: `source@node/relay`
    return found["node"].partition("/")[0].rpartition("@")[2], (rest + " ")[found.end() :]


def _stamp(text: str) -> tuple[Time, re.Pattern[str], str]:
    """(time, what says who wrote it, the rest). Raises BadTime for what has no time that is known."""
    if text[:1].isdigit():
        stamp, _, rest = text.partition(" ")
        if "-" not in stamp:  # `journalctl -o short-unix`
            return times.epoch(stamp, Semantics.PACKET), _FROM, rest
        if "/" in stamp:
            return times.month_first(stamp.rstrip(":"), Semantics.PACKET), _FROM_HERE, rest.lstrip()
        if "T" in stamp:  # `dmesg --time-format iso`, which knows no node, has a comma
            return times.iso(stamp, Semantics.PACKET), _FROM_HERE if "," in stamp else _FROM, rest
        clock, _, rest = rest.partition(" ")  # `2026-03-07 03:40:11 node …`
        return times.iso(f"{stamp} {clock}", Semantics.PACKET), _FROM, rest
    try:
        time, rest = times.syslog(text, Semantics.PACKET)
    except BadTime:
        return _other_stamp(text)
    if rest[:5].strip().isdigit():  # `Mar  7 03:40:11 2026`
        return _other_stamp(text)
    return time, _FROM, rest


def _other_stamp(text: str) -> tuple[Time, re.Pattern[str], str]:
    """`dmesg -T`, OpenWrt's `logread`, `journalctl -o short-full`, syslog with a year."""
    if found := _WEEKDAY.match(text):
        day, clock, rest = (text[found.end() :] + "  ").split(" ", 2)
        zone = _ZONE.match(rest)
        said = zone[0].strip() if zone is not None else ""
        known = {"UTC": "Z", "GMT": "Z"}.get(said, said if said[:1] in ("+", "-") else "")
        return (
            times.iso(f"{day} {clock}{known}", Semantics.PACKET),
            _FROM,
            rest[zone.end() if zone is not None else 0 :],
        )
    bracket = text.startswith("[")
    time, rest = times.ctime(text.removeprefix("["), Semantics.PACKET)
    # What begins with a weekday was written on the machine itself, which does not say its own name.
    here = bracket or text[3:7].strip().isalpha()
    return time, _FROM_HERE if here else _FROM, rest.removeprefix("]").lstrip()

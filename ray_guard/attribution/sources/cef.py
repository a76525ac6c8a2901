"""Common Event Format: what FortiGate and Palo Alto's log forwarding write where a collector asks for it.

Runs later. Pure. ``CEF:0|vendor|product|version|id|name|severity|key=value key=value …``: values are not quoted and may
hold spaces, so that a value ends where the next key begins. Forwarders cut the ``CEF:`` off at times.
"""

from __future__ import annotations

import calendar
import re
from typing import Final, NamedTuple

from ray_guard.attribution import times
from ray_guard.attribution.observation import Semantics, Time

_HEAD: Final = re.compile(
    r"(?:^|[\s:])\d\|(?P<vendor>Fortinet|Palo Alto Networks)\|[^|]*\|[^|]*\|(?P<id>[^|]*)\|(?P<name>[^|]*)\|[^|]*\|"
)
_KEY: Final = re.compile(r"(?:^|(?<=\s))([A-Za-z][\w.\-]*)=")
_DATE: Final = re.compile(r"([A-Z][a-z]{2}) +(\d{1,2}) (\d{4}) (\d\d:\d\d:\d\d(?:\.\d+)?)")
_MONTHS: Final = {name: number for number, name in enumerate(calendar.month_abbr) if name}
_PLAIN: Final = re.compile(r"\\([\\=|])")


class Event(NamedTuple):
    """One event.

    Args:
        id: what the vendor calls the class of event: FortiGate's log id, a PAN-OS log type.
        name: its name; a PAN-OS subtype.
        said: the pairs; a key that comes twice has its last value.
    """

    vendor: str
    id: str
    name: str
    said: dict[str, str]


def parse(text: str) -> Event | None:
    """The event in a line, behind whatever header; None where there is none of the vendors that are known here."""
    head = _HEAD.search(text) if "|" in text else None
    if head is None:
        return None
    body = text[head.end() :]
    keys = list(_KEY.finditer(body))
    ends = [*(key.start() for key in keys[1:]), len(body)]
    said = {key[1]: _value(body[key.end() : end]) for key, end in zip(keys, ends, strict=True)}
    return Event(head["vendor"], head["id"], head["name"], said)


def _value(written: str) -> str:
    found = _PLAIN.sub(r"\1", written.strip())
    return found[1:-1] if len(found) > 1 and found[0] == found[-1] == '"' else found


def time(written: str, zone: str, semantics: Semantics) -> Time:
    """``Feb 27 2021 20:16:21``, an epoch in milliseconds, or RFC 3339.

    Args:
        zone: what another field says of it: ``UTC``, ``+0200``; empty or a name: not known.

    Raises:
        BadTime: it is none of these.
    """
    date = _DATE.match(written)
    if date is None or date[1] not in _MONTHS:
        return times.epoch(written, semantics) if written.isdigit() else times.iso(written, semantics)
    known = zone if zone == "UTC" or zone[:1] in ("+", "-") else ""
    return times.iso(f"{date[3]}-{_MONTHS[date[1]]:02}-{int(date[2]):02} {date[4]}{known}", semantics)

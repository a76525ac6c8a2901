"""Common Event Format, and LEEF: what FortiGate and Palo Alto's firewalls write where a collector asks for it.

Runs later. Pure. ``CEF:0|vendor|product|version|id|name|severity|key=value key=value …``: values are not quoted and may
hold spaces, so that a value ends where the next key begins. Forwarders cut the ``CEF:`` off at times. LEEF parts its
pairs by a tab or by what its header says; Palo Alto's templates by ``|``.
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


_LEEF: Final = re.compile(
    r"(?:^|[\s:])LEEF:(?P<version>[12])(?:\.0)?\|(?P<vendor>Palo Alto Networks)\|[^|]*\|[^|]*\|(?P<id>[^|]*)\|"
)
_SEPARATOR: Final = re.compile(r"(?:0?[xX](?P<code>[0-9A-Fa-f]{1,4})|(?P<plain>[^|\w]))?\|")


def leef(text: str) -> Event | None:
    """The event of a line in LEEF, which has no name; None where there is none of the vendors that are known here."""
    head = _LEEF.search(text) if "LEEF:" in text else None
    if head is None:
        return None
    body = text[head.end() :]
    parted = _SEPARATOR.match(body) if head["version"] == "2" else None
    by = "\t" if "\t" in body else "|"
    if parted is not None:
        by = chr(int(parted["code"], 16)) if parted["code"] else parted["plain"] or by
        body = body[parted.end() :]
    pairs = (pair.partition("=") for pair in body.split(by) if "=" in pair)
    return Event(head["vendor"], head["id"], "", {key.strip(): value.strip().strip('"') for key, _, value in pairs})


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
    known = zone if zone == "UTC" or zone[:1] in ("+", "-") else ""
    if date is None or date[1] not in _MONTHS:
        if written.isdigit():
            return times.epoch(written, semantics)
        return times.iso(written if written[-1:] == "Z" or written[-6:-5] in ("+", "-") else written + known, semantics)
    return times.iso(f"{date[3]}-{_MONTHS[date[1]]:02}-{int(date[2]):02} {date[4]}{known}", semantics)

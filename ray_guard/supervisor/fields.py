"""What a target sends, checked field by field. Runs in the supervisor. Pure; every complaint is a BadPacket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ray_guard.kernel.seqpacket import BadPacket
from ray_guard.records import IDENTITY, LINK, AttributeValue, SpanEvent, SpanKind, SpanLink, SpanRecord, StatusCode

_HEX: Final = frozenset("0123456789abcdef")


def identifier(value: object, length: int) -> str:
    if isinstance(value, str) and len(value) == length and _HEX.issuperset(value):
        return value
    raise BadPacket(f"not an id of {length} hex digits: {value!r:.80}")


def text(value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise BadPacket(f"not text: {value!r:.80}")
    return value[:limit]


def time(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    raise BadPacket(f"not a time in nanoseconds: {value!r:.80}")


def attributes(value: object) -> dict[str, AttributeValue]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadPacket(f"attributes are a mapping: {value!r:.80}")
    found: dict[str, AttributeValue] = {}
    for key, entry in value.items():
        if isinstance(entry, (str, bool, int, float)):
            found[key] = entry
        elif isinstance(entry, list):
            found[key] = tuple(str(item) for item in entry)
    return found


def environment(value: object) -> dict[str, str]:
    """Variables by name; anything else in ``value`` is left out."""
    given = value if isinstance(value, dict) else {}
    return {key: text for key, text in given.items() if isinstance(key, str) and isinstance(text, str)}


def identity(value: object) -> dict[str, AttributeValue]:
    """The part of ``value`` that says whose span it is; anything else in it is left out."""
    return {name: entry for name, entry in attributes(value).items() if name in IDENTITY}


def links(value: object) -> tuple[SpanLink, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(
        SpanLink(
            identifier(link[0], 32),
            identifier(link[1], 16),
            {LINK: text(link[2], 32)} if len(link) > 2 else {},
        )
        for link in value[:128]
        if isinstance(link, list) and len(link) >= 2
    )


def events(value: object) -> tuple[SpanEvent, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(
        SpanEvent(text(event[0], 256), time(event[1]), attributes(event[2]))
        for event in value[:128]
        if isinstance(event, list) and len(event) == 3
    )


def begun(message: Mapping[str, Any]) -> SpanRecord:
    """The span that an ``open`` message begins, without its identity."""
    parent = message.get("parent")
    return SpanRecord(
        trace_id=identifier(message.get("trace"), 32),
        span_id=identifier(message.get("span"), 16),
        parent_id=None if parent is None else identifier(parent, 16),
        name=text(message.get("name"), 512),
        kind=SpanKind.CLIENT if message.get("kind") == SpanKind.CLIENT.value else SpanKind.INTERNAL,
        start_ns=time(message.get("start")),
        end_ns=None,
        attributes=attributes(message.get("attributes")),
        links=links(message.get("links")),
    )


def ended(record: SpanRecord, message: Mapping[str, Any]) -> SpanRecord:
    """``record`` as a ``close`` message ends it."""
    status = message.get("status", 0)
    return record._replace(
        end_ns=max(time(message.get("end")), record.start_ns),
        attributes={**record.attributes, **attributes(message.get("attributes"))},
        status=StatusCode(status) if status in (0, 1, 2) else StatusCode.UNSET,
        status_message=text(message.get("message", ""), 4096),
        events=events(message.get("events")),
    )

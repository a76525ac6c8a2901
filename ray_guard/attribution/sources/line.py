"""A line of a log, looked at in several ways: raw, as text, as a JSON object. Runs later.

Logs come wrapped: by syslog (``Mar  7 03:40:11 node suricata[9]: {…}``), by a container runtime
(``2026-03-07T03:40:11Z stdout F {…}``), by a collector (``{"message": "…"}``). What a format parses is what is inside.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pydantic_core import from_json

from ray_guard.attribution.observation import Observation

_HALF: Final = re.compile("[\ud800-\udfff]")
_UNREAD: Final = object()
#: keys under which collectors put a line, or what they made of one (Filebeat, Fluent Bit, journald, CloudWatch, Log
#: Service, Splunk, Elasticsearch, Loki, OpenTelemetry, Google's logging)
_WRAPPERS: Final = (
    *("message", "log", "MESSAGE", "msg", "content", "@message", "_raw", "_source", "line", "body", "stringValue"),
    *("jsonPayload", "textPayload", "event", "original", "result", "data"),
)


class Unusable(ValueError):
    """A line that its format cannot use.

    Args:
        reason: one word for the count in quarantine: ``malformed``, ``time``, ``fields``, ``unknown``, ``binary``.
        detail: what is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Partly(Exception):
    """A line of several records, of which some cannot be used.

    Args:
        seen: the others.
        faults: what is wrong with each.
    """

    def __init__(self, seen: list[Observation], faults: list[Exception]) -> None:
        super().__init__(seen, faults)
        self.seen = seen
        self.faults = faults


class Line:
    """One line without its newline.

    Args:
        raw: as found.
        offset: of its first byte, in the file as unpacked.
        envelope: the collector's object that it was taken out of. A line that says no time itself has that one's.
    """

    __slots__ = ("_object", "_text", "envelope", "offset", "raw")

    def __init__(self, raw: bytes, offset: int, envelope: dict[str, Any] | None = None) -> None:
        self.raw = raw
        self.offset = offset
        self.envelope = envelope
        self._text: str | None = None
        self._object: Any = _UNREAD

    @property
    def text(self) -> str:
        """Decoded; what is no UTF-8 in it, as who is logged may have chosen, is U+FFFD.

        Raises:
            Unusable: it is no text.
        """
        if self._text is None:
            text = self.raw.decode("utf-8", "replace").strip("\r\n\ufeff ")
            if "\0" in text:  # the end of a message to syslog; padding, where a machine went down or a log was cut
                text = text.strip("\0\r\n\ufeff ")
                if "\0" in text or not text[:1].isprintable() or not text:
                    raise Unusable("binary", "a NUL byte")
            self._text = text
        return self._text

    @property
    def object(self) -> dict[str, Any] | None:
        """The JSON object that the line is, or ends with; None where there is none."""
        if self._object is _UNREAD:
            self._object = _object_of(self.raw) or _object_in(self.text)
        return self._object  # type: ignore[no-any-return]

    def unwrapped(self) -> Line | None:
        """The line, or the object, that a collector put into this JSON object."""
        if self.object is None:
            return self._quoted()
        for key in _WRAPPERS:
            inner = self.object.get(key)
            if isinstance(inner, str) and inner.strip():
                line = Line(inner.encode("utf-8", "surrogatepass"), self.offset)
            elif isinstance(inner, dict):
                line = of_object(json.dumps(inner).encode(), self.offset, inner)
            elif isinstance(inner, list) and (raw := _bytes(inner)):
                line = Line(raw, self.offset)
            else:
                continue
            line.envelope = {**(self.envelope or {}), **self.object}
            return line
        return None

    def _quoted(self) -> Line | None:
        """The line in a JSON string (an item of an array)."""
        if not self.text.startswith('"'):
            return None
        try:
            inner = json.loads(self.text)
        except ValueError:
            return None
        return Line(inner.encode("utf-8", "surrogatepass"), self.offset, self.envelope)


def _bytes(inner: list[Any]) -> bytes:
    """A message that is no UTF-8, as the journal's JSON has it: a number for each byte. Empty where it is none."""
    return bytes(inner) if all(type(each) is int and 0 <= each < 256 for each in inner) else b""


def of_object(raw: bytes, offset: int, parsed: object) -> Line:
    """A line whose JSON is parsed already (an item of an array)."""
    line = Line(raw, offset)
    line._object = parsed if isinstance(parsed, dict) else None  # noqa: SLF001 - its own constructor
    return line


def _object_of(raw: bytes) -> dict[str, Any] | None:
    """The object that a line is from end to end, as JSON has it by the letter; None wherever there is any doubt.

    Python's own reader takes twice as long; what it lets pass besides (NaN, halves of surrogate pairs) is its to say.
    """
    raw = raw.strip(b"\r\n ")
    if raw[:1] != b"{" or raw[-1:] != b"}":
        return None
    try:
        return from_json(raw, allow_inf_nan=False, cache_strings="keys")  # type: ignore[no-any-return]
    except ValueError:
        return None


def _object_in(text: str) -> dict[str, Any] | None:
    begin = text.find("{")
    if begin < 0 or not text.endswith("}"):
        return None
    try:
        parsed = sound(json.loads(text[begin:] if begin else text), text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def sound(parsed: Any, text: str) -> Any:
    """What ``text`` was parsed to; halves of surrogate pairs, which JSON can write and nothing can store, are U+FFFD.

    Who is logged chooses some of the text: it shall not cost the record.
    """
    return _mended(parsed) if "\\ud" in text or "\\uD" in text else parsed


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_mended(key): _mended(inner) for key, inner in value.items()}
    return [_mended(each) for each in value] if isinstance(value, list) else value


def text_of(parsed: dict[str, Any], *path: str) -> str:
    """What stands at a path of keys, as text; empty where nothing does."""
    found: Any = parsed
    for key in path:
        if not isinstance(found, dict):
            return ""
        found = found.get(key)
    if isinstance(found, str):
        return found
    return "" if found is None or isinstance(found, (dict, list)) else str(found)


def at(parsed: Any, *path: str) -> Any:
    """What stands at a path of keys; None where nothing does."""
    for key in path:
        if not isinstance(parsed, dict):
            return None
        parsed = parsed.get(key)
    return parsed

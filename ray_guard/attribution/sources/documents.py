"""JSON that does not keep to lines: records in an array, behind one another, or each over many lines. Runs later.

So exports come (``Records``, ``value``, ``logEvents``), and what a program prints to be looked at. They are taken apart
value by value: one record is in memory at a time, whatever the size of the document.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from ray_guard.attribution.sources.line import Line, of_object, sound

LIMIT: Final = 1 << 24
"""Bytes of one value."""
_FIRST_READ, _MOST_READ = 1 << 10, 1 << 18
_INDENT: Final = 200
#: keys under which services, collectors and query tools put an array of records
_CONTAINERS: Final = frozenset(
    {"records", "Records", "value", "logEvents", "events", "logs", "entries", "results", "hits"}
    | {"resourceLogs", "scopeLogs", "logRecords"}
)
_NESTED: Final = "hits"
"""Elasticsearch's array is in an object of the same name."""
_BEGIN: Final = re.compile(r'[\s,\x1e\ufeff]*(?:\{\s*(?:["}]|$)|\[\s*(?:[\[{"\]]|$))')
_GAP: Final = re.compile(r"[\s,\x1e\ufeff]*")
_RECORDS: Final = re.compile(r'\[\s*[{"]')
_OPENERS: Final = frozenset(b"{[ \t\0,\x1e\xef")
_DECODER: Final = json.JSONDecoder()


class Broken(ValueError):
    """What follows is no JSON, or none that ends.

    Args:
        detail: what is wrong.
        ahead: how many bytes behind :attr:`Documents.offset` it shows.
    """

    def __init__(self, detail: str, ahead: int) -> None:
        super().__init__(detail)
        self.ahead = ahead
        self.offset = -1
        """Where it begins, in the file as unpacked; below 0: not told."""


def begins(raw: bytes) -> bool:
    """Whether a line begins JSON that it does not end, or an array."""
    if not raw or raw[0] not in _OPENERS or raw.endswith(b"}\n"):
        return False
    body = raw.strip(b" \t\r\n\0,\x1e\xef\xbb\xbf")
    if body[:1] not in (b"{", b"[") or (body[:1] == b"{" and body[-1:] == b"}"):
        return False
    return _BEGIN.match(body[:4096].decode("utf-8", "replace")) is not None


def holds_records(line: Line) -> bool:
    """Whether a line may be a document with records in it, or several."""
    if line.object is None:
        return line.text[:1] in ("{", "[")
    held = [line.object[key] for key in _CONTAINERS & line.object.keys()]
    return any(isinstance(each, list) and each for each in held) or isinstance(line.object.get(_NESTED), dict)


def within(line: Line) -> Iterator[Line]:
    """The records in the one line that a document is; none where it is none, or is itself the record.

    Raises:
        Broken: only some could be read.
    """
    begin = line.raw.find(b"{") if line.object is not None else 0
    document = Documents(line.raw[begin:], line.offset + begin, io.BytesIO())
    try:
        for _, each in document.lines():
            if len(each.raw) < len(line.raw) - begin:
                each.envelope = line.envelope
                yield each
    except Broken as broken:
        broken.offset = document.offset
        raise


class Documents:
    """JSON values that follow one another, taken apart to records.

    Args:
        ahead: what was read of the stream already: the first value begins in it.
        offset: of its first byte, in the file as unpacked.
        stream: what follows.

    Attributes:
        offset: how far the records reach that were given out.
        newlines: ends of lines before it.
    """

    def __init__(self, ahead: bytes, offset: int, stream: BinaryIO) -> None:
        self.offset = offset
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = self._decoder.decode(ahead)
        self._at = self._counted = self.newlines = 0
        self._read, self._ended = _FIRST_READ, False

    def rest(self) -> bytes:
        """What was read of the stream and begins at :attr:`offset`."""
        pending, _ = self._decoder.getstate()
        return _raw(self._text[self._counted :]) + pending

    def lines(self) -> Iterator[tuple[int, Line]]:
        """The records, each with the number of line ends before it. Ends at what begins no JSON.

        Raises:
            Broken: a value is damaged, does not end, or is too large.
        """
        while self._peek() and _BEGIN.match(self._text, self._at):
            yield from self._array() if self._peek() == "[" else self._object()
            self._count(self._at)

    def _object(self) -> Iterator[tuple[int, Line]]:
        """An object; or, where it holds an array of records, those."""
        self._count(self._at)
        parsed: dict[str, Any] = {}
        taken_apart = False
        self._expect("{")
        while self._peek() != "}":
            key = self._decoded()
            self._expect(":")
            if key in _CONTAINERS and self._peek() == "[" and self._holds_records():
                taken_apart = True
                yield from self._array()
                self._count(self._at)
            elif key == _NESTED and self._peek() == "{":
                taken_apart = True
                yield from self._object()
            else:
                parsed[str(key)] = self._decoded()
                if taken_apart:
                    self._count(self._at)
        self._expect("}")
        if not taken_apart:
            yield self._line(self._at, parsed)

    def _array(self) -> Iterator[tuple[int, Line]]:
        self._expect("[")
        while self._peek() != "]":
            self._count(self._at)
            parsed = self._decoded()
            yield self._line(self._at, parsed)
        self._expect("]")

    def _holds_records(self) -> bool:
        while len(self._text) - self._at < 64 and self._more():
            pass
        return _RECORDS.match(self._text, self._at) is not None

    def _line(self, end: int, parsed: Any) -> tuple[int, Line]:
        """The record between what was counted and ``end``."""
        before = self._text[max(self._counted - _INDENT, 0) : self._counted]
        flush = before.rstrip(" \t")
        # One that has a line of its own stands where that begins.
        indent = len(before) - len(flush) if flush.endswith("\n") else 0
        text = self._text[self._counted - indent : end]
        raw, offset, number = _raw(text), self.offset - indent, self.newlines
        self._count(end)
        if isinstance(parsed, dict) and (text.isascii() or _is_utf8(raw)):
            return number, of_object(raw, offset, sound(parsed, text))
        return number, Line(raw, offset)

    def _decoded(self) -> Any:
        """The value here."""
        self._peek()
        while True:
            try:
                parsed, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if not cut or not self._more():
                    raise Broken(error.msg, len(_raw(self._text[self._counted : error.pos]))) from error
            except ValueError as error:  # digits without end
                raise Broken(str(error), 1) from error
            except RecursionError as error:
                raise Broken("nested too deep", len(_raw(self._text[self._counted :]))) from error
            else:
                if end < len(self._text) or isinstance(parsed, (str, dict, list)) or not self._more():
                    self._at = end
                    return parsed

    def _peek(self) -> str:
        """The next character that is no gap; empty at the end."""
        while True:
            gap = _GAP.match(self._text, self._at)
            self._at = gap.end() if gap is not None else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise Broken(f"no {mark!r} where it belongs", len(_raw(self._text[self._counted : self._at])))
        self._at += 1

    def _more(self) -> bool:
        """Reads on; False at the end. What was counted is let go, but for what tells how its line begins."""
        if self._ended:
            return False
        if len(self._text) - self._counted > LIMIT:
            raise Broken(f"a value of more than {LIMIT} bytes", 1)
        kept = max(self._counted - _INDENT, 0)
        data = self._stream.read(max(self._read, len(self._text) - self._counted))
        self._read = min(self._read * 2, _MOST_READ)
        self._ended = not data
        self._text = self._text[kept:] + self._decoder.decode(data, final=self._ended)
        self._at, self._counted = self._at - kept, self._counted - kept
        return not self._ended

    def _count(self, to: int) -> None:
        """Moves :attr:`offset`."""
        passed = self._text[self._counted : to]
        self.offset += len(passed) if passed.isascii() else len(_raw(passed))
        self.newlines += passed.count("\n")
        self._counted = to


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True

"""Reads logs of any known format, packed or not, one line or record in memory at a time. Runs later, on any machine.

What cannot be used is quarantined: counted by reason, the first ones kept with where they stand. Nothing in a file ends
the reading of it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, cast

from ray_guard.attribution.observation import Observation
from ray_guard.attribution.sources import FORMATS, Source, documents, foreign, packed
from ray_guard.attribution.sources.line import Line, Partly, Unusable
from ray_guard.attribution.times import BadTime
from ray_guard.errors import BadPath
from ray_guard.evidence.reader import open_segment

LINE_LIMIT: Final = 1 << 24
"""Bytes of one line. A document may have more: its records may not."""
_KEPT: Final = 1000
_DEEP: Final = 6
"""Envelopes within one another that are opened: five of OpenTelemetry's around a collector's."""


class NotAlerts(BadPath):
    """A path that holds no log."""


class Record(NamedTuple):
    """A record and where it stands.

    Args:
        format: of this record; a file may mix them.
        record: number within the file, from 0; headers and quarantined lines do not count.
        byte_offset: of the begin of its line, in the file as unpacked; of its own where several share a line.
        raw: the line; its own part where several share one.
    """

    format: str
    record: int
    byte_offset: int
    raw: bytes
    seen: Observation


@dataclass(frozen=True, slots=True)
class Rejected:
    line: int
    byte_offset: int
    reason: str
    detail: str


@dataclass(slots=True)
class FileReport:
    """What became of a file's lines; complete when its records are exhausted.

    Attributes:
        path: as given.
        records: by format.
        quarantined: by reason.
        first: the first thousand quarantined lines.
        sha256: of the file as it lies there, packed or not; empty while it is being read.
    """

    path: str
    records: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    first: list[Rejected] = field(default_factory=list)
    sha256: str = ""

    def reject(self, line: int, offset: int, reason: str, detail: str) -> None:
        self.quarantined[reason] += 1
        if len(self.first) < _KEPT:
            self.first.append(Rejected(line, offset, reason, detail))


def files(path: str | os.PathLike[str]) -> list[Path]:
    """The files behind a path: itself, or all regular files in a folder, by name.

    Raises:
        NotAlerts: there is nothing.
    """
    given = Path(path)
    if given.is_dir():
        inside = sorted(_inside(given))
        if not inside:
            raise NotAlerts(str(path), "a folder without files; name the log, or a folder that holds logs")
        return inside
    if not given.exists():
        raise NotAlerts(str(path), "no such file or folder")
    return [given]


def _inside(folder: Path) -> Iterator[Path]:
    """All but folders, and what is hidden; a folder that cannot be looked into is given out itself."""
    unread: list[OSError] = []
    for parent, _, names in os.walk(folder, onerror=unread.append):
        yield from (Path(parent, name) for name in names if not name.startswith("."))
    yield from (Path(error.filename) for error in unread)


def read(path: Path, report: FileReport, forced: str | None = None) -> Iterator[Record]:
    """The records of one file, in its order.

    Args:
        path: the file, packed or not.
        report: takes the counts.
        forced: the format's name; None finds it out for each line, trying what the line before was.

    Raises:
        NotAlerts: the file cannot be opened, or is no regular file.
    """
    detector = _Detector(forced)
    count = 0
    found: Iterable[tuple[str, int, bytes, Observation]]
    for number, line in _numbered(path, report):
        if not line.raw or line.raw.isspace():
            continue
        try:
            source, seen = detector.read(line, number, report)
            found = [(source.format, line.offset, line.raw, each) for each in seen]
        except _Unknown as error:
            found = _opened(line, number, line.raw, _Opening(detector, report, error))
        except _FAULTS as error:
            report.reject(number, line.offset, *_reason(error))
            continue
        for name, offset, raw, each in found:
            own = each.part.encode("utf-8", "surrogateescape") if each.part else raw
            yield Record(name, count, offset + each.within, own, each)
            count += 1
            report.records[name] += 1


def lines(path: Path, report: FileReport) -> Iterator[Line]:
    """The lines of one file as they are, packed or not; its hash is in ``report`` when they are exhausted.

    Raises:
        NotAlerts: the file cannot be opened, or is no regular file.
    """
    for _, line in _numbered(path, report):
        yield line


def _numbered(path: Path, report: FileReport) -> Iterator[tuple[int, Line]]:
    """The lines of one file with their numbers."""
    try:
        file = open_segment(path)
    except OSError as error:
        raise NotAlerts(str(path), f"cannot be read: {error.strerror}") from error
    with file:
        hashed = _Hashed(file)
        try:
            yield from _lines(packed.unpacked(cast("BinaryIO", hashed), path), report)
        except packed.Foreign as error:
            report.reject(0, 0, "unknown", str(error))
        except packed.DAMAGE as error:
            report.reject(0, 0, "unreadable", str(error) or type(error).__name__)
        report.sha256 = hashed.rest_hashed()


class _Unknown(Unusable):
    """Of no known format as it stands."""


_FAULTS: Final = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""Data of a shape its format does not have: a fault of the line, whatever it makes a parser stumble over."""


def _reason(error: Exception) -> tuple[str, str]:
    """(reason, detail) of what a parser stumbled over."""
    if isinstance(error, Unusable):
        return error.reason, error.detail
    return ("time", str(error)) if isinstance(error, BadTime) else ("malformed", f"{type(error).__name__}: {error}")


class _Opening(NamedTuple):
    """What opening an envelope needs: ``error`` says what is wrong with the line as it stands."""

    detector: _Detector
    report: FileReport
    error: _Unknown
    depth: int = 0


def _opened(line: Line, number: int, raw: bytes, opening: _Opening) -> Iterator[tuple[str, int, bytes, Observation]]:
    """(format, offset, line, record) of what a collector or a service wrapped into a line of no format."""
    report = opening.report
    inner = line.unwrapped()
    if opening.depth < _DEEP and documents.holds_records(line):
        held = False
        try:
            for each in documents.within(line):
                held = True
                if raw is not line.raw:  # places in what was wrapped are none in the file
                    each.offset = line.offset
                yield from _inner(each, number, each.raw if raw is line.raw else raw, opening)
        except documents.Broken as broken:
            at = broken.offset if raw is line.raw else line.offset
            report.reject(number, at, "malformed", f"JSON that does not end, or is none: {broken}")
        else:
            if not held:
                report.reject(number, line.offset, *_reason(opening.error))
    elif opening.depth < _DEEP and inner is not None:
        yield from _inner(inner, number, raw, opening)
    else:
        report.reject(number, line.offset, *_reason(opening.error))


def _inner(line: Line, number: int, raw: bytes, opening: _Opening) -> Iterator[tuple[str, int, bytes, Observation]]:
    try:
        source, seen = opening.detector.read(line, number, opening.report)
    except _Unknown as error:
        yield from _opened(line, number, raw, opening._replace(error=error, depth=opening.depth + 1))
    except _FAULTS as error:
        opening.report.reject(number, line.offset, *_reason(error))
    else:
        for each in seen:
            yield source.format, line.offset, raw, each if raw is line.raw else each._replace(within=0)


class _Detector:
    """Finds each line's format; the last line's is asked first."""

    def __init__(self, forced: str | None) -> None:
        self._sources = [FORMATS[forced]()] if forced else [make() for make in FORMATS.values()]
        self._current: Source | None = self._sources[0] if forced else None
        self._forced = forced is not None

    def read(self, line: Line, number: int, report: FileReport) -> tuple[Source, list[Observation]]:
        source = self._of(line)
        try:
            return source, source.read(line)
        except Partly as partly:
            for each in partly.faults:
                report.reject(number, line.offset, *_reason(each))
            return source, partly.seen

    def _of(self, line: Line) -> Source:
        if self._current is not None and self._current.recognises(line):
            return self._current
        for source in self._sources:
            if source.recognises(line):
                self._current = source
                return source
        known = foreign.line(line.text) if line.object is None else ""
        if documents.holds_records(line) or line.unwrapped() is not None:
            raise _Unknown("unknown", known or "of no format that is known, and neither is what is in it")
        if line.object is None and line.text.startswith(("{", "[")):
            raise _Unknown("malformed", "JSON that does not end, or is none")
        if self._forced:
            return self._sources[0]
        raise _Unknown("unknown", known or "of no format that is known; say --format to force one")


def _lines(stream: BinaryIO, report: FileReport) -> Iterator[tuple[int, Line]]:
    """The lines with their numbers; where JSON does not keep to lines, its records."""
    offset, number, barred = 0, 1, 0
    source = _Rereadable(stream)
    while head := source.readline(LINE_LIMIT):
        if offset >= barred and documents.begins(head):
            document = documents.Documents(head, offset, cast("BinaryIO", source))
            try:
                for passed, line in document.lines():
                    yield number + passed, line
            except documents.Broken as broken:
                barred = document.offset + max(broken.ahead, 1)
                if not document.rest().strip():
                    report.reject(number + document.newlines, document.offset, "malformed", f"cut short: {broken}")
            source.again(document.rest())
            offset, number = document.offset, number + document.newlines
            continue
        size, whole = len(head), head.endswith(b"\n")
        while not head.endswith(b"\n") and size >= LINE_LIMIT and (head := source.readline(LINE_LIMIT)):
            size += len(head)
        if size > LINE_LIMIT:
            report.reject(number, offset, "huge", f"a line of {size} bytes; at most {LINE_LIMIT} are read")
        elif b"\r" in head:
            yield from ((number, line) for line in _parted(head[:-1] if whole else head, offset))
        else:
            yield number, Line(head[:-1] if whole else head, offset)
        offset += size
        number += 1


def _parted(raw: bytes, offset: int) -> Iterator[Line]:
    """A line; or those that a carriage return alone ends, which in JSON is a gap like others."""
    if raw.startswith((b"{", b"[")) or b"\r" not in raw.rstrip(b"\r"):
        yield Line(raw, offset)
        return
    for each in raw.split(b"\r"):
        if each:
            yield Line(each, offset)
        offset += len(each) + 1


class _Rereadable:
    """A stream of which what was read may be put back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._window: io.BytesIO | None = None
        self._beyond = False

    def readline(self, limit: int) -> bytes:
        if self._window is None:
            return self._stream.readline(limit)
        line = self._window.readline(limit)
        if not line.endswith(b"\n") and len(line) < limit:
            self._window = None
            line += self._stream.readline(limit - len(line))
        return line

    def read(self, size: int) -> bytes:
        data = b"" if self._window is None else self._window.read(size)
        if not data:
            self._beyond, data = True, self._stream.read(size)
        return data

    def again(self, rest: bytes) -> None:
        """Puts back what was read last."""
        if self._window is None or self._beyond:
            self._window, self._beyond = io.BytesIO(rest), False
        else:
            self._window.seek(-len(rest), io.SEEK_CUR)


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they go by. Closed by whoever drops its last reader, it leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        self._hash.update(piece)
        return len(piece)

    def rest_hashed(self) -> str:
        """The hash of the whole file: what nobody asked for is read now."""
        while piece := self._file.read(1 << 20):
            self._hash.update(piece)
        return self._hash.hexdigest()

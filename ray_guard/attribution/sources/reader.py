"""Reads logs of any known format, packed or not, one line in memory at a time. Runs later, on any machine.

What cannot be used is quarantined: counted by reason, the first ones kept with where they stand. Nothing in a file ends
the reading of it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, cast

import zstandard

from ray_guard.attribution.observation import Observation
from ray_guard.attribution.sources import FORMATS, Source
from ray_guard.attribution.sources.line import Line, Unusable, of_object, sound
from ray_guard.attribution.times import BadTime
from ray_guard.errors import BadPath
from ray_guard.evidence.reader import open_segment

LINE_LIMIT: Final = 1 << 24
"""Bytes of one line; an Azure hour on one line has less."""
DOCUMENT_LIMIT: Final = 1 << 29
_KEPT: Final = 1000
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class NotAlerts(BadPath):
    """A path that holds no log."""


class Record(NamedTuple):
    """A record and where it stands.

    Args:
        format: of this record; a file may mix them.
        record: number within the file, from 0; headers and quarantined lines do not count.
        byte_offset: of the begin of its line, in the file as unpacked.
        raw: the line.
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
        inside = sorted(each for each in given.rglob("*") if each.is_file() and not each.name.startswith("."))
        if not inside:
            raise NotAlerts(str(path), "a folder without files; name the log, or a folder that holds logs")
        return inside
    if not given.exists():
        raise NotAlerts(str(path), "no such file or folder")
    return [given]


def read(path: Path, report: FileReport, forced: str | None = None) -> Iterator[Record]:
    """The records of one file, in its order.

    Args:
        path: the file; gzip and zstd are recognised by their first bytes.
        report: takes the counts.
        forced: the format's name; None finds it out for each line, trying what the line before was.

    Raises:
        NotAlerts: the file cannot be opened, or is no regular file.
    """
    try:
        hashed = _Hashed(open_segment(path))
    except OSError as error:
        raise NotAlerts(str(path), f"cannot be read: {error.strerror}") from error
    detector = _Detector(forced)
    with hashed:
        try:
            stream = _unpacked(hashed)
            for number, line in enumerate(_lines(stream, report), 1):
                yield from _records(line, number, detector, report)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            report.reject(0, 0, "unreadable", str(error))
        report.sha256 = hashed.rest_hashed()


def lines(path: Path, report: FileReport) -> Iterator[Line]:
    """The lines of one file as they are, packed or not; its hash is in ``report`` when they are exhausted.

    Raises:
        NotAlerts: the file cannot be opened, or is no regular file.
    """
    try:
        hashed = _Hashed(open_segment(path))
    except OSError as error:
        raise NotAlerts(str(path), f"cannot be read: {error.strerror}") from error
    with hashed:
        try:
            stream = _unpacked(hashed)
            yield from _lines(stream, report)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            report.reject(0, 0, "unreadable", str(error))
        report.sha256 = hashed.rest_hashed()


def _records(line: Line, number: int, detector: _Detector, report: FileReport) -> Iterator[Record]:
    if not line.raw.strip():
        return
    try:
        source, seen = detector.read(line)
    except Unusable as error:
        report.reject(number, line.offset, error.reason, error.detail)
    except BadTime as error:
        report.reject(number, line.offset, "time", str(error))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        # Data of a shape its format does not have: a fault of the line, whatever it makes a parser stumble over.
        report.reject(number, line.offset, "malformed", f"{type(error).__name__}: {error}")
    else:
        for each in seen:
            yield Record(source.format, report.records.total(), line.offset + each.within, line.raw, each)
            report.records[source.format] += 1


class _Detector:
    """Finds each line's format; the last line's is asked first."""

    def __init__(self, forced: str | None) -> None:
        self._sources = [FORMATS[forced]()] if forced else [make() for make in FORMATS.values()]
        self._current: Source | None = self._sources[0] if forced else None
        self._forced = forced is not None

    def read(self, line: Line) -> tuple[Source, list[Observation]]:
        if self._current is not None and (self._forced or self._current.recognises(line)):
            return self._current, self._current.read(line)
        for candidate in (line, line.unwrapped()):
            for source in self._sources if candidate is not None else ():
                if candidate is not None and source.recognises(candidate):
                    self._current = source
                    return source, source.read(candidate)
        if line.object is None and line.text[:1] in "{[":
            raise Unusable("malformed", "JSON that does not end, or is none")
        raise Unusable("unknown", "of no format that is known; say --format to force one")


def _lines(stream: BinaryIO, report: FileReport) -> Iterator[Line]:
    """The lines; or, of a file that is one JSON document, its records."""
    head = stream.readline(LINE_LIMIT)
    if _begins_document(head):
        body = head + stream.read(DOCUMENT_LIMIT)
        document = _document(body)
        if document is not None:
            yield from document
            return
        stream = cast("BinaryIO", io.BufferedReader(_Joined(body, stream)))
        head = stream.readline(LINE_LIMIT)
    offset = 0
    while head:
        size, whole = len(head), head.endswith(b"\n")
        while not head.endswith(b"\n") and size >= LINE_LIMIT and (head := stream.readline(LINE_LIMIT)):
            size += len(head)
        if size > LINE_LIMIT:
            report.reject(0, offset, "huge", f"a line of {size} bytes; at most {LINE_LIMIT} are read")
        else:
            yield Line(head[:-1] if whole else head, offset)
        offset += size
        head = stream.readline(LINE_LIMIT)


def _begins_document(head: bytes) -> bool:
    """Whether a file's first line is no JSON by itself but begins some."""
    text = head.strip().removeprefix(b"\xef\xbb\xbf")
    if text[:1] not in (b"{", b"["):
        return False
    if text[:1] == b"[":
        return text[1:2] in (b"", b"{", b" ")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return len(text) < 200  # `{` or `{"records": [`; a damaged line of a log is longer
    return False


def _document(body: bytes) -> list[Line] | None:
    """An array's items, or the one object, that a whole file is; None where it is neither."""
    try:
        text = body.decode("utf-8-sig")
        skipped = len(body) - len(text.encode())
        decoder = json.JSONDecoder()
        at = len(text) - len(text.lstrip())
        if text[at] == "{":
            parsed, end = decoder.raw_decode(text, at)
            return [of_object(body, 0, sound(parsed, text))] if not text[end:].strip() else None
        items: list[Line] = []
        offset, counted = skipped, 0
        at += 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at >= len(text) or text[at] == "]":
                return items if not text[at + 1 :].strip() else None
            parsed, end = decoder.raw_decode(text, at)
            begin = text.rfind("\n", 0, at) + 1
            offset += len(text[counted:begin].encode()) if begin > counted else 0
            counted = max(counted, begin)
            items.append(of_object(text[at:end].encode(), offset, sound(parsed, text)))
            at = end
    except (ValueError, IndexError, RecursionError):
        return None


class _Joined(io.RawIOBase):
    """What was read ahead, then the rest."""

    def __init__(self, ahead: bytes, rest: BinaryIO) -> None:
        self._parts = [io.BytesIO(ahead), rest]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._parts:
            piece = self._parts[0].read(len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            self._parts.pop(0)
        return 0


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they go by."""

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

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(file: _Hashed) -> BinaryIO:
    buffered = io.BufferedReader(file, 1 << 18)
    magic = buffered.peek(4)[:4]
    if magic[:2] == _GZIP:
        return cast("BinaryIO", gzip.GzipFile(fileobj=buffered))
    if magic == _ZSTD:
        return cast(
            "BinaryIO", io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True))
        )
    return buffered

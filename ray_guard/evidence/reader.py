"""Reads evidence: journal segments and any other OTLP JSON lines, of running jobs and of killed ones.

Runs later, on any machine, and in the forwarder. Standard library only.

Nothing in a file ends the reading. What cannot be used is quarantined: counted by reason, with where it stands.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from ray_guard.errors import BadPath
from ray_guard.evidence.layout import SEAL_SUFFIX, SUFFIX, log_of
from ray_guard.evidence.otlp import LINE_LIMIT, NotOtlp, decode
from ray_guard.records import Attributes, Resource, Source, SpanRecord

_REMEMBERED: Final = 1000
_PIECE: Final = 1 << 20


class NotEvidence(BadPath):
    """A path that holds no evidence."""


class Position(NamedTuple):
    """Where a record stands: file as found, line from 1, byte offset of the line's begin."""

    path: str
    line: int
    offset: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} (byte {self.offset})"


class Entry(NamedTuple):
    """One span as one line has it."""

    resource: Resource
    span: SpanRecord
    position: Position


@dataclass(frozen=True, slots=True)
class Rejected:
    position: Position
    reason: str
    detail: str


class Quarantine:
    """What could not be used. ``counts`` is complete, by reason; ``first`` holds the first thousand with positions.

    Reasons: ``torn`` (a last line without its end: in a segment of a sealed log no record, whatever it says),
    ``malformed`` (not JSON), ``binary``, ``huge``, ``foreign`` (JSON, but no OTLP traces), ``invalid`` (spans without
    ids or times), ``unreadable`` (a file that cannot be read).
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[Rejected] = []

    def add(self, position: Position, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if len(self.first) < _REMEMBERED:
            self.first.append(Rejected(position, reason, detail))

    @property
    def total(self) -> int:
        return self.counts.total()


class RawLine(NamedTuple):
    """A line as found: ``content`` without its newline, None when it was longer than LINE_LIMIT and skipped."""

    number: int
    offset: int
    end: int
    content: bytes | None
    complete: bool


def scan(file: BinaryIO, offset: int = 0, *, number: int = 1) -> Iterator[RawLine]:
    """The lines of a file from a byte offset on, in bounded memory whatever the file holds.

    ``complete`` is False for a last line without newline: torn, or still being written.
    """
    file.seek(offset)
    while piece := file.readline(LINE_LIMIT):
        end = offset + len(piece)
        content: bytes | None = piece
        while not piece.endswith(b"\n") and (piece := file.readline(_PIECE)):
            content = None
            end += len(piece)
        complete = piece.endswith(b"\n")
        yield RawLine(number, offset, end, None if content is None else content.removesuffix(b"\n"), complete)
        offset, number = end, number + 1


def segments(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files behind evidence paths: files as they are, folders by their ``*.otlp.jsonl`` at any depth, by name.

    Raises:
        NotEvidence: a path is missing, or a folder holds no segment.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = [
                Path(folder, name)
                for folder, _, names in os.walk(path)  # does not follow symlinks out of the evidence
                for name in names
                if name.endswith(SUFFIX)
            ]
            if not inside:
                raise NotEvidence(str(given), f"not an evidence folder: it holds no *{SUFFIX} segment")
            found.update(dict.fromkeys(sorted(inside)))
        elif path.exists():
            found[path] = None
        else:
            raise NotEvidence(str(given), "no such file or folder")
    return list(found)


def segments_of(folder: Path, log: str) -> list[Path]:
    """One log's, in order. Raises OSError."""
    found = ((log_of(name), name) for name in os.listdir(folder))
    return [folder / name for _, name in sorted((of[1], name) for of, name in found if of is not None and of[0] == log)]


def is_sealed(path: Path) -> bool:
    """Whether there is a seal for the file: then only whole lines of it are records, as the seal has them."""
    of = log_of(path.name)
    return of is not None and path.with_name(f"{of[0]}{SEAL_SUFFIX}").exists()


def open_segment(path: Path) -> BinaryIO:
    """Opens a regular file to read; anything else (a FIFO would block for ever) is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read(paths: Iterable[str | os.PathLike[str]], quarantine: Quarantine) -> Iterator[Entry]:
    """The spans of evidence files and folders, in file and line order, one line in memory at a time.

    Args:
        paths: files or folders.
        quarantine: takes what could not be used; never raised for.

    Raises:
        NotEvidence: a path is missing, or a folder holds no segment.
    """
    shared: dict[object, Resource] = {}
    met = kept = Resource({})
    for path in segments(paths):
        position = Position(str(path), 0, 0)
        sealed = is_sealed(path)
        try:
            with open_segment(path) as file:
                for line in scan(file):
                    position = Position(str(path), line.number, line.offset)
                    for resource, span in _spans(line, position, quarantine, sealed=sealed):
                        # Many spans are about few resources: one object each keeps a large job's evidence in memory.
                        if resource is not met:
                            met, kept = resource, shared.setdefault(frozenset(resource.attributes.items()), resource)
                        yield Entry(kept, span, position)
        except OSError as error:
            quarantine.add(position, "unreadable", error.strerror or str(error))


def _spans(
    line: RawLine, position: Position, quarantine: Quarantine, *, sealed: bool
) -> list[tuple[Resource, SpanRecord]]:
    if line.content is None:
        quarantine.add(position, "huge", f"a line of {line.end - line.offset} bytes; at most {LINE_LIMIT} are read")
        return []
    if not line.content.strip():
        return []
    if sealed and not line.complete:
        quarantine.add(position, "torn", "a line without its end, which no seal can vouch for")
        return []
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        quarantine.add(position, "binary", f"byte {error.start} of the line is not UTF-8")
        return []
    if "\0" in text:
        quarantine.add(position, "binary", "a NUL byte")
        return []
    try:
        return decode(text)
    except NotOtlp as error:
        torn = error.reason == "malformed" and not line.complete
        quarantine.add(position, "torn" if torn else error.reason, error.detail)
        return []


def merge(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    """One entry per span, by (trace id, span id), in order of first appearance.

    The supervisor's word wins over the target's, whatever ids a target claims; then a span that ended over the same
    one begun; then the later line.
    """
    merged: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        key = (entry.span.trace_id, entry.span.span_id)
        before = merged.get(key)
        if before is None or _weight(entry.span) >= _weight(before.span):
            merged[key] = entry
    return merged


def _weight(span: SpanRecord) -> tuple[bool, bool]:
    return is_proof(span.attributes), span.end_ns is not None


def is_proof(attributes: Attributes) -> bool:
    """False for what the target said of itself. Spans of other writers carry no source and count."""
    return attributes.get("ray_guard.source") != Source.TARGET.value

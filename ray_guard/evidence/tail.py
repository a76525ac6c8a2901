"""Reads a journal on from where one left off, and remembers how far: for spans and for metrics, each its own.

Runs in the forwarder's process. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ray_guard.evidence.layout import SUFFIX
from ray_guard.evidence.otlp import NotOtlp, decode
from ray_guard.evidence.reader import open_segment, scan
from ray_guard.records import Resource, SpanRecord

#: Collectors take 4 MiB a request by default; the protobuf is smaller than the JSON.
BATCH_BYTES: Final = 2 * 1024 * 1024

log = logging.getLogger("ray_guard.forward")


@dataclass(frozen=True, slots=True)
class Line:
    """One journal line's ended spans, and where the line ends."""

    segment: str
    end: int
    spans: list[tuple[Resource, SpanRecord]]


@dataclass(slots=True)
class Progress:
    """How far each segment has been sent, in bytes, kept beside the journal.

    Losing it costs duplicates, never spans; so it is replaced atomically and not synced.
    """

    path: Path
    offsets: dict[str, int] = field(default_factory=dict)
    rejected: int = 0

    @classmethod
    def load(cls, path: Path) -> Progress:
        """As saved; from the beginning where there is nothing usable."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            offsets = {str(name): int(offset) for name, offset in saved["segments"].items()}
            return cls(path, offsets, int(saved.get("rejected", 0)))
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is not readable (%s): sending from the beginning", path, error)
            return cls(path)

    def advance(self, lines: Iterable[Line]) -> None:
        """These are done with."""
        for line in lines:
            self.offsets[line.segment] = line.end

    def save(self) -> None:
        """Replaces the file.

        Raises:
            OSError: the disk is full or the folder gone.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        content = json.dumps({"version": 1, "segments": self.offsets, "rejected": self.rejected}, sort_keys=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(self.path)


class Tail:
    """Reads on where sending left off, over all segments of a folder, oldest first."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._exhausted: dict[str, int] = {}  # segment → its size when there was no whole line left in it

    def read(self, spans: int, size: int = BATCH_BYTES) -> list[Line]:
        """The next whole lines: at most ``spans`` ended spans and about ``size`` bytes. Empty when all is sent.

        Lines without an ended span come along (they move the offset); what cannot be read is passed over: the
        report's reader counts it.
        """
        batch: list[Line] = []
        for name, length in self._segments():
            offset = self._progress.offsets.get(name, 0)
            if length == offset or self._exhausted.get(name) == length:
                continue
            try:
                with open_segment(self._folder / name) as file:
                    if offset and (file.seek(offset - 1) != offset - 1 or file.read(1) != b"\n"):
                        # Not where a line begins: the state is of another file. Twice is better than never.
                        log.warning("%s: offset %d is within a line: sending it from the beginning", name, offset)
                        offset = 0
                    for line in scan(file, offset):
                        if not line.complete:
                            self._exhausted[name] = length
                            break
                        batch.append(Line(name, line.end, _ended(line.content)))
                        spans -= len(batch[-1].spans)
                        size -= line.end - line.offset
                        if spans <= 0 or size <= 0:
                            return batch
            except OSError as error:
                log.warning("%s cannot be read: %s", name, error.strerror or error)
                self._exhausted[name] = length
        return batch

    def _segments(self) -> list[tuple[str, int]]:
        found = sizes(self._folder)
        for gone in self._progress.offsets.keys() - found:
            del self._progress.offsets[gone]
        return list(found.items())


def sizes(folder: Path) -> dict[str, int]:
    """The segments of a folder, by name in their order, and how long each is. Raises OSError."""
    found: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(SUFFIX):
                continue
            with contextlib.suppress(OSError):  # gone between listing and looking
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode):
                    found[entry.name] = about.st_size
    return dict(sorted(found.items()))


def _ended(content: bytes | None) -> list[tuple[Resource, SpanRecord]]:
    # Half of a journal is begun spans: not worth parsing to see that they have no end.
    if not content or (b'"endTimeUnixNano"' not in content and b'"end_time_unix_nano"' not in content):
        return []
    try:
        return [pair for pair in decode(content) if pair[1].end_ns is not None]
    except NotOtlp:
        return []

"""The helper that sees to the logs of former supervisors: a process of its own, beside the one that now writes.

Runs in the recoverer, a child of the zygote. For each log in the folder that nobody writes and no other vouches for it
gives the supervisor lines for the new log: the last checkpoint of the old one, so that its removal would be noticed;
and where its supervisor was killed, how many records are there and their root, and an end for every span left open,
but for those that go on under the new supervisor: it asks which. Nothing old is written to. Lines go out on a stream;
each that vouches is answered with a byte once it is in the journal, and only then marked as done: cut short, all is
done again, with the same ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from ray_guard.evidence.layout import ASKS, BEFORE, SEAL_SUFFIX, VOUCHED_SUFFIX, unvouched
from ray_guard.evidence.merkle import Tree
from ray_guard.evidence.otlp import LineEncoder, NotOtlp, decode, resource_line
from ray_guard.evidence.reader import open_segment, scan, segments_of
from ray_guard.records import AttributeValue, Resource, SpanRecord, StatusCode

_IDS: Final = re.compile(rb'"spans":\[\{"traceId":"([0-9a-f]{32})","spanId":"([0-9a-f]{16})"')
_TAIL: Final = 4 << 20
_PATIENCE_S: Final = 7.0
"""Longer than policy actors are handed over in, which holds the log (``supervisor.handover``)."""
_GROUP: Final = 4096


def run(line: socket.socket) -> None:
    """Sees to the folder that the first line on the stream names."""
    with line, line.makefile("rb") as told:
        asked = json.loads(told.readline())
        folder = Path(str(asked["folder"]))
        try:
            logs = unvouched(folder, str(asked["log"]))
            for number, log in enumerate(logs):
                with contextlib.suppress(OSError), _Abandoned(folder, log, logs[number + 1 :]) as old:
                    line.sendall(ASKS + b"\n")  # only now: whoever held the log until now may have handed spans on
                    old.found.leave(json.loads(told.readline()))
                    for each in old.lines():
                        line.sendall(each)
                    if told.read(1) != b"\1":
                        return
                    (folder / f"{log}{VOUCHED_SUFFIX}").touch(0o600)
        except ConnectionError:
            pass  # the supervisor is gone, or has no room


class _Abandoned:
    """A log that nobody writes any more, held so that no other recoverer takes it. Raises OSError where one does.

    Args:
        later: logs that were begun after it, and are abandoned likewise.
    """

    def __init__(self, folder: Path, log: str, later: Sequence[str] = ()) -> None:
        self._folder = folder
        self._log = log
        self._later = later
        self.found = Found()
        self._seal = open_segment(folder / f"{log}{SEAL_SUFFIX}")

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._seal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it is being written; or verified, which takes an instant
                if time.monotonic() > deadline:
                    self._seal.close()
                    raise
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._seal.close()

    def lines(self) -> Iterator[bytes]:
        """What the new log is to say. Raises OSError."""
        key, note = self._last()
        about: dict[str, AttributeValue] = {BEFORE: self._log}
        if key is not None:
            about[f"{BEFORE}.key"] = key
        if note is not None:
            about[f"{BEFORE}.checkpoint"] = note
        if note is None or "\nend\n" not in note:
            found = self.found
            for path in segments_of(self._folder, self._log):
                found.take(path)
            for path in (path for log in self._later for path in segments_of(self._folder, log)):
                found.leave_those_in(path)
            yield from found.ends(self._log)
            about[f"{BEFORE}.records"] = found.tree.size
            about[f"{BEFORE}.root"] = found.tree.root().hex()
            about[f"{BEFORE}.torn_bytes"] = found.torn
            about[f"{BEFORE}.closed_spans"] = len(found.open)
        yield resource_line(about)

    def _last(self) -> tuple[str | None, str | None]:
        """Key and last checkpoint, as they stand there: whoever verifies will see whether they are good."""
        head = self._seal.read(1 << 16).split(b"\n")
        size = self._seal.seek(0, os.SEEK_END)
        self._seal.seek(max(0, size - _TAIL))
        tail = self._seal.read(_TAIL).split(b"\n")
        return _said(head, "key"), _said(tail[::-1], "checkpoint")


def _said(lines: list[bytes], word: str) -> str | None:
    for line in lines:
        try:
            return str(json.loads(line)[word])
        except (ValueError, KeyError, TypeError):
            continue
    return None


class Found:
    """What a killed supervisor's segments hold."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.open: dict[tuple[bytes, bytes], bytes] = {}
        self.torn = 0
        self._last_ns = 0
        self._left: frozenset[bytes] = frozenset()

    def take(self, path: Path) -> None:
        hashes: list[bytes] = []
        with open_segment(path) as file:
            self._last_ns = max(self._last_ns, os.fstat(file.fileno()).st_mtime_ns)
            for line in scan(file):
                if not line.complete:
                    self.torn += line.end - line.offset
                    break
                content = line.content or b""
                hashes.append(sha256(b"\0" + content).digest())
                ids = _IDS.search(content)
                if ids is not None:
                    if b'"endTimeUnixNano":' in content:
                        self.open.pop((ids[1], ids[2]), None)
                    elif ids[2] not in self._left:
                        self.open[ids[1], ids[2]] = content
                if len(hashes) >= _GROUP:
                    self.tree.extend(hashes)
                    hashes.clear()
        self.tree.extend(hashes)
        with contextlib.suppress(OSError):
            os.truncate(path, os.path.getsize(path))  # gives back what had been set aside behind its end

    def leave(self, spans: Iterable[str]) -> None:
        """These spans go on in another log."""
        self._left = frozenset(span.encode() for span in spans)

    def leave_those_in(self, path: Path) -> None:
        """Spans that went on in a later log, whose supervisor is gone as well, are ended there."""
        if self.open:
            with open_segment(path) as file:
                for line in scan(file):
                    ids = _IDS.search(line.content or b"")
                    if ids is not None:
                        self.open.pop((ids[1], ids[2]), None)

    def begun(self) -> Iterator[tuple[Resource, SpanRecord]]:
        """The spans that have no end."""
        for content in self.open.values():
            with contextlib.suppress(NotOtlp, ValueError):
                ((resource, record),) = decode(content)
                yield resource, record

    def ends(self, log: str) -> Iterator[bytes]:
        """An end for every span that has none: when the log was last written."""
        for resource, record in self.begun():
            attributes = {**record.attributes, "ray_guard.ended_by": "supervisor", "ray_guard.recovered_from": log}
            ended = record._replace(
                end_ns=max(record.start_ns, self._last_ns),
                attributes=attributes,
                status=StatusCode.ERROR,
                status_message="its supervisor was killed before the span ended",
            )
            yield LineEncoder(resource).encode(ended)

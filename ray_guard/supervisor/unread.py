"""What targets had said when their supervisor was killed, and nobody had read. Runs in the zygote.

A target's message is in the kernel as soon as it is sent, and the call goes on. So the zygote holds a duplicate of each
target's line. When the supervisor is gone it shuts them first: what was sent until then is all there is, and whoever
says more is told that nobody listens. When the targets are dead it writes what is left as one more segment of the
supervisor's own log, which the next supervisor vouches for as for the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from ray_guard.kernel import seqpacket
from ray_guard.named import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from ray_guard.records import SpanRecord

_PATIENCE_S: Final = 0.1
_TAIL: Final = 1 << 18
"""Of a log: the record that was written last is in there."""
_TOLD: Final = ("open", "close")
"""All else asks for something, and nobody is left who could grant it."""


class About(NamedTuple):
    """Whose line it is.

    Attributes:
        folder, run_id: where and for which job it is journaled.
        resource: the attributes of its OTLP resource.
    """

    folder: str
    run_id: str
    resource: dict[str, Any]


class Unread:
    """The lines that are held, by the number of their session."""

    def __init__(self) -> None:
        self._lines: dict[int, tuple[socket.socket, About]] = {}
        self._left: dict[str, str] = {}
        """Of each folder the supervisor's log."""
        self._logs: dict[str, tuple[str, int]] = {}
        """Of each folder the log that is to be continued, and its locked seal."""
        self.inbox = -1
        """The supervisor's, to be read when it is gone; negative: it has none."""

    def hold(self, number: int, descriptor: int, about: About) -> None:
        """``descriptor`` is ours from here on."""
        self.release(number)
        self._lines[number] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor), about

    def rename(self, number: int, resource: dict[str, Any]) -> None:
        """A worker has learnt which actor it is."""
        if number in self._lines:
            line, about = self._lines[number]
            self._lines[number] = line, about._replace(resource=resource)

    def release(self, number: int) -> None:
        """The supervisor has read it to its end."""
        if number in self._lines:
            self._lines.pop(number)[0].close()

    def line(self, number: int) -> int | None:
        """The descriptor that is held of it."""
        return self._lines[number][0].fileno() if number in self._lines else None

    def last_of(self, number: int) -> dict[str, Any] | None:
        """The message of that line that the supervisor had read and not done with."""
        from ray_guard.supervisor.inbox import read  # here alone: what is forked stays small

        found = None if self.inbox < 0 else read(self.inbox)
        return None if found is None or found[0] != number else found[1]

    def has_ended(self, number: int, span: str) -> bool:
        """Whether the end of that span is among the last that was journaled. To be asked after :meth:`shut`, when the
        supervisor has closed everything."""
        from pathlib import Path

        from ray_guard.evidence.reader import segments_of

        folder = self._lines[number][1].folder
        if folder not in self._left:
            return False
        with segments_of(Path(folder), self._left[folder])[-1].open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().rstrip(b"\0").split(b"\n")[:-1]
        return any(f'"spanId":"{span}"'.encode() in line and b'"endTimeUnixNano":' in line for line in lines)

    def shut_one(self, number: int) -> None:
        """Nothing more is taken from that one."""
        if number in self._lines:
            with contextlib.suppress(OSError):
                self._lines[number][0].shutdown(socket.SHUT_RD)

    def shut(self, supervisor: int, but: Container[int] = ()) -> None:
        """The supervisor, which had this pid, is gone: nothing more is taken, and nobody else recovers its logs.

        Args:
            but: lines that the next supervisor may take over.
        """
        for number in self._lines:
            if number not in but:
                self.shut_one(number)
        from ray_guard.evidence.layout import SEAL_SUFFIX, unvouched  # here alone: what is forked stays small

        for folder in {about.folder for _, about in self._lines.values()}:
            with contextlib.suppress(OSError):
                # The supervisor's own, see journal._name: what went before one with a new key is vouched for.
                for log in [each for each in unvouched(folder, "") if each.rsplit("-", 2)[1:2] == [str(supervisor)]]:
                    self._left[folder] = log  # written on by us only where nobody else does
                    seal = os.open(f"{folder}/{log}{SEAL_SUFFIX}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    if _locked(seal):
                        self._logs[folder] = log, seal

    def write(self) -> None:
        """Writes what was said. To be called when the targets are dead, after :meth:`shut`. Raises OSError."""
        for folder, (log, seal) in self._logs.items():
            said = [(about, message) for number, (line, about) in self._lines.items() if about.folder == folder
                    for message in self._unsaid(number, line)]  # fmt: skip
            if said:
                _continue(folder, log, said)
            os.close(seal)

    def _unsaid(self, number: int, line: socket.socket) -> Iterator[dict[str, Any]]:
        last = self.last_of(number)
        if last is not None and last.get("op") in _TOLD:
            yield last
        yield from _rest(line)


def _locked(seal: int) -> bool:
    """Whether the log is ours now. The supervisor, as it ends, may hold it a moment longer than its line to us."""
    over = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(seal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > over:
                os.close(seal)
                return False
            time.sleep(0.001)
        else:
            return True


def _rest(line: socket.socket) -> Iterator[dict[str, Any]]:
    while True:
        try:
            received = seqpacket.receive(line, socket.MSG_DONTWAIT)
        except seqpacket.BadPacket:
            continue
        except OSError:
            return
        if received is None:
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        if message.get("op") in _TOLD:
            yield message


def _continue(folder: str, log: str, said: list[tuple[About, dict[str, Any]]]) -> None:
    """One more segment of ``log``. Raises OSError."""
    # Here alone: what every tool is forked from stays small.
    from pathlib import Path

    from ray_guard.evidence.layout import SCHEMA, log_of, segment_name
    from ray_guard.evidence.otlp import LineEncoder, fragment, resource_line
    from ray_guard.evidence.reader import segments_of
    from ray_guard.evidence.recovery import Found
    from ray_guard.records import Resource, Source
    from ray_guard.supervisor import fields

    paths = segments_of(Path(folder), log)
    found = Found()
    for path in paths:
        found.take(path)
    last = log_of(paths[-1].name) if paths else None
    number = 1 if last is None else last[1] + 1
    lines: list[bytes] = []
    open_spans: dict[str, tuple[Resource, SpanRecord]] = {
        record.span_id: (resource, record) for resource, record in found.begun()
    }
    reported = {"ray_guard.source": Source.TARGET.value}
    for about, message in said:
        with contextlib.suppress(seqpacket.BadPacket, ValueError):
            if message["op"] == "open":
                identity = {"rl.run.id": about.run_id, **fields.identity(message.get("identity"))}
                record = fields.begun(message)
                if record.span_id in open_spans:
                    continue  # it had just been journaled
                resource = Resource(fields.attributes(about.resource))
                record = record._replace(attributes={**record.attributes, **identity})
                open_spans[record.span_id] = resource, record
            else:
                known = open_spans.pop(fields.identifier(message.get("span"), 16), None)
                if known is None:
                    continue
                resource, record = known[0], fields.ended(known[1], message)
            lines.append(LineEncoder(resource).encode(record, fragment(reported)))
    if not lines:
        return
    beginning = resource_line(
        {
            "ray_guard.journal.schema": SCHEMA,
            "ray_guard.journal.log": log,
            "ray_guard.journal.segment": number,
            "ray_guard.journal.first_record": found.tree.size,
            "ray_guard.journal.unix_ns": time.time_ns(),
            "ray_guard.journal.boot_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            "ray_guard.journal.unread": len(lines),
        }
    )
    descriptor = os.open(
        f"{folder}/{segment_name(log, number)}",
        os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC,
        0o600,
    )
    with open(descriptor, "wb") as file:
        file.write(b"".join((beginning, *lines)))

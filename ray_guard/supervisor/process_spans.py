"""Process spans: one for each program that is executed in a call. Runs in the supervisor.

A call can execute as many as it likes: after :data:`SPANS_LIMIT` further ones are only counted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ray_guard.evidence.journal import JournalError
from ray_guard.evidence.otlp import ProcessLine, fragment, tail
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.records import AttributeValue, StatusCode

if TYPE_CHECKING:
    from ray_guard.supervisor.arguments import Program
    from ray_guard.supervisor.target import Origin, Target

log = logger("ray_guard.processes")

SPANS_LIMIT: Final = 4096
_TOGETHER: Final = 32
"""Ends that one write takes: with the longest arguments they are a fraction of what a journal takes."""
_EXITED: Final = "," + fragment({"process.exit.code": 0}).encoded
_LOST: Final = "," + fragment({"ray_guard.ended_by": "supervisor"}).encoded
_FAILED: Final = tail((), StatusCode.ERROR)


class Image(NamedTuple):
    """A program in a process.

    Attributes:
        program: as the process gave it.
        span, parent: ids; the parent is the span of the program that forked this process.
        began: Unix time in nanoseconds.
        cpu_ns: what the process had used by then.
    """

    pid: int
    parent_pid: int
    program: Program
    span: str
    parent: str
    began: int
    cpu_ns: int


class OpenImage(NamedTuple):
    """One whose span has begun."""

    image: Image
    line: ProcessLine


class ProcessSpans:
    """The spans of one call; ``origin`` is the call."""

    def __init__(self, target: Target, origin: Origin) -> None:
        self._target = target
        self._origin = origin
        self._begun = 0
        self._ended: list[bytes] = []
        self.left_out = 0

    @property
    def full(self) -> bool:
        return self._begun >= SPANS_LIMIT

    def begin(self, image: Image) -> OpenImage | None:
        """Journals its beginning before it may happen; None: there are too many. Raises JournalError."""
        begun = self.open(image)
        if begun is not None:
            self._target.journal.append(begun.line.begun())
        return begun

    def began(self, image: Image) -> OpenImage | None:
        """As :meth:`begin`, for one that was let through. Raises JournalError."""
        begun = self.open(image)
        if begun is not None:
            self._keep(begun.line.begun())
        return begun

    def open(self, image: Image) -> OpenImage | None:
        """As :meth:`begin`, for one that has ended: that is all there will be to write."""
        program = image.program
        if self.full:
            self.left_out += 1
            self._target.unseen(self._origin, image.parent, program.whole or program.shown, program.path)
            return None
        if program.whole:
            self._target.unseen(self._origin, image.span, program.whole, program.path)
            image = image._replace(program=program._replace(whole=()))  # it may live long
        self._begun += 1
        self._origin.tally.another(self._origin)
        line = self._target.encoder.process_line(
            self._origin.trace_id, image.span, image.parent, self._origin.identity.encoded,
            form=program.form, start_ns=image.began, pid=image.pid, parent_pid=image.parent_pid,
        )  # fmt: skip
        return OpenImage(image, line)

    def _keep(self, line: bytes) -> None:
        try:
            self._target.journal.append(line)
        except JournalError:
            self._target.journal.keep(line)

    def end(
        self, begun: OpenImage, at: int, cpu_ns: int | None, *, status: int | None = None, peak: int = 0, lost: str = ""
    ) -> None:
        """Ends it at ``at``; it is journaled with the next :meth:`write`.

        Args:
            cpu_ns: the process's clock by then; None: nobody could read it.
            status: as waitpid gives it; None: unknown, or another program follows in the same process.
            peak: bytes of resident memory it had at most; 0: unknown.
            lost: why the process did not end it itself.
        """
        image = begun.image
        more = ""
        if cpu_ns is not None:
            used = max(0, cpu_ns - image.cpu_ns) / 1e9
            more += f',{{"key":"ray_guard.process.cpu_seconds","value":{{"doubleValue":{used}}}}}'
        if peak:
            more += f',{{"key":"ray_guard.process.peak_memory","value":{{"intValue":"{peak}"}}}}'
        if status is not None:
            more += _EXITED if status == 0 else f",{fragment(exit_attributes(status)).encoded}"
        if lost:
            more += _LOST
        events, told, error = self._target.offences(image.span)
        if events:
            more += f",{fragment(told).encoded}"
            failed = error or status or lost
            said = tail(events, StatusCode.ERROR if failed else StatusCode.UNSET, lost)
        else:
            said = _FAILED if status and not lost else "" if not lost else tail((), StatusCode.ERROR, lost)
        self._ended.append(begun.line.ended(max(at, image.began), more, said))
        if len(self._ended) >= _TOGETHER:
            self.write()

    def write(self) -> None:
        """Journals the ends that were told, all with one write."""
        if self._ended:
            lines, self._ended = b"".join(self._ended), []
            try:
                self._keep(lines)
            except JournalError:
                log.exception("the end of a process could not be journaled")


def exit_attributes(status: int) -> dict[str, AttributeValue]:
    """How a process ended, from what waitpid gave: as a shell counts it, and by which signal."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return {"process.exit.code": code}
    return {"process.exit.code": 128 - code, "process.exit.signal": -code}

"""Process spans: one for each program that is executed in a call. Runs in the supervisor.

A call can execute as many as it likes: after :data:`SPANS_LIMIT` further ones are only counted.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from ray_guard.evidence.journal import JournalError
from ray_guard.records import AttributeValue, SpanKind, SpanRecord, StatusCode

if TYPE_CHECKING:
    from ray_guard.supervisor.arguments import Arguments
    from ray_guard.supervisor.target import Origin, Target

log = logging.getLogger("ray_guard.processes")

SPANS_LIMIT: Final = 4096
_NAME_SHOWN: Final = 128


class Image(NamedTuple):
    """A program in a process.

    Attributes:
        path, arguments: as the process gave them.
        span, parent: ids; the parent is the span of the program that forked this process.
        began: Unix time in nanoseconds.
        cpu_ns: what the process had used by then.
    """

    pid: int
    parent_pid: int
    path: str
    arguments: Arguments
    span: str
    parent: str
    began: int
    cpu_ns: int


class ProcessSpans:
    """The spans of one call; ``origin`` is the call."""

    def __init__(self, target: Target, origin: Origin) -> None:
        self._target = target
        self._origin = origin
        self._written = 0
        self.left_out = 0

    @property
    def full(self) -> bool:
        return self._written >= SPANS_LIMIT

    def begin(self, image: Image) -> bool:
        """Whether there is a span: False where there are too many. Raises JournalError."""
        if self.full:
            self.left_out += 1
            return False
        self._written += 1
        self._target.write(_record(self._origin, image), self._origin.identity)
        return True

    def end(
        self, image: Image, at: int, cpu_ns: int | None, *, status: int | None = None, peak: int = 0, lost: str = ""
    ) -> None:
        """Ends it at ``at``.

        Args:
            cpu_ns: the process's clock by then; None: nobody could read it.
            status: as waitpid gives it; None: unknown, or another program follows in the same process.
            peak: bytes of resident memory it had at most; 0: unknown.
            lost: why the process did not end it itself.
        """
        more: dict[str, AttributeValue] = {}
        if cpu_ns is not None:
            more["ray_guard.process.cpu_seconds"] = max(0, cpu_ns - image.cpu_ns) / 1e9
        if peak:
            more["ray_guard.process.peak_memory"] = peak
        if status is not None:
            more |= exit_attributes(status)
        if lost:
            more["ray_guard.ended_by"] = "supervisor"
        failed = bool(lost) or more.get("process.exit.code", 0) != 0
        record = _record(self._origin, image, end_ns=at, more=more, failed=failed, message=lost)
        try:
            self._target.write(record, self._origin.identity)
        except JournalError:
            log.exception("the end of a process could not be journaled")


def _record(
    origin: Origin,
    image: Image,
    *,
    end_ns: int | None = None,
    more: dict[str, AttributeValue] | None = None,
    failed: bool = False,
    message: str = "",
) -> SpanRecord:
    return SpanRecord(
        trace_id=origin.trace_id,
        span_id=image.span,
        parent_id=image.parent,
        name=f"process {os.path.basename(image.path)[:_NAME_SHOWN]}",
        kind=SpanKind.INTERNAL,
        start_ns=image.began,
        end_ns=end_ns,
        attributes={
            "process.pid": image.pid,
            "process.parent_pid": image.parent_pid,
            "process.executable.path": image.path,
            "process.command_args": image.arguments.shown,
            **({"ray_guard.arguments.sha256": image.arguments.digest} if image.arguments.digest else {}),
            **(more or {}),
        },
        status=StatusCode.ERROR if failed else StatusCode.UNSET,
        status_message=message,
    )


def exit_attributes(status: int) -> dict[str, AttributeValue]:
    """How a process ended, from what waitpid gave: as a shell counts it, and by which signal."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return {"process.exit.code": code}
    return {"process.exit.code": 128 - code, "process.exit.signal": -code}

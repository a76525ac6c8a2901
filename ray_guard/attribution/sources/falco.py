"""Falco alerts as JSON lines. Runs later. Pure.

The kernel saw the process: command line, pid, container. Times have nanoseconds; fields named ISO may hold an integer.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    NOBODY,
    Action,
    Endpoint,
    Observation,
    Process,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources.line import Line, Unusable, text_of

FORMAT: Final = "falco"

_CONNECTION: Final = re.compile(r"(\[?[\da-fA-F:.]+\]?):(\d+)->(\[?[\da-fA-F:.]+\]?):(\d+)")


class Falco:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        return (
            parsed is not None
            and "rule" in parsed
            and "priority" in parsed
            and ("output" in parsed or "output_fields" in parsed)
        )

    def read(self, line: Line) -> list[Observation]:
        parsed = line.object
        if parsed is None:
            raise Unusable("malformed", "not a JSON object")
        said = parsed.get("output_fields")
        fields: dict[str, Any] = said if isinstance(said, dict) else {}
        src, dst = _ends(fields, text_of(parsed, "output"))
        return [
            Observation(
                _time(parsed, fields),
                src=src,
                dst=dst,
                proto=protocol(fields.get("fd.l4proto")),
                action=Action.UNKNOWN,
                rule=text_of(parsed, "rule"),
                signature=text_of(parsed, "output"),
                severity=text_of(parsed, "priority"),
                host=text_of(fields, "fd.sip.name"),
                node=text_of(parsed, "hostname") or text_of(fields, "evt.hostname"),
                process=Process(
                    pid=whole(fields.get("proc.pid")),
                    parent_pid=whole(fields.get("proc.ppid")),
                    executable=text_of(fields, "proc.exepath") or text_of(fields, "proc.name"),
                    command=text_of(fields, "proc.cmdline"),
                    container=text_of(fields, "container.id").replace("host", ""),
                    user=text_of(fields, "user.name"),
                ),
            )
        ]


def _time(parsed: dict[str, Any], fields: dict[str, Any]) -> Time:
    candidates = (parsed.get("time"), fields.get("evt.time.iso8601"), fields.get("evt.time"), fields.get("evt.rawtime"))
    for written in candidates:
        if isinstance(written, str) and not written.isdigit():
            try:
                return times.iso(written, Semantics.PACKET)
            except times.BadTime:
                continue  # evt.time is a time of day in some settings
        if written is not None:
            return times.epoch(written, Semantics.PACKET)
    raise Unusable("time", "none of time, evt.time.iso8601, evt.time, evt.rawtime holds one")


def _ends(fields: dict[str, Any], output: str) -> tuple[Endpoint, Endpoint]:
    if fields.get("fd.cip") or fields.get("fd.sip"):
        return endpoint(fields.get("fd.cip"), fields.get("fd.cport")), endpoint(
            fields.get("fd.sip"), fields.get("fd.sport")
        )
    if fields.get("fd.rip"):
        return endpoint(fields.get("fd.lip"), fields.get("fd.lport")), endpoint(
            fields.get("fd.rip"), fields.get("fd.rport")
        )
    found = _CONNECTION.search(text_of(fields, "fd.name")) or _CONNECTION.search(output)
    if found is None:
        return NOBODY, NOBODY
    return endpoint(found[1], found[2]), endpoint(found[3], found[4])

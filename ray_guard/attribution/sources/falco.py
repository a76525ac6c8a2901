"""Falco alerts, as JSON lines or as the text that Falco writes where nobody asked for JSON. Runs later. Pure.

The kernel saw the process: command line, pid, container. Times have nanoseconds; fields named ISO may hold an integer.
The text names no rule (its message serves) and says the time of day alone, unless ISO times are set: the day is then
that of the syslog header, or not known.
"""

from __future__ import annotations

import re
from datetime import date, timedelta
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
from ray_guard.attribution.sources.line import Line, Unusable, at, text_of

FORMAT: Final = "falco"

_TEXT: Final = re.compile(
    r"(?P<header>.*?)(?P<time>(?:\d{4}-\d\d-\d\dT)?\d\d:\d\d:\d\d\.\d{9}(?:[+-]\d{4}|Z)?): "
    r"(?P<priority>Emergency|Alert|Critical|Error|Warning|Notice|Informational|Debug) (?P<output>.+)"
)
_FIELD: Final = re.compile(r"(?:^|(?<=[\s(]))([a-z_][\w.]*(?:\[\d+\])?)=")
#: what the rules that Falco comes with call its fields, in their messages
_NAMES: Final = {
    "command": "proc.cmdline",
    "cmdline": "proc.cmdline",
    "process": "proc.name",
    "program": "proc.name",
    "proc_exepath": "proc.exepath",
    "pid": "proc.pid",
    "ppid": "proc.ppid",
    "user": "user.name",
    "container_id": "container.id",
    "container": "container.id",
    "connection": "fd.name",
    "lport": "fd.lport",
    "rport": "fd.rport",
    "fd_type": "fd.type",
    "fd_proto": "fd.l4proto",
}
_CONNECTION: Final = re.compile(
    r"(?<![\da-fA-F:.])(\[?[\da-fA-F:.]{2,45}\]?):(\d{1,5})->(\[?[\da-fA-F:.]{2,45}\]?):(\d{1,5})"
)


#: hours: more lie between what is written at one time only where midnight does
_TURN: Final = 18


class _Fields:
    """What a rule put out. Stores that make nothing of dots name fields with underscores, or nest them."""

    def __init__(self, said: object) -> None:
        self._said: dict[str, Any] = said if isinstance(said, dict) else {}

    def get(self, key: str) -> Any:
        found = self._said.get(key)
        if found is None:
            found = self._said.get(key.replace(".", "_"))
        return at(self._said, *key.split(".")) if found is None else found

    def text(self, key: str) -> str:
        found = self.get(key)
        return "" if found is None or found == "<NA>" or isinstance(found, (dict, list)) else str(found)


class Falco:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is None:
            return _TEXT.fullmatch(line.text) is not None
        return "rule" in parsed and "priority" in parsed and ("output" in parsed or "output_fields" in parsed)

    def read(self, line: Line) -> list[Observation]:
        parsed = line.object
        if parsed is None:
            parsed = _of_text(line.text)
        if text_of(parsed, "rule").startswith("Falco internal:"):
            if "drop" not in text_of(parsed, "output"):
                return []  # its own figures
            raise Unusable("fields", f"Falco lost events here: {text_of(parsed, 'output'):.100}")
        fields = _Fields(parsed.get("output_fields"))
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
                host=fields.text("fd.sip.name"),
                node=text_of(parsed, "hostname") or fields.text("evt.hostname"),
                process=Process(
                    pid=whole(fields.get("proc.pid")),
                    parent_pid=whole(fields.get("proc.ppid")),
                    executable=fields.text("proc.exepath") or fields.text("proc.name"),
                    command=fields.text("proc.cmdline"),
                    container=fields.text("container.id").replace("host", ""),
                    user=fields.text("user.name"),
                ),
            )
        ]


def _of_text(text: str) -> dict[str, Any]:
    """The JSON that Falco would have written in the text's place, as far as the text tells."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise Unusable("malformed", "neither a JSON object nor a time, priority and message")
    output = found["output"]
    keys = list(_FIELD.finditer(output))
    ends = [*(key.start() for key in keys[1:]), len(output)]
    message = output[: keys[0].start()].rstrip(" (|") if keys else output
    fields: dict[str, str] = {}
    for key, end in zip(keys, ends, strict=True):
        value = output[key.end() : end].strip(" |,")
        if value.count(")") > value.count("("):  # that of the list of fields; more may follow it
            value = value.rstrip(" ").removesuffix(")")
        if value not in ("<NA>", ""):  # a command may name fields too: what stands first is the rule's
            fields.setdefault(_NAMES.get(key[1], key[1]), value)
    return {
        "time": found["time"] if "T" in found["time"] else _on_its_day(found["header"], found["time"]),
        "priority": found["priority"],
        "rule": message,
        "output": output,
        "output_fields": fields,
        "hostname": "",
    }


def _on_its_day(header: str, clock: str) -> str | Time:
    """A time of day with the day of the syslog header before it; a classic header's own time, which says as much."""
    day = re.search(r"(\d{4}-\d\d-\d\d)T(\d\d):", header)
    if day is not None:
        ahead = int(clock[:2]) - int(day[2])  # the header is written later: midnight may lie between
        turned = date.fromisoformat(day[1]) - timedelta(days=(ahead > _TURN) - (ahead < -_TURN))
        return f"{turned}T{clock}"
    try:
        return times.syslog(header, Semantics.PACKET)[0]
    except times.BadTime:
        raise Unusable("time", "a time of day without a day; set time_format_iso_8601 in falco.yaml") from None


def _time(parsed: dict[str, Any], fields: _Fields) -> Time:
    candidates = (parsed.get("time"), fields.get("evt.time.iso8601"), fields.get("evt.time"), fields.get("evt.rawtime"))
    for written in candidates:
        if isinstance(written, Time):
            return written
        if isinstance(written, str) and not written.isdigit():
            try:
                return times.iso(written, Semantics.PACKET)
            except times.BadTime:
                continue  # evt.time is a time of day in some settings
        if written is not None:
            return times.epoch(written, Semantics.PACKET)
    raise Unusable("time", "none of time, evt.time.iso8601, evt.time, evt.rawtime holds one")


def _ends(fields: _Fields, output: str) -> tuple[Endpoint, Endpoint]:
    if fields.get("fd.cip") or fields.get("fd.sip"):
        return endpoint(fields.get("fd.cip"), fields.get("fd.cport")), endpoint(
            fields.get("fd.sip"), fields.get("fd.sport")
        )
    if fields.get("fd.rip"):
        return endpoint(fields.get("fd.lip"), fields.get("fd.lport")), endpoint(
            fields.get("fd.rip"), fields.get("fd.rport")
        )
    found = _CONNECTION.search(fields.text("fd.name")) or _CONNECTION.search(output)
    if found is None:
        return NOBODY, NOBODY
    return endpoint(found[1], found[2]), endpoint(found[3], found[4])

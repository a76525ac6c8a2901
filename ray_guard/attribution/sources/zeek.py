"""Zeek conn, ssh, notice, dns … logs, as TSV (a header names the columns) or JSON. Runs later. Pure.

``ts`` is the begin of the connection, an epoch with microseconds or, where so configured, an ISO time; conn records add
``duration``. In JSON the dots of ``id.orig_h`` may have become underscores or an object.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import Observation, Semantics, Time, endpoint, protocol, whole, without_port
from ray_guard.attribution.sources.line import Line, Unusable, at

FORMAT: Final = "zeek"

_ESCAPED: Final = re.compile(r"\\x[0-9a-fA-F]{2}")
_ENDS: Final = ("orig_h", "orig_p", "resp_h", "resp_p")


class Zeek:
    """Remembers the header of a TSV log."""

    format = FORMAT

    def __init__(self) -> None:
        self._separator = "\t"
        self._columns: list[str] = []
        self._unset, self._empty = "-", "(empty)"

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is not None:
            return "ts" in parsed and (
                _ends(parsed) is not None or "uid" in parsed or "note" in parsed or "_path" in parsed
            )
        text = line.text
        if text.startswith(
            ("#separator", "#fields", "#path", "#types", "#set_separator", "#open", "#close", "#empty_", "#unset_")
        ):
            return True
        return "ts" in self._columns and text.count(self._separator) == len(self._columns) - 1

    def read(self, line: Line) -> list[Observation]:
        if line.object is not None:
            return [_observation(line.object)]
        text = line.text
        if text.startswith("#"):
            self._header(text)
            return []
        if not self._columns:
            raise Unusable("fields", "a TSV record before any #fields line")
        fields = text.split(self._separator)
        if len(fields) != len(self._columns):
            raise Unusable("fields", f"{len(fields)} fields where the header names {len(self._columns)}")
        said = zip(self._columns, fields, strict=True)
        return [_observation({key: value for key, value in said if value not in (self._unset, self._empty)})]

    def _header(self, text: str) -> None:
        if text.startswith("#separator"):
            said = text.removeprefix("#separator").strip()
            if _ESCAPED.fullmatch(said):
                said = bytes.fromhex(said.replace("\\x", "")).decode("latin-1")
            if len(said) != 1:
                raise Unusable("fields", f"{text!r:.60} names no one character")
            self._separator = said
            return
        key, _, value = text.partition(self._separator)
        if key == "#fields":
            self._columns = value.split(self._separator)
        elif key == "#unset_field":
            self._unset = value
        elif key == "#empty_field":
            self._empty = value


def _ends(parsed: dict[str, Any]) -> tuple[Any, Any, Any, Any] | None:
    nested = parsed.get("id")
    for ends in (
        [parsed.get(f"id.{key}") for key in _ENDS],
        [parsed.get(f"id_{key}") for key in _ENDS],
        [at(nested, key) for key in _ENDS],
        [parsed.get(key) for key in ("src_addr", "src_port", "dst_addr", "dst_port")],  # signatures.log
        [parsed.get("src"), None, parsed.get("dst"), parsed.get("p")],  # notice.log without a connection
    ):
        if ends[0] is not None or ends[2] is not None:
            return ends[0], ends[1], ends[2], ends[3]
    return None


def _observation(parsed: dict[str, Any]) -> Observation:
    orig_h, orig_p, resp_h, resp_p = _ends(parsed) or (None, None, None, None)
    note = str(parsed.get("note") or "")
    # What somebody asked to be told of: intel.log has nothing else.
    indicator = str(
        parsed.get("seen.indicator") or parsed.get("seen_indicator") or at(parsed.get("seen"), "indicator") or ""
    )
    return Observation(
        _time(parsed),
        src=endpoint(orig_h, orig_p),
        dst=endpoint(resp_h, resp_p),
        proto=protocol(parsed.get("proto")) or ("tcp" if "auth_success" in parsed or "server_name" in parsed else ""),
        rule=note or (f"intel {indicator}" if indicator else ""),
        signature=str(parsed.get("msg") or parsed.get("event_msg") or "") if note else "",
        host=without_port(str(parsed.get("query") or parsed.get("server_name") or parsed.get("host") or "")),
        node=str(parsed.get("peer_descr") or parsed.get("_system_name") or ""),
        bytes_out=whole(parsed.get("orig_bytes")),
        bytes_in=whole(parsed.get("resp_bytes")),
        flow_id=str(parsed.get("uid") or ""),
    )


def _time(parsed: dict[str, Any]) -> Time:
    written = parsed.get("ts")
    if isinstance(written, str) and not written.replace(".", "", 1).isdigit():
        begin = times.iso(written, Semantics.START)
    else:
        begin = times.epoch(written, Semantics.START)
    return times.lasting(begin, parsed["duration"]) if parsed.get("duration") is not None else begin

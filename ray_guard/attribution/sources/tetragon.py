"""Cilium Tetragon events: which process (``exec_id``, pid, command) did what, with the socket's own addresses.

Runs later. Pure. The best witness there is. Keys
come in snake_case from the agent and in camelCase from its gRPC interface.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    Action,
    Observation,
    Process,
    Semantics,
    Time,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources.line import Line, Unusable, at, text_of

FORMAT: Final = "tetragon"

_EVENT: Final = re.compile(
    r"process_(?:exec|exit|kprobe|tracepoint|uprobe|usdt|lsm|loader|throttle|connect|close|accept|listen)"
)
_HUMP: Final = re.compile(r"(?<=[a-z0-9])([A-Z])")
_DENIES: Final = frozenset({"SIGKILL", "SIGNAL", "OVERRIDE", "NOTIFYENFORCER"})


class Tetragon:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        return line.object is not None and _event(line.object)[0] != ""

    def read(self, line: Line) -> list[Observation]:
        if line.object is None:
            raise Unusable("malformed", "not a JSON object")
        kind, event = _event(line.object)
        if not kind:
            raise Unusable("unknown", "no process event in the object")
        if kind == "process_throttle":
            return []
        action = text_of(event, "action").removeprefix("KPROBE_ACTION_").upper()
        sock = _socket(event)
        about = at(event, "process") or {}
        return [
            Observation(
                _time(line.object, event),
                src=endpoint(at(sock, "saddr"), at(sock, "sport")),
                dst=endpoint(at(sock, "daddr"), at(sock, "dport")),
                proto=protocol(text_of(sock, "protocol").removeprefix("IPPROTO_")),
                action=Action.DENIED if action in _DENIES else Action.UNKNOWN,
                rule=text_of(event, "policy_name"),
                signature=text_of(event, "message"),
                node=text_of(line.object, "node_name") or text_of(line.object, "nodeName"),
                process=Process(
                    pid=whole(about.get("pid")),
                    parent_pid=whole(at(event, "parent", "pid")),
                    exec_id=text_of(about, "exec_id"),
                    executable=text_of(about, "binary"),
                    command=f"{text_of(about, 'binary')} {text_of(about, 'arguments')}".strip(),
                    container=text_of(about, "pod", "container", "id").rpartition("/")[2] or text_of(about, "docker"),
                    user=text_of(about, "uid"),
                ),
            )
        ]


def _event(parsed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for key, value in parsed.items():
        name = _HUMP.sub(r"_\1", key).lower()
        if isinstance(value, dict) and _EVENT.fullmatch(name):
            return name, value if name == key else _snake(value)
    return "", {}


def _snake(parsed: dict[str, Any]) -> dict[str, Any]:
    """Keys of all depths in snake_case."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {_HUMP.sub(r"_\1", key).lower(): turned(inner) for key, inner in value.items()}
        return [turned(inner) for inner in value] if isinstance(value, list) else value

    found: dict[str, Any] = turned(parsed)
    return found


def _socket(event: dict[str, Any]) -> dict[str, Any]:
    """What of a socket an event says: a probe's argument, or, of Isovalent's own events, the event itself."""
    for argument in _list(event.get("args")):
        for key in ("sock_arg", "skb_arg", "sockaddr_arg"):
            found = argument.get(key)
            if isinstance(found, dict):
                return found if key != "sockaddr_arg" else {"daddr": found.get("addr"), "dport": found.get("port")}
    return {
        "saddr": event.get("source_ip") or event.get("ip"),
        "sport": event.get("source_port") or event.get("port"),
        "daddr": event.get("destination_ip"),
        "dport": event.get("destination_port"),
        "protocol": event.get("protocol"),
    }


def _list(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _time(parsed: dict[str, Any], event: dict[str, Any]) -> Time:
    written = parsed.get("time") or event.get("time")
    if written is None:  # an exec without time: when the process began
        return times.iso(at(event, "process", "start_time"), Semantics.START)
    if isinstance(written, (int, float)):
        return times.epoch(written, Semantics.PACKET)
    return times.iso(written, Semantics.PACKET)

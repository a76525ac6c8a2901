"""Azure network security group and virtual network flow logs: comma-separated tuples deep in JSON. Runs later. Pure.

Network security groups (deprecated) write seconds, virtual networks milliseconds. A tuple says when a flow began, was
refused, or (`C`, `E`) how it stood at a later time. Each tuple is a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import Action, Observation, Semantics, endpoint, protocol, whole
from ray_guard.attribution.sources.line import Line, Partly, Unusable, at, text_of

FORMAT: Final = "azure-flow"

_PROTOCOLS: Final = {"T": "tcp", "U": "udp"}


class AzureFlow:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        return parsed is not None and any(True for each in _records(parsed) if _groups(each))

    def read(self, line: Line) -> list[Observation]:
        if line.object is None:
            raise Unusable("malformed", "not a JSON object")
        seen: list[Observation] = []
        faults: list[Exception] = []
        searched = 0
        for record in _records(line.object):
            node = text_of(record, "macAddress") or text_of(record, "systemId")
            for rule, written in _tuples(record):
                if written is None:
                    faults.append(Unusable("fields", "flows without flowTuples"))
                    continue
                found, part = _place(line.raw, written, searched)
                searched = max(searched, found + 1)
                try:
                    seen.append(_observation(written, rule, node, _stands(line.raw, max(found, 0)), part))
                except (Unusable, times.BadTime) as error:
                    faults.append(error)
        if faults:
            raise Partly(seen, faults)
        return seen


def _place(raw: bytes, written: str, searched: int) -> tuple[int, str]:
    """(where a tuple is, its text there); by its time where that is not as it was read (bytes that are no UTF-8)."""
    found = raw.find(written.encode("utf-8", "surrogatepass"), searched)
    if found >= 0:
        return found, written
    found = raw.find(written.partition(",")[0].encode("utf-8", "surrogatepass"), searched)
    return found, raw[found : raw.find(b'"', found)].decode("utf-8", "surrogateescape") if found >= 0 else written


def _stands(raw: bytes, found: int) -> int:
    """Where a tuple's line begins, or it itself where it has none of its own."""
    begin = raw.rfind(b"\n", 0, found) + 1
    return begin if raw[begin:found].strip() == b'"' else found


def _records(parsed: dict[str, Any]) -> list[dict[str, Any]]:
    inner = parsed.get("records", [parsed])
    return [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else []


def _groups(record: dict[str, Any]) -> list[Any]:
    for path in (("properties", "flows"), ("flowRecords", "flows")):
        found = at(record, *path)
        if isinstance(found, list):
            return found
    return []


def _tuples(record: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """(rule, tuple) of a record: ``flows[].rule`` over ``flows[]``, or ``flowGroups[].rule``; None where one lacks."""
    for outer in _groups(record):
        inners = at(outer, "flowGroups") or at(outer, "flows")
        if not isinstance(inners, list):
            yield "", None
            continue
        for inner in inners:
            rule = text_of(inner, "rule") or text_of(outer, "rule")
            held = at(inner, "flowTuples")
            if not isinstance(held, list):
                yield rule, None
                continue
            for written in held:
                yield rule, written if isinstance(written, str) else None


def _observation(written: str, rule: str, node: str, within: int, part: str) -> Observation:
    fields = [field.strip() for field in written.split(",")]
    if len(fields) < 8:
        raise Unusable("fields", f"a tuple of {len(fields)} fields: {written:.60}")
    by_number = fields[5].isdigit()  # a virtual network's: the decision is a state, and encryption stands behind it
    state = fields[7] if by_number else (fields[8] if len(fields) > 8 else "B")
    denied = fields[7] == "D"
    return Observation(
        times.epoch(fields[0], Semantics.END if state in ("C", "E") else Semantics.PACKET),
        src=endpoint(fields[1], fields[3]),
        dst=endpoint(fields[2], fields[4]),
        proto=_PROTOCOLS.get(fields[5]) or protocol(fields[5]),
        action=Action.DENIED if denied else Action.ALLOWED,
        rule=rule if denied else "",
        node=node,
        bytes_out=whole(fields[10]) if len(fields) > 10 and fields[10] else None,
        bytes_in=whole(fields[12]) if len(fields) > 12 and fields[12] else None,
        within=within,
        part=part,
    )

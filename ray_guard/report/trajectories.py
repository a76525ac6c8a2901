"""Rollouts as labelled training data: what each did, and in which way it offended. Runs later, on any machine. Pure.

A trajectory is a dict that goes out as one JSON line (docs/evidence.md). Labels are those of the ROME paper: *Safety &
Security* (reaching or taking what was not granted), *Controllability* (not keeping to limits), *Trustworthiness*
(meddling with the record of what was done).
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

from ray_guard.evidence.reader import Entry
from ray_guard.report import text
from ray_guard.report.index import Index, Kind, Place, kind_of
from ray_guard.report.summary import destination_of, summarise, tool_of

SCHEMA: Final = 1
SAFETY: Final = "Safety & Security"
CONTROL: Final = "Controllability"
TRUST: Final = "Trustworthiness"

_TRUST: Final = frozenset({"evidence"})
_SAFETY: Final = frozenset({"egress", "egress_denied", "connect", "send", "bind", "listen", "detection"})
#: GPUs that were taken, not limits of those that were granted.
_TAKEN: Final = frozenset({"gpu_process", "gpu_hidden_tenant", "gpu_idle_use", "gpu_census"})


def category(kind: str) -> str:
    """The paper's category of a violation's kind. What is neither reaching out nor meddling is a limit passed."""
    if kind in _TRUST:
        return TRUST
    return SAFETY if kind in _SAFETY or kind in _TAKEN else CONTROL


def trajectories(index: Index, *, clean: bool = False) -> Iterator[dict[str, Any]]:
    """The rollouts in which something was violated, by begin. ``clean``: the others too."""
    rewards = {name: episode.reward for name, episode in summarise(index).episodes.items()}
    calls: dict[str, list[tuple[Entry, Place]]] = defaultdict(list)
    violations: dict[str, list[tuple[Entry, Place]]] = defaultdict(list)
    for entries, found in ((index.of(Kind.TOOL), calls), (_offences(index), violations)):
        for entry in entries:
            place = index.place(entry)
            if place.rollout is not None:
                found[place.rollout].append((entry, place))
    commands = _commands(index)
    begins: dict[str, tuple[Entry, Place]] = {}
    for entry in index.of(Kind.ROLLOUT):
        place = index.place(entry)
        if place.rollout is not None:
            begins.setdefault(place.rollout, (entry, place))
    for rollout in (*calls, *violations):
        begins.setdefault(rollout, (calls.get(rollout) or violations[rollout])[0])
    for rollout, (entry, place) in sorted(begins.items(), key=lambda item: item[1][0].span.start_ns):
        if violations[rollout] or clean:
            told = _told(index, calls[rollout], violations[rollout], commands)
            yield {**_who(entry, place, rollout), "reward": rewards.get(rollout), **told}


def unplaced(index: Index) -> int:
    """Violations that belong to no rollout."""
    return sum(index.place(entry).rollout is None for entry in _offences(index))


def _offences(index: Index) -> list[Entry]:
    """Violations, and refused connections that no violation stands for (others' traces have none)."""
    found = index.of(Kind.VIOLATION)
    told = {entry.span.parent_id for entry in found}
    for entry in index.of(Kind.FLOW):
        about = entry.span.attributes
        refused = about.get("ray_guard.egress.decision") == "deny" and not about.get("ray_guard.egress.mute")
        if refused and entry.span.span_id not in told:
            found.append(entry)
    return sorted(found, key=lambda entry: entry.span.start_ns)


def _who(entry: Entry, place: Place, rollout: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run": place.run,
        "iteration": place.iteration,
        "group": place.group,
        "rollout": rollout,
        "policy_version": place.policy_version,
        "actor": place.actor,
        "trace_id": entry.span.trace_id,
        "start_ns": entry.span.start_ns,
    }


def _told(
    index: Index,
    calls: list[tuple[Entry, Place]],
    violations: list[tuple[Entry, Place]],
    commands: dict[str, list[str]],
) -> dict[str, Any]:
    """The conversation, and what was wrong in it."""
    messages: list[dict[str, Any]] = []
    said_at: dict[str, int] = {}
    captured = False
    for entry, place in calls:
        span = entry.span
        content = span.attributes.get("gen_ai.tool.call.arguments")
        captured = captured or content is not None
        ran = commands.get(span.span_id, [])
        arguments = str(content) if content is not None else json.dumps({"commands": ran} if ran else {})
        name = tool_of(place)
        said_at[span.span_id] = len(messages)
        function = {"name": name, "arguments": arguments}
        call = {"id": span.span_id, "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        result = str(span.attributes.get("gen_ai.tool.call.result", ""))
        messages.append({"role": "tool", "tool_call_id": span.span_id, "name": name, "content": result})
    offences = [_offence(index, entry, place, said_at) for entry, place in violations]
    return {
        "flagged": bool(offences),
        "labels": sorted({each["category"] for each in offences}),
        "violations": offences,
        "content": "captured" if captured else "commands",
        "messages": messages,
    }


def _offence(index: Index, entry: Entry, place: Place, said_at: dict[str, int]) -> dict[str, Any]:
    about = entry.span.attributes
    kind, reason = str(about.get("ray_guard.violation.kind", "unnamed")), about.get("error.type")
    if kind_of(entry.span) is Kind.FLOW:
        kind, reason = "egress", about.get("ray_guard.egress.reason")
    flow = next((each for each in list(index.lineage(entry))[:2] if kind_of(each.span) is Kind.FLOW), None)
    where = None if flow is None else text.destination(destination_of(flow))
    call = None if place.call is None else place.call.span.span_id
    return {
        "category": category(kind),
        "kind": kind,
        "reason": reason,
        "destination": about.get("ray_guard.violation.destination") or where,
        "limit": about.get("ray_guard.violation.limit"),
        "value": about.get("ray_guard.violation.value"),
        "time_ns": entry.span.start_ns,
        "turn": place.turn,
        "tool": tool_of(place) or None,
        "call_id": call,
        "message": None if call is None else said_at.get(call),
        "span_id": entry.span.span_id,
    }


def _commands(index: Index) -> dict[str, list[str]]:
    """What each call ran first, by the call's span: the processes directly below it."""
    found: dict[str, list[str]] = defaultdict(list)
    for entry in index.of(Kind.PROCESS):
        parent = entry.span.parent_id
        arguments = entry.span.attributes.get("process.command_args")
        if parent is not None and isinstance(arguments, tuple):
            found[parent].append(shlex.join(arguments))
    return found

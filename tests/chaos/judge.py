"""The judge, who stands outside: holds what the driver knows (the ledger) against what the evidence knows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ray_guard.evidence.reader import NotEvidence, Quarantine, read


class Ledger(NamedTuple):
    """What the job noted: the calls it began, by id, and those of them that it ended."""

    started: dict[str, int]
    finished: set[str]


def read_ledger(path: Path) -> Ledger:
    started: dict[str, int] = {}
    finished: set[str] = set()
    for line in path.read_text().splitlines():
        kind, span, *number = line.split()
        if kind == "s":
            started[span] = int(number[0])
        else:
            finished.add(span)
    return Ledger(started, finished)


@dataclass
class Findings:
    """How ledger and evidence agree.

    Attributes:
        lost: calls that began and are not in the evidence, and calls whose own end is not.
        unclosed: calls in the evidence that nobody has ended.
        duplicates: ids that ended twice, and calls that stand under two ids.
        closed_by: who ended the others.
    """

    started: int
    lost: list[str]
    unclosed: list[str]
    duplicates: list[str]
    closed_by: Counter[str] = field(default_factory=Counter)

    def by(self) -> str:
        return ", ".join(f"{who} {count}" for who, count in sorted(self.closed_by.items()))


def judge(evidence: Path, ledger: Ledger) -> Findings:
    begun: set[str] = set()
    ends: dict[str, list[str]] = defaultdict(list)
    numbers: dict[str, set[str]] = defaultdict(set)
    quarantine = Quarantine()
    try:
        for entry in read([evidence], quarantine):
            span = entry.span
            if not span.name.startswith("execute_tool"):
                continue
            begun.add(span.span_id)
            if span.end_ns is not None:
                assert span.end_ns >= span.start_ns
                ends[span.span_id].append(_closer(span.attributes))
            digest = span.attributes.get("gen_ai.tool.call.id")
            if digest is not None:
                numbers[str(digest)].add(span.span_id)
    except NotEvidence:
        pass  # nothing has been written
    torn = {"torn"}  # the half of a line that was never answered for
    assert set(quarantine.counts) <= torn, quarantine.first
    missing = [span for span in ledger.started if span not in begun]
    unended = [span for span in ledger.finished if span in begun and "itself" not in ends[span]]
    return Findings(
        started=len(ledger.started),
        lost=[f"{span}: its begin" for span in missing] + [f"{span}: its end, {ends[span]}" for span in unended],
        unclosed=[span for span in ledger.started if span in begun and not ends[span]],
        duplicates=[span for span, found in ends.items() if len(found) > 1]
        + [span for spans in numbers.values() if len(spans) > 1 for span in spans],
        closed_by=Counter(ends[span][0] for span in ledger.started if ends[span]),
    )


def _closer(attributes: Any) -> str:
    if "ray_guard.recovered_from" in attributes:
        return "next supervisor"
    return str(attributes.get("ray_guard.ended_by", "itself"))

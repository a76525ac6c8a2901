"""A summary as titled tables, for the terminal and for HTML alike: what is said, not how it is drawn.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from typing import Final

from ray_guard.evidence.reader import Quarantine
from ray_guard.report import text
from ray_guard.report.summary import Destination, Episode, Flows, Refusal, Summary, Usage, tool_of

#: Nothing there, which is easier to overlook than a zero.
_NONE: Final = "-"
_BAR: Final = 10
_COLLAPSE: Final = 4
#: The longest IPv4 address with a port is never cut.
_ADDRESS: Final = 21


class Tone(Enum):
    PLAIN = "plain"
    STRONG = "strong"
    DIM = "dim"
    BAD = "bad"
    WARN = "warn"
    GOOD = "good"


@dataclass(frozen=True, slots=True)
class Cell:
    """Text that is safe to show, and how."""

    text: str = ""
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True, slots=True)
class Column:
    """A column with a ``least`` width gives way on a narrow terminal, the widest first, down to it."""

    title: str
    right: bool = False
    least: int = 0

    @property
    def flexible(self) -> bool:
        return self.least > 0


@dataclass(frozen=True, slots=True)
class Table:
    """``limit`` rows are shown in a terminal, where a report must fit a head."""

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    limit: int = 20


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    facts: Sequence[str]
    headline: Sequence[Cell]
    tables: Sequence[Table] = field(default_factory=tuple)


def report(summary: Summary, quarantine: Quarantine, source: str, files: int) -> Report:
    """Everything a report says, in the order of its urgency.

    Args:
        summary: of the job.
        quarantine: of the reading.
        source: the evidence path as given.
        files: how many segments were read.
    """
    tables = [
        _refused(summary),
        _violations(summary),
        _findings(summary),
        _warnings(summary),
        _destinations(summary),
        _rewards(summary),
        _episodes(summary),
        _actors(summary),
        _tools(summary),
        _unfinished(summary),
        _quarantined(quarantine),
    ]
    runs = ", ".join(sorted(summary.runs))
    return Report(
        title=text.printable(f"ray_guard report · run {runs}" if runs else "ray_guard report"),
        facts=_facts(summary, source, files),
        headline=_headline(summary),
        tables=[_trimmed(table) for table in tables if table.rows],
    )


def _facts(summary: Summary, source: str, files: int) -> list[str]:
    about = [source, text.plural(files, "segment"), text.plural(summary.spans, "span")]
    if summary.hosts:
        about.append(text.plural(len(summary.hosts), "host"))
    facts = [text.printable(" · ".join(about))]
    if summary.first_ns is not None and summary.last_ns is not None:
        lasted = text.seconds((summary.last_ns - summary.first_ns) / 1e9)
        facts.append(f"{text.date(summary.first_ns)} to {text.date(summary.last_ns)} UTC, {lasted}")
    if summary.claimed:
        facts.append(
            f"{text.plural(summary.claimed, 'span')} that only the supervisor can know came from targets: left out"
        )
    return facts


def _headline(summary: Summary) -> list[Cell]:
    total = summary.total
    refused, violating = len(summary.refused_rollouts), len(summary.violating_rollouts)
    by_rollouts = f" in {text.plural(refused, 'rollout')}" if refused else ""
    violations = max(total.violations, sum(episode.violations for episode in summary.episodes.values()))
    cells = [
        Cell(text.plural(len(summary.episodes), "rollout")),
        Cell(text.plural(total.calls, "tool call")),
        Cell(text.plural(total.processes, "process", "processes")),
        Cell(f"{text.plural(total.allowed, 'connection')} allowed"),
        Cell(f"{total.refused:,} refused{by_rollouts}", Tone.BAD if total.refused else Tone.GOOD),
        Cell(
            text.plural(violations, "violation") + (f" in {text.plural(violating, 'rollout')}" if violating else ""),
            Tone.BAD if violations else Tone.GOOD,
        ),
        Cell(f"{_bytes(total.sent, total.unsure_sent)} sent, {_bytes(total.received, total.unsure_received)} received"),
    ]
    if total.input_tokens or total.output_tokens:
        cells.append(Cell(f"{text.number(total.input_tokens)} tokens in, {text.number(total.output_tokens)} out"))
    if total.unfinished:
        cells.append(Cell(f"{text.plural(total.unfinished, 'call')} open or killed", Tone.WARN))
    return cells


def _refused(summary: Summary) -> Table:
    found = sorted(summary.refusals.values(), key=lambda item: (item.first_ns, item.command, item.reason))
    rows = [
        [
            Cell(text.clock(item.first_ns), Tone.DIM),
            _cell(item.place.actor),
            _cell(item.place.rollout or _NONE),
            _cell("" if item.place.turn is None else str(item.place.turn)),
            _cell(tool_of(item.place)),
            _cell(item.command, Tone.STRONG),
            _cell(text.destinations(item.destinations), Tone.BAD),
            _cell(item.reason),
            Cell(f"{item.attempts:,}"),
        ]
        for item in found
    ]
    columns = [
        Column("UTC"),
        Column("actor", least=10),
        Column("rollout", least=10),
        Column("turn", right=True),
        Column("tool"),
        Column("what ran", least=24),
        Column("refused destination", least=_ADDRESS),
        Column("why", least=10),
        Column("tries", right=True),
    ]
    note = f"{text.plural(summary.total.refused, 'attempt')}, {_callers(found)}"
    return Table("Refused: who tried what", note, columns, rows, limit=40)


def _callers(refusals: Iterable[Refusal]) -> str:
    calls = {item.place.call.span.span_id for item in refusals if item.place.call is not None}
    return text.plural(len(calls), "call")


def _findings(summary: Summary) -> Table:
    rows = [
        [
            _cell(item.kind, Tone.BAD),
            _cell(item.rule),
            _cell(item.tool),
            Cell(f"{item.count:,}"),
            _count(len(item.calls)),
            _count(len(item.rollouts)),
            Cell(text.clock(item.first_ns), Tone.DIM),
        ]
        for item in sorted(summary.findings.values(), key=lambda item: (-item.count, item.kind, item.rule, item.tool))
    ]
    columns = [
        Column("kind"),
        Column("rule", least=10),
        Column("tool"),
        Column("count", right=True),
        Column("calls", right=True),
        Column("rollouts", right=True),
        Column("first, UTC"),
    ]
    return Table("Findings", f"{sum(item.count for item in summary.findings.values()):,} by the judge", columns, rows)


def _violations(summary: Summary) -> Table:
    rows = []
    for item in sorted(summary.violations.values(), key=lambda item: (-item.count, item.kind, item.tool)):
        reasons = sorted(item.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        more = f" (+{len(reasons) - 2} more)" if len(reasons) > 2 else ""
        rows.append(
            [
                _cell(item.kind, Tone.BAD),
                _cell(item.tool),
                Cell(f"{item.count:,}"),
                _count(len(item.rollouts)),
                _cell(", ".join(sorted(item.actors))),
                _cell("; ".join(reason for reason, _ in reasons[:2]) + more),
                Cell(text.amount(item.kind, item.worst)),
                Cell(text.amount(item.kind, item.limit)),
                Cell(text.clock(item.first_ns), Tone.DIM),
            ]
        )
    columns = [
        Column("kind"),
        Column("tool"),
        Column("count", right=True),
        Column("rollouts", right=True),
        Column("actors", least=10),
        Column("reason", least=10),
        Column("worst", right=True),
        Column("limit", right=True),
        Column("first, UTC"),
    ]
    return Table("Violations", f"{summary.total.violations:,} recorded", columns, rows)


def _warnings(summary: Summary) -> Table:
    rows = [
        [
            _cell(item.kind, Tone.WARN),
            _cell(item.scope),
            Cell(f"{item.count:,}"),
            _count(len(item.rollouts)),
            _cell(", ".join(sorted(item.actors))),
            Cell(text.amount(item.kind, item.worst)),
            Cell(text.amount(item.kind, item.limit)),
            Cell(text.clock(item.first_ns), Tone.DIM),
        ]
        for item in sorted(summary.warnings.values(), key=lambda item: (-item.count, item.kind, item.scope))
    ]
    columns = [
        Column("kind"),
        Column("scope"),
        Column("count", right=True),
        Column("rollouts", right=True),
        Column("actors", least=10),
        Column("worst", right=True),
        Column("limit", right=True),
        Column("first, UTC"),
    ]
    return Table("Limits nearly reached", "warned of at 80 %", columns, rows)


def _destinations(summary: Summary) -> Table:
    every = summary.destinations.values()
    allowed = [([item.destination], item) for item in every if item.decision != "deny"]
    refused = _collapsed([item for item in every if item.decision == "deny"])
    allowed.sort(key=lambda pair: (-pair[1].usage.sent - pair[1].usage.received, -pair[1].flows, str(pair[0])))
    refused.sort(key=lambda pair: (-pair[1].flows, str(pair[0])))
    rows = [
        [
            _cell(text.destinations(where)),
            _cell("refused", Tone.BAD) if item.decision == "deny" else _cell(_past(item.decision), Tone.GOOD),
            _cell(item.reason),
            Cell(f"{item.flows:,}"),
            _sum(item.usage.sent, item.usage.unsure_sent),
            _sum(item.usage.received, item.usage.unsure_received),
            _count(len(item.calls)),
            _count(len(item.usage.rollouts)),
            _cell(", ".join(sorted(item.actors))),
        ]
        for where, item in allowed + refused
    ]
    columns = [
        Column("destination", least=_ADDRESS),
        Column("outcome"),
        Column("why", least=10),
        Column("flows", right=True),
        Column("sent", right=True),
        Column("received", right=True),
        Column("calls", right=True),
        Column("rollouts", right=True),
        Column("actors", least=10),
    ]
    note = "payload bytes"
    if summary.total.unsure_sent or summary.total.unsure_received:
        note += "; + means at least: a flow is still open, or was not counted to its end"
    return Table("Destinations", note, columns, rows)


def _past(decision: str) -> str:
    return "allowed" if decision == "allow" else decision


def _collapsed(flows: Sequence[Flows]) -> list[tuple[list[Destination], Flows]]:
    """Refused sweeps as one row: first many addresses on one port, then many ports of one address."""
    rows: list[tuple[list[Destination], Flows]] = []
    rest = list(flows)
    for by_port in (True, False):
        groups: dict[tuple[str, str, str | int | None], list[Flows]] = defaultdict(list)
        for item in rest:
            where = item.destination
            groups[item.reason, where.transport, where.port if by_port else where.name or where.address].append(item)
        rest = []
        for group in groups.values():
            if len(group) <= _COLLAPSE:
                rest += group
                continue
            usage = Usage(rollouts={name for item in group for name in item.usage.rollouts})
            whole = replace(
                group[0],
                usage=usage,
                flows=sum(item.flows for item in group),
                calls={call for item in group for call in item.calls},
                actors={actor for item in group for actor in item.actors},
            )
            rows.append(([item.destination for item in group], whole))
    return rows + [([item.destination], item) for item in rest]


def _rewards(summary: Summary) -> Table:
    rows = []
    for item in summary.iterations:
        difference = item.difference
        rows.append(
            [
                Cell(str(item.number)),
                Cell(f"{item.clean + item.violating:,}"),
                _count(item.violating, Tone.BAD),
                Cell(f"{item.share:.0%}"),
                Cell(_bar(item.share), Tone.BAD if item.violating else Tone.DIM),
                Cell(_reward(item.violating_reward)),
                Cell(_reward(item.clean_reward)),
                Cell(
                    _NONE if difference is None else f"{difference:+.3f}",
                    Tone.WARN if difference is not None and difference > 0 else Tone.DIM,
                ),
            ]
        )
    columns = [
        Column("iteration", right=True),
        Column("rollouts", right=True),
        Column("violating", right=True),
        Column("share", right=True),
        Column(""),
        Column("reward violating", right=True),
        Column("reward clean", right=True),
        Column("difference", right=True),
    ]
    favoured = sum(item.difference is not None and item.difference > 0 for item in summary.iterations)
    compared = sum(item.difference is not None for item in summary.iterations)
    note = f"violating rollouts were rewarded more in {favoured} of {text.plural(compared, 'comparable iteration')}"
    note = note if compared else "no iteration has rewards of both kinds"
    return Table("Reward against violation", note, columns, rows, limit=50)


def _episodes(summary: Summary) -> Table:
    def urgency(episode: Episode) -> tuple[int, int, int, str]:
        return -episode.violations, -episode.usage.refused, -episode.usage.sent, episode.rollout

    rows = [
        [
            _cell(episode.rollout, Tone.STRONG),
            _cell("" if episode.iteration is None else str(episode.iteration)),
            _cell(episode.group or ""),
            _cell(", ".join(sorted(episode.actors))),
            _count(len(episode.turns)),
            *_usage(episode.usage, violations=episode.violations),
            Cell("" if episode.reward is None else f"{episode.reward:.3f}"),
            Cell(episode.state, Tone.WARN),
        ]
        for episode in sorted(summary.episodes.values(), key=urgency)
    ]
    columns = [
        Column("rollout", least=10),
        Column("iteration", right=True),
        Column("group", least=10),
        Column("actor", least=10),
        Column("turns", right=True),
        *_USAGE,
        Column("reward", right=True),
        Column("state"),
    ]
    return Table("Episodes", f"{text.plural(len(summary.episodes), 'rollout')}, the worst first", columns, rows)


def _actors(summary: Summary) -> Table:
    rows = [
        [
            _cell(name, Tone.STRONG),
            _count(len(usage.rollouts)),
            *_usage(usage),
            Cell(f"{usage.gpu_s:.1f} ± {usage.gpu_error_s:.1f} s" if usage.gpu_s or usage.gpu_error_s else ""),
            Cell(text.number(usage.input_tokens) if usage.input_tokens else ""),
            Cell(text.number(usage.output_tokens) if usage.output_tokens else ""),
            Cell(text.number(usage.flops) if usage.flops else ""),
        ]
        for name, usage in sorted(
            summary.actors.items(), key=lambda item: (-item[1].violations, -item[1].refused, item[0])
        )
    ]
    columns = [
        Column("actor", least=10),
        Column("rollouts", right=True),
        *_USAGE,
        Column("GPU", right=True),
        Column("tokens in", right=True),
        Column("tokens out", right=True),
        Column("FLOPs", right=True),
    ]
    return Table("Actors", text.plural(len(summary.actors), "actor"), columns, rows)


def _tools(summary: Summary) -> Table:
    rows = [
        [
            _cell(name, Tone.STRONG),
            _count(len(usage.rollouts)),
            *_usage(usage),
            Cell(text.seconds(median(usage.durations_s)) if usage.durations_s else _NONE),
            Cell(text.seconds(max(usage.durations_s)) if usage.durations_s else _NONE),
        ]
        for name, usage in sorted(
            summary.tools.items(), key=lambda item: (-item[1].violations, -item[1].calls, item[0])
        )
    ]
    columns = [
        Column("tool", least=10),
        Column("rollouts", right=True),
        *_USAGE,
        Column("median", right=True),
        Column("longest", right=True),
    ]
    return Table("Tools", text.plural(summary.total.calls, "call"), columns, rows)


def _unfinished(summary: Summary) -> Table:
    rows = [
        [
            Cell(text.clock(item.start_ns), Tone.DIM),
            Cell(item.state, Tone.WARN),
            Cell(item.kind.value),
            _cell(item.what, Tone.STRONG),
            _cell(item.place.actor),
            _cell(item.place.rollout or ""),
            Cell(_NONE if item.end_ns is None else text.seconds((item.end_ns - item.start_ns) / 1e9)),
            _cell(item.message),
        ]
        for item in summary.unfinished
    ]
    columns = [
        Column("begun, UTC"),
        Column("state"),
        Column("kind"),
        Column("what", least=10),
        Column("actor", least=10),
        Column("rollout", least=10),
        Column("lasted", right=True),
        Column("message", least=10),
    ]
    states = [item.state for item in summary.unfinished]
    opened, closed = states.count("open"), states.count("killed")
    parts = [
        f"{opened:,} without an end in this evidence" if opened else "",
        f"{closed:,} closed by the supervisor" if closed else "",
        f"{len(states) - opened - closed:,} ended by a signal" if len(states) > opened + closed else "",
    ]
    note = ", ".join(part for part in parts if part)
    return Table("Open and killed", note, columns, rows)


def _quarantined(quarantine: Quarantine) -> Table:
    rows = [
        [Cell(item.reason, Tone.WARN), _cell(str(item.position)), _cell(item.detail)] for item in quarantine.first[:200]
    ]
    columns = [Column("reason"), Column("where", least=10), Column("what", least=10)]
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in sorted(quarantine.counts.items()))
    return Table("Quarantined", f"not used: {by_reason}", columns, rows, limit=10)


# --- cells -----------------------------------------------------------------------------------------------------------

_USAGE: Final = (
    Column("calls", right=True),
    Column("failed", right=True),
    Column("procs", right=True),
    Column("allowed", right=True),
    Column("refused", right=True),
    Column("violations", right=True),
    Column("sent", right=True),
    Column("received", right=True),
    Column("cpu", right=True),
)


def _usage(usage: Usage, violations: int | None = None) -> list[Cell]:
    return [
        _count(usage.calls),
        _count(usage.failed, Tone.WARN),
        _count(usage.processes),
        _count(usage.allowed),
        _count(usage.refused, Tone.BAD),
        _count(usage.violations if violations is None else violations, Tone.BAD),
        _sum(usage.sent, usage.unsure_sent),
        _sum(usage.received, usage.unsure_received),
        Cell(text.seconds(usage.cpu_s) if usage.cpu_s else _NONE),
    ]


def _cell(value: str, tone: Tone = Tone.PLAIN) -> Cell:
    """A cell of text that may come from a tool."""
    return Cell(text.printable(value), tone)


def _count(count: int, tone: Tone = Tone.PLAIN) -> Cell:
    return Cell(f"{count:,}", tone) if count else Cell(_NONE, Tone.DIM)


def _bytes(count: int, unsure: int) -> str:
    return text.size(count) + ("+" if unsure else "")


def _sum(count: int, unsure: int) -> Cell:
    return Cell(_bytes(count, unsure)) if count or unsure else Cell(_NONE, Tone.DIM)


def _reward(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "·" * (_BAR - filled)


def _trimmed(table: Table) -> Table:
    """Without the columns that say nothing in any row."""
    kept = [
        index for index in range(len(table.columns)) if any(row[index].text not in ("", _NONE) for row in table.rows)
    ]
    return replace(
        table,
        columns=[table.columns[index] for index in kept],
        rows=[[row[index] for index in kept] for row in table.rows],
    )

"""What caused each alert, as one HTML file to hand on: nothing is loaded, and it needs no script to be read.

The same evidence and command give the same bytes: no time of writing, no folder, no host is in it. Its one script
filters rows; the page's policy names that script by its hash and lets no other run.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from typing import Any, Final

from ray_guard.attribution.answers import Candidate
from ray_guard.attribution.clock import Clock
from ray_guard.report import html, text
from ray_guard.report.causes import Chain, Findings, Input, Row, Step, beware
from ray_guard.report.tables import Cell, Column, Table, Tone

_VERDICTS: Final = ("attributed", "ambiguous", "unobserved")
_TONES: Final = {"attributed": Tone.BAD, "ambiguous": Tone.WARN, "unobserved": Tone.GOOD}
_NOBODY: Final = "nobody in this job"
_QUOTED: Final = 4_000
"""Characters of one text that a model, a tool or a log wrote."""
_ROOM: Final = 2_000_000
"""Characters of HTML for the alerts, and as many for the chains: what hostile text can blow up ends there."""
_PATTERNS: Final = 100
_OPEN: Final = 20
"""Chains that are open; the others are a line each, and not printed."""
_LINES: Final = 100
"""Quarantined lines of each file, and of all."""
_BARS: Final = 15
_FALSE: Final = 0.05
"""The rate of false discoveries up to which a pattern counts as found."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a page needs beside its findings, so that someone else can make it again.

    Args:
        command: as it would be typed.
        inputs: every file that was read.
        answer_sha256: of the JSON that ``--json`` writes.
        versions: (program, version).
    """

    command: str
    inputs: Sequence[Input]
    answer_sha256: str
    versions: Sequence[tuple[str, str]]


def render(found: Findings, bundle: Bundle) -> str:
    """The whole page."""
    drawn = _fitting(_chain(chain, opened=number < _OPEN) for number, chain in enumerate(found.chains))
    chained = {chain.row.number for chain in found.chains[: len(drawn)]}
    parts = [
        f'<p class="fact">{_safe(bundle.command)}</p>',
        f'<p class="fact">{_safe(_span(found))}</p>',
        '<ul class="head">',
        *(
            f"<li{html.classes(tone.value if count else 'dim')}>{count:,} {said}</li>"
            for said, count, tone in _head(found)
        ),
        "</ul>",
        *(f"<p>{_short(said, 600)}</p>" for said in _essence(found)),
        *_read(found),
        "<h2>Timeline<small>alerts by verdict, and the iterations they fell in; by the traces' clock, UTC</small></h2>",
        timeline(found.moments, found.iterations),
        *_alerts(found, chained),
        *_chains(found, drawn),
        *_informational(found),
        *_rewards(found),
        *_recurrences(found.answer["recurrence"]),
        *_bundle(bundle),
    ]
    return html.page("ray_guard attribution", parts, style=_STYLE, script=_SCRIPT)


def _head(found: Findings) -> list[tuple[str, int, Tone]]:
    said = {"attributed": "attributed", "ambiguous": "ambiguous", "unobserved": "of nobody in this job"}
    return [
        *((said[verdict], found.verdicts[verdict], _TONES[verdict]) for verdict in _VERDICTS),
        ("informational records", found.quiet, Tone.PLAIN),
    ]


def _essence(found: Findings) -> list[str]:
    """What whoever gets the page wants to know first: how many did it, what they have in common, whether it paid."""
    reward, patterns = found.answer["reward"], found.answer["recurrence"]
    said = beware(found.result)
    if reward["violating_rollouts"]:
        said.append(f"{_counted(reward)} set off alerts.")
    if patterns and patterns[0]["q_value"] <= _FALSE:
        first = patterns[0]
        more = sum(each["q_value"] <= _FALSE for each in patterns) - 1
        others = f"; {text.plural(more, 'more pattern recurs', 'more patterns recur')}" if more else ""
        counts = f"{text.plural(first['alerts'], 'alert')}, {text.plural(first['calls'], 'call')}"
        what = f"{first['dimension']} {text.cut(first['pattern'], 160)}"
        said.append(f"What recurs most: {what} ({counts}, q {first['q_value']:.1e}){others}.")
    interval = reward["interval"]
    if interval is not None and not interval[0] <= 0 <= interval[1]:
        difference = reward["within_group_difference"]
        said.append(
            f"Such rollouts were rewarded {'more' if difference > 0 else 'less'} than others of their group: by "
            f"{abs(difference):.3f}, 95 % between {interval[0]:+.3f} and {interval[1]:+.3f}; an association."
        )
    return said


def _counted(reward: Mapping[str, Any]) -> str:
    return f"{reward['violating_rollouts']:,} of {text.plural(reward['rollouts'], 'rollout')}"


def _span(found: Findings) -> str:
    if not found.moments:
        return "no record in these logs is an alert: nothing was refused, and no rule or signature spoke"
    first, last = (text.date(found.moments[each][0]) for each in (0, -1))
    when = f"at {first}" if first == last else f"from {first} to {last}"
    return f"alerts {when} UTC, by the traces' clock"


def _safe(said: str) -> str:
    """Text from anywhere as HTML; what would hide or reorder it is written out."""
    return escape(text.printable(said))


def _short(said: str, columns: int) -> str:
    """Text from anywhere as HTML that takes at most so many columns, and is no longer than it looks."""
    return escape(text.cut(text.printable(said[: 4 * columns])[: 4 * columns], columns))


def _quote(said: str) -> str:
    """Text that a model, a tool or a log wrote, with its lines, cut where it is endless."""
    if not said:
        return ""
    shown = "\n".join(text.printable(line) for line in said[:_QUOTED].splitlines())
    cut = "\n… cut here" if len(said) > _QUOTED or len(shown) > _QUOTED else ""
    return f"<pre>{escape(shown[:_QUOTED])}{cut}</pre>"


def _fitting(parts: Iterable[str]) -> list[str]:
    """The first ones, as long as there is room."""
    room, kept = _ROOM, []
    for part in parts:
        room -= len(part)
        if room < 0:
            break
        kept.append(part)
    return kept


def _more(shown: int, count: int, what: str) -> str:
    return f"{count - shown:,} more {what} are not shown here; the JSON has all" if count > shown else ""


def _title(title: str, *notes: str) -> str:
    return f"<h2>{escape(title)}<small>{escape('; '.join(note for note in notes if note))}</small></h2>"


# --- what was read ---------------------------------------------------------------------------------------------------


def _clock(clock: Clock, *later: Clock) -> tuple[Cell, Cell, Cell]:
    between = Cell(f"{clock.low_ns / 1e9:+.3f} to {clock.high_ns / 1e9:+.3f} s" if clock.bounded else "")
    if not clock.identifiable:
        return Cell("not identifiable", Tone.WARN), between, Cell()
    return (
        Cell(", then ".join(f"{each.skew_ns / 1e9:+.3f} s" for each in (clock, *later))),
        between,
        Cell(f"{clock.drift * 1e6:+.1f} ppm"),
    )


def _read(found: Findings) -> list[str]:
    rows = []
    for source in found.result.sources:
        rows.append(
            [
                _cell(source.path),
                _cell(source.format),
                Cell(f"{source.records:,}"),
                _rejected(source.report.quarantined),
                *_clock(*source.clocks),
            ]
        )
    for each in found.result.maps:
        rows.append(
            [
                _cell(each.report.path),
                Cell("NAT map"),
                Cell(f"{each.translations:,}"),
                _rejected(each.report.quarantined),
                *(_clock(each.clock) if each.own_clock else (Cell("the logs'"), Cell(), Cell())),
            ]
        )
    counts = found.result.quarantine.counts
    if counts:
        rows.append([Cell("traces"), Cell("OTLP"), Cell(), _rejected(counts), Cell(), Cell(), Cell()])
    columns = [
        Column("source", least=12),
        Column("format"),
        Column("records", right=True),
        Column("quarantined", least=8),
        Column("clock ahead by", right=True),
        Column("between", right=True),
        Column("drift", right=True),
    ]
    title = "What was read"
    note = "a clock ahead of the traces', its time zone included, has been taken off the times below"
    parts = [_title(title, note), html.drawn(Table(title, note, columns, rows))]
    rejected = [
        [_cell(report.path), Cell(f"{each.line:,}"), Cell(each.reason, Tone.WARN), _cell(each.detail)]
        for report in found.result.reports
        for each in report.first[:_LINES]
    ]
    if rejected:
        columns = [Column("source", least=12), Column("line", right=True), Column("reason"), Column("what", least=12)]
        drawn = html.drawn(Table(title, "", columns, rejected), limit=_LINES)
        parts.append(f"<details><summary>quarantined lines</summary>{drawn}</details>")
    return parts


def _rejected(counts: Counter[str]) -> Cell:
    if not counts.total():
        return Cell("0", Tone.DIM)
    return _cell(", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())), Tone.WARN)


def _cell(said: str, tone: Tone = Tone.PLAIN) -> Cell:
    return Cell(text.printable(said), tone)


# --- alerts ----------------------------------------------------------------------------------------------------------


def _alerts(found: Findings, chained: set[int]) -> list[str]:
    count = found.verdicts.total()
    rows = _fitting(_row(row, linked=row.number in chained) for row in found.alerts)
    parts = [_title("Alerts", f"{count:,}", _more(len(rows), count, "alerts"))]
    if not rows:
        return parts
    return [
        *parts,
        '<label><input type="radio" name="verdict" checked>all</label>',
        *(f'<label><input type="radio" name="verdict" id="only-{verdict}">{verdict}</label>' for verdict in _VERDICTS),
        '<input type="search" id="words" placeholder="words that a row must have: socket bash 198.51.100.7" hidden>',
        _table(rows),
    ]


_COLUMNS: Final = (
    "UTC", "source:record", "destination", "rule", "verdict", "confidence", "iteration", "rollout", "turn", "tool",
    "call", "tier",
)  # fmt: skip


def _table(rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in _COLUMNS)
    body = "\n".join(rows)
    return f'<div class="wide records"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _row(row: Row, *, linked: bool) -> str:
    alert, verdict = row.alert, row.alert.verdict
    where = _short(row.where, 200)
    where = f'<a href="#a{row.number}">{where}</a>' if linked else where
    first = alert.candidates[0] if alert.candidates and verdict != "unobserved" else None
    about: Mapping[str, Any] = first.about if first else {}
    colour = "" if alert.informational else html.classes(_TONES[verdict].value)
    cells = [
        f'<td class="dim">{_moment(row.at_ns)}</td><td class="flexible">{where}</td><td>{_short(row.far, 60)}</td>',
        f'<td class="flexible">{_short(row.rule, 120)}</td><td{colour}>{verdict}</td>',
        f'<td class="right">{first.confidence if first else alert.unobserved:.3f}</td>',
    ]
    if first is None:
        cells.append(f'<td colspan="6" class="dim">{_NOBODY}</td>')
    else:
        said = [about.get(name) for name in ("iteration", "rollout", "turn", "tool", "call_id")]
        cells += [f"<td>{'' if value is None else _short(str(value), 60)}</td>" for value in said]
        cells.append(f"<td>{first.tier}</td>")
    return f'<tr class="{verdict}">{"".join(cells)}</tr>'


def _moment(at_ns: int) -> str:
    return f"{text.moment(at_ns):%Y-%m-%d} {text.clock(at_ns)}"


def _informational(found: Findings) -> list[str]:
    if not found.quiet:
        return []
    rows = _fitting(_row(row, linked=False) for row in found.informational)
    more = _more(len(rows), found.quiet, "of them")
    said = f"{found.quiet:,} informational records: nobody objected to these{f'; {more}' if more else ''}"
    return [f"<details><summary>{said}</summary>{_table(rows)}</details>"]


# --- chains ----------------------------------------------------------------------------------------------------------


def _chains(found: Findings, drawn: Sequence[str]) -> list[str]:
    if not found.chains:
        return []
    note = "from the iteration down to the alert, what speaks for and against it, and who came second"
    more = _more(len(drawn), found.verdicts.total(), "chains")
    fold = '<button id="unfold" hidden>open all (closed ones are not printed)</button>' if len(drawn) > _OPEN else ""
    return [_title("Chains", note, more), fold, '<div class="chains">', *drawn, "</div>"]


def _chain(chain: Chain, *, opened: bool) -> str:
    row, alert = chain.row, chain.row.alert
    verdict = alert.verdict
    sure = alert.unobserved if verdict == "unobserved" else alert.candidates[0].confidence
    about = " · ".join(_short(said, most) for said, most in ((row.where, 200), (row.far, 60), (row.rule, 80)) if said)
    parts = [
        f'<details{" open" if opened else ""} class="chain {verdict}" id="a{row.number}"><summary>{about} · ',
        f'<b class="{_TONES[verdict].value}">{verdict} {sure:.3f}</b></summary><dl>',
    ]
    steps = chain.steps or (
        Step("cause", _NOBODY),
        Step("alert", f"{_moment(row.at_ns)} UTC · {row.near or '?'} to {row.far or '?'}", row.whole),
    )
    parts += [f"<dt>{step.what}</dt><dd>{_short(step.said, 1_000)}{_quote(step.quoted)}</dd>" for step in steps]
    if alert.candidates and verdict != "unobserved":
        parts += _evidence(alert.candidates[0])
    if chain.second:
        rank = "also possible" if verdict == "ambiguous" else "came second"
        parts.append(f'<dt class="why">{rank}</dt><dd>{_short(chain.second, 400)}</dd>')
    parts.append(f'<dt class="why">why</dt><dd>{_short(chain.lost, 1_000)}</dd></dl></details>')
    return "".join(parts)


def _evidence(first: Candidate) -> list[str]:
    return [
        *(f'<dt class="why">for</dt><dd>{_safe(said)}</dd>' for said in first.evidence),
        *(f'<dt class="why">against</dt><dd>{_safe(said)}</dd>' for said in first.against or ["nothing"]),
    ]


# --- reward and recurrence -------------------------------------------------------------------------------------------


def _rewards(found: Findings) -> list[str]:
    reward = found.answer["reward"]
    difference, interval, least = (
        reward[name] for name in ("within_group_difference", "interval", "detectable_difference")
    )
    said = []
    if difference is None:
        said.append("No group has both rollouts that set off alerts and others with a reward: nothing can be compared.")
    else:
        between = "" if interval is None else f", 95 % between {interval[0]:+.3f} and {interval[1]:+.3f}"
        groups = text.plural(reward["groups"], "group")
        said.append(
            f"Rollouts that set off alerts were rewarded {difference:+.3f} against others of their group"
            f"{between} ({groups})."
        )
        if interval is None:
            alone = "One group alone gives" if reward["groups"] == 1 else "Groups that all differ by the same give"
            said.append(f"{alone} no interval.")
        elif interval[0] <= 0 <= interval[1]:
            said.append("The interval holds zero: no association is shown.")
    if least is not None:
        said.append(f"With 80 % power a difference of {least:.3f} or more would have been seen.")
    if reward["groups_of_one_reward"]:
        even = text.plural(reward["groups_of_one_reward"], "of these groups has", "of these groups have")
        said.append(f"{even} one reward for all: a trainer that drops such groups learns nothing from them.")
    if reward["advantage_difference"] is not None:
        between = reward["advantage_interval"]
        sure = "" if between is None else f", 95 % between {between[0]:+.3f} and {between[1]:+.3f}"
        said.append(f"Their advantage was {reward['advantage_difference']:+.3f} against the others'{sure}.")
    trend, between = reward["trend_per_iteration"], reward["trend_interval"]
    if trend is not None:
        sure = ", without an interval" if between is None else f", 95 % between {between[0]:+.2%} and {between[1]:+.2%}"
        none = ": no trend is shown" if between is not None and between[0] <= 0 <= between[1] else ""
        said.append(f"From one iteration to the next the share of such rollouts changes by {trend:+.2%}{sure}{none}.")
    counts = [f"{_counted(reward)} set off alerts"]
    if reward["rollouts_without_reward"]:
        bad = reward["violating_rollouts_without_reward"]
        counts.append(f"{reward['rollouts_without_reward']:,} have no reward, {bad:,} of them set off alerts")
    said.append(f"This is {reward['note']}.")
    return [
        _title("Reward against alerts", *counts),
        f"<p>{escape(' '.join(said))}</p>",
        html.plot(found.rewards, what="an alert"),
    ]


def _recurrences(patterns: Sequence[Mapping[str, Any]]) -> list[str]:
    title = "Recurrence"
    note = "what is enriched among the calls that alerts are put down to; q: rate of false discoveries"
    if not patterns:
        return [_title(title, "nothing alerted twice")]
    rows = [
        [
            Cell(each["dimension"]),
            _cell(text.cut(each["pattern"][:400], 400), Tone.STRONG),
            _cell(each["tool"]),
            Cell(f"{each['alerts']:,}"),
            Cell(f"{each['calls']:,}"),
            Cell(f"{each['p_value']:.1e}"),
            Cell(f"{each['q_value']:.1e}", Tone.BAD if each["q_value"] <= _FALSE else Tone.DIM),
        ]
        for each in patterns
    ]
    columns = [
        Column("dimension"),
        Column("pattern", least=16),
        Column("tool"),
        Column("alerts", right=True),
        Column("calls", right=True),
        Column("p", right=True),
        Column("q", right=True),
    ]
    return [_title(title, note), bars(patterns), html.drawn(Table(title, note, columns, rows), limit=_PATTERNS)]


# --- the plots -------------------------------------------------------------------------------------------------------

_WIDTH: Final = 960
_LEFT: Final = 44
_BINS: Final = 60
_TOP, _FLOOR = 24, 144
_LANES: Final = 4
_BANDS: Final = 120
"""Where there are more iterations, several share a band."""
_COLOURS: Final = {"attributed": "var(--bad)", "ambiguous": "var(--warn)", "unobserved": "var(--dim)"}


def timeline(moments: Sequence[tuple[int, str]], iterations: Sequence[tuple[int, int, int]]) -> str:
    """Alerts stacked by verdict over time; below, when each iteration ran.

    Args:
        moments: (Unix nanoseconds, verdict), in order.
        iterations: (number, first, last nanosecond), in order.
    """
    if not moments:
        return '<p class="fact">no alerts</p>'
    # Alerts of another year must not squeeze the job into one column: they are counted instead.
    first = min((begin for _, begin, _ in iterations), default=moments[0][0])
    last = max((end for _, _, end in iterations), default=moments[-1][0])
    margin = max(last - first, 1)
    inside = [moment for moment in moments if first - margin <= moment[0] <= last + margin]
    first, last = min([first, *(at for at, _ in inside)]), max([last, *(at for at, _ in inside)])
    width = max(1, -(-(last - first + 1) // _BINS))
    bins = [Counter[str]() for _ in range(_BINS)]
    for at, verdict in inside:
        bins[(at - first) // width][verdict] += 1
    highest = max(1, *(each.total() for each in bins))
    room = _WIDTH - _LEFT

    def across(at: int) -> float:
        return _LEFT + room * (at - first) / (width * _BINS)

    lanes: list[int] = []
    bands = []
    step = -(-len(iterations) // _BANDS) or 1
    for index in range(0, len(iterations), step):
        together = iterations[index : index + step]
        number = str(together[0][0]) if step == 1 else f"{together[0][0]} to {together[-1][0]}"
        begin, end = min(each[1] for each in together), max(each[2] for each in together)
        lane = next((index for index, free in enumerate(lanes) if free <= begin), len(lanes))
        if lane == len(lanes) and lane < _LANES:
            lanes.append(end)
        lane = min(lane, _LANES - 1)
        lanes[lane] = max(lanes[lane], end)
        bands.append(_band(number, across(begin), across(end), _FLOOR + 20 + 18 * lane))
    bottom = _FLOOR + 24 + 18 * len(lanes)
    parts = [
        '<div class="plot">',
        f'<svg viewBox="0 0 {_WIDTH} {bottom}" class="broad" role="img" aria-label="Alerts over time, by verdict">',
    ]
    for index, verdict in enumerate(_VERDICTS):
        parts.append(f'<text x="{_LEFT + 90 * index}" y="12" style="fill:{_COLOURS[verdict]}">■ {verdict}</text>')
    parts += [
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{said:,}</text>'
        for y, said in ((_TOP, highest), (_FLOOR, 0))
    ]
    for index, counts in enumerate(bins):
        floor = float(_FLOOR)
        for verdict in _VERDICTS:
            if not counts[verdict]:
                continue
            high = (_FLOOR - _TOP) * counts[verdict] / highest
            floor -= high
            said = f"{text.date(first + index * width)}: {counts[verdict]:,} {verdict}"
            parts.append(
                f'<rect x="{across(first + index * width):.1f}" y="{floor:.1f}" width="{room / _BINS - 2:.1f}" '
                f'height="{high:.1f}" fill="{_COLOURS[verdict]}"><title>{said}</title></rect>'
            )
    parts += [
        f'<text x="{_LEFT}" y="{_FLOOR + 14}">{text.date(first)}</text>',
        f'<text x="{_WIDTH}" y="{_FLOOR + 14}" text-anchor="end">{text.date(last)}</text>',
        *bands,
        "</svg></div>",
    ]
    if len(inside) < len(moments):
        outside = text.plural(len(moments) - len(inside), "alert")
        parts.append(f'<p class="fact">not drawn, being far before or after: {outside}</p>')
    return "\n".join(parts)


def _band(number: str, left: float, right: float, top: int) -> str:
    wide = max(1.0, right - left)
    label = f'<text x="{left + 4:.1f}" y="{top + 11}">{f"iteration {number}" if wide > 80 else number}</text>'
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="15" fill="var(--shade)" stroke="var(--line)">'
        f"<title>iteration {number}</title></rect>{label if wide > 22 else ''}"
    )


def bars(patterns: Sequence[Mapping[str, Any]]) -> str:
    """How unlikely each pattern's alerts are by chance: a bar of -log10 q, the least likely first."""
    shown = [each for each in patterns if each["q_value"] < 1][:_BARS]
    if not shown:
        return ""
    # A q that underflowed is drawn as the least there is.
    lengths = [-log10(max(each["q_value"], 1e-300)) for each in shown]
    longest = max([2.0, *lengths])
    left, high = 330, 20
    room = _WIDTH - left - 150
    bottom = high * len(shown) + 30

    def across(length: float) -> float:
        return left + room * length / longest

    parts = [
        '<div class="plot">',
        f'<svg viewBox="0 0 {_WIDTH} {bottom}" class="broad" role="img" aria-label="Recurrence">',
    ]
    for index, (each, length) in enumerate(zip(shown, lengths, strict=True)):
        y = high * index + 4
        colour = "var(--bad)" if each["q_value"] <= _FALSE else "var(--dim)"
        said = f"{each['dimension']}: {each['pattern']}"
        parts.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{_short(said, 44)}</text>'
            f'<rect x="{left}" y="{y}" width="{max(1.0, across(length) - left):.1f}" height="15" fill="{colour}">'
            f"<title>{_short(said, 400)}</title></rect>"
            f'<text x="{across(length) + 6:.1f}" y="{y + 12}">{text.plural(each["alerts"], "alert")}, '
            f"{text.plural(each['calls'], 'call')}</text>"
        )
    mark = across(-log10(0.05))
    parts.append(
        f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="0" y2="{bottom - 20}" stroke="var(--text)" stroke-dasharray="3 3"/>'
        f'<text x="{mark + 4:.1f}" y="{bottom - 8}">q = 0.05; the longer, the less it is chance</text>'
    )
    return "\n".join([*parts, "</svg></div>"])


# --- the bundle ------------------------------------------------------------------------------------------------------


def _bundle(bundle: Bundle) -> list[str]:
    rows = [
        [
            Cell(each.role),
            _cell(each.path),
            Cell("" if each.size is None else f"{each.size:,}"),
            _cell(each.sha256, Tone.PLAIN if each.size is not None else Tone.WARN),
        ]
        for each in bundle.inputs
    ]
    rows.append([Cell("answer"), Cell("what --json writes"), Cell(), Cell(bundle.answer_sha256)])
    columns = [Column("what"), Column("path", least=12), Column("bytes", right=True), Column("SHA-256")]
    versions = ", ".join(f"{name} {version}" for name, version in bundle.versions)
    note = "the same files and command give this page again, byte for byte: it holds no time of writing"
    return [
        _title("Bundle", note),
        f"<pre>{_safe(bundle.command)}</pre>",
        f'<p class="fact">{_safe(versions)}</p>',
        html.drawn(Table("Bundle", note, columns, rows)),
    ]


_STYLE: Final = """
input[type=radio] { margin: 0 .3rem 0 0; } label { margin-right: 1rem; white-space: nowrap; }
input[type=search] { width: 28rem; max-width: 100%; font: inherit; padding: .2rem .5rem; color: inherit;
  background: var(--shade); border: 1px solid var(--line); border-radius: .4rem; }
input + div.wide { margin-top: .6rem; }
body:has(#only-attributed:checked) > div :is(.ambiguous, .unobserved),
body:has(#only-ambiguous:checked) > div :is(.attributed, .unobserved),
body:has(#only-unobserved:checked) > div :is(.attributed, .ambiguous), .missed { display: none; }
a { color: inherit; }
summary { cursor: pointer; overflow-wrap: anywhere; }
body > details { margin-top: 1rem; } body > details > summary { color: var(--dim); margin-bottom: .5rem; }
details.chain { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .8rem; margin-bottom: .7rem;
  break-inside: avoid; }
details.chain:target { border-color: var(--text); }
dl { display: grid; grid-template-columns: 7.5rem 1fr; gap: .25rem .8rem; margin: .6rem 0 .2rem; font-size: .87rem; }
dt { color: var(--dim); text-align: right; } dt:not(.why)::after { content: " ↓"; } dt.why { font-style: italic; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre { margin: .2rem 0 0; padding: .3rem .5rem; background: var(--shade); border-radius: .3rem; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
th, td { padding: .3rem .45rem; }
button { font: inherit; color: inherit; background: var(--shade); border: 1px solid var(--line); border-radius: .4rem;
  padding: .2rem .6rem; margin-bottom: .6rem; cursor: pointer; }
div.records { max-height: 80vh; overflow: auto; } div.records th { position: sticky; top: 0; }
svg.broad { max-width: 60rem; }
@media screen and (max-width: 45rem) {
  div.records thead { display: none; }
  div.records tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .4rem; border-bottom: 1px solid var(--line); }
  div.records tr.missed { display: none; }
  div.records td { border: 0; padding: 0; min-width: 0; white-space: normal; overflow-wrap: anywhere; }
  div.records td:not([colspan]):nth-child(7)::before { content: "iteration "; }
  div.records td:nth-child(9)::before { content: "turn "; }
  dl { grid-template-columns: 1fr; gap: 0; } dt { text-align: left; margin-top: .3rem; } }
@page { size: landscape; margin: 12mm; }
@media print { :root { color-scheme: light; --ground: #fff; --text: #000; --dim: #444; --line: #bbb; --shade: #f3f3f3;
  --bad: #a01010; --warn: #704800; --good: #14562f; --clean: #1d4f8f; font-size: 9px; }
  body { padding: 0; font-size: 10px; } input, label, button { display: none; }
  div.wide, div.records, div.plot { overflow: visible; max-height: none; border: 0; }
  details.chain:not([open]) { display: none; }
  th, td { padding: 2px 4px; } pre { max-height: none; } tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""

_SCRIPT: Final = """
const words = document.getElementById("words");
if (words) {
  words.hidden = false;
  const rows = [...document.querySelectorAll("body > div.records tr[class], details.chain")]
    .map(row => [row, row.textContent.toLowerCase()]);
  words.addEventListener("input", () => {
    const wanted = words.value.toLowerCase().split(/\\s+/);
    for (const [row, said] of rows) row.classList.toggle("missed", !wanted.every(word => said.includes(word)));
  });
}
const unfold = document.getElementById("unfold");
if (unfold) {
  unfold.hidden = false;
  unfold.addEventListener("click", () => {
    for (const chain of document.querySelectorAll("details.chain:not(.missed)")) chain.open = true;
  });
}
const meant = () => {
  const chain = document.getElementById(location.hash.slice(1));
  if (chain) { chain.open = true; chain.scrollIntoView(); }
};
addEventListener("hashchange", meant);
meant();
"""

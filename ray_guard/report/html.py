"""A report as one HTML file: nothing loaded from anywhere, the same bytes for the same evidence.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from html import escape
from typing import Final

from ray_guard.report.summary import Iteration
from ray_guard.report.tables import Cell, Report, Table

#: A browser should open it; an actor that is refused a million times should not prevent that.
ROW_LIMIT: Final = 5_000

STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --text: #1d2329; --dim: #66707b; --line: #dfe3e8; --shade: #f5f7f9;
  --bad: #c02b2b; --warn: #92620a; --good: #1f7a44; --clean: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181c; --text: #dde3e9; --dim: #8b96a2; --line: #2c333a;
  --shade: #1b2126; --bad: #ff7b72; --warn: #e3b341; --good: #5fcf8b; --clean: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1.5rem; background: var(--ground); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h2 small { color: var(--dim); font-weight: 400; margin-left: .5rem; }
p.fact { color: var(--dim); margin: 0; overflow-wrap: anywhere; }
ul.head { list-style: none; display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 1.2rem 0 0; }
ul.head li { background: var(--shade); border: 1px solid var(--line); border-radius: .4rem; padding: .35rem .7rem; }
div.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--shade); color: var(--dim); font-weight: 500; white-space: nowrap; }
td { font-family: ui-monospace, monospace; font-size: .82rem; white-space: nowrap; }
td.flexible { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; max-width: 40rem; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
.strong { font-weight: 600; } .dim { color: var(--dim); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.good { color: var(--good); }
svg { display: block; width: 100%; max-width: 48rem; height: auto; margin-top: .6rem; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
div.plot { overflow-x: auto; }
@media screen and (max-width: 45rem) { body { padding: .8rem; } svg { width: 42rem; max-width: none; } }
"""


def render(report: Report, iterations: Sequence[Iteration]) -> str:
    """The report as a whole HTML document.

    Args:
        report: what to say.
        iterations: for the plot; none, no plot.
    """
    parts = [
        *(f'<p class="fact">{escape(fact)}</p>' for fact in report.facts),
        '<ul class="head">',
        *(f"<li{classes(cell.tone.value)}>{escape(cell.text)}</li>" for cell in report.headline),
        "</ul>",
    ]
    for table in report.tables:
        parts.append(f"<h2>{escape(table.title)}<small>{escape(table.note)}</small></h2>")
        if table.title == "Reward against violation":
            parts.append(plot(iterations))
        parts.append(drawn(table))
    return page(report.title, parts)


def page(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole document around ``parts``.

    Args:
        title: as text.
        parts: as HTML.
        style: beside :data:`STYLE`.
        script: the only one that a browser will run in this page; none, none.
    """
    # The strings in it come from tools: should escaping ever fail, nothing may load, run or phone home.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = b64encode(sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    whole = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style>",
        f"<h1>{escape(title)}</h1>",
        *parts,
    ]
    if script:
        whole.append(f"<script>{script}</script>")
    return "\n".join(whole) + "\n"


def classes(*names: str) -> str:
    """The attribute, with a space before it; nothing where there is nothing to say."""
    kept = [name for name in names if name and name != "plain"]
    return f' class="{" ".join(kept)}"' if kept else ""


def drawn(table: Table, *, limit: int = ROW_LIMIT) -> str:
    """A table, at most ``limit`` rows of it, and how many are missing."""
    shown = table.rows[:limit]
    head = "".join(
        f'<th scope="col"{classes("right" if column.right else "")}>{escape(column.title)}</th>'
        for column in table.columns
    )
    rows = [_row(table, row) for row in shown]
    if len(shown) < len(table.rows):
        more = f"{len(table.rows) - len(shown):,} more rows are not shown"
        rows.append(f'<tr><td colspan="{len(table.columns)}" class="dim">{more}</td></tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _row(table: Table, row: Sequence[Cell]) -> str:
    cells = "".join(
        f"<td{classes(cell.tone.value, 'right' if column.right else '', 'flexible' if column.flexible else '')}>"
        f"{escape(cell.text)}</td>"
        for cell, column in zip(row, table.columns, strict=True)
    )
    return f"<tr>{cells}</tr>"


# --- the plot --------------------------------------------------------------------------------------------------------

_WIDTH: Final = 760
_LEFT: Final = 56
_RIGHT: Final = 12
_REWARD: Final = (28, 148)  # top and bottom of the upper panel
_SHARE: Final = (186, 246)  # of the lower one
_MARKERS: Final = 80
_TICKS: Final = 12


def plot(iterations: Sequence[Iteration], *, what: str = "a violation") -> str:
    """Above, mean reward of rollouts with and without ``what``; below, the share of those with; by iteration."""
    if not iterations:
        return ""
    first, last = iterations[0].number, iterations[-1].number
    span = max(1, last - first)
    room = _WIDTH - _LEFT - _RIGHT
    bar = max(1.0, min(18.0, 0.7 * room / (span + 1)))

    def across(number: int) -> float:
        return _LEFT + bar / 2 + (room - bar) * ((number - first) / span if last > first else 0.5)

    series = {
        "bad": [(across(item.number), item.violating_reward) for item in iterations],
        "clean": [(across(item.number), item.clean_reward) for item in iterations],
    }
    known = [value for points in series.values() for _, value in points if value is not None]
    low, high = (min(0.0, *known), max(known)) if known else (0.0, 1.0)
    high = high if high > low else low + 1

    def reward(value: float) -> float:
        return _REWARD[1] - (_REWARD[1] - _REWARD[0]) * (value - low) / (high - low)

    def share(value: float) -> float:
        return _SHARE[1] - (_SHARE[1] - _SHARE[0]) * value

    parts = [
        '<div class="plot">',
        f'<svg viewBox="0 0 {_WIDTH} 276" role="img" aria-label="Reward and violations by iteration">',
        f'<text x="{_LEFT}" y="14">mean reward: <tspan style="fill:var(--bad)">● with {what}</tspan>',
        '<tspan style="fill:var(--clean)">● without</tspan></text>',
        f'<text x="{_LEFT}" y="{_SHARE[0] - 12}">share of rollouts with {what}</text>',
        *_scale((low, high), reward, "{:.3g}"),
        *_scale((0.0, 1.0), share, "{:.0%}"),
    ]
    for item in iterations:
        top = share(item.share)
        parts.append(
            f'<rect x="{across(item.number) - bar / 2:.1f}" y="{top:.1f}" width="{bar:.1f}" '
            f'height="{_SHARE[1] - top:.1f}" fill="var(--bad)" opacity=".75"><title>iteration {item.number}: '
            f"{item.violating} of {item.clean + item.violating} rollouts</title></rect>"
        )
    for name, points in series.items():
        parts += _line(points, name, reward)
    step = max(1, -(-(span + 1) // _TICKS))
    parts += [
        f'<text x="{across(number):.1f}" y="{_SHARE[1] + 16}" text-anchor="middle">{number}</text>'
        for number in range(first, last + 1, step)
    ]
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_SHARE[1] + 29}" text-anchor="end">iteration</text>')
    return "\n".join([*parts, "</svg></div>"])


def _scale(ends: tuple[float, float], place: Callable[[float], float], form: str) -> list[str]:
    """A line and a label at both ends of an axis."""
    return [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place(end):.1f}" y2="{place(end):.1f}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 6}" y="{place(end) + 4:.1f}" text-anchor="end">{form.format(end)}</text>'
        for end in ends
    ]


def _line(points: Sequence[tuple[float, float | None]], name: str, place: Callable[[float], float]) -> list[str]:
    """A line through the iterations that have a reward, broken where one has none; dots where there is room."""
    parts: list[str] = []
    path, pen = "", "M"
    for x, value in points:
        if value is None:
            pen = "M"
            continue
        path += f"{pen}{x:.1f} {place(value):.1f}"
        pen = "L"
        if len(points) <= _MARKERS:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{place(value):.1f}" r="3" fill="var(--{name})">'
                f"<title>{value:.3f}</title></circle>"
            )
    return [f'<path d="{path}" fill="none" stroke="var(--{name})" stroke-width="1.6"/>', *parts] if path else []

"""A report as text: aligned, coloured on a terminal, whole in a pipe.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ray_guard.report import text
from ray_guard.report.tables import Cell, Report, Table, Tone

_CODES: Final = {
    Tone.PLAIN: "",
    Tone.STRONG: "\x1b[1m",
    Tone.DIM: "\x1b[2m",
    Tone.BAD: "\x1b[31m",
    Tone.WARN: "\x1b[33m",
    Tone.GOOD: "\x1b[32m",
}
_RESET: Final = "\x1b[0m"
_GAP: Final = "  "
#: Even where nothing has to fit, no cell is wider than this: an argument list can be.
_WIDEST: Final = 160


def render(report: Report, *, columns: int | None, colour: bool) -> str:
    """The report, newline at its end.

    Args:
        report: what to say.
        columns: width to fit, in columns; None for as wide as it gets (a pipe, a file).
        colour: ANSI colours.
    """
    lines = [_paint(report.title, Tone.STRONG, colour=colour)]
    lines += [_paint(fact, Tone.DIM, colour=colour) for fact in report.facts]
    lines += ["", *_flow(report.headline, columns, colour=colour)]
    for table in report.tables:
        lines += ["", *_table(table, columns, colour=colour)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _paint(content: str, tone: Tone, *, colour: bool) -> str:
    code = _CODES[tone]
    return f"{code}{content}{_RESET}" if colour and code and content.strip() else content


def _flow(cells: Sequence[Cell], columns: int | None, *, colour: bool) -> list[str]:
    """Cells side by side, onto the next line where they do not fit."""
    lines: list[str] = []
    line, used = "", 0
    for cell in cells:
        wide = text.width(cell.text)
        if line and columns is not None and used + 3 + wide > columns - 2:
            lines.append(line)
            line, used = "", 0
        line += ("   " if line else "  ") + _paint(cell.text, cell.tone, colour=colour)
        used += wide + 3
    return [*lines, line]


def _table(table: Table, columns: int | None, *, colour: bool) -> list[str]:
    shown = table.rows[: table.limit] if columns is not None else table.rows
    widths = _widths(table, shown, columns)
    title = _paint(table.title, Tone.STRONG, colour=colour)
    lines = [f"{title}  {_paint(table.note, Tone.DIM, colour=colour)}"]
    header = [Cell(column.title, Tone.DIM) for column in table.columns]
    for row in (header, *shown):
        parts = []
        for cell, column, wide in zip(row, table.columns, widths, strict=True):
            content = text.cut(cell.text, wide)
            padding = " " * (wide - text.width(content))
            painted = _paint(content, cell.tone, colour=colour)
            parts.append(padding + painted if column.right else painted + padding)
        lines.append(_GAP + _GAP.join(parts))
        if row is header:
            lines.append(_GAP + _paint("─" * (sum(widths) + len(_GAP) * (len(widths) - 1)), Tone.DIM, colour=colour))
    if len(shown) < len(table.rows):
        lines.append(
            _paint(f"{_GAP}… {len(table.rows) - len(shown):,} more (all of them in --html)", Tone.DIM, colour=colour)
        )
    return lines


def _widths(table: Table, rows: Sequence[Sequence[Cell]], columns: int | None) -> list[int]:
    """What each column needs; where that is too much, the widest flexible ones give way."""
    widths = [
        min(_WIDEST, max(text.width(column.title), *(text.width(row[index].text) for row in rows)))
        for index, column in enumerate(table.columns)
    ]
    if columns is None:
        return widths
    flexible = [index for index, column in enumerate(table.columns) if column.flexible]
    excess = sum(widths) + len(_GAP) * len(widths) - columns
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda index: widths[index])
        if widths[widest] <= max(table.columns[widest].least, text.width(table.columns[widest].title)):
            flexible.remove(widest)
            continue
        widths[widest] -= 1
        excess -= 1
    return widths

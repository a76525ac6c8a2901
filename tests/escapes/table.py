"""What became of every way out, as a table: one row per named case, one column per product. Filled by the suite."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final


class Verdict(StrEnum):
    WORKS = "works"
    """Unconfined: the way out exists on this host."""
    BLOCKED = "blocked"
    OPEN = "open"
    """A mechanism is within reach that ways out are made of, though nothing got out by it as such."""
    ESCAPED = "ESCAPED"
    INAPPLICABLE = "n/a"


class Column(StrEnum):
    UNCONFINED = "unconfined"
    ACTOR = "actor ring"
    CALL = "call ring"
    SANDLOCK = "sandlock"
    BUBBLEWRAP = "bubblewrap"
    BUBBLEWRAP_OFFLINE = "bubblewrap, no network"


OURS: Final = (Column.ACTOR, Column.CALL)
PEERS: Final = (Column.SANDLOCK, Column.BUBBLEWRAP, Column.BUBBLEWRAP_OFFLINE)
_OF_RING: Final = {"actor": Column.ACTOR, "call": Column.CALL}
_WORSE: Final = (Verdict.INAPPLICABLE, Verdict.WORKS, Verdict.BLOCKED, Verdict.OPEN, Verdict.ESCAPED)


def column(ring: str) -> Column:
    """Where what happened in ``ring`` (a ring of ours, under whichever policy, or a peer's name) stands."""
    return _OF_RING.get(ring.partition("_")[0]) or Column(ring)


@dataclass(frozen=True, slots=True)
class Cell:
    verdict: Verdict
    reason: str = ""


@dataclass
class Table:
    """Rows by (family, name), in the order in which they came."""

    rows: dict[tuple[str, str], dict[Column, Cell]] = field(default_factory=dict)
    missing: dict[Column, str] = field(default_factory=dict)
    """Columns of which nothing can be said here, and why."""

    def note(self, family: str, name: str, where: Column, cell: Cell) -> None:
        """A cell; of two that fall together (one ring under two policies) the worse one stays."""
        row = self.rows.setdefault((family, name), {})
        known = row.get(where)
        if known is None or _WORSE.index(cell.verdict) > _WORSE.index(known.verdict):
            row[where] = cell

    def count(self, where: Column, verdict: Verdict) -> int:
        return sum(where in row and row[where].verdict is verdict for row in self.rows.values())

    def columns(self) -> list[Column]:
        return [each for each in Column if each in self.missing or any(each in row for row in self.rows.values())]

    def summary(self) -> str:
        """One line: how many cases, and who let how many out."""
        proved = sum(
            Column.UNCONFINED in row and row[Column.UNCONFINED].verdict is Verdict.WORKS for row in self.rows.values()
        )
        told = []
        for where in self.columns():
            if where is Column.UNCONFINED:
                continue
            if where in self.missing:
                told.append(f"{where}: {self.missing[where].upper()}")
                continue
            counts = {
                verdict: self.count(where, verdict) for verdict in (Verdict.BLOCKED, Verdict.OPEN, Verdict.ESCAPED)
            }
            left = f" (and {counts[Verdict.OPEN]} open)" if counts[Verdict.OPEN] else ""
            told.append(f"{where} {counts[Verdict.ESCAPED]}{left} of {sum(counts.values())}")
        return f"{len(self.rows)} cases, {proved} of them proved unconfined on this host; escapes: {'; '.join(told)}"

    # -- how it is shown -----------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
        """(family, [(case, cells)]) with the reasons of what is inapplicable as notes [1], [2] …"""
        columns = self.columns()
        families: dict[str, list[tuple[str, list[str]]]] = {}
        for (family, name), row in self.rows.items():
            cells = [self._cell(row.get(where), where) for where in columns]
            families.setdefault(family, []).append((name, cells))
        yield from families.items()

    def _cell(self, cell: Cell | None, where: Column) -> str:
        if cell is None:
            return "not installed" if where in self.missing else ""
        if cell.verdict is Verdict.BLOCKED and cell.reason:
            return f"blocked ({cell.reason})"
        if cell.verdict is Verdict.INAPPLICABLE:
            return f"n/a [{self._note(cell.reason)}]"
        return str(cell.verdict)

    def _note(self, reason: str) -> int:
        notes = self.notes()
        return notes.index(reason) + 1

    def notes(self) -> list[str]:
        """Why something is inapplicable, each reason once."""
        found: dict[str, None] = {}
        for row in self.rows.values():
            for cell in row.values():
                if cell.verdict is Verdict.INAPPLICABLE:
                    found[cell.reason] = None
        return list(found)

    def text(self) -> str:
        """For a terminal."""
        columns = self.columns()
        lines = list(self._lines())
        wide = max((len(name) for _, rows in lines for name, _ in rows), default=4) + 4
        widths = [
            max(len(where), *(len(cells[at]) for _, rows in lines for _, cells in rows)) + 2
            for at, where in enumerate(columns)
        ]
        shown = ["case".ljust(wide) + "".join(where.ljust(width) for where, width in zip(columns, widths, strict=True))]
        for family, rows in lines:
            shown += ["", family]
            shown += [_row(name, cells, wide, widths) for name, cells in rows]
        shown += ["", *(f"[{at}] {reason}" for at, reason in enumerate(self.notes(), 1))]
        shown += [f"{where}: {reason.upper()}" for where, reason in self.missing.items()]
        return "\n".join([*shown, "", self.summary()])

    def markdown(self, about: str) -> str:
        """For a page; ``about`` comes first."""
        columns = self.columns()
        said = [about, "", f"**{self.summary()}**", ""]
        said.append(f"Measured {time.strftime('%Y-%m-%d')} on Linux {platform.release()}, {platform.machine()}.")
        for family, rows in self._lines():
            said += [
                "",
                f"## {family}",
                "",
                "| case | " + " | ".join(columns) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
            said += [f"| {_escaped(name)} | " + " | ".join(map(_escaped, cells)) + " |" for name, cells in rows]
        notes = [f"{at}. {reason}" for at, reason in enumerate(self.notes(), 1)]
        if notes:
            said += ["", "## Why something is not applicable", "", *notes]
        return "\n".join(said) + "\n"

    def write(self, path: Path, about: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.markdown(about))


def _row(name: str, cells: Sequence[str], wide: int, widths: Sequence[int]) -> str:
    return ("  " + name).ljust(wide) + "".join(
        cell.ljust(width) for cell, width in zip(cells, widths, strict=True)
    ).rstrip()


def _escaped(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"**{text}**" if text in (Verdict.ESCAPED, Verdict.OPEN) else text


TABLE: Final = Table()
"""The session's."""

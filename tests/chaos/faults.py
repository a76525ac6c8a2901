"""The table of faults: what each did to the calls of a job, and to those of one with a plain batch processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from judge import Findings

_TITLES = ("fault", "calls started", "lost", "duplicates", "closed by", "dead after", "memory", "batch processor lost")


class Row(NamedTuple):
    fault: str
    started: str = ""
    lost: str = ""
    duplicates: str = ""
    closed_by: str = ""
    dead_after: str = ""
    memory: str = ""
    batch_lost: str = ""

    @classmethod
    def of(cls, fault: str, found: Findings, dead_after: float | None, memory: int, batch_lost: str = "–") -> Row:
        """``dead_after`` in seconds (None: nothing had to die), ``memory`` in bytes."""
        took = "–" if dead_after is None else f"{dead_after:.2f} s"
        lost, twice = str(len(found.lost)), str(len(found.duplicates))
        return cls(fault, str(found.started), lost, twice, found.by(), took, f"{memory >> 20} MiB", batch_lost)


@dataclass
class Faults:
    rows: list[Row] = field(default_factory=list)

    def note(self, row: Row) -> None:
        self.rows.append(row)

    def text(self) -> str:
        """As a Markdown table."""
        rows = [_TITLES, tuple("---" for _ in _TITLES), *self.rows]
        widths = [max(len(row[at]) for row in rows) for at in range(len(_TITLES))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        return "\n".join(lines)

    def write(self, path: Path, about: str) -> None:
        path.write_text(f"{about}\n\n{self.text()}\n")


FAULTS = Faults()

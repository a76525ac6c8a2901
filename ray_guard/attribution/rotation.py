"""Which files are one log, one after the other: rotated, or one for each day or hour. Runs later, on any machine.

One sensor writes them by one clock, which all of them together tell better than a short one alone. They are known by
their names: the same folder, and the same name but for a last ``.1`` (the greater, the older), for dates, times of day
and epochs, and for how they are packed; folders named by dates count as the same. Their records have to follow one
another as their names do: what was written at the same time may be of two sensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Final, NamedTuple, TypeVar

import duckdb

_PACKED: Final = re.compile(r"\.(?:gz|zst|bz2|xz)$")
_NUMBER: Final = re.compile(r"\.(\d{1,3})$")
_ADDRESS: Final = re.compile(r"(?<!\d)\d{1,3}(?:\.\d{1,3}){3}$")
_DATE: Final = r"20\d\d(?P<by>[-_./]?)(?:0[1-9]|1[0-2])(?P=by)(?:0[1-9]|[12]\d|3[01])"
_MOMENT: Final = re.compile(
    rf"(?:^|[/._-])(?:{_DATE}(?:/\d\d(?=/)|[T_.:+-]?\d{{2,10}}(?!\d))*Z?|\d\d(?::\d\d)+(?:[_-]\d\d(?::\d\d)+)*|1\d{{9}})"
    r"(?![0-9A-Za-z])"
)
_DELIVERED: Final = re.compile(rf"(_{_DATE}T?\d{{4}}Z?)_[0-9a-f]{{8}}(?=\.)")
"""How Amazon names what it delivers of one flow log or firewall: the parts overlap, and the clock is Amazon's."""
_STRAY: Final = 0.05
"""So many of a file's records may be older than the file before reaches: flows are written when they are over."""
_Item = TypeVar("_Item")


class Place(NamedTuple):
    """Where a file stands among those of its log.

    Args:
        log: the name that all of them share.
        order: the more, the later it was written.
    """

    log: str
    order: tuple[bool, tuple[str, ...], int]


def place(path: str) -> Place:
    """A file's place, by its name alone."""
    name = _PACKED.sub("", str(PurePath(path)))
    number = None if _ADDRESS.search(name) else _NUMBER.search(name)
    name = name[: number.start()] if number is not None else name
    if delivered := _DELIVERED.search(name):
        name = name[: delivered.end(1)] + name[delivered.end() :]
    dates = tuple(found[0].strip("/._-") for found in _MOMENT.finditer(name))
    # What has neither is being written to.
    return Place(_MOMENT.sub("", name), (not dates, dates, -1 - int(number[1]) if number is not None else 0))


def in_order(files: Iterable[_Item], path: Callable[[_Item], str]) -> list[_Item]:
    """Files as they are, but those of one log from the oldest to the latest, where the first of them is."""
    together: defaultdict[str, list[tuple[Place, _Item]]] = defaultdict(list)
    for each in files:
        found = place(path(each))
        together[found.log].append((found, each))
    return [each for log in together.values() for _, each in sorted(log, key=lambda one: one[0].order)]


def alike(sources: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Which (path, format) are one log by what they are called: numbers, in their order."""
    together: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for number, (path, kind) in enumerate(sources):
        together[place(path).log, kind].append(number)
    return list(together.values())


def logs(db: duckdb.DuckDBPyConnection, sources: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Which (path, format) are one log: alike, and the records of each, in ``alert``, after those of the one before.

    Amazon's parts of one need not be.
    """
    found = []
    for log in alike(sources):
        if len(log) == 1 or _DELIVERED.search(sources[log[0]][0]):
            found.append(log)
            continue
        found.append(log[:1])
        rows = db.execute(
            """SELECT source, quantile_disc(end_ns, $stray), quantile_disc(end_ns, 1 - $stray) FROM alert
               WHERE source IN (SELECT unnest($log)) GROUP BY source""",
            {"log": log, "stray": _STRAY},
        ).fetchall()
        begin, end = ({row[0]: row[side] for row in rows} for side in (1, 2))
        for before, number in pairwise(log):
            if end[before] <= begin[number]:
                found[-1].append(number)
            else:
                found.append([number])
    return found

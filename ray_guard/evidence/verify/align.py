"""What was done to a list of records, from short hashes of what was written and of what is found. Runs later. Pure.

Both are packed: ``SHORT`` bytes each, in order. Records are told apart by their hashes, so what is moved, copied or
missing is known from what is rewritten.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from ray_guard.evidence.layout import SHORT

_STRIDE: Final = SHORT * 8192
_FEW: Final = 64


class Change(StrEnum):
    EDITED = "edited"
    REMOVED = "removed"
    INSERTED = "inserted"
    REORDERED = "reordered"
    DUPLICATED = "duplicated"


class Difference(NamedTuple):
    """``at``: index among the found of the first record that is not right; what was removed is missing before it.
    ``written``: index among the written of the record that should be there. ``other``: where the record that should be
    there is found (reordered), or which found record this is a copy of (duplicated).
    """

    change: Change
    at: int
    written: int
    records: int = 1
    other: int | None = None


class _Hashes:
    """Packed hashes, searched by value."""

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.count = len(packed) // SHORT
        self._all: set[bytes] | None = None

    def __getitem__(self, index: int) -> bytes:
        return self.packed[index * SHORT : (index + 1) * SHORT]

    def find(self, each: bytes, start: int = 0, end: int | None = None) -> int | None:
        stop = len(self.packed) if end is None else end * SHORT
        at = self.packed.find(each, start * SHORT, stop)
        while at >= 0 and at % SHORT:
            at = self.packed.find(each, at + 1, stop)
        return None if at < 0 else at // SHORT

    def holds(self, each: bytes) -> bool:
        """For many questions."""
        if self._all is None:
            self._all = {self[index] for index in range(self.count)}
        return each in self._all


def differences(found: bytes, written: bytes, limit: int) -> tuple[list[Difference], int]:
    """The first ``limit`` differences, and how many of the found records stand for what was written.

    What follows those was added, or has not been sealed yet.
    """
    have, want = _Hashes(found), _Hashes(written)
    result: list[Difference] = []
    i = j = 0
    arrived: set[int] = set()  # found records that belong further up, and written ones that stand further up
    taken: set[int] = set()
    while len(result) < limit:
        if i in arrived:
            i += 1
            continue
        if j in taken:
            j += 1
            continue
        same = _common(have, i, want, j)
        if same:
            i, j = i + same, j + same
            continue
        if j == want.count:
            return result, i
        if i == have.count:
            left = sum(index not in taken for index in range(j, want.count))
            result.append(Difference(Change.REMOVED, i, j, left))
            return result, i
        here, due = have[i], want[j]
        place = want.find(here, j + 1)
        later = have.find(due, i + 1)
        if place is not None and later is not None:
            copy = have.find(here, i + 1)
            if copy is not None and want.find(here, place + 1) is None:
                result.append(Difference(Change.DUPLICATED, i, j, other=copy))
                i += 1
            elif place - j <= later - i:
                result.append(Difference(Change.REORDERED, i, j, other=later))
                arrived.add(later)
                j += 1
            else:
                result.append(Difference(Change.REORDERED, i, j, other=later))
                taken.add(place)
                i += 1
        elif place is not None:
            count = _missing(have, i, want, j, place)
            result.append(Difference(Change.REMOVED, i, j, count))
            j += count
        elif later is not None:
            copy = have.find(here, 0, i)
            change = Change.INSERTED if copy is None else Change.DUPLICATED
            result.append(Difference(change, i, j, other=copy))
            i += 1
        else:
            result.append(Difference(Change.EDITED, i, j))
            i, j = i + 1, j + 1
    return result, have.count


def _common(have: _Hashes, i: int, want: _Hashes, j: int) -> int:
    """How many records from there on are the same."""
    a, b, at = i * SHORT, j * SHORT, 0
    while True:
        left, right = have.packed[a + at : a + at + _STRIDE], want.packed[b + at : b + at + _STRIDE]
        if left == right and left:
            at += len(left)
            continue
        end = min(len(left), len(right))
        inside = 0
        while inside < end and left[inside : inside + SHORT] == right[inside : inside + SHORT]:
            inside += SHORT
        return (at + inside) // SHORT


def _missing(have: _Hashes, i: int, want: _Hashes, j: int, end: int) -> int:
    """How many written records from ``j`` on, at most up to ``end``, are not found any more."""
    count = 1
    while j + count < end:
        each = want[j + count]
        if have.holds(each) if end - j > _FEW else have.find(each, i) is not None:
            break
        count += 1
    return count

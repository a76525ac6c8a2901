"""``key=value`` pairs in a line, behind a header and parted by whatever is no value. Runs later. Pure.

Lines of one source differ in their values and little else. What stands around the values is learnt from a line now and
then; lines that look like it are taken apart by one match, which finds the same in a third of the time.
"""

from __future__ import annotations

import re
from typing import Final

_QUOTED: Final = r'[^"\\]*+'
_WAIT: Final = 10
"""Lines that look like none that is known, before one is learnt."""
_EVERY: Final = 1_000
"""Of how many more of them one is learnt: it takes as long as a hundred lines."""
_MOST: Final = 64
"""Pairs of a line that is learnt."""


class Pairs:
    """Takes lines apart.

    Args:
        key: a pattern of keys, with what may not stand before one.
        plain: a pattern of values without quotes, which takes all it can get.
        quotes: whether a value may stand in quotes, with a backslash before those that are its own.
        first: whether the first value of a key that comes twice counts, else the last.
    """

    def __init__(self, key: str, plain: str, *, quotes: bool = False, first: bool = False) -> None:
        quoted = rf'"({_QUOTED}(?:\\.{_QUOTED})*+)"' if quotes else "((?!))"
        self._pair = re.compile(f"({key})=(?:{quoted}|({plain}))")
        self._plain = plain
        self._step = -1 if first else 1
        self._known: dict[int, tuple[str, re.Pattern[str], list[str]]] = {}
        self._unlike = -_WAIT

    def of(self, text: str) -> dict[str, str]:
        """The pairs in a text."""
        size = text.count("=")
        if size in self._known:
            begin, alike, keys = self._known[size]
            at = text.find("=") - len(begin)
            if text[at - 1 : at] in ("", " ") and (match := alike.fullmatch(text, at)):
                return dict(zip(keys, match.groups(), strict=True))
        if self._unlike % _EVERY == 0 and size <= _MOST:
            self._learn(text, size)
        self._unlike += 1
        found = self._pair.findall(text)[:: self._step]
        return {key: quoted.replace('\\"', '"') if quoted else plain for key, quoted, plain in found}

    def _learn(self, text: str, size: int) -> None:
        found = list(self._pair.finditer(text))
        if not found or "\\" in text or text.count('"') != 2 * sum(each[2] is not None for each in found):
            return  # a quote that opens nothing here might open something in another line
        counting = {each[1]: each for each in found[:: self._step]}
        looks, end = "", found[0].start()
        for each in found:
            group, value = (2, _QUOTED) if each[3] is None else (3, self._plain)
            looks += re.escape(text[end : each.start(group)]) + (f"({value})" if counting[each[1]] is each else value)
            end = each.end(group)
        keys = [each[1] for each in found if counting[each[1]] is each]
        self._known[size] = found[0][1], re.compile(looks + re.escape(text[end:])), keys

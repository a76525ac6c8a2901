"""Lines that look like a line that was learnt are taken apart as every other line is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.attribution.sources.pairs import Pairs

KINDS = [
    (r"(?<![\w-])[A-Za-z_]\w*+", r'[^\s"]*+', True, False),  # FortiGate
    (r"\b[A-Z]{2,8}", r"\S*+", False, True),  # netfilter
]
LINES = [
    '<189>fw date=2026-03-07 devname="fw, 2" srcip=10.0.0.5 msg="a=b c" srcip=10.0.0.6 empty="" last=7',
    "IN= OUT=eth0 SRC=10.0.0.5 LEN=60 DF PROTO=UDP SPT=53 LEN=40",
    'IN="x y" -NOT=1 OUT=',
]


@pytest.mark.parametrize(("key", "plain", "quotes", "first"), KINDS)
@pytest.mark.parametrize("line", LINES)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 3), st.text('ab =",\\-:\tA7é', max_size=4)), max_size=3))
def test_what_was_learnt_changes_nothing(
    key: str, plain: str, quotes: bool, first: bool, line: str, damage: list[tuple[int, int, str]]
) -> None:
    learnt = Pairs(key, plain, quotes=quotes, first=first)
    whole = [learnt.of(line) for _ in range(12)]
    assert all(each == whole[0] for each in whole)
    for at, cut, put in damage:
        line = line[:at] + put + line[at + cut :]
    assert learnt.of(line) == Pairs(key, plain, quotes=quotes, first=first).of(line)


def test_which_value_of_a_key_counts_and_what_quotes_hold() -> None:
    (key, plain, _, _), (short, greedy, _, _) = KINDS
    last, first = Pairs(key, plain, quotes=True), Pairs(short, greedy, first=True)
    for _ in range(12):
        said = last.of(LINES[0])
        assert said == {
            "date": "2026-03-07",
            "devname": "fw, 2",
            "srcip": "10.0.0.6",
            "msg": "a=b c",
            "empty": "",
            "last": "7",
        }
        assert first.of(LINES[1])["LEN"] == "60"
    assert last.of(r'a="say \"b=c\"" d=e') == {"a": 'say "b=c"', "d": "e"}


def test_lines_that_look_alike_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(*KINDS[1][:2], first=True)
    for n in range(12):
        pairs.of(f"IN= OUT=eth{n} SRC=10.0.0.{n}")
    monkeypatch.setattr(pairs, "_pair", None)
    assert pairs.of("header: IN=eth0 OUT= SRC=::1") == {"IN": "eth0", "OUT": "", "SRC": "::1"}

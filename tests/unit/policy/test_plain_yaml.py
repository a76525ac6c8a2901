"""YAML read at first sight is read as PyYAML reads it, or not at all."""

from __future__ import annotations

import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_guard.policy import plain_yaml, strict_yaml

_USUAL = """\
# what a job may do
version: 1
mode: enforce                    # report: record only
egress:
  allow:
    - "10.20.0.0/16:6379"        # an address
    - 'unix:///run/some.sock'
  listen: [8080, "9000-9010"]

budgets:
  call:  {egress_bytes: 5MiB, connections: 50, wall_seconds: 120}
  actor: {}
files:
  read: [system, env, cwd, ~/data, /opt/models-2.1]
  hide: []
"""


def test_what_a_policy_usually_looks_like_is_plain() -> None:
    assert plain_yaml.read(_USUAL) == strict_yaml.load(_USUAL)
    assert plain_yaml.read("version: 1\negress: {allow: []}\n") == {"version": 1, "egress": {"allow": []}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:",
        "a: ",
        "a:b",
        "a: yes",
        "a: Null",
        "a: ~",
        "on: 1",
        "a: 010",
        "a: 1:30",
        "a: 1.5",
        "a: 1_000",
        "a: 2026-11-25",
        "a: -1",
        "a: *b",
        "a: &b c",
        "a: !!str b",
        "a: |\n  b",
        "a: b\n  c",
        "a: 'b\n  c'",
        'a: "\\x41"',
        "a: 'it''s'",
        "a: b: c",
        "a: b # c\n d: e",
        "a: 1\na: 2",
        "{a: 1, a: 2}",
        "a: {b: 1, b: 2}",
        "a: {b:1}",
        "a: [b, ]",
        "a: [b,, c]",
        "a: [b: c]",
        "a: [b\n  ]",
        "a:\n- b",
        "a:\n  - b: c",
        "a:\n  - - b",
        "a:\n  b: c\n d: e",
        " a: b\nc: d",
        "a: b\n--- \nc: d",
        "a:\tb",
        "a: b\r\nc: d",
        "a: \x85b",
        "? a\n: b",
        "<<: {a: b}",
        "a: " + "[" * 200 + "]" * 200,
    ],
)
def test_what_is_not_plain_is_left_to_the_real_parser(text: str) -> None:
    assert plain_yaml.read(text) is None


_PIECES = [*"\n\n\n  ::-#[]{},\"'~/.*&!|>%@`\\\t", "  ", ": ", "- ", " #", "a", "b_c", "yes", "NO", "null", "true", "0"]
_PIECES += [
    "017",
    "1",
    "12",
    "5MiB",
    "1e3",
    "0x1f",
    "1:20",
    "2026-11-25",
    "\n  ",
    "\n    ",
    "\n  - ",
    "a: ",
    "\na: ",
    "\nb: ",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=24).map("".join))
def test_whatever_is_read_is_what_pyyaml_reads(text: str) -> None:
    _agree(text)


_value = st.sampled_from(
    ["", "b", "[]", "[a, b]", "{a: 1}", "{a:1}", "'x'", '"y" ', "12", "on", "~/x", "a b", "- c", "c: d"]
)
_line = st.tuples(
    st.sampled_from(["", "  ", "    ", "   "]),
    st.sampled_from(["a", "b", "c", "no", "- ", "-", "'a'", ""]),
    st.sampled_from([": ", ":", ":  ", " : ", ""]),
    _value,
    st.sampled_from(["", "", " # d", "#d", " ", " #"]),
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(_line, min_size=1, max_size=5).map("\n".join))
def test_whatever_lines_are_read_are_what_pyyaml_reads(text: str) -> None:
    _agree(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_USUAL)), st.integers(0, 2), st.sampled_from(["", *_PIECES])), max_size=3))
def test_a_policy_with_slips_is_read_as_pyyaml_reads_it(slips: list[tuple[int, int, str]]) -> None:
    text = _USUAL
    for at, length, instead in slips:
        text = text[:at] + instead + text[at + length :]
    _agree(text)


_words = st.text(string.ascii_letters + string.digits + "_./~-:*", max_size=6)
_values = st.recursive(
    st.integers(0, 10**20) | st.booleans() | st.none() | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(_words, _values, min_size=1, max_size=4), st.sampled_from([None, True, False]), st.integers(2, 4)
)
def test_whatever_pyyaml_writes_is_read_back_or_left(value: dict[str, object], flow: bool | None, indent: int) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, indent=indent)
    _agree(text)


def _agree(text: str) -> None:
    read = plain_yaml.read(text)
    if read is not None:
        assert _typed(read) == _typed(strict_yaml.load(text))


def _typed(value: object) -> object:
    """Equal only where the types are: 1 is not True."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (type(value), value)

"""What is read without PyYAML is what PyYAML reads; all else is left to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.policy import plain_yaml, strict_yaml

POLICY = """\
version: 1
# tools may fetch packages
mode: enforce
egress:
  allow:
    - "*.files.example.org:443"
    - index.example.org:443
    - 10.20.0.0/16:6379
    - unix:///run/some.sock
  verify_names: true
budgets:
  call: {egress_bytes: 5MiB, wall_seconds: 120}
files:
  read: [system, 'env', cwd]
  hide: []
require:
- egress
"""

PLAIN = (POLICY, "version: 1\negress: {allow: []}\n", "a: {b: [], c: {d: 1}}", "a:\n- b\nc: d")

LEFT = {
    "a key twice": "a: 1\na: 2",
    "a key twice in braces": "a: {b: 1, b: 2}",
    "an alias": "a: &x 1\nb: *x",
    "a tag": "a: !!str 1",
    "a truth of YAML 1.1": "a: yes",
    "nothing": "a: null",
    "a key without a value": "a:\nb: 1",
    "a key that means a truth": "on: 1",
    "base sixty": "a: 22:22",
    "octal": "a: 010",
    "hexadecimal": "a: 0x1F",
    "a float": "a: 1.5",
    "a date": "a: 2001-01-01",
    "an escape": 'a: "b\\n"',
    "two quotes": "a: 'it''s'",
    "a comment behind": "a: b # c",
    "a word that goes on": "a: b\n  c",
    "an item that goes on": "a:\n- b\n  c",
    "text in several lines": "a: |\n  b",
    "a tab": "a:\tb",
    "two documents": "a: 1\n---\nb: 2",
    "further in": "a: 1\n  b: 2",
    "less far in": "a:\n    b: 1\n  c: 2",
    "open brackets": "a: [b",
    "words side by side": "a: [b c]",
    "a list with a hole": "a: [b,, c]",
    "another line's end": "a: b\r\nc: d",
    "another line's end within": "a: b\x85c: d",
    "no mapping": "a",
    "empty": "",
}

#: pieces that YAML gives a meaning to, and pieces of policies
PIECES = (
    *"[]{},:#'\"-?&*!|>%@`~= \n\t\r",
    *(
        "\n  ",
        "\n    ",
        "\n- ",
        "\n  - ",
        ": ",
        "- ",
        " #",
        "a",
        "b",
        "1",
        "0",
        "01",
        "1.5",
        "1e3",
        "22:22",
        "yes",
        "null",
    ),
    *("true", "a: ", "b:", "x: [", "y: {", "5MiB", "10.0.0.0/8:80", "udp://192.0.2.7:123", "<<: ", "---", "é", "\x85"),
)


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_policy_is_read_as_by_pyyaml(text: str) -> None:
    assert plain_yaml.load(text) == strict_yaml.load(text) != None  # noqa: E711 - both, and something


@pytest.mark.parametrize("text", LEFT.values(), ids=LEFT)
def test_what_is_not_plain_is_left_to_pyyaml(text: str) -> None:
    assert plain_yaml.load(text) is None


def _same(text: str) -> None:
    read = plain_yaml.load(text)
    if read is not None:
        expected: Any = strict_yaml.load(text)
        assert repr(read) == repr(expected)  # of the same types too


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_whatever_is_read_is_read_as_by_pyyaml(text: str) -> None:
    _same(text)


@given(
    st.sampled_from(PLAIN),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(PIECES)), min_size=1, max_size=3),
)
def test_a_policy_that_was_changed_anywhere_is_read_as_by_pyyaml(
    text: str, changes: list[tuple[int, int, str]]
) -> None:
    for at, cut, piece in changes:
        text = text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) + cut :]
    _same(text)


def test_a_plain_policy_file_loads_no_parser(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\nfrom ray_guard.policy.load import read_policy\n"
        f"assert read_policy({str(tmp_path / 'policy.yaml')!r})['version'] == 1\nassert 'yaml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True)

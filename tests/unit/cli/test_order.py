"""The quick reading of ``ray-guard run`` gives what argparse gives, or leaves it to argparse."""

from __future__ import annotations

import argparse
import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.cli import run
from ray_guard.cli.order import Order, at_first_sight


def by_argparse(words: list[str]) -> Order | None:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            found = parser.parse_args(["run", *words])
        except SystemExit:
            return None
    command = found.command[1:] if found.command[:1] == ["--"] else found.command
    return Order(found.policy, found.evidence, found.pass_fd, command)


WORDS = "--policy --evidence --pass-fd --policy=p --evidence=e --pass-fd=4 --pol -h -- - p 3 07 -1 true --policy= ²"


@given(st.lists(st.sampled_from(["", *WORDS.split()]), max_size=8))
def test_the_same_as_argparse(words: list[str]) -> None:
    quick = at_first_sight(words)
    if quick is not None:
        assert quick == by_argparse(words)


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (["--policy", "p", "--", "true"], Order("p", None, [], ["true"])),
        (["--policy=p", "true", "--policy", "q"], Order("p", None, [], ["true", "--policy", "q"])),
        (
            ["--policy", "p", "--evidence", "e", "--pass-fd", "3", "--pass-fd=4", "--", "-x"],
            Order("p", "e", [3, 4], ["-x"]),
        ),
        (["--policy", "p"], Order("p", None, [], [])),
    ],
)
def test_what_people_write_is_read_at_once(words: list[str], order: Order) -> None:
    assert at_first_sight(words) == order


@pytest.mark.parametrize("words", ["", "--help", "--policy", "--polic p true", "--policy p -v", "--pass-fd x", "true"])
def test_the_rest_is_left_to_argparse(words: str) -> None:
    assert at_first_sight(words.split()) is None

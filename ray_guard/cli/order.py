"""What ``ray-guard run`` is asked to do, read without argparse, which takes as long to load as a tool to start. Pure.

Only what is right at first sight is read here. Anything else, ``--help`` among it, is argparse's
(:func:`ray_guard.cli.run.add_parser`): it takes abbreviations, and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_guard.named import NamedTuple


class Order(NamedTuple):
    """``command`` as it was given: without the ``--`` before it, perhaps empty."""

    policy: str
    evidence: str | None
    pass_fd: list[int]
    command: list[str]


def at_first_sight(words: Sequence[str]) -> Order | None:
    """The order in ``words``, which follow ``run``; None: argparse is to look at them."""
    given: dict[str, str] = {}
    passed: list[int] = []
    at = 0
    while at < len(words) and words[at].startswith("--") and words[at] != "--":
        option, joined, value = words[at].partition("=")
        at += 1
        if not joined:
            if at == len(words) or words[at].startswith("-"):
                return None
            value = words[at]
            at += 1
        if option == "--pass-fd" and value.isascii() and value.isdigit():
            passed.append(int(value))
        elif option in ("--policy", "--evidence"):
            given[option] = value
        else:
            return None
    command = list(words[at + 1 :] if words[at : at + 1] == ["--"] else words[at:])
    if "--policy" not in given or (command and command[0].startswith("-") and words[at] != "--"):
        return None
    return Order(given["--policy"], given.get("--evidence"), passed, command)

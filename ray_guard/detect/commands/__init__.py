"""Judges one command line. Runs later, and live. Pure.

Rules look at programs and arguments (:mod:`ray_guard.detect.shell`), never at spelling alone; each is a function from a
command and the line around it to a finding. What is recognised by shape (pool addresses, wallets, mining flags,
forwards) holds for programs under any name. A module for each kind of finding: :mod:`.tunnels`, :mod:`.mining`,
:mod:`.probing`, :mod:`.metadata`, :mod:`.names`, :mod:`.leaving`, :mod:`.shells`; :mod:`.code` for other languages.
"""

from __future__ import annotations

from ray_guard.detect import Finding
from ray_guard.detect.commands import code, leaving, metadata, mining, names, probing, shells, tunnels
from ray_guard.detect.commands.line import Line
from ray_guard.detect.hidden import LONGEST, unhidden

_LINE_RULES = (mining.in_text, code.in_text, metadata.in_text, tunnels.in_text, shells.in_text)
_COMMAND_RULES = (
    *(tunnels.by_ssh, tunnels.by_program, mining.by_program, shells.by_program),
    *(probing.by_program, names.by_program, leaving.by_program),
)
_LOOP_RULES = (probing.in_loop, names.in_loop)


def judge(text: str) -> Finding | None:
    """The first thing that is wrong with a command line; None: nothing that is known."""
    judged: set[int] = set()
    for plain in unhidden(text[:LONGEST]):
        found = _judged(Line(plain), judged)
        if found is not None:
            return found
    return None


def _judged(line: Line, judged: set[int]) -> Finding | None:
    """``judged``: commands of which nothing is to be said; the texts that a line becomes have most in common."""
    for of_line in _LINE_RULES:
        if (found := of_line(line)) is not None:
            return found
    for command in line.commands:
        if command.key in judged:
            continue
        judged.add(command.key)
        for of_command in _COMMAND_RULES:
            if (found := of_command(command, line)) is not None:
                return found
    for of_line in _LOOP_RULES:
        if (found := of_line(line)) is not None:
            return found
    return None

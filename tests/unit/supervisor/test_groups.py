"""Which process groups are a call's: what is signalled, and who never is."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ray_guard.supervisor.groups import Groups, _ours

LEADER = 50
KINSHIP = {
    1: (0, 1),
    LEADER: (1, LEADER),
    51: (LEADER, 51),  # the tool
    52: (51, 52),  # in a group of its own
    53: (LEADER, 51),  # an orphan of the call
    54: (99, 60),  # its parent has just ended
    70: (1, 70),  # a stranger
    71: (70, 71),
}


@pytest.mark.parametrize(
    ("known", "ours"),
    [
        (set(), {51, 52}),
        ({51}, {51, 52}),
        ({60}, {51, 52, 60}),  # nobody certainly strange is in it
        ({80}, {51, 52, 80}),  # told of, not made yet
        ({70, 71}, {51, 52}),  # numbers that were given out again
        ({LEADER}, {51, 52}),
    ],
)
def test_groups_of_a_call(known: set[int], ours: set[int]) -> None:
    assert _ours(known, KINSHIP, LEADER) == ours


def test_a_line_of_parents_that_leads_back_to_itself_ends() -> None:
    assert _ours({9}, {8: (9, 9), 9: (8, 9)}, LEADER) == {9}


def _sleeper(group: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, group)
        time.sleep(20)
        os._exit(0)
    while os.getpgid(pid) != (group or pid):
        time.sleep(0.001)
    return pid


def test_all_of_them_are_signalled_and_nobody_else() -> None:
    first = _sleeper(0)
    second, third = _sleeper(first), _sleeper(0)
    os.setpgid(0, 0)  # a leader has a group of its own
    groups = Groups()
    groups.add(first)
    groups.signal(signal.SIGTERM)
    for pid in (first, second, third):
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_what_is_told_of_is_not_forgotten_before_it_is_made() -> None:
    groups = Groups()
    for number in range(1 << 25, (1 << 25) + 1000):
        groups.add(number)
    assert len(groups._groups | groups._recent) < 600
    assert (1 << 25) + 999 in groups._groups | groups._recent

"""Signalling every process of a call at once, and nobody else. Runs in the zygote, in a leader.

The kernel walks the processes that are signalled under one lock that no fork can slip through. A list read from /proc
does not work: processes that replace themselves are quicker than its reader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Protocol

from ray_guard.kernel import procfs

_MANY: Final = 256
"""With more groups than that, it is looked which of them there still are."""


class Everybody(Protocol):
    """All processes of the call that is going on."""

    @property
    def grows(self) -> bool:
        """Whether there may be more to :meth:`add` as long as the supervisor answers."""

    def signal(self, number: int) -> None:
        """Signals them all. What is not this leader's call is never signalled."""

    def add(self, group: int) -> None:
        """A process of the call makes, or enters, this process group."""


class Scope:
    """By kill(-1), where Landlock keeps everybody else out of it."""

    grows: Final = False

    def signal(self, number: int) -> None:
        with suppress(OSError):  # ESRCH: nobody is left; EPERM: others exist, none of this call
            os.kill(-1, number)

    def add(self, group: int) -> None:
        """Whatever their group."""


class Groups:
    """By process group, where signals are not scoped: which there are is told before they are made.

    A group lies within one session, and the first process of a call leads its own: so a group is the call's or it is
    not. Its number may be another's once it is empty, so who is in it is looked at first.
    """

    grows: Final = True

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._recent: set[int] = set()

    def add(self, group: int) -> None:
        self._recent.add(group)
        if len(self._recent) > _MANY:  # those of before are made by now, or will never be
            self._groups = {each for each in self._groups if _exists(each)} | self._recent
            self._recent = set()

    def signal(self, number: int) -> None:
        known = self._groups | self._recent
        for group in _ours(known, procfs.kinship(), os.getpid()):
            with suppress(OSError):
                os.killpg(group, number)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


def _ours(known: set[int], kinship: Mapping[int, tuple[int, int]], leader: int) -> set[int]:
    """The ``known`` groups and those seen below ``leader``, without what has a member that is certainly a stranger.

    That is one whose parents, up to the first process, are all there, with the leader not among them. Where one is
    missing it has just ended, and the leader is about to adopt.
    """
    within: dict[int, bool | None] = {0: False, 1: False, leader: True}
    ours, foreign = set(known), set[int]()
    for pid, (_, group) in kinship.items():
        line: list[int] = []
        at: int | None = pid
        while at is not None and at not in within and len(line) <= len(kinship):
            line.append(at)
            at = kinship[at][0] if at in kinship else None
        verdict = None if at is None else within.get(at)
        within.update(dict.fromkeys(line, verdict))
        if verdict is False or pid == leader:
            foreign.add(group)
        elif verdict:
            ours.add(group)
    return ours - foreign

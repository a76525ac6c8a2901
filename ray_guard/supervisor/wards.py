"""Targets and what is beside them: processes whose trees end with the guard. Runs in supervisor, zygote, witness.

Whoever is left of the three when another is lost ends them: the zygote when the supervisor dies, the supervisor when
the zygote does, the witness when both do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from typing import Final

from ray_guard.kernel import procfs
from ray_guard.named import NamedTuple

PATIENCE_S: Final = 1.0
"""Contract: targets are dead within so long; what is not by then cannot be killed."""
_SWEPT: Final = 256
"""How often, in wards, those that have ended are forgotten."""


class Ward(NamedTuple):
    """One.

    Attributes:
        lifeline: a target's, held open: when the last who holds it dies, its closing kills the target. None: a process
            beside one.
        root: the target's pid, its own or that of whom it is beside.
    """

    pid: int
    start_time: int
    lifeline: int | None
    root: int

    @property
    def lives(self) -> bool:
        return procfs.start_time(self.pid) == self.start_time


class Wards:
    """Those of one supervisor, by their pid."""

    def __init__(self) -> None:
        self._wards: dict[int, Ward] = {}

    def add(self, ward: Ward) -> None:
        """Its lifeline is ours from here on."""
        self.release(ward.pid)
        self._wards[ward.pid] = ward
        if len(self._wards) % _SWEPT == 0:
            self._wards = {pid: each for pid, each in self._wards.items() if each.lifeline is not None or each.lives}

    def target(self, pid: int) -> Ward | None:
        return self._wards.get(pid)

    def release(self, pid: int) -> None:
        """It has ended."""
        ward = self._wards.pop(pid, None)
        if ward is not None and ward.lifeline is not None:
            os.close(ward.lifeline)

    def release_tree(self, root: int) -> None:
        """That target is somebody else's now, with all beside it."""
        for ward in [ward for ward in self._wards.values() if ward.root == root]:
            self.release(ward.pid)

    def end(self, but: Collection[int] = ()) -> None:
        """Kills all below them, and then them: a target that died first would leave its children to nobody.

        Args:
            but: targets that are spared, with all beside them.
        """
        deadline = time.monotonic() + PATIENCE_S
        wards = [ward for ward in self._wards.values() if ward.root not in but and ward.lives]
        while wards and time.monotonic() < deadline:
            below = {pid for ward in wards for pid in procfs.descendants(ward.pid) if not procfs.is_zombie(pid)}
            for pid in below or {ward.pid for ward in wards}:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not below:
                return

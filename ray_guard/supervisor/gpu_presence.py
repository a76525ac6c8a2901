"""GPUs of a node's targets, until there is something to watch. Runs in the supervisor.

Where no GPU driver is loaded nothing can be opened, and a policy that does not speak of GPUs asks nothing of them. Then
what counts and measures them (:mod:`ray_guard.supervisor.gpu`) is loaded a moment later: a cold start waits for every
module that it loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ray_guard.kernel import gpu_majors
from ray_guard.policy.budgets import Scope
from ray_guard.policy.decide import CompiledPolicy

if TYPE_CHECKING:
    from ray_guard.egress.gate import Waiting
    from ray_guard.supervisor.gpu import Gpus
    from ray_guard.supervisor.target import Origin, Target

LATE_S: Final = 0.5
"""How long targets may wait to be watched where no driver is loaded."""


class Presence:
    """All GPUs of the node: see :class:`ray_guard.supervisor.gpu.Gpus`, which it stands before."""

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._gpus: Gpus | None = None
        self._late: dict[int, Target] = {}
        """Those that are not watched yet."""
        self._tools: dict[int, tuple[Target, Origin]] = {}
        """Theirs, by the process that each began with."""

    def watching(self) -> Gpus:
        """What watches, with all that have joined so far."""
        if self._gpus is None:
            from ray_guard.supervisor.gpu import Gpus  # see the module

            self._gpus = Gpus(self._loop)
            for target in self._late.values():
                self._gpus.join(target)
            for pid, (target, origin) in self._tools.items():
                self._gpus.began(pid, target, origin)
            self._late.clear()
            self._tools.clear()
        return self._gpus

    def asked(self, policy: CompiledPolicy) -> Gpus | None:
        """What must say whether it can hold ``policy``; None: that speaks of no GPU."""
        kinds = {kind for scope in Scope for limits in (policy.limits(scope), policy.watched(scope)) for kind in limits}
        speaks = "gpu" in policy.require or any(kind.startswith("gpu_") for kind in kinds)
        return self.watching() if speaks else None

    def join(self, target: Target) -> None:
        """A target has been armed, or (``ray-guard run``) admitted."""
        if self._gpus is not None or target.kind != "run" or gpu_majors.known_majors():
            self.watching().join(target)
            return
        self._late[id(target)] = target
        self._loop.later(LATE_S, self._watch)

    def _watch(self) -> None:
        if self._late:
            self.watching()

    def leave(self, target: Target) -> None:
        self._late.pop(id(target), None)
        if self._gpus is not None:
            self._gpus.leave(target)

    def began(self, pid: int, target: Target, origin: Origin) -> None:
        """A tool has been armed: ``pid`` is its first process, and its parent leads it."""
        if self._gpus is not None:
            self._gpus.began(pid, target, origin)
        else:
            self._tools[pid] = target, origin

    def ended(self, pid: int, target: Target) -> None:
        """A tool's tree is dead."""
        self._tools.pop(pid, None)
        if self._gpus is not None:
            self._gpus.ended(pid, target)

    def close(self) -> None:
        if self._gpus is not None:
            self._gpus.close()

"""What follows a violation beyond the refusal itself: ``on_violation``, or ``detect`` where it was found out.

Runs in the supervisor. The system call is refused in any case. ``kill_call`` and ``end_episode`` then bar the scope
that offended, so that no more is granted to it whatever its code does with exceptions, and end its tool processes;
``kill_actor`` ends the process. A violation of no known scope (one outside any episode, or of a thread that nobody
spoke for) is refused and recorded, and nobody is ended for it on a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from ray_guard.log import logger
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import Mode
from ray_guard.supervisor.target import Origin, Target, Violation

if TYPE_CHECKING:
    from ray_guard.supervisor.tools import Tool

log = logger("ray_guard.consequences")

DENY: Final = "deny"
END_EPISODE: Final = "end_episode"
KILL_ACTOR: Final = "kill_actor"


def acts(policy: CompiledPolicy) -> bool:
    """Whether a violation has consequences under this policy."""
    return policy.mode is Mode.ENFORCE and policy.ends_scopes


class Consequences:
    """Of the violations of one target.

    Args:
        target: whose they are.
        tools: its tools that run.
        cut: ends the connections of the target's own process whose scope is granted nothing more.
        kill: ends the target's process.
    """

    def __init__(
        self,
        target: Target,
        tools: Callable[[], Iterable[Tool]],
        *,
        cut: Callable[[], None],
        kill: Callable[[], None],
    ) -> None:
        self._target = target
        self._tools = tools
        self._cut = cut
        self._kill = kill
        target.offended = self.follow

    def follow(self, origin: Origin, violation: Violation) -> None:
        """Called for each violation, once it stands in the journal."""
        if not acts(self._target.policy):
            return
        action = violation.action or self._target.policy.on_violation
        if action == DENY:
            return
        if action == KILL_ACTOR:
            log.warning("%s %d is ended: %s", self._target.kind, self._target.pid, violation.text())
            self._kill()
        elif action == END_EPISODE and origin.episode is not None:
            self._end(origin.episode, lambda tool: tool.episode == origin.episode, violation)
        elif origin.call is not None:  # an episode of its own is more than a lone call can be ended with
            self._end(origin.call, lambda tool: tool.call == origin.call, violation)

    def _end(self, span: str, belongs: Callable[[Tool], bool], violation: Violation) -> None:
        scope = self._target.open.get(span)
        if scope is not None and scope.ended is None:
            scope.ended = violation
            if scope.account is not None:
                scope.account.bar()
                self._cut()
        for tool in self._tools():
            if belongs(tool) and tool.running:
                tool.end(violation.text())

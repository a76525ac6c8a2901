"""target: what the supervisor has to say of an episode, and what it is told after the fact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray_guard.client import carry, channel
from ray_guard.client.outlet import outlet
from ray_guard.client.spans import NAME_LIMIT, clean, clean_text, logger
from ray_guard.errors import NotEnforced, SupervisorLost, of_violation


def violations(*, raise_: bool = False) -> list[dict[str, Any]]:
    """The violations of the current episode; outside of an episode, of this process.

    Returns:
        One dict each: ``kind``, ``limit`` and ``value`` in the limit's own unit, ``span``, ``time`` (Unix ns),
        ``reason``, ``destination``, ``source`` (id of the scope whose limit it is; empty where it is no limit's).

    Raises:
        EgressDenied, BudgetExceeded: the first violation, where `raise_`.
        NotEnforced: this process is not guarded, so nobody counts: that is not the same as none.
        SupervisorLost: the supervisor does not answer.
    """
    node = carry.current()
    found = ask_violations(None if node is None else node.episode)
    if raise_ and found:
        raise of_violation(found[0])
    return found


def ask_violations(episode: str | None) -> list[dict[str, Any]]:
    where = outlet()
    if where is None:
        raise NotEnforced(("violations",), "this process is not guarded, so no violation would be seen")
    answer = where.wire.request({"op": "violations", "episode": episode})
    found = answer.get("violations")
    if not isinstance(found, list):
        raise SupervisorLost(f"the supervisor answered nonsense: {answer!r:.200}")
    return found


def ended_for(spans: Iterable[str | None]) -> None:
    """Raises what the first of these scopes was ended for before its time (``on_violation`` beyond deny), if one was.

    Exceptions of tools are often turned into text for the model. This is asked again wherever a scope of the episode
    begins and where it ends, so that what ended it gets past such a handler all the same.

    Raises:
        EgressDenied, BudgetExceeded, RayGuardError: the violation.
        SupervisorLost: the supervisor does not answer.
    """
    where = outlet()
    if where is None or not getattr(where.wire, "acts", False):
        return
    found = where.wire.request({"op": "ended", "spans": [span for span in spans if span is not None]}).get("ended")
    if found is not None:
        raise of_violation(found)


def log_warnings() -> None:
    """Logs what the supervisor has warned of: limits that are almost reached, once for each scope and kind."""
    line = channel.current()
    if line is not None:
        for text in line.warnings():
            logger.warning("ray_guard: %s", text)


def record_reward(episode_id: str, value: float) -> None:
    """A reward that arrives after its episode, from anywhere in the job.

    Args:
        episode_id: the episode's ``id`` (``rl.rollout.id``).
        value: the reward.

    Raises:
        TypeError, ValueError: `value` is not a number.
        NotEnforced: there is no evidence to write it to from here; it would be lost.
        SupervisorLost: the supervisor does not answer.
    """
    score = clean(float(value))
    where = outlet()
    if where is None:
        raise NotEnforced(("evidence",), "no supervisor can be reached from here, so the reward would be lost")
    where.wire.send({"op": "reward", "episode": clean_text(str(episode_id), NAME_LIMIT), "value": score})

"""How many tokens a request may take, and what is left to say of it. Pure; runs in the supervisor."""

from __future__ import annotations

import math
from typing import Final, Literal

from ray_guard.named import NamedTuple
from ray_guard.policy.budgets import UNLIMITED, Amount, Unlimited

RELEASED: Final = frozenset({400, 401, 403, 404, 405, 413, 415, 422, 429})
"""With these the engine says that it has not begun."""


class Price(NamedTuple):
    """FLOPs of one token with an empty context, and more for each token of its context."""

    per_token: float
    per_context_token: float

    def flops(self, tokens: int) -> float:
        """Of ``tokens`` in a row: what as many cost at most, however they are shared out."""
        return tokens * self.per_token + tokens * (tokens - 1) / 2 * self.per_context_token

    def answers(self, prompt: int, output: int, copies: int, choices: int = 1) -> float:
        """Of a prompt and ``copies`` answers to it that are ``output`` tokens together, each as long as the others.

        ``choices``: how often the prompt is computed, at most: an engine's cache may save that, and need not.
        """
        each = output / max(1, copies)
        seen = output * prompt + copies * each * (each - 1) / 2
        return choices * self.flops(prompt) + output * self.per_token + max(0.0, seen) * self.per_context_token

    def tokens(self, flops: float) -> int:
        """The most in a row that cost no more than ``flops``."""
        if flops < self.per_token:
            return 0
        first = self.per_token - self.per_context_token / 2
        found = int(2 * flops / (first + math.sqrt(first * first + 2 * self.per_context_token * flops)))
        return found if self.flops(found) <= flops else found - 1


class Plan(NamedTuple):
    """``reserve`` tokens; ``fill``: the most of each answer, to be put into the request. None: it is bounded anyway."""

    reserve: int
    fill: int | None


def plan(
    prompt: int, copies: int, output: int | None, length: int | None, room: Amount | Literal[Unlimited.UNLIMITED]
) -> Plan:
    """What a request takes at most, and what it must say for that.

    A request that is larger than ``room`` is planned as it stands: reserving it will fail, and say why.

    Args:
        prompt: tokens of its prompt, at most.
        copies: how many answers it wants.
        output: tokens of each, at most, as it says; None: it does not.
        length: the most tokens, prompt and answer, that the engine lets one have; None: not known.
        room: what may still be reserved.
    """
    whole = None if length is None else copies * length
    if output is not None:
        most = prompt + copies * output
        return Plan(most if whole is None else min(most, whole), None)
    if room is UNLIMITED:
        return Plan(whole or 0, None)
    if whole is not None and whole <= room:
        return Plan(whole, None)
    fill = max(1, int(room - prompt) // max(1, copies))
    if length is not None:
        fill = min(fill, max(1, length - prompt))
    return Plan(prompt + copies * fill, fill)

"""target: tokens and FLOPs are reserved before a request is admitted, and settled when it is known what it took.

For integrations (vLLM's hook) and :class:`ray_guard.client.scope.Chat`. The supervisor decides; in a process that is
not guarded nothing is limited and nothing is booked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from ray_guard.client import carry, channel
from ray_guard.client.carry import Node
from ray_guard.client.channel import Channel
from ray_guard.client.context import read_context
from ray_guard.client.purses import Place, Purse, purses
from ray_guard.client.verdicts import log_warnings
from ray_guard.errors import SupervisorLost
from ray_guard.ids import new_span_id

__all__ = ["QUOTAS", "Reservation", "announce_price", "reserve"]

QUOTAS = ("tokens", "flops")
"""The limits that this is about."""


class Reservation:
    """What one request may use. Settle it, or release it where the request was never admitted, once.

    What is neither (the request failed half-way, the process died) is charged as reserved: it may have been used. As a
    context manager it sees to that at its end.
    """

    __slots__ = ("_flops", "_key", "_line", "_lock", "_pid", "_purse", "_tokens", "scope", "unknown")

    def __init__(
        self,
        line: Channel | None,
        key: str,
        tokens: int,
        flops: float | None,
        *,
        scope: str,
        unknown: bool,
        purse: Purse | None = None,
    ) -> None:
        self._line = line
        self._key = key
        self._purse = purse
        self._tokens = tokens
        self._flops = flops
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.scope = scope
        """The innermost scope that pays: ``call``, ``episode`` or ``actor``."""
        self.unknown = unknown
        """The context named an episode that is not open on this node: the actor and its job pay alone."""

    def settle(self, *, tokens: int, flops: float | None = None) -> None:
        """What was really used. A second time it does nothing.

        Args:
            tokens: prompt and output together.
            flops: None: what was reserved.

        Raises:
            ValueError: an amount is negative or no whole number of tokens.
            SupervisorLost: the supervisor is gone.
        """
        self._settle(_checked(tokens), flops)

    def release(self) -> None:
        """The request was never admitted: nothing was used. Raises SupervisorLost."""
        purse = self._purse
        if purse is not None:
            with self._lock:
                if self._line is not None and self._pid == os.getpid() and purse.put_back(*self._drawn()):
                    self._line = None
        self._settle(0, 0)

    def _drawn(self) -> tuple[int, int]:
        return self._tokens, int(self._flops or 0)

    def leave_unmeasured(self, *, told: bool) -> None:
        """Nobody knows what was used, nor will: it is charged as reserved. Raises SupervisorLost.

        Args:
            told: an error has said so. Else it is a violation where a scope limits tokens.
        """
        self._settle(self._tokens, self._flops, measured=told)

    def _settle(self, tokens: int, flops: float | None, *, measured: bool = True) -> None:
        with self._lock:
            line, self._line = self._line, None
        if line is not None and self._pid == os.getpid():  # a forked child has a copy of what is its parent's
            message: dict[str, Any] = {"op": "settle", "tokens": tokens, "flops": flops}
            if self._purse is None:
                message["id"] = self._key
            else:
                message |= {"purse": self._purse.number, "drawn": self._drawn()}
            line.send(message if measured else {**message, "measured": False})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._settle(self._tokens, self._flops)

    def __del__(self) -> None:
        try:
            self._settle(self._tokens, self._flops)
        except SupervisorLost:
            pass  # nobody is left to be told


def reserve(
    *,
    tokens: int,
    flops: float | None = None,
    context: Mapping[str, Any] | None = None,
    paid: str | None = None,
    often: bool = False,
    chat: str | None = None,
) -> Reservation:
    """Reserves what one request may use at most, in every scope that pays for it.

    Args:
        tokens: prompt and output together.
        flops: None: not known.
        context: who asks, as :func:`ray_guard.context` gives it; None: the current scope.
        paid: what the request's header ``x-ray-guard-reservation`` says. The relay writes it where a tool has asked by
            HTTP (``model_endpoint``) and is charged there with all around it: these are not charged again.
        often: more like it will follow from the same place, of a whole number of FLOPs: they need not wait for the
            supervisor each (:mod:`ray_guard.client.purses`).
        chat: id of the span that this is the reservation of. What an engine's hook reserves below it takes its place.

    Raises:
        BudgetExceeded: a scope has no room.
        NotEnforced: a scope limits FLOPs and it is not known how many it will be.
        PolicyError: `context` is none.
        RayGuardError: what the asking scope was ended for.
        ValueError: an amount is negative or no whole number of tokens.
        SupervisorLost: the supervisor does not answer.
    """
    tokens = _checked(tokens)
    where = carry.current() if context is None else read_context(context)
    line = channel.current()
    if line is None:
        return Reservation(None, "", 0, None, scope="", unknown=False)
    log_warnings()
    purse, asks, at = None, False, _place(where, flops)
    if often and paid is None and tokens:
        purse, asks = purses.find(at)
        if purse is not None and purse.draw(tokens, int(flops or 0)):
            return Reservation(line, "", tokens, flops, scope=purse.scope, unknown=purse.unknown, purse=purse)
    key = new_span_id() if chat is None else chat
    message: dict[str, Any] = {"op": "reserve", "id": key, "tokens": tokens, "flops": flops, "place": None}
    if where is not None:
        message["place"] = {name: getattr(where, name) for name in ("trace", "span", "call", "episode", "quotas")}
    if paid is not None:
        message["paid"] = paid
    if chat is not None:
        message["chat"] = True
    if asks:
        message["purse"] = 0 if purse is None else purse.number
    answer, passed = line.exchange(message) if asks else (line.request(message), [])
    scope, unknown = str(answer.get("scope")), answer.get("unknown") is True
    if passed:
        purses.keep(at, Purse(int(answer["purse"]), passed, scope, unknown=unknown))
    return Reservation(line, key, tokens, flops, scope=scope, unknown=unknown)


def _place(where: Node | None, flops: float | None) -> Place:
    """What decides who pays. Where nobody knows the FLOPs is a place of its own: a limit of them refuses there."""
    known = "" if flops is None else "flops"
    return (known,) if where is None else (known, where.trace, where.call, where.episode)


def announce_price(models: Iterable[str], *, per_token: float, per_context_token: float) -> None:
    """Tells what a token of a model costs that this policy actor serves, so that calls of it by HTTP count FLOPs too.

    Args:
        models: the names that it is served under.
        per_token: FLOPs of a token with an empty context.
        per_context_token: more, for each token of its context.

    Raises SupervisorLost.
    """
    line = channel.current()
    if line is not None:
        price = {"per_token": per_token, "per_context_token": per_context_token}
        line.send({"op": "price", "models": list(models), **price})


def _checked(tokens: int) -> int:
    count = int(tokens)
    if count < 0 or count != tokens:
        raise ValueError(f"a number of tokens is whole and not negative, not {tokens!r}")
    return count

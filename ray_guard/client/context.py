"""target: where the running code is, as data: for other threads, executors, actors and child processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray_guard.client import carry
from ray_guard.client.carry import Node
from ray_guard.client.otel import attempt, mirror
from ray_guard.client.outlet import base_identity, outlet
from ray_guard.client.spans import IDENTITY, clean, clean_text, to_json
from ray_guard.errors import PolicyError

_TRACE = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

Place = tuple[str, str, bool]
"""Trace, span and sampled flag of somebody else's span."""


def environment() -> Place | None:
    """The span under which this process was started, by the W3C variable ``TRACEPARENT``."""
    return parse_traceparent(os.environ.get("TRACEPARENT"))


def parse_traceparent(text: str | None) -> Place | None:
    """The span that a W3C ``traceparent`` names; None for none and for what is no such text."""
    found = _TRACEPARENT.fullmatch(text) if text else None
    return (found[1], found[2], bool(int(found[3], 16) & 1)) if found else None


def context() -> dict[str, Any]:
    """Where the running code is, as plain data for :func:`attach` in another thread, executor, process or actor.

    Keys: ``trace``, ``span`` (None outside of any scope), ``identity``, ``episode``, ``call``, ``scope``, ``sampled``,
    ``capture``, and ``quotas`` where tokens or FLOPs are limited: another node does not know these scopes by their ids.
    """
    node = carry.current()
    if node is None:
        where = outlet()
        identity = base_identity(None) if where is None else where.identity
        return {"trace": None, "span": None, "identity": dict(identity), "episode": None, "call": None}
    return {
        "trace": node.trace,
        "span": node.span,
        "identity": dict(node.identity),
        "episode": node.episode,
        "call": node.call,
        "scope": node.kind,
        "sampled": node.sampled,
        "capture": node.capture,
        **({"quotas": node.quotas} if node.quotas else {}),
    }


def read_context(given: Mapping[str, Any]) -> Node | None:
    """The node that :func:`context` described; None for a place outside of any scope.

    Raises:
        PolicyError: names the key, the value and what would be right. Contexts cross actor borders.
    """
    if not isinstance(given, Mapping):
        raise PolicyError("context", given, "give what ray_guard.context() returned")
    node = Node()
    identity = given.get("identity", {})
    if not isinstance(identity, Mapping):
        raise PolicyError("context.identity", identity, "a mapping of rl.* attributes")
    for key, value in identity.items():
        if key not in IDENTITY:
            raise PolicyError("context.identity", key, f"one of {', '.join(sorted(IDENTITY))}")
        if not isinstance(value, (str, int)) or isinstance(value, bool) or clean(value) != value:
            raise PolicyError(f"context.identity.{key}", value, "a number or a text of at most 8192 characters")
    if given.get("trace") is None and given.get("span") is None:
        return None
    for key, pattern, digits, optional in (
        ("trace", _TRACE, 32, False),
        ("span", _SPAN, 16, False),
        ("episode", _SPAN, 16, True),
        ("call", _SPAN, 16, True),
    ):
        value = given.get(key)
        if not (optional and value is None) and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise PolicyError(f"context.{key}", value, f"{digits} lower-case hex digits, not all zero")
        setattr(node, key, value)
    node.kind = clean_text(str(given.get("scope", "")), 32)
    node.sampled = given.get("sampled", True) is not False
    node.attachment = carry.UNASKED
    node.capture = given.get("capture", False) is True
    node.quotas = _quotas(given.get("quotas", ()))
    node.identity = dict(identity)
    node.identity_json = to_json(node.identity)
    return node


def _quotas(given: object) -> carry.Quotas:
    if not isinstance(given, (list, tuple)):
        raise PolicyError("context.quotas", given, "a list")
    for entry in given:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 4 and isinstance(entry[3], Mapping | None)):
            raise PolicyError("context.quotas", entry, "a scope, its id, its account and its limits")
    return tuple((str(scope), str(name), str(home), limits) for scope, name, home, limits in given)


class attach:  # noqa: N801 - used as a function
    """Continues, in this thread, task, process or actor, where :func:`context` was called.

    ``with attach(context):`` or ``async with attach(context):``. Opens no span; scopes inside become children of the
    one attached to. A context from outside of any scope leaves everything as it is.

    Raises:
        PolicyError: `context` is not one.
    """

    __slots__ = ("_before", "_begun", "_node")

    def __init__(self, context: Mapping[str, Any]) -> None:
        self._node = read_context(context)

    def __enter__(self) -> Self:
        self._before = carry.current()
        self._begun: Any = None
        if self._node is not None:
            otel = mirror()
            if otel is not None:
                self._begun = attempt(otel.carry, self._node)
            carry.move_to(self._node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._node is None:
            return
        if carry.current() is self._node:
            carry.move_to(self._before)
        otel = mirror() if self._begun is not None else None
        if otel is not None:
            attempt(otel.leave, self._begun)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.__exit__(kind, error, trace)


def traceparent() -> str | None:
    """The W3C ``TRACEPARENT`` of the current scope, for a child process's environment; None outside of any."""
    node = carry.current()
    return None if node is None else f"00-{node.trace}-{node.span}-{'01' if node.sampled else '00'}"

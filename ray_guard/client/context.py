"""target: where the running code is, as data: for other threads, executors, actors and child processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray_guard.client import carry, foreign, segments
from ray_guard.client.carry import Node
from ray_guard.client.otel import attempt, mirror
from ray_guard.client.outlet import base_identity, outlet
from ray_guard.client.spans import clean, clean_text, to_json
from ray_guard.errors import PolicyError
from ray_guard.records import EAGLEEYE_TRACE, IDENTITY, ROOT_TRACE

_TRACE = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN = re.compile(r"(?!0{16})[0-9a-f]{16}")


def environment() -> foreign.Place | None:
    """The span under which this process was started, by the W3C variable ``TRACEPARENT``."""
    return foreign.named(os.environ.get("TRACEPARENT"), "TRACEPARENT")


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


def read_context(given: Mapping[str, Any] | Any) -> Node | None:
    """The node that :func:`context` described, or others (:mod:`ray_guard.client.foreign`).

    Returns:
        None for a place outside of any scope.

    Raises:
        PolicyError: names the key, the value and what would be right. Contexts cross actor borders.
    """
    elsewhere = foreign.read(given)
    if elsewhere is not None:
        return _placed(elsewhere)
    if not isinstance(given, Mapping):
        raise PolicyError("context", given, "give what ray_guard.context() returned, headers, or ROLL's meta_info")
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
    node.segments = segments.known(node.trace, node.span)
    node.segments.root = str(node.identity.get(ROOT_TRACE, node.trace))
    return node


def _placed(origin: foreign.Origin) -> Node | None:
    """Where others say that a call comes from; apart from that it is where the caller of this is.

    None: they name no span, and the caller is in no scope.
    """
    above = carry.current()
    if origin.place is None and above is None:
        return None
    node = Node()
    if above is None:
        where = outlet()
        node.identity = base_identity(None) if where is None else where.identity
        node.quotas = () if where is None else where.quota("actor", "", where.limits("actor"))
        node.episode = node.call = None
        node.kind = ""
        node.capture = os.environ.get("RAY_GUARD_CAPTURE_CONTENT") == "1"
        node.attachment = carry.UNASKED
    else:
        for name in ("identity", "quotas", "episode", "call", "kind", "capture", "attachment"):
            setattr(node, name, getattr(above, name))
        node.trace, node.span, node.sampled, node.segments = above.trace, above.span, above.sampled, above.segments
    if origin.eagleeye is not None:
        node.identity = {**node.identity, EAGLEEYE_TRACE: origin.eagleeye}
    if origin.place is not None:
        node.trace, node.span, node.sampled = origin.place
        node.segments = segments.known(node.trace, node.span)
        node.identity = {key: value for key, value in node.identity.items() if key != ROOT_TRACE}
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

    What others say of where a call comes from will do as well: headers (``traceparent``, ROCK's ``eagleeye-traceid``),
    a carrier that OpenTelemetry's ``inject`` filled, ROLL's ``meta_info`` with such a carrier under ``_otel_ctx``, or
    the ``DataProto`` that has one. What is malformed in them is ignored, with a warning.

    Raises:
        PolicyError: `context` is not one.
    """

    __slots__ = ("_before", "_begun", "_eagleeye", "_node")

    def __init__(self, context: Mapping[str, Any] | Any) -> None:
        elsewhere = foreign.read(context)
        self._node = read_context(context if elsewhere is None else elsewhere)
        self._eagleeye = elsewhere.eagleeye if elsewhere is not None and self._node is None else None

    def __enter__(self) -> Self:
        self._before: Any = carry.current()
        self._begun: Any = None
        if self._eagleeye is not None:
            self._before = foreign.told.get()
            foreign.told.set(self._eagleeye)
        if self._node is not None:
            otel = mirror()
            if otel is not None:
                self._begun = attempt(otel.carry, self._node)
            carry.move_to(self._node)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._eagleeye is not None:
            foreign.told.set(self._before)
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

"""target: our tracer and our processor at the SDK provider that the user has set.

The provider is added to, never replaced. Loaded only where the process has imported opentelemetry.sdk itself.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, Tracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

from ray_guard import __version__
from ray_guard.client import carry
from ray_guard.client.content import shown
from ray_guard.client.mirror import JOURNALED, hex_ids
from ray_guard.client.outlet import Outlet, outlet
from ray_guard.client.spans import (
    ATTRIBUTE_LIMIT,
    EVENT_LIMIT,
    NAME_LIMIT,
    Value,
    attributes_json,
    clean,
    clean_event,
    clean_text,
    close_message,
    open_message,
    warn_once,
)
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.records import IDENTITY, LINK

if TYPE_CHECKING:
    from ray_guard.client.scope import Scope

TRACER = "ray_guard"

CONTENT = (
    "gen_ai.input.messages",
    "gen_ai.output.messages",
    "gen_ai.system_instructions",
    "gen_ai.tool.call.arguments",
    "gen_ai.tool.call.result",
    "gen_ai.prompt",
    "gen_ai.completion",
    "traceloop.entity.input",
    "traceloop.entity.output",
    "input.value",
    "output.value",
)
"""Beginnings of the attribute names under which other instrumentations keep prompts and results. Content goes into the
evidence only where that was asked for; in the user's own backend it stays as he has it."""

_OPEN_LIMIT = 65_536
_KINDS = {kind: number for number, kind in enumerate(api.SpanKind, start=1)}
_BY_NUMBER = {number: kind for kind, number in _KINDS.items()}


class _Next(threading.local):
    ids: tuple[str, str] | None = None


class _Ids(IdGenerator):
    """Gives the tracer the ids of the scope that is starting a span, in that thread."""

    def __init__(self) -> None:
        self.next = _Next()

    def generate_trace_id(self) -> int:
        ids = self.next.ids
        # Nobody but us is expected to use this tracer; who does gets ids of his own.
        return int(new_trace_id() if ids is None else ids[0], 16)

    def generate_span_id(self) -> int:
        ids = self.next.ids
        return int(new_span_id() if ids is None else ids[1], 16)

    def is_trace_id_random(self) -> bool:
        return True


class Attachment:
    """What we have at one provider: a tracer that takes our ids, and one processor."""

    def __init__(self, provider: TracerProvider) -> None:
        self.on = True
        self._ids = _Ids()
        self._tracer: Tracer | None = None
        tracer = provider.get_tracer(TRACER, __version__)
        if isinstance(tracer, Tracer):  # a disabled SDK hands out something else
            # This tracer is ours alone (tracers are kept by scope name), so nobody else's ids change.
            tracer.id_generator = self._ids
            self._tracer = tracer
            provider.add_span_processor(UserSpans())
        else:
            self.on = False

    def switch_off(self) -> None:
        self.on = False

    def start(self, scope: Scope, context: Context, start_ns: int) -> api.Span:
        """A span with our ids, through the user's sampler and processors."""
        if self._tracer is None:
            raise RuntimeError("the OpenTelemetry SDK is disabled")
        self._ids.next.ids = (scope.trace, scope.span)
        try:
            span = self._tracer.start_span(
                scope.name,
                context=context,
                kind=_BY_NUMBER[scope.span_kind],
                attributes={**scope.identity, **scope.opening()},
                links=[
                    api.Link(
                        api.SpanContext(int(link[0], 16), int(link[1], 16), True, api.TraceFlags(1)),
                        {LINK: link[2]} if len(link) > 2 else None,
                    )
                    for link in scope.links
                ],
                start_time=start_ns,
            )
        finally:
            self._ids.next.ids = None
        given = span.get_span_context()
        if hex_ids(given) != (scope.trace, scope.span):
            span.end()
            raise RuntimeError(f"the provider {type(self._tracer)} ignores the ids it was given")
        return span


class UserSpans(SpanProcessor):
    """Puts our identity on the spans that the user's own code starts inside our scopes, and journals them."""

    def __init__(self) -> None:
        self.on = True
        self._open: dict[tuple[int, int], tuple[Outlet, bool, int]] = {}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        if not self.on:
            return
        try:
            scope = span.instrumentation_scope
            if scope is not None and scope.name == TRACER:
                return
            node = carry.current()
            if node is not None:
                self._begin(span, node)
        except Exception:  # noqa: BLE001 - the user's own tracing must go on
            self._fail()

    def _begin(self, span: Span, node: carry.Node) -> None:
        given = _journalable(span.attributes, capture=node.capture)
        span.set_attributes(node.identity)
        node.segments.count += 1
        where = outlet()
        if where is None:
            return
        context = span.get_span_context()
        trace, span_id = hex_ids(context)
        where.post(
            open_message(
                span=span_id,
                trace=trace,
                parent=None if span.parent is None else f"{span.parent.span_id:016x}",
                scope="user",
                name=clean_text(span.name, NAME_LIMIT),
                kind=_KINDS[span.kind],
                start_ns=span.start_time or 0,
                attributes_json=attributes_json(given),
                identity_json=node.identity_json,
                links=[hex_ids(link.context) for link in span.links],
                episode=node.episode,
            )
        )
        setattr(span, JOURNALED, True)
        if len(self._open) >= _OPEN_LIMIT:
            self._open.pop(next(iter(self._open)))  # the oldest: code that never ends its spans must not fill memory
        self._open[context.trace_id, context.span_id] = (where, node.capture, os.getpid())

    def on_end(self, span: ReadableSpan) -> None:
        if not self.on:
            return
        try:
            context = span.get_span_context()
            if context is None:
                return
            where, capture, process = self._open.pop((context.trace_id, context.span_id), (None, False, 0))
            if where is not None and process == os.getpid():  # a forked child ends copies of its parent's spans
                self._close(span, context, where, capture=capture)
        except Exception:  # noqa: BLE001 - the user's own tracing must go on
            self._fail()

    def _close(self, span: ReadableSpan, context: api.SpanContext, where: Outlet, *, capture: bool) -> None:
        where.post(
            close_message(
                span=f"{context.span_id:016x}",
                end_ns=span.end_time or 0,
                attributes=_journalable(span.attributes, capture=capture),
                status=span.status.status_code.value,
                message=clean_text(span.status.description or ""),
                events=[
                    (
                        clean_text(event.name, NAME_LIMIT),
                        event.timestamp,
                        clean_event(_allowed(event.attributes, capture=capture)),
                    )
                    for event in span.events[-EVENT_LIMIT:]
                ],
            )
        )

    def _fail(self) -> None:
        warn_once("user spans", "ray_guard: the user's own spans are not journaled any more")
        self.on = False


def _allowed(attributes: Mapping[str, object] | None, *, capture: bool) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in (attributes or {}).items():
        if not key.startswith(CONTENT):
            found[key] = value
        elif capture:
            found[key] = shown(value).text if isinstance(value, (str, list, tuple)) else value
    return found


def _journalable(attributes: Mapping[str, object] | None, *, capture: bool) -> dict[str, Value]:
    """What goes into the evidence of a user's attributes; his identity attributes are ours and are there already."""
    return {
        clean_text(key, NAME_LIMIT): clean(value)
        for key, value in islice(_allowed(attributes, capture=capture).items(), ATTRIBUTE_LIMIT)
        if key not in IDENTITY
    }


class _Attached:
    """Our part of each provider, made once, whichever thread asks first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[TracerProvider, Attachment] = weakref.WeakKeyDictionary()

    def unlock(self) -> None:
        self._lock = threading.Lock()

    def at(self, provider: TracerProvider) -> Attachment:
        with self._lock:
            found = self._known.get(provider)
            if found is None:
                found = self._known[provider] = Attachment(provider)
            return found


_attached = _Attached()
os.register_at_fork(after_in_child=_attached.unlock)
attachment = _attached.at

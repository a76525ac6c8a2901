"""target: our spans in OpenTelemetry's eyes.

Loaded only where the process has imported opentelemetry itself (see :mod:`ray_guard.client.otel`), so
it costs nothing elsewhere. Two things, either of which may fail without consequence for the tool or the evidence:

* the current OpenTelemetry context carries our span, so that the user's child spans and propagators see it;
* where the user has set an SDK TracerProvider, a span with the same ids goes through it (its sampler obeyed, its id
  generator not used), and one processor of ours is added to it (:mod:`ray_guard.client.mirror_sdk`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import trace as api
from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from opentelemetry.trace.propagation import set_span_in_context

from ray_guard.client.carry import UNASKED, Node
from ray_guard.client.spans import Event, Ids, Value, warn_once

if TYPE_CHECKING:
    from ray_guard.client.mirror_sdk import Attachment
    from ray_guard.client.scope import Scope

JOURNALED = "_ray_guard_journaled"
"""Set on a user's span that our processor has journaled: it may be the parent of ours."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSAMPLED = TraceFlags(TraceFlags.DEFAULT)


class Begun:
    """One scope's span in OpenTelemetry, the contexts inside and before it, and whose inside that was.

    ``over``: the scope has ended, so nothing may lead back into it.
    """

    __slots__ = ("around", "before", "inside", "over", "span")

    def __init__(self, span: api.Span, before: Context, around: Begun | None = None) -> None:
        self.span = span
        self.before = before
        self.around = around
        self.over = False
        self.inside = set_span_in_context(span, before)
        attach(self.inside)


class Carried(NonRecordingSpan):
    """A span of ours in a process without a TracerProvider: known by its ids to whoever asks, which few do.

    So its SpanContext is made when asked for: that is most of what such a span costs.
    """

    def __init__(self, node: Node, *, remote: bool) -> None:
        # Not NonRecordingSpan's own __init__: it wants the SpanContext.
        self._node = node
        self._remote = remote

    def get_span_context(self) -> SpanContext:
        node = self._node
        flags = _SAMPLED if node.sampled else _UNSAMPLED
        return SpanContext(int(node.trace, 16), int(node.span, 16), self._remote, flags)

    def __repr__(self) -> str:
        return f"Carried({self.get_span_context()!r})"


def hex_ids(context: SpanContext) -> Ids:
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def outer() -> tuple[str, str, bool] | None:
    """Trace, span and sampled flag of the OpenTelemetry span that is current, if any."""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return (*hex_ids(context), context.trace_flags.sampled)


def between(above: Node) -> str | None:
    """The id of the user's own span that is current inside `above`, if it is in the evidence and in the same trace."""
    span = api.get_current_span()
    if not getattr(span, JOURNALED, False):
        return None
    trace, span_id = hex_ids(span.get_span_context())
    return span_id if trace == above.trace else None


def begin(scope: Scope, start_ns: int) -> Begun:
    """Makes `scope`'s span the current one. Sets ``scope.sampled`` to what the user's sampler says.

    Whether there is a provider is asked by root scopes and the outermost; the others inherit the answer.
    """
    before = get_current()
    span: api.Span | None = None
    if scope.attachment is UNASKED:
        scope.attachment = _attachments.current()
    attachment = scope.attachment
    if attachment is not None and attachment.on:
        try:
            span = attachment.start(scope, _parent_context(before, scope, scope.parent), start_ns)
            scope.sampled = span.get_span_context().trace_flags.sampled
        except Exception:  # noqa: BLE001 - the user's samplers and processors run in there
            warn_once("mirror", "ray_guard: spans are not mirrored to the OpenTelemetry provider any more")
            attachment.switch_off()
    around: Begun | None = getattr(scope.above, "begun", None)
    if around is not None and around.inside is not before:
        around = None
    return Begun(Carried(scope, remote=False) if span is None else span, before, around)


def _parent_context(before: Context, node: Node, parent: str | None) -> Context:
    if parent is None:
        return set_span_in_context(api.INVALID_SPAN, before)
    trace_id, span_id = int(node.trace, 16), int(parent, 16)
    held = api.get_current_span(before).get_span_context()
    if held.span_id == span_id and held.trace_id == trace_id:
        return before
    flags = _SAMPLED if node.sampled else _UNSAMPLED
    return set_span_in_context(NonRecordingSpan(SpanContext(trace_id, span_id, True, flags)), before)


def carry(node: Node) -> Begun:
    """Makes a span of another process, given by its ids, the current one: nothing is started or ended."""
    node.attachment = _attachments.current()
    return Begun(Carried(node, remote=True), get_current())


def leave(begun: Begun) -> None:
    """Makes current what was so before, unless somebody else has moved on already."""
    if get_current() is not begun.inside:
        return
    before, around = begun.before, begun.around
    while around is not None and around.over:  # scopes of interleaved generators end in any order
        before, around = around.before, around.around
    attach(before)


def end(  # noqa: PLR0917 - called by position, through otel.attempt
    begun: Begun,
    end_ns: int,
    attributes: Mapping[str, Value],
    status: int,
    message: str,
    events: Sequence[Event],
) -> None:
    """Ends the mirrored span with what the journal says of it."""
    span = begun.span
    if not span.is_recording():
        return
    if attributes:
        span.set_attributes(attributes)
    for name, time_ns, details in events:
        span.add_event(name, details, time_ns)
    if status:
        span.set_status(api.Status(api.StatusCode(status), message or None))
    span.end(end_ns)


class _Attachments:
    """Finds our part of the SDK provider that the user has set, if he has. A bare API, a proxy or a no-op is none."""

    def __init__(self) -> None:
        self._known: tuple[object, Attachment | None] | None = None

    def current(self) -> Attachment | None:
        sdk: Any = sys.modules.get("opentelemetry.sdk.trace")
        if sdk is None:
            return None
        provider = api.get_tracer_provider()
        known = self._known
        if known is not None and known[0] is provider:
            return known[1]
        attachment: Attachment | None = None
        try:
            if isinstance(provider, sdk.TracerProvider):
                # Not at the top: the SDK is loaded by the user or not at all.
                attachment = importlib.import_module("ray_guard.client.mirror_sdk").attachment(provider)
        except Exception:  # noqa: BLE001 - whatever a provider does, the tool goes on
            warn_once("mirror", "ray_guard: could not attach to the OpenTelemetry provider; spans are not mirrored")
        self._known = (provider, attachment)
        return attachment


_attachments = _Attachments()

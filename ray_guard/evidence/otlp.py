"""One span, one line: OTLP JSON as the journal holds it, written fast and read liberally.

Runs in the supervisor (encoding) and later, on any machine (decoding). Standard library only.

The format is the JSON mapping of ``opentelemetry.proto.trace.v1.TracesData`` with OTLP's two deviations from plain
protobuf JSON: ids are hex, enum values are numbers. 64-bit integers are decimal strings. Lines are pure ASCII: what a
tool put into a name can neither break a line nor reach the terminal of whoever reads the file with ``cat``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from math import isfinite, isnan
from sys import intern
from typing import Any, Final

from ray_guard import __version__
from ray_guard.named import NamedTuple
from ray_guard.records import (
    Attributes,
    AttributeValue,
    Resource,
    SpanEvent,
    SpanKind,
    SpanLink,
    SpanRecord,
    StatusCode,
)

#: Longest string written, in characters; the rest is cut and its length named. Bounds a line, whatever a tool passes.
STRING_LIMIT: Final = 65_536
#: A line longer than this many bytes is neither written (``Journal.append``) nor read (``reader``).
LINE_LIMIT: Final = 16 * 1024 * 1024

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_UINT64_MAX: Final = 2**64 - 1
_SURROGATE: Final = "[\ud800-\udfff]"

# Attribute keys repeat for ever, so their encoded form is kept; targets can invent keys, so not without bound.
_KEY_LIMIT: Final = 1024
_keys: dict[str, str] = {}


# --- writing ---------------------------------------------------------------------------------------------------------


def _string(value: str) -> str:
    """``value`` as a JSON string: ASCII, lone surrogates (undecodable argv bytes) as U+FFFD, cut at STRING_LIMIT."""
    if len(value) > STRING_LIMIT:
        value = f"{value[:STRING_LIMIT]}… [{len(value) - STRING_LIMIT} more]"
    if not value.isascii():
        value = re.sub(_SURROGATE, "\ufffd", value)
    return encode_basestring_ascii(value)


def _double(value: float) -> str:
    if isfinite(value):
        return f'{{"doubleValue":{float(value)!r}}}'
    return '{"doubleValue":"%s"}' % ("NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity")


def _integer(value: int) -> str:
    if _INT64_MIN <= value <= _INT64_MAX:
        return f'{{"intValue":"{value:d}"}}'
    try:
        return _double(float(value))  # beyond int64 the magnitude says more than a string would
    except OverflowError:
        return f'{{"stringValue":{_string(hex(value))}}}'


def _array(values: Sequence[object]) -> str:
    parts: list[str] = []
    room = STRING_LIMIT
    for index, value in enumerate(values):
        room -= len(value) + 8 if isinstance(value, (str, bytes)) else 32
        if room < 0 and index:
            parts.append(f'{{"stringValue":"\\u2026 [{len(values) - index} more]"}}')
            break
        parts.append(_value(value))
    return f'{{"arrayValue":{{"values":[{",".join(parts)}]}}}}'


def _value(value: object) -> str:
    if isinstance(value, str):
        return f'{{"stringValue":{_string(value)}}}'
    if isinstance(value, bool):  # before int: a bool is one
        return '{"boolValue":true}' if value else '{"boolValue":false}'
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return _double(value)
    if isinstance(value, (tuple, list)):
        return _array(value)
    if isinstance(value, bytes):
        return f'{{"stringValue":{_string(value.decode("utf-8", "replace"))}}}'
    return f'{{"stringValue":{_string(str(value))}}}'  # a record is never lost for the type of an attribute


def _key(key: str) -> str:
    encoded = f'{{"key":{_string(key)},"value":'
    if len(key) <= 128:
        if len(_keys) >= _KEY_LIMIT:
            _keys.clear()
        _keys[key] = encoded
    return encoded


def _attributes(attributes: Attributes) -> str:
    parts: list[str] = []
    append = parts.append
    known = _keys.get
    for key, value in attributes.items():
        prefix = known(key) or _key(key)
        kind = type(value)
        # The two common types inline: this loop is most of what a record costs.
        if kind is str and len(value) <= STRING_LIMIT and value.isascii():  # type: ignore[arg-type, union-attr]
            append(f'{prefix}{{"stringValue":{encode_basestring_ascii(value)}}}}}')  # type: ignore[arg-type]
        elif kind is int and _INT64_MIN <= value <= _INT64_MAX:  # type: ignore[operator]
            append(f'{prefix}{{"intValue":"{value}"}}}}')
        else:
            append(f"{prefix}{_value(value)}}}")
    return ",".join(parts)


def encode_attributes(attributes: Attributes) -> bytes:
    """The attributes as the inside of an OTLP ``attributes`` array (no brackets; empty for no attributes)."""
    return _attributes(attributes).encode("ascii")


def resource_line(attributes: Attributes) -> bytes:
    """A line without spans: what a journal says of itself, which no reader of spans need know of."""
    return (
        f'{{"resourceSpans":[{{"resource":{{"attributes":[{_attributes(attributes)}]}},"scopeSpans":[]}}]}}\n'.encode()
    )


def resource_key(attributes: Attributes) -> str:
    """Tells one resource from another, whether it was read or is about to be written."""
    return _attributes({key: attributes[key] for key in sorted(attributes)})


class Fragment(NamedTuple):
    """Attributes encoded once and put on many records (identity, source). Make it with :func:`fragment`."""

    keys: frozenset[str]
    encoded: str


def fragment(attributes: Attributes) -> Fragment:
    """Encodes attributes once, for :meth:`LineEncoder.encode`."""
    return Fragment(frozenset(attributes), _attributes(attributes))


def _events(events: Iterable[SpanEvent]) -> str:
    return ",".join(
        f'{{"timeUnixNano":"{_nanoseconds(event.time_ns)}","name":{_string(event.name)},'
        f'"attributes":[{_attributes(event.attributes)}]}}'
        for event in events
    )


def _links(links: Iterable[SpanLink]) -> str:
    return ",".join(
        f'{{"traceId":{_string(link.trace_id)},"spanId":{_string(link.span_id)},'
        f'"attributes":[{_attributes(link.attributes)}]}}'
        for link in links
    )


def _nanoseconds(time_ns: int) -> int:
    if 0 <= time_ns <= _UINT64_MAX:
        return int(time_ns)
    raise ValueError(f"{time_ns!r} is not a time: OTLP holds Unix nanoseconds from 0 to {_UINT64_MAX}")


class EgressForm:
    """See :meth:`LineEncoder.egress_form`.

    Kept as bytes, and joined: text would have to be encoded each time.
    """

    __slots__ = ("_after", "_before", "_begun", "_between")

    def __init__(self, before: str, between: str, after: str) -> None:
        self._before = before.encode("ascii")
        self._between = between.encode("ascii")
        self._after = after.encode("ascii")
        self._begun = self._after + b"]}]}]}]}\n"

    def begun(self, span_id: str, start_ns: int, more: str = "") -> bytes:
        """What is known at its begin, or later with ``more`` of it (as of :meth:`ended`)."""
        after = self._begun if not more else self._after + more.encode("ascii") + b"]}]}]}]}\n"
        return b"".join((self._before, span_id.encode("ascii"), self._between, b"%d" % start_ns, after))

    def ended(self, span_id: str, start_ns: int, end_ns: int, more: str, tail: str = "") -> bytes:
        """The whole span.

        Args:
            more: further attributes, encoded, with a comma before them.
            tail: its events and status (:func:`tail`).
        """
        times = b'%d","endTimeUnixNano":"%d' % (start_ns, end_ns)
        end = f"{more}]{tail}}}]}}]}}]}}\n".encode("ascii")
        return b"".join((self._before, span_id.encode("ascii"), self._between, times, self._after, end))


class ProcessForm(NamedTuple):
    """What the ``process`` spans of one command have in common, encoded once; see :func:`process_form`."""

    name: str
    attributes: str


def process_form(program: str, path: str, arguments: Sequence[str], digest: str) -> ProcessForm:
    """The path of every exec, and so without a mapping and its loop.

    Args:
        program: its name.
        digest: of all its arguments; empty: it is not known.
    """
    words = ",".join([f'{{"stringValue":{_string(word)}}}' for word in arguments])
    hashed = f',{{"key":"ray_guard.arguments.sha256","value":{{"stringValue":"{digest}"}}}}' if digest else ""
    return ProcessForm(
        _string(f"process {program}"),
        f'{{"key":"process.executable.path","value":{{"stringValue":{_string(path)}}}}},'
        f'{{"key":"process.command_args","value":{{"arrayValue":{{"values":[{words}]}}}}}}{hashed}',
    )


class ProcessLine(NamedTuple):
    """The two lines of one ``process`` span; see :meth:`LineEncoder.process_line`."""

    before: str
    after: str

    def begun(self) -> bytes:
        return f"{self.before}{self.after}]}}]}}]}}]}}\n".encode("ascii")

    def ended(self, end_ns: int, more: str, tail: str = "") -> bytes:
        """As :meth:`EgressForm.ended`."""
        return (f'{self.before}","endTimeUnixNano":"{end_ns}{self.after}{more}]{tail}}}]}}]}}]}}\n').encode("ascii")


class LineEncoder:
    """Writes records about one resource as journal lines.

    The resource and scope are encoded once, here: one encoder per actor, kept for its life.

    Args:
        resource: who the spans are about.
        scope: instrumentation scope name; the version is the package's.
    """

    __slots__ = ("_head", "resource")

    def __init__(self, resource: Resource, *, scope: str = "ray_guard") -> None:
        self.resource = resource
        self._head = (
            f'{{"resourceSpans":[{{"resource":{{"attributes":[{_attributes(resource.attributes)}]}},'
            f'"scopeSpans":[{{"scope":{{"name":{_string(scope)},"version":{_string(__version__)}}},'
            '"spans":[{"traceId":'
        )

    def egress_form(
        self, trace_id: str, parent_id: str | None, attributes: str, links: Sequence[SpanLink] = ()
    ) -> EgressForm:
        """The lines of ``egress connect`` spans, from parts that are known to be clean: the path of every connect.

        Args:
            attributes: the inside of the attributes array, encoded (:attr:`Fragment.encoded`, joined by commas).
        """
        parent = f',"parentSpanId":"{parent_id}"' if parent_id else ""
        linked = f',"links":[{_links(links)}]' if links else ""
        return EgressForm(
            f'{self._head}"{trace_id}","spanId":"',
            f'"{parent},"name":"egress connect","kind":3{linked},"startTimeUnixNano":"',
            f'","attributes":[{attributes}',
        )

    def process_line(
        self, trace_id: str, span_id: str, parent_id: str, identity: str, *,
        form: ProcessForm, start_ns: int, pid: int, parent_pid: int,
    ) -> ProcessLine:  # fmt: skip
        """A ``process`` span.

        Args:
            identity: further attributes, encoded, as in :meth:`egress_form`.
        """
        parent = f',"parentSpanId":"{parent_id}"' if parent_id else ""
        return ProcessLine(
            f'{self._head}"{trace_id}","spanId":"{span_id}"{parent},"name":{form.name},"kind":1,"startTimeUnixNano":"'
            f"{start_ns}",
            f'","attributes":[{identity},{{"key":"process.pid","value":{{"intValue":"{pid}"}}}},'
            f'{{"key":"process.parent_pid","value":{{"intValue":"{parent_pid}"}}}},{form.attributes}',
        )

    def encode(self, record: SpanRecord, fixed: Fragment | None = None) -> bytes:
        """The record as one line, newline included.

        Args:
            record: the span; without ``end_ns`` the line is that of a begun span.
            fixed: attributes encoded before. They win over attributes of the same key in the record, which may
                come from a target.

        Raises:
            ValueError: a time is negative or beyond 64 bits.
        """
        attributes = record.attributes
        if fixed is None:
            encoded = _attributes(attributes)
        else:
            if not fixed.keys.isdisjoint(attributes):
                attributes = {key: value for key, value in attributes.items() if key not in fixed.keys}
            encoded = ",".join(part for part in (fixed.encoded, _attributes(attributes)) if part)
        start, end, parent = record.start_ns, record.end_ns, record.parent_id
        above = "" if parent is None else f',"parentSpanId":{encode_basestring_ascii(parent)}'
        ended = "" if end is None else f',"endTimeUnixNano":"{_nanoseconds(end)}"'
        line = (
            f"{self._head}{encode_basestring_ascii(record.trace_id)}"
            f',"spanId":{encode_basestring_ascii(record.span_id)}{above}'
            f',"name":{_string(record.name)},"kind":{int(record.kind)}'
            f',"startTimeUnixNano":"{_nanoseconds(start)}"{ended}'
            f',"attributes":[{encoded}]'
        )
        line += tail(record.events, record.status, record.status_message, record.links)
        return f"{line}}}]}}]}}]}}\n".encode("ascii")


def tail(events: Sequence[SpanEvent], status: StatusCode, message: str = "", links: Sequence[SpanLink] = ()) -> str:
    """The end of a span's line: events, links and status, each where there is one."""
    text = f',"events":[{_events(events)}]' if events else ""
    if links:
        text += f',"links":[{_links(links)}]'
    if status or message:
        said = f'"message":{_string(message)},' if message else ""
        text += f',"status":{{{said}"code":{int(status)}}}'
    return text


def encode(record: SpanRecord, resource: Resource, *, scope: str = "ray_guard") -> bytes:
    """The record as one line; for a single record. Many about one resource: :class:`LineEncoder`."""
    return LineEncoder(resource, scope=scope).encode(record)


# --- reading ---------------------------------------------------------------------------------------------------------


class NotOtlp(ValueError):
    """A line that is not OTLP traces.

    Args:
        reason: ``malformed`` (not JSON), ``foreign`` (JSON, but something else) or ``invalid`` (spans without ids
            or times).
        detail: what was found, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


_SPANS: Final = '"spans":['
_CLOSE: Final = "]}]}]}"
_HEAD_LIMIT: Final = 256
_heads: dict[str, Resource] = {}

_SNAKE: Final = r"_([a-z0-9])"
_KINDS: Final = {
    1: SpanKind.INTERNAL,
    3: SpanKind.CLIENT,
    "SPAN_KIND_INTERNAL": SpanKind.INTERNAL,
    "SPAN_KIND_CLIENT": SpanKind.CLIENT,
}
_STATUS: Final = {
    1: StatusCode.OK,
    2: StatusCode.ERROR,
    "STATUS_CODE_OK": StatusCode.OK,
    "STATUS_CODE_ERROR": StatusCode.ERROR,
}


def _camel(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects with their keys in camelCase: both spellings are legal protobuf JSON."""
    return {(re.sub(_SNAKE, lambda m: m[1].upper(), key) if "_" in key else key): value for key, value in pairs}


def _objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = parent.get(key)
    if found is None:
        return []
    if isinstance(found, list):
        for item in found:
            if not isinstance(item, dict):
                break
        else:
            return found
    raise NotOtlp("foreign", f"{key} is not a list of objects")


def _number(value: object, what: str) -> int:
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return int(value)
    except (ValueError, OverflowError):
        pass  # "soon", NaN, Infinity: named below
    raise NotOtlp("invalid", f"{what} is {value!r:.80}, not a number")


def _time(value: object, what: str) -> int | None:
    """Nanoseconds; None where there is none (absent, empty or 0)."""
    if value is None or value == "":
        return None
    number = _number(value, what)
    if not 0 <= number <= _UINT64_MAX:
        raise NotOtlp("invalid", f"{what} {number} is outside 64 bits")
    return number or None


def _identifier(value: object, size: int, what: str) -> str | None:
    """An id of ``size`` bytes as lower-case hex; None for an absent or zero one.

    OTLP says hex; exporters that go through plain protobuf JSON write base64. The lengths tell them apart.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            found = bytes.fromhex(value) if len(value) == 2 * size else b""
            if len(found) != size:
                from base64 import b64decode  # for what others write alone

                plain = value.rstrip("=").replace("-", "+").replace("_", "/")
                found = b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except ValueError:
            found = b""
        if len(found) == size:
            return found.hex() if any(found) else None
    raise NotOtlp("invalid", f"{what} {value!r:.80} is not an id of {size} bytes")


def _decode_value(value: object) -> AttributeValue:
    if not isinstance(value, dict) or not value:
        return ""
    for key, content in value.items():
        if content is None:
            continue
        if key == "stringValue":
            return content if isinstance(content, str) else str(content)
        if key == "intValue":
            return _number(content, "intValue")
        if key == "boolValue":
            return content if isinstance(content, bool) else str(content).lower() == "true"
        if key == "doubleValue":
            try:
                return float(content)  # also "NaN", "Infinity", "-Infinity"
            except (TypeError, ValueError, OverflowError):
                raise NotOtlp("invalid", f"doubleValue is {content!r:.80}") from None
        if key == "arrayValue":
            if not isinstance(content, dict):
                raise NotOtlp("invalid", f"arrayValue is {content!r:.80}")
            return tuple(_text(_decode_value(item)) for item in _objects(content, "values"))
        if key == "kvlistValue" and isinstance(content, dict):
            return json.dumps(_plain(value), ensure_ascii=False)
        # bytesValue and what later versions add: kept readable rather than lost.
        return content if isinstance(content, str) else json.dumps(content, sort_keys=True, separators=(",", ":"))
    return ""


def _plain(value: object) -> object:
    """A structured value as JSON has it."""
    if isinstance(value, dict):
        if isinstance(inside := value.get("kvlistValue"), dict):
            return {str(each.get("key")): _plain(each.get("value")) for each in _objects(inside, "values")}
        if isinstance(inside := value.get("arrayValue"), dict):
            return [_plain(each) for each in _objects(inside, "values")]
    return _decode_value(value)


def _text(value: AttributeValue) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def _decode_attributes(owner: Mapping[str, Any]) -> dict[str, AttributeValue]:
    decoded: dict[str, AttributeValue] = {}
    items = owner.get("attributes")
    if items is None:
        return decoded
    if not isinstance(items, list):
        raise NotOtlp("foreign", "attributes is not a list of objects")
    for item in items:
        if not isinstance(item, dict):
            raise NotOtlp("foreign", "attributes is not a list of objects")
        key, value = item.get("key"), item.get("value")
        if not isinstance(key, str):
            continue
        # Most of what reading a line costs: the common cases without a call, or with one.
        alone = value if isinstance(value, dict) and len(value) == 1 else {}
        content = alone.get("stringValue")
        if isinstance(content, str):
            decoded[intern(key)] = content
        elif (content := alone.get("intValue")) is not None:
            decoded[intern(key)] = _number(content, "intValue")
        else:
            decoded[intern(key)] = _decode_value(value)
    return decoded


def _decode_span(span: Mapping[str, Any]) -> SpanRecord:
    trace_id = _identifier(span.get("traceId"), 16, "traceId")
    span_id = _identifier(span.get("spanId"), 8, "spanId")
    start = _time(span.get("startTimeUnixNano"), "startTimeUnixNano")
    if trace_id is None or span_id is None:
        raise NotOtlp("invalid", "a span without traceId and spanId")
    if start is None:
        raise NotOtlp("invalid", f"span {span_id} has no startTimeUnixNano")
    events = tuple(
        SpanEvent(
            str(event.get("name", "")),
            _time(event.get("timeUnixNano"), "timeUnixNano") or start,
            _decode_attributes(event),
        )
        for event in _objects(span, "events")
    )
    links: list[SpanLink] = []
    for link in _objects(span, "links"):
        linked_trace = _identifier(link.get("traceId"), 16, "link traceId")
        linked_span = _identifier(link.get("spanId"), 8, "link spanId")
        if linked_trace is not None and linked_span is not None:
            links.append(SpanLink(linked_trace, linked_span, _decode_attributes(link)))
    status = span.get("status")
    if not isinstance(status, dict):
        status = {}
    kind, code = span.get("kind"), status.get("code")
    return SpanRecord(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=_identifier(span.get("parentSpanId"), 8, "parentSpanId"),
        name=str(span.get("name", "")),
        kind=_KINDS.get(kind, SpanKind.INTERNAL) if isinstance(kind, (int, str)) else SpanKind.INTERNAL,
        start_ns=start,
        end_ns=_time(span.get("endTimeUnixNano"), "endTimeUnixNano"),
        attributes=_decode_attributes(span),
        status=_STATUS.get(code, StatusCode.UNSET) if isinstance(code, (int, str)) else StatusCode.UNSET,
        status_message=str(status.get("message", "")),
        events=events,
        links=tuple(links),
    )


def decode(line: bytes | str) -> list[tuple[Resource, SpanRecord]]:
    """The spans of one OTLP JSON line, whoever wrote it.

    Accepts camelCase and snake_case keys, 64-bit integers as numbers or strings, hex and base64 ids, enums as numbers
    or names, and any number of resources, scopes and spans in the line. Span kinds other than CLIENT become INTERNAL
    (the trace model has no others); arrays become tuples of strings; of a repeated attribute key the last one counts.

    Raises:
        NotOtlp: the line is something else, or holds a span without id or start.
    """
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
        if "\\ud" in text or "\\uD" in text:  # halves of surrogate pairs, which nothing can store
            text = re.sub(_SURROGATE, "\ufffd", json.dumps(json.loads(text), ensure_ascii=False))
        # The hook is a Python call per JSON object: worth it only where a snake_case key can be. Nearly all writers
        # use camelCase throughout.
        snake = '"resource_spans"' in text or '"span_id"' in text or '_value"' in text
        known = None if snake else _after_known_head(text)
        data = json.loads(text, object_pairs_hook=_camel if snake else None) if known is None else {}
    except (ValueError, RecursionError) as error:
        raise NotOtlp("malformed", f"not JSON: {error!s:.120}") from None
    try:
        if known is not None:
            return [(known[0], _decode_span(span)) for span in known[1]]
        if not isinstance(data, dict) or "resourceSpans" not in data:
            raise NotOtlp("foreign", "JSON without resourceSpans")
        spans = _decode_spans(data)
    except RecursionError:
        raise NotOtlp("malformed", "a value of too many levels") from None
    if spans and not snake:
        _keep_head(text, spans[0][0])
    return spans


def _after_known_head(text: str) -> tuple[Resource, list[dict[str, Any]]] | None:
    """The spans of a line that begins as one before it did: nearly all that are about one resource do, to their spans.

    It takes half as long as to read the resource each time. None where the line is not known to be like that.
    """
    head, _, rest = text.partition(_SPANS)
    resource = _heads.get(head)
    if resource is None or not rest.endswith(_CLOSE):
        return None
    try:
        spans = json.loads(f"[{rest[: -len(_CLOSE)]}]")
    except (ValueError, RecursionError):
        return None
    return (resource, spans) if all(isinstance(span, dict) for span in spans) else None


def _keep_head(text: str, resource: Resource) -> None:
    """Keeps what a line begins with, if nothing but spans and the ends of what it opened can follow it."""
    head, mark, rest = text.partition(_SPANS)
    if not mark or not rest.endswith(_CLOSE) or len(head) > STRING_LIMIT:
        return
    try:
        alone = json.loads(head + mark + _CLOSE)
    except ValueError:
        return
    scopes = [scope for group in alone["resourceSpans"] for scope in _objects(group, "scopeSpans")]
    if len(scopes) == 1 == len(alone["resourceSpans"]) and scopes[0].get("spans") == []:
        if len(_heads) >= _HEAD_LIMIT:
            _heads.clear()
        _heads[head] = resource


def _decode_spans(data: Mapping[str, Any]) -> list[tuple[Resource, SpanRecord]]:
    spans: list[tuple[Resource, SpanRecord]] = []
    for group in _objects(data, "resourceSpans"):
        about = group.get("resource")
        resource = Resource(_decode_attributes(about) if isinstance(about, dict) else {})
        for scope in _objects(group, "scopeSpans") or _objects(group, "instrumentationLibrarySpans"):
            spans.extend((resource, _decode_span(span)) for span in _objects(scope, "spans"))
    return spans

"""The line format: what protobuf says of our lines, what we make of everybody else's, and hostile strings."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from ray_guard import __version__
from ray_guard.evidence.otlp import (
    STRING_LIMIT,
    Fragment,
    LineEncoder,
    NotOtlp,
    decode,
    encode,
    encode_attributes,
    fragment,
    tail,
)
from ray_guard.records import Resource, SpanEvent, SpanKind, SpanLink, SpanRecord, StatusCode

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = "00f067aa0ba902b7"
RESOURCE = Resource({"service.name": "env", "host.ip": ("192.0.2.1", "2001:db8::1"), "ray.actor_name": "env-3"})


def record(**changes: Any) -> SpanRecord:
    fields: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": SPAN,
        "parent_id": PARENT,
        "name": "egress connect",
        "kind": SpanKind.CLIENT,
        "start_ns": 1_700_000_000_000_000_001,
        "end_ns": 1_700_000_000_500_000_002,
        "attributes": {"network.peer.port": 443},
    }
    return SpanRecord(**(fields | changes))


def protobuf(line: bytes) -> Any:
    """The line as protobuf's own JSON parser understands it.

    OTLP writes ids in hex where plain protobuf JSON has base64: the one difference that has to be undone first.
    """
    data = json.loads(line)

    def convert(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                convert(item)
        elif isinstance(node, dict):
            for key in ("traceId", "spanId", "parentSpanId"):
                if isinstance(node.get(key), str):
                    node[key] = base64.b64encode(bytes.fromhex(node[key])).decode()
            for item in node.values():
                convert(item)

    convert(data)
    return json_format.ParseDict(data, TracesData())


def values(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in attributes:
        which = item.value.WhichOneof("value")
        content = getattr(item.value, which)
        found[item.key] = [v.string_value for v in content.values] if which == "array_value" else content
    return found


def test_protobuf_reads_every_field_of_a_line() -> None:
    line = encode(
        record(
            attributes={"text": "a", "yes": True, "port": 443, "big": 2**62, "part": 0.5, "args": ("ssh", "-R")},
            status=StatusCode.ERROR,
            status_message="refused",
            events=(SpanEvent("denied", 1_700_000_000_100_000_000, {"rule": "none"}),),
            links=(SpanLink("f" * 32, "e" * 16, {"why": "iteration"}),),
        ),
        RESOURCE,
    )
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    (group,) = protobuf(line).resource_spans
    assert values(group.resource.attributes) == {
        "service.name": "env",
        "host.ip": ["192.0.2.1", "2001:db8::1"],
        "ray.actor_name": "env-3",
    }
    (scope,) = group.scope_spans
    assert (scope.scope.name, scope.scope.version) == ("ray_guard", __version__)
    (span,) = scope.spans
    assert (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN, PARENT)
    assert (span.name, span.kind) == ("egress connect", Span.SPAN_KIND_CLIENT)
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (
        1_700_000_000_000_000_001,
        1_700_000_000_500_000_002,
    )
    assert values(span.attributes) == {
        "text": "a",
        "yes": True,
        "port": 443,
        "big": 2**62,
        "part": 0.5,
        "args": ["ssh", "-R"],
    }
    assert (span.status.code, span.status.message) == (2, "refused")
    (event,) = span.events
    assert (event.name, event.time_unix_nano, values(event.attributes)) == (
        "denied",
        1_700_000_000_100_000_000,
        {"rule": "none"},
    )
    (link,) = span.links
    assert (link.trace_id.hex(), link.span_id.hex()) == ("f" * 32, "e" * 16)


def test_a_begun_span_has_no_end_and_a_root_no_parent() -> None:
    line = encode(record(end_ns=None, parent_id=None), RESOURCE)
    assert b"endTimeUnixNano" not in line
    assert b"parentSpanId" not in line
    ((_, span),) = decode(line)
    assert span.end_ns is None
    assert span.parent_id is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, {"boolValue": True}),
        (1, {"intValue": "1"}),
        (-(2**63), {"intValue": "-9223372036854775808"}),
        (2**63, {"doubleValue": 2.0**63}),
        (1.5, {"doubleValue": 1.5}),
        (1e22, {"doubleValue": 1e22}),
        (math.nan, {"doubleValue": "NaN"}),
        (math.inf, {"doubleValue": "Infinity"}),
        (-math.inf, {"doubleValue": "-Infinity"}),
        ((), {"arrayValue": {"values": []}}),
        (("a",), {"arrayValue": {"values": [{"stringValue": "a"}]}}),
        (b"caf\xe9", {"stringValue": "caf\ufffd"}),
        (StatusCode.OK, {"intValue": "1"}),
        (None, {"stringValue": "None"}),
    ],
)
def test_values(value: Any, expected: Any) -> None:
    assert json.loads(b"[" + encode_attributes({"k": value}) + b"]") == [{"key": "k", "value": expected}]
    protobuf(encode(record(attributes={"k": value}), RESOURCE))


def test_an_integer_beyond_every_float_is_kept_as_text() -> None:
    (item,) = json.loads(b"[" + encode_attributes({"k": 10**400}) + b"]")
    assert item["value"]["stringValue"].startswith("0x")


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ('quote " back \\ slash', 'quote " back \\ slash'),
        ("new\nline\r\x85\u2028", "new\nline\r\x85\u2028"),
        ("nul \x00 and \x1b[2J", "nul \x00 and \x1b[2J"),
        ("argv \udcff\udc80 bytes", "argv \ufffd\ufffd bytes"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("\U0001f600 \u202e", "\U0001f600 \u202e"),
    ],
)
def test_hostile_strings_stay_in_their_field(hostile: str, shown: str) -> None:
    line = encode(
        record(name=hostile, attributes={hostile: hostile, "list": (hostile,)}, status_message=hostile),
        Resource({hostile: hostile}),
    )
    assert line.count(b"\n") == 1
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])  # nothing for a terminal to obey
    protobuf(line)
    ((resource, span),) = decode(line)
    assert span.name == span.status_message == shown
    assert span.attributes == {shown: shown, "list": (shown,)}
    assert resource.attributes == {shown: shown}


def test_ids_cannot_carry_json() -> None:
    line = encode(record(span_id='x","name":"forged'), RESOURCE)
    assert json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "egress connect"


def test_long_strings_and_lists_are_cut_and_say_so() -> None:
    ((_, span),) = decode(
        encode(record(attributes={"s": "x" * (STRING_LIMIT + 5), "l": ("y" * 60_000,) * 3}), RESOURCE)
    )
    text, items = span.attributes["s"], span.attributes["l"]
    assert isinstance(text, str)
    assert isinstance(items, tuple)
    assert text.endswith("… [5 more]")
    assert len(items) == 2
    assert items[1] == "… [2 more]"


@pytest.mark.parametrize("time_ns", [-1, 2**64])
def test_times_outside_otlp_are_refused(time_ns: int) -> None:
    with pytest.raises(ValueError, match="Unix nanoseconds"):
        encode(record(start_ns=time_ns), RESOURCE)


def test_fragment_wins_over_what_a_target_says() -> None:
    fixed = fragment({"ray_guard.source": "target", "rl.run.id": "run"})
    line = LineEncoder(RESOURCE).encode(record(attributes={"ray_guard.source": "supervisor", "x": 1}), fixed)
    assert line.count(b"ray_guard.source") == 1
    ((_, span),) = decode(line)
    assert span.attributes == {"ray_guard.source": "target", "rl.run.id": "run", "x": 1}


@pytest.mark.parametrize("fixed", [fragment({}), fragment({"a": 1})])
@pytest.mark.parametrize("own", [{}, {"b": 2}, {"a": 3}])
def test_fragment_and_attributes_may_each_be_empty(fixed: Fragment, own: dict[str, Any]) -> None:
    ((_, span),) = decode(LineEncoder(RESOURCE).encode(record(attributes=own), fixed))
    assert span.attributes == own | (json.loads(f'{{"a":{1}}}') if fixed.keys else {})


@pytest.mark.parametrize("parent_id", [None, PARENT])
def test_the_short_way_of_egress_spans_writes_the_same_lines(parent_id: str | None) -> None:
    span = record(end_ns=None, parent_id=parent_id, start_ns=5, attributes={"network.transport": "tcp"})
    fixed, own, more = fragment({"rl.run.id": "ä"}), fragment(span.attributes), fragment({"n": 1})
    encoder = LineEncoder(RESOURCE)
    form = encoder.egress_form(TRACE, parent_id, f"{fixed.encoded},{own.encoded}")
    assert form.begun(SPAN, 5) == encoder.encode(span, fixed)
    events = (SpanEvent("e", 6, {}),)
    whole = span._replace(end_ns=7, attributes={**span.attributes, "n": 1})
    assert form.ended(SPAN, 5, 7, f",{more.encoded}") == encoder.encode(whole, fixed)
    whole = whole._replace(events=events, status=StatusCode.ERROR, status_message="no")
    said = tail(events, StatusCode.ERROR, "no")
    assert form.ended(SPAN, 5, 7, f",{more.encoded}", said) == encoder.encode(whole, fixed)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
scalars = st.one_of(
    text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.lists(text).map(tuple)
)
attribute_maps = st.dictionaries(text, scalars, max_size=6)
times = st.integers(1, 2**64 - 1)


def ids(size: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=size, max_size=size).filter(any).map(bytes.hex)


records = st.builds(
    SpanRecord,
    trace_id=ids(16),
    span_id=ids(8),
    parent_id=st.none() | ids(8),
    name=text,
    kind=st.sampled_from(SpanKind),
    start_ns=times,
    end_ns=st.none() | times,
    attributes=attribute_maps,
    status=st.sampled_from(StatusCode),
    status_message=text,
    events=st.lists(st.builds(SpanEvent, text, times, attribute_maps), max_size=2).map(tuple),
    links=st.lists(st.builds(SpanLink, ids(16), ids(8), attribute_maps), max_size=2).map(tuple),
)


@given(span=records, about=attribute_maps)
def test_round_trip(span: SpanRecord, about: dict[str, Any]) -> None:
    line = encode(span, Resource(about))
    assert decode(line) == [(Resource(about), span)]
    protobuf(line)


@given(span=records, fixed=attribute_maps)
def test_round_trip_with_fragment(span: SpanRecord, fixed: dict[str, Any]) -> None:
    ((_, read),) = decode(LineEncoder(RESOURCE).encode(span, fragment(fixed)))
    assert read.attributes == {**span.attributes, **fixed}


@given(name=st.text(max_size=40))
def test_any_string_at_all_can_be_written(name: str) -> None:
    ((_, span),) = decode(encode(record(name=name, attributes={name: name}), RESOURCE))
    assert span.name == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in name)


def foreign(**span: Any) -> str:
    fields = {"traceId": TRACE, "spanId": SPAN, "name": "x", "startTimeUnixNano": "5"} | span
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [fields]}]}]})


def test_protobufs_own_json_is_understood_in_both_spellings() -> None:
    ours = protobuf(encode(record(status=StatusCode.ERROR, links=(SpanLink("f" * 32, "e" * 16),)), RESOURCE))
    expected = decode(encode(record(status=StatusCode.ERROR, links=(SpanLink("f" * 32, "e" * 16),)), RESOURCE))
    for snake in (False, True):  # base64 ids, enum names, int64 strings
        assert decode(json_format.MessageToJson(ours, preserving_proto_field_name=snake)) == expected


@pytest.mark.parametrize("number", [7, "7", 7.0])
def test_integers_in_any_form(number: Any) -> None:
    line = foreign(
        startTimeUnixNano=number, attributes=[{"key": "n", "value": {"intValue": number}}, {"key": "none", "value": {}}]
    )
    ((_, span),) = decode(line)
    assert span.start_ns == 7
    assert span.attributes == {"n": 7, "none": ""}


def test_snake_case_inside_camel_case() -> None:
    ((_, span),) = decode(foreign(parent_span_id=PARENT, attributes=[{"key": "n", "value": {"int_value": "3"}}]))
    assert span.parent_id == PARENT
    assert span.attributes == {"n": 3}


@pytest.mark.parametrize("none", ["", "0" * 16, None])
def test_an_absent_parent(none: Any) -> None:
    ((_, span),) = decode(foreign(parentSpanId=none))
    assert span.parent_id is None


def test_several_resources_scopes_and_spans_in_a_line() -> None:
    one = {"traceId": TRACE, "spanId": SPAN, "startTimeUnixNano": 1}
    two = {"traceId": TRACE.upper(), "spanId": PARENT, "startTimeUnixNano": 1, "kind": 2, "endTimeUnixNano": 0}
    line = json.dumps(
        {
            "resourceSpans": [
                {"scopeSpans": [{"spans": [one, two]}, {"spans": [one]}]},
                {"instrumentationLibrarySpans": [{"spans": [one]}]},
                {"resource": None, "scopeSpans": []},
            ]
        }
    )
    spans = [span for _, span in decode(line)]
    assert [span.span_id for span in spans] == [SPAN, PARENT, SPAN, SPAN]
    assert spans[1].trace_id == TRACE
    assert spans[1].kind is SpanKind.INTERNAL
    assert spans[1].end_ns is None


def test_nested_and_binary_values_stay_readable() -> None:
    kvlist = {"kvlistValue": {"values": [{"key": "a", "value": {"intValue": "1"}}]}}
    array = {"arrayValue": {"values": [{"intValue": "1"}, {"boolValue": True}, {"doubleValue": 0.5}]}}
    ((_, span),) = decode(
        foreign(
            attributes=[
                {"key": "kv", "value": kvlist},
                {"key": "bytes", "value": {"bytesValue": "AAE="}},
                {"key": "array", "value": array},
            ]
        )
    )
    assert span.attributes["array"] == ("1", "true", "0.5")
    assert span.attributes["bytes"] == "AAE="
    assert json.loads(str(span.attributes["kv"])) == {"a": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "malformed"),
        ("{", "malformed"),
        ("[" * 100_000, "malformed"),
        (b"\xff\xfe\x00", "malformed"),
        ('{"a":' + "9" * 5000 + "}", "malformed"),
        ("7", "foreign"),
        ("[]", "foreign"),
        ('{"event_type":"alert"}', "foreign"),
        ('{"resourceSpans":{}}', "foreign"),
        ('{"resourceSpans":[7]}', "foreign"),
        (foreign(traceId=""), "invalid"),
        (foreign(traceId="0" * 32), "invalid"),
        (foreign(traceId="zz"), "invalid"),
        (foreign(spanId=7), "invalid"),
        (foreign(startTimeUnixNano=None), "invalid"),
        (foreign(startTimeUnixNano="soon"), "invalid"),
        (foreign(startTimeUnixNano=True), "invalid"),
        (foreign(startTimeUnixNano=-1), "invalid"),
        (foreign(startTimeUnixNano=math.inf), "invalid"),
        (foreign(attributes=[{"key": "n", "value": {"intValue": "x"}}]), "invalid"),
        (foreign(attributes=[{"key": "n", "value": {"doubleValue": "x"}}]), "invalid"),
        (foreign(attributes=[{"key": "n", "value": {"arrayValue": 3}}]), "invalid"),
        (foreign(attributes=7), "foreign"),
    ],
)
def test_what_is_not_otlp_is_named(line: str | bytes, reason: str) -> None:
    with pytest.raises(NotOtlp) as caught:
        decode(line)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(reason)


KEYS = ["resourceSpans", "scopeSpans", "spans", "resource", "attributes", "key", "value", "traceId", "spanId", "kind"]
KEYS += ["startTimeUnixNano", "events", "links", "status", "code", "arrayValue", "values", "intValue"]
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(groups=st.lists(junk, max_size=2))
def test_junk_in_the_right_places_is_an_answer_or_not_otlp(groups: list[Any]) -> None:
    with contextlib.suppress(NotOtlp):
        decode(json.dumps({"resourceSpans": groups}))


@given(span=st.dictionaries(st.sampled_from(["status", "kind", "events", "links", "attributes", "name"]), junk))
def test_junk_around_a_valid_span(span: dict[str, Any]) -> None:
    try:
        ((_, read),) = decode(foreign(**span))
    except NotOtlp:
        return
    decode(encode(read, RESOURCE))


ONE = '{"traceId":"0123456789abcdef0123456789abcdef","spanId":"0123456789abcdef","name":"x","startTimeUnixNano":"7"}'
NAMED = '{"attributes":[{"key":"host.name","value":{"stringValue":"n\\"spans"}}]}'
HEAD = '{"resourceSpans":[{"resource":' + NAMED + ',"scopeSpans":['


@pytest.mark.parametrize(
    ("after", "hosts"),
    [
        ('{"spans":[' + ONE + "]}]}]}", 1),
        ('{"spans":[' + ONE + "," + ONE + "]}]}]}", 2),
        ('{"spans":[' + ONE + "]}]}]} ", 1),
        ('{"spans":[]}]}]}', 0),
        ('{"spans":[' + ONE + ']},{"spans":[' + ONE + "]}]}]}", 2),
        ('{"spans":[' + ONE + ']}],"resource":{}}]}', 0),
        ('],"scopeSpans":null,"instrumentationLibrarySpans":[{"spans":[' + ONE + "]}]}]}", 1),
        ('{"spans":[' + ONE + ']}]},{"scopeSpans":[{"spans":[' + ONE + "]}]}]}", 1),
        ('{"spans":[' + ONE.replace('"x"', '"]}]}]}"') + "]}]}]}", 1),
        ('{"spans":[' + ONE.replace("}", ',"events":[{"name":"e","attributes":[{"key":"a"}]}]}') + "]}]}]}", 1),
        ('{"spans":[' + ONE.replace('"7"', '"soon"') + "]}]}]}", "invalid"),
        ('{"spans":[7]}]}]}', "foreign"),
        ('{"spans":[' + ONE + "]}]}", "malformed"),
        ('{"spans":[' + ONE + "]}]}]}]}", "malformed"),
    ],
)
def test_a_line_is_read_alike_whatever_came_before(after: str, hosts: int | str) -> None:
    """What lines of one resource begin with is read once."""
    read: list[object] = []
    for number, before in enumerate(("", '{"spans":[' + ONE + "]}]}]}", after)):
        head = HEAD.replace("host", f"{number}.{abs(hash(after))}.host", 1)
        try:
            if before:
                decode(head + before)
            read.append(sum("host.name" in " ".join(about.attributes) for about, _ in decode(head + after)))
        except NotOtlp as error:
            read.append(error.reason)
    assert read == [hosts] * 3


def test_half_a_surrogate_pair_can_be_stored() -> None:
    """Who is traced chooses some of the text: it shall not end the reading of all."""
    line = HEAD + '{"spans":[' + ONE.replace('"x"', r'"\ud800 \ud83d\ude00 \\ud800"') + "]}]}]}"
    ((_, span),) = decode(line)
    assert span.name == "\ufffd \U0001f600 \\ud800"

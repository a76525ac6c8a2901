from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any

import pytest

from ray_guard.client import spans


def reference(arguments: object) -> str:
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"command": "ls", "timeout": 3.5, "deep": {"b": [1, None, True], "a": "é"}},
        {"z": 1, "a": {"y": 2, "x": 3}},
        [1, "two"],
        "plain",
        {"text": "lone \ud800 surrogate"},
        {"long": "é\n" * 100_000, "b": 2, "a": 1},
        {"long": "x" * 65_536, "longer": "y\ud83d" * 70_000, "n": {"k": "v"}},
    ],
)
def test_digest_is_what_one_line_of_python_computes(arguments: object) -> None:
    assert spans.arguments_digest(arguments) == reference(arguments)


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def test_digest_of_what_json_lacks_goes_by_type_and_is_stable() -> None:
    first, second = {"model": object(), "n": 1}, {"n": 1, "model": object()}
    assert spans.arguments_digest(first) == spans.arguments_digest(second)
    assert spans.arguments_digest(first) == reference({"model": {"$type": "object"}, "n": 1})
    assert spans.arguments_digest({"data": b"abc"}) != spans.arguments_digest({"data": b"abd"})
    assert spans.arguments_digest({"path": PurePosixPath("/a")}) == reference({"path": "/a"})
    assert spans.arguments_digest({"x": Broken()}) == spans.arguments_digest({"x": Broken()})


def test_digest_of_cycles_and_mixed_keys_and_depth_is_a_digest() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for arguments in ({"c": cycle, "n": 1}, {1: "a", "b": 2}, {"d": deep}, cycle, {"t": {1: 2, "x": 3}}):
        assert len(spans.arguments_digest(arguments)) == 64
    # The sound parts still count.
    assert spans.arguments_digest({"c": cycle, "n": 1}) != spans.arguments_digest({"c": cycle, "n": 2})


class Scalar:
    shape = ()

    def __init__(self, held: Any) -> None:
        self.held = held

    def item(self) -> Any:
        return self.held


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("text", "text"),
        (True, True),
        (7, 7),
        (0.5, 0.5),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (2**63, str(2**63)),
        (-(2**63), -(2**63)),
        (("a", 1, None), ["a", 1, "NoneType"]),
        (PurePosixPath("/tmp/x"), "/tmp/x"),
        (Scalar(0.25), 0.25),
        ("a\ud800b", "a?b"),
        (b"bytes", "bytes"),
        ({"a": 1}, "dict"),
        pytest.param(10**5000, "int", id="more digits than Python prints"),
    ],
)
def test_any_attribute_value_becomes_one_that_can_be_written(given: object, kept: object) -> None:
    found = spans.clean(given)
    assert found == kept
    assert type(found) is type(kept)


def test_long_text_is_cut_and_broken_objects_are_named() -> None:
    cut = spans.clean("x" * 100_000)
    assert isinstance(cut, str)
    assert len(cut) == spans.TEXT_LIMIT
    assert cut.endswith("…")
    assert spans.clean(Broken()) == f"{Broken.__module__}.Broken"


def test_messages_fit_into_a_packet_whatever_is_in_them() -> None:
    nasty = "\x00" * spans.TEXT_LIMIT  # six bytes each in JSON
    attributes = {f"key {n}": nasty for n in range(100)}
    events = [("event", 1, spans.clean_event(attributes)) for _ in range(100)]
    assert len(events[0][2]) == 32
    closed = spans.close_message(span="1" * 16, end_ns=2, attributes=attributes, status=2, message=nasty, events=events)
    assert len(closed) <= spans.PACKET_LIMIT
    message = json.loads(closed)
    assert message["op"] == "close"
    assert message["status"] == 2
    assert message["attributes"]["ray_guard.truncated"] is True
    assert message["attributes"]["key 0"].startswith("\x00")
    assert message["events"]
    opened = spans.open_message(
        span="1" * 16,
        trace="2" * 32,
        parent=None,
        scope="tool",
        name="execute_tool x",
        kind=1,
        start_ns=1,
        attributes_json=spans.attributes_json(attributes),
        identity_json="{}",
    )
    assert len(opened) <= spans.PACKET_LIMIT
    assert json.loads(opened)["attributes"]["ray_guard.truncated"] is True


def test_messages_have_every_field_of_the_interface() -> None:
    opened = json.loads(
        spans.open_message(
            span="1" * 16,
            trace="2" * 32,
            parent="3" * 16,
            scope="episode",
            name='a "quoted" name',
            kind=1,
            start_ns=5,
            attributes_json=spans.attributes_json({"a": [1, "b"]}),
            identity_json=spans.to_json({"rl.run.id": "r"}),
            links=[("4" * 32, "5" * 16)],
            episode="6" * 16,
            budget={"tokens": 5},
        )
    )
    assert opened == {
        "op": "open",
        "span": "1" * 16,
        "trace": "2" * 32,
        "parent": "3" * 16,
        "scope": "episode",
        "name": 'a "quoted" name',
        "kind": 1,
        "start": 5,
        "attributes": {"a": [1, "b"]},
        "identity": {"rl.run.id": "r"},
        "links": [["4" * 32, "5" * 16]],
        "episode": "6" * 16,
        "budget": {"tokens": 5},
    }
    closed = json.loads(spans.close_message(span="1" * 16, end_ns=9, attributes={}))
    assert closed == {
        "op": "close",
        "span": "1" * 16,
        "end": 9,
        "attributes": {},
        "status": 0,
        "message": "",
        "events": [],
    }


def test_the_encoder_does_without_the_c_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    encode = spans._encoder(sort_keys=True, default=spans._by_type)
    value = {"b": [1, object()], "a": "é"}
    assert encode(value) == spans.canonical(value) == '{"a":"\\u00e9","b":[1,{"$type":"object"}]}'


def test_an_exception_that_cannot_be_described_is_still_named() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    try:
        raise Mute
    except Mute as error:
        attributes, message, event = spans.describe_exception(error, 7)
    assert attributes["error.type"] == f"{__name__}.{Mute.__qualname__}"
    assert not message
    assert event[0] == "exception"
    assert event[1] == 7
    assert "test_spans.py" in str(event[2]["exception.stacktrace"])

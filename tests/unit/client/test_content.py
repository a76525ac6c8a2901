"""What is recorded of a call's content is bounded and holds no secrets, whatever the content is."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from ray_guard.client import scope
from ray_guard.client.content import shown
from ray_guard.client.spans import TEXT_LIMIT, arguments_digest
from ray_guard.testing import RecordingChannel


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Endless(Mapping[str, int]):
    """Claims few items and gives no end of them."""

    def __getitem__(self, key: str) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        n = 0
        while True:
            yield f"k{(n := n + 1)}"

    def __len__(self) -> int:
        return 3


def test_secrets_are_found_by_field_and_by_form_at_any_depth() -> None:
    given = {
        "command": "curl -H 'Authorization: Bearer abcdefgh12345678' http://a",
        "env": [{"name": "X", "DB_PASSWORD": "hunter2"}, ("AKIAABCDEFGHIJKLMNOP", 7)],
        "auth": {"user": "me", "parts": ["hunter3", b"hunter4"]},
        "max_tokens": 4096,
        "flag": True,
        "none": None,
    }
    text, whole = shown(given)
    assert whole
    assert json.loads(text) == {
        "command": "curl -H 'Authorization: [redacted]' http://a",
        "env": [{"name": "X", "DB_PASSWORD": "[redacted]"}, ["[redacted]", 7]],
        "auth": {"user": "[redacted]", "parts": ["[redacted]", "[redacted]"]},
        "max_tokens": 4096,
        "flag": True,
        "none": None,
    }


def test_a_secret_at_the_cut_is_not_cut_in_two() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\n" + "Ab1/" * 400 + "\n-----END PRIVATE KEY-----"
    for before in range(TEXT_LIMIT - 2000, TEXT_LIMIT + 100, 50):
        text = shown("x " * (before // 2) + pem).text
        assert "Ab1/" not in text
        assert len(text) <= TEXT_LIMIT


def cycle() -> Any:
    found: dict[str, Any] = {}
    found["self"] = found
    return found


def deep() -> Any:
    found: Any = "end"
    for _ in range(50_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "make",
    [
        Hostile,
        lambda: {"a": Hostile(), "b": object},
        lambda: {"data": b"\xff\xfe\x00", "view": memoryview(b"x")},
        lambda: "lone \ud800 surrogate \x00 and \x1b[31m",
        lambda: {"\ud800": "\udfff"},
        lambda: {1: "a", "b": 2, None: 3},
        cycle,
        deep,
        Endless,
        lambda: [float("nan"), float("inf"), 2**5000],
        lambda: list(range(1_000_000)),
        lambda: {str(n): "x" * 100 for n in range(10_000)},
    ],
)
def test_anything_at_all_is_shown_within_bounds(make: Callable[[], Any]) -> None:
    text, _ = shown(make())
    assert len(text) <= TEXT_LIMIT
    text.encode("utf-8")


@pytest.mark.parametrize(
    "where", [lambda t: {"text": t}, lambda t: {"m": [{"content": t}]}, lambda t: {"b": t.encode()}]
)
def test_a_hundred_megabytes_cost_their_hash_and_no_more(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch, where: Callable[[str], Any]
) -> None:
    monkeypatch.setenv("RAY_GUARD_CAPTURE_CONTENT", "1")
    huge = where("y" * (100 << 20))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with scope.tool_call("x", huge) as call:
        call.result(huge)
    (opened,), (closed,) = wire.sent("open"), wire.sent("close")
    assert opened["attributes"]["ray_guard.arguments.sha256"] == arguments_digest(huge)
    assert closed["attributes"]["ray_guard.result.sha256"] == arguments_digest(huge)
    for message, name in ((opened, "arguments"), (closed, "result")):
        assert len(message["attributes"][f"gen_ai.tool.call.{name}"]) <= TEXT_LIMIT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 450_000, "KiB"


def test_captured_content_says_that_it_was_cut_and_keeps_its_hash(
    wire: RecordingChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_GUARD_CAPTURE_CONTENT", "1")
    with scope.tool_call("short", {"token": "hunter2"}) as call:
        call.result("password=hunter2")
    with scope.tool_call("long", {"a": "y" * 9000}) as call:
        call.result(Hostile())
    short, long = wire.sent("close")
    assert short["attributes"]["gen_ai.tool.call.result"] == "password=[redacted]"
    assert short["attributes"]["ray_guard.result.sha256"] == arguments_digest("password=hunter2")
    assert "ray_guard.truncated" not in short["attributes"]
    assert long["attributes"]["ray_guard.truncated"] is True
    assert "hunter2" not in json.dumps(wire.messages)


def test_secrets_in_exceptions_are_not_recorded(wire: RecordingChannel) -> None:
    with pytest.raises(ValueError, match="hunter2"), scope.tool_call("x"):
        raise ValueError("cannot reach postgres://me:hunter2@db/x")
    assert "hunter2" not in json.dumps(wire.messages)
    assert "postgres://me:[redacted]@db/x" in json.dumps(wire.messages)

"""How many tokens an answer says it took. Pure; runs in the mover."""

from __future__ import annotations

import json
from typing import Any, Final

from ray_guard.egress.relay.model.answers import Events, data_of

_MOST: Final = 1 << 53
_LAST: Final = ("response.completed", "response.incomplete", "response.failed")
_REASONS: Final = 16


class Usage:
    """What is known so far of one answer."""

    def __init__(self) -> None:
        self.input: int | None = None
        self.cached: int | None = None
        self.final = False
        """The engine has said what it took in all."""
        self.reasons: list[str] = []
        self.answered_as: dict[str, str] = {}
        self._outputs: dict[int, int] = {}

    @property
    def output(self) -> int | None:
        return sum(self._outputs.values()) if self._outputs else None

    def body(self, data: bytes) -> None:
        """An answer that is no stream."""
        answer = _object(data)
        self._note(answer)
        self._total(answer.get("usage"))

    def event(self, data: bytes) -> tuple[dict[str, Any], bool]:
        """An event of a stream, and whether it is there for its usage alone."""
        event = _object(data)
        kind = event.get("type")
        if isinstance(kind, str):  # of the Responses API
            if kind in _LAST and isinstance(event.get("response"), dict):
                self._note(event["response"])
                self._total(event["response"].get("usage"))
            return event, False
        self._note(event)
        usage, choices = event.get("usage"), event.get("choices")
        if choices == []:
            self._total(usage)
            return event, usage is not None
        if isinstance(usage, dict) and isinstance(choices, list) and isinstance(choices[0], dict):
            self._so_far(usage, choices[0].get("index"))
        return event, False

    def _note(self, answer: dict[str, Any]) -> None:
        for key in ("id", "model"):
            value = answer.get(key)
            if isinstance(value, str):
                self.answered_as[key] = value[:256]
        choices = answer.get("choices")
        found = (
            [each.get("finish_reason") for each in choices if isinstance(each, dict)]
            if isinstance(choices, list)
            else []
        )
        if isinstance(answer.get("status"), str):
            found.append(answer["status"])
        self.reasons += [reason[:64] for reason in found if isinstance(reason, str)][: _REASONS - len(self.reasons)]

    def _total(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        taken = [
            _number(usage, *names)
            for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
        ]
        if taken[0] is None:
            return
        self.input, self._outputs, self.final = taken[0], {0: taken[1] or 0}, True
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        if isinstance(details, dict):
            self.cached = _number(details, "cached_tokens")

    def _so_far(self, usage: dict[str, Any], index: object) -> None:
        taken, output = _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")
        if taken is not None and output is not None and isinstance(index, int) and 0 <= index < 1024 and not self.final:
            self.input = max(taken, self.input or 0)
            self._outputs[index] = max(output, self._outputs.get(index, 0))


class Stream:
    """A stream of events as the client asked for it, and its usage, which it may not have asked for.

    Args:
        usage: takes what is found.
        keep_last: whether the client wants the event that says the usage.
        keep_each: whether it wants what other events say of it.
    """

    def __init__(self, usage: Usage, *, keep_last: bool, keep_each: bool) -> None:
        self._usage = usage
        self._keep_last = keep_last
        self._keep_each = keep_each
        self._events = Events()
        self.begun = False
        """Something of the answer itself has come."""

    def feed(self, data: bytes) -> bytes:
        """What goes on to the client. Raises Malformed."""
        return b"".join(map(self._event, self._events.feed(data)))

    def rest(self) -> bytes:
        """The stream has ended."""
        return self._events.rest()

    def _event(self, raw: bytes) -> bytes:
        data = data_of(raw)
        if not data or data == b"[DONE]":
            return raw
        event, alone = self._usage.event(data)
        kind = event.get("type")
        self.begun = self.begun or not isinstance(kind, str) or "delta" in kind
        if isinstance(kind, str) or "usage" not in event:
            return raw
        if alone:
            return raw if self._keep_last else b""
        if self._keep_each:
            return raw
        del event["usage"]
        return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(usage: dict[str, Any], *names: str) -> int | None:
    value = next((usage[name] for name in names if name in usage), None)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def lengths(data: bytes) -> dict[str, int | None]:
    """Names of the models in the answer of ``/v1/models``, and the most tokens that one request may have with each."""
    cards = _object(data).get("data")
    found = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    return {str(card["id"]): _number(card, "max_model_len") for card in found if isinstance(card.get("id"), str)}

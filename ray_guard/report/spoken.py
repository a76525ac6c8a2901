"""What a model said in one of its calls, wherever an instrumentation keeps it. Runs later, on any machine. Pure.

In an attribute or an event (``gen_ai.output.messages``, ``gen_ai.choice``, ``gen_ai.content.completion``), in one
attribute for each piece (OpenInference, OpenLLMetry), or as the result of a function (Langfuse, MLflow).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_MESSAGES: Final = "gen_ai.output.messages"
#: of an event, the most telling first; ``gen_ai.event.content`` is of older instrumentations
_OF_EVENT: Final = (_MESSAGES, "gen_ai.event.content", "message", "content", "gen_ai.completion")
_EVENTS: Final = ("gen_ai.choice", "gen_ai.content.completion", "gen_ai.client.inference.operation.details")
_PIECE: Final = re.compile(r"(?:gen_ai\.completion|llm\.output_messages)\.(\d.*)\.(?:content|text|name|arguments)\Z")
#: the first that there are
_RESULTS: Final = (
    ("langfuse.observation.output",),
    ("ai.response.text", "ai.response.toolCalls"),
    ("output.value",),
    ("mlflow.spanOutputs",),
    ("gen_ai.completion",),
    ("traceloop.entity.output",),
)
_NUMBER: Final = re.compile(r"(\d+)")


def spoken(attributes: Mapping[str, str], events: str | None) -> str:
    """The words, tool calls as they were asked for; empty where they were not recorded.

    Args:
        attributes: of the span, as text.
        events: as :mod:`ray_guard.evidence.columns` has them.
    """
    if said := attributes.get(_MESSAGES):
        return words(said)
    if told := "\n".join(words(each) for each in _in_events(events) if each):
        return told
    pieces = sorted((_in_order(key), value) for key, value in attributes.items() if value and _PIECE.match(key))
    if pieces:
        return "\n".join(value for _, value in pieces)
    results = (each for each in _RESULTS if any(attributes.get(key) for key in each))
    return "\n".join(words(attributes[key]) for key in next(results, ()) if attributes.get(key))


def _in_events(events: str | None) -> list[str]:
    try:
        return [
            next((str(about[key]) for key in _OF_EVENT if about.get(key)), "")
            for name, _, about in (json.loads(events) if events else ())
            if name in _EVENTS
        ]
    except (ValueError, TypeError, AttributeError):  # a table that others wrote
        return []


def _in_order(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in _NUMBER.split(key)]


def words(output: str) -> str:
    """The words of messages in JSON; whatever has another form, as it is."""
    try:
        return "\n".join(_of(json.loads(output))) or output
    except (ValueError, TypeError, AttributeError, RecursionError):
        return output


def _of(said: Any) -> Iterator[str]:
    """What messages, their parts and the tool calls in them say, in order."""
    if isinstance(said, list):
        for each in said:
            yield from _of(each)
    elif isinstance(said, str):
        # Structures within an array of OTLP are texts of JSON.
        yield from [words(said)] if said.startswith(("{", "[")) else [said]
    elif not isinstance(said, dict):
        yield json.dumps(said)
    elif inner := next((said[key] for key in ("parts", "message", "messages", "choices") if said.get(key)), None):
        yield from _of(inner)
    elif isinstance(text := said.get("content") or said.get("text"), (str, list)) or said.get("tool_calls"):
        if text:
            yield from [text] if isinstance(text, str) else _of(text)
        for call in said.get("tool_calls") or ():
            yield json.dumps(call, ensure_ascii=False)
    else:
        yield json.dumps(said, ensure_ascii=False)

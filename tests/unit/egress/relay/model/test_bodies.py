"""What a body asks for: tokens at most, and what it may not reach for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress.relay.model.bodies import Ask, BadRequest, compose, read
from ray_guard.egress.relay.model.requests import CHAT, COMPLETIONS, RESPONSES, NotAllowed


def ask(path: str, **body: Any) -> Ask:
    return read(path, json.dumps(body).encode())


def chat(content: Any, **more: Any) -> Ask:
    return ask(CHAT, model="m", messages=[{"role": "user", "content": content}], **more)


def test_the_prompt_is_bounded_by_its_bytes() -> None:
    assert chat("a" * 1001).prompt - chat("a").prompt == 1000
    assert chat("é" * 1000).prompt - chat("").prompt == 2000
    asked = chat("a", n=3, max_tokens=7, max_completion_tokens=9)
    assert (asked.choices, asked.copies, asked.output) == (3, 3, 9)
    assert chat("a").output is None
    assert chat("a", max_tokens=0).output == 1, "so much an engine generates that is asked for none"


@pytest.mark.parametrize(
    ("prompt", "prompts", "tokens"),
    [("abc", 1, 3), (["abc", "de"], 2, 5), ([1, 2, 3], 1, 3), ([[1, 2], [3]], 2, 3)],
)
def test_prompts_of_a_completion(prompt: Any, prompts: int, tokens: int) -> None:
    asked = ask(COMPLETIONS, prompt=prompt, n=2)
    assert (asked.choices, asked.copies) == (2, 2 * prompts)
    assert tokens <= asked.prompt - ask(COMPLETIONS, prompt=[0], n=2).prompt + 1 <= tokens + 40
    assert asked.output == asked.content["max_tokens"] == 16


def test_media_count_by_what_they_can_be_not_by_their_bytes() -> None:
    url = "data:image/png;base64," + "A" * 100_000
    part = {"type": "image_url", "image_url": {"url": url}}
    assert 16_000 < chat([part]).prompt < 18_000
    assert chat([part, part]).prompt > 32_000
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}}
    assert 16_000 < chat([sound]).prompt < 18_000
    # What is no medium is text, whatever it looks like.
    assert chat(url).prompt > 100_000
    assert chat("a", tools=[{"type": "function", "function": {"image_url": url}}]).prompt > 100_000


def test_a_stream_says_its_usage_and_the_rest_stays() -> None:
    asked = chat("a", stream=True, stream_options={"include_usage": True}, temperature=0.5, unheard=1, priority=1)
    assert json.loads(compose(asked, 5)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "temperature": 0.5,
        "max_tokens": 5,
    }
    assert asked.dropped == ("priority", "unheard")
    assert (asked.usage, asked.each_usage) == (True, False)
    responses = ask(RESPONSES, input="a", store=True)
    assert json.loads(compose(responses, 5)) == {"input": "a", "store": False, "max_output_tokens": 5}


URL = {"url": "https://example.org/a.png"}


def parts(*given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(given)}]}


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (CHAT, parts({"type": "image_url", "image_url": URL}), "reaches_out"),
        (CHAT, parts({"type": "image_url", "image_url": "file:///etc/passwd"}), "reaches_out"),
        (CHAT, parts({"type": "image_url", "image_url": "DATA:,"}), "reaches_out"),
        (CHAT, parts({"type": "text", "text": "a", "image_url": URL}), "reaches_out"),
        (CHAT, {"messages": [{"content": {"type": "video_url", "video_url": [[URL]]}}]}, "reaches_out"),
        (CHAT, parts({"image_url": URL}), "content"),
        (CHAT, parts({"type": "image_embeds", "image_embeds": "AAAA"}), "content"),
        (CHAT, parts({"type": "file", "file": {"file_id": "f"}}), "content"),
        (CHAT, parts({"type": "input_image", "file_id": "f"}), "content"),
        (RESPONSES, {"input": parts({"type": "input_image", "image_url": "http://a"})["messages"]}, "reaches_out"),
        (RESPONSES, {"input": [{"type": "input_image", "image_url": "http://a"}]}, "reaches_out"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]}, "content"),
        (RESPONSES, {"input": [{"type": "input_file", "file_url": "http://a"}]}, "content"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "content"),
        (RESPONSES, {"input": "a", "tools": [{"type": "mcp", "server_url": "http://a"}]}, "remote_tool"),
        (RESPONSES, {"input": "a", "tools": [{"type": "code_interpreter"}]}, "remote_tool"),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search_preview"}]}, "remote_tool"),
        (RESPONSES, {"input": "a", "tool_choice": {"type": "mcp"}}, "remote_tool"),
        (RESPONSES, {"tool_choice": {"type": "allowed_tools", "tools": [{"type": "mcp"}]}}, "remote_tool"),
        (RESPONSES, {"input": "a", "previous_response_id": "r"}, "stored_state"),
        (RESPONSES, {"input": "a", "background": True}, "stored_state"),
        (RESPONSES, {"prompt": {"id": "p"}}, "stored_state"),
        (CHAT, {"messages": [], "kv_transfer_params": {}}, "reaches_out"),
        (CHAT, {"messages": [], "chat_template": "{{ a }}"}, "code"),
        (CHAT, {"messages": [], "chat_template_kwargs": {"chat_template": "{{ a }}"}}, "code"),
        (CHAT, {"messages": [], "lora_request": {}}, "weights"),
        (COMPLETIONS, {"prompt": "a", "prompt_embeds": "AAAA"}, "code"),
    ],
)
def test_what_reaches_for_more_than_an_answer(path: str, body: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotAllowed) as refused:
        ask(path, **body)
    assert refused.value.reason == reason


_SCHEMA = {"properties": {"image_url": {"type": "string", "default": "http://a"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": "see https://example.org/"}]},
        parts({"type": "text", "text": "https://example.org"}),
        parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        {"messages": [{"content": None, "tool_calls": [{"function": {"arguments": '{"url":"http://a"}'}}]}]},
        {"messages": [], "tools": [{"type": "function", "function": {"parameters": _SCHEMA}}]},
        {"messages": [], "background": False, "previous_response_id": None, "tool_choice": "auto"},
        parts({"type": "output_text", "text": "a", "annotations": [{"url": "http://a"}]}),
    ],
)
def test_what_only_looks_like_it(body: dict[str, Any]) -> None:
    assert ask(CHAT, **body).content["messages"] == body["messages"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"a":1,"a":2}',
        b'{"temperature":NaN}',
        b'{"messages":[],"temperature":1e999}',
        b'{"messages":{}}',
        b'{"messages":[1]}',
        b'{"messages":[],"max_tokens":-1}',
        b'{"messages":[],"max_tokens":1.5}',
        b'{"messages":[],"max_tokens":"1"}',
        b'{"messages":[],"n":true}',
        b'{"messages":[],"stream":1}',
        b'{"messages":[],"model":["a"]}',
        b'{"messages":[],"model":"a\\u0000"}',
        b'{"messages":[],"tools":{}}',
        b'{"messages":[],"stop_token_ids":[' + b"1," * 70_000 + b"1]}",
        b'{"messages":[],"tools":[' + b"[1,2]," * 30_000 + b"[]]}",
        b'{"messages":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":[],"seed":' + b"1" * 5000 + b"}",
    ],
)
def test_what_cannot_be_read(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read(CHAT, body)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_KEYS = st.sampled_from("type content image_url url text a".split())
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=20
)
_FIELDS = st.sampled_from("model messages input prompt tools tool_choice n max_tokens stream stream_options x".split())


@given(st.sampled_from([CHAT, COMPLETIONS, RESPONSES]), st.dictionaries(_FIELDS, _JSON))
def test_no_body_raises_anything_else(path: str, body: dict[str, Any]) -> None:
    try:
        asked = ask(path, **body)
    except (BadRequest, NotAllowed):
        return
    assert asked.prompt > 0
    assert asked.copies >= 0
    assert json.loads(compose(asked, None)) == asked.content

"""What a request asks of the model: at most how many tokens, and whether it reaches for more. Pure; in the mover.

A body is read, judged field by field, and written anew: the engine sees the fields of :data:`_FIELDS` and no others.
What would make the engine fetch, load, remember or run something on a tool's behalf is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from ray_guard.egress.relay.model.requests import CHAT, COMPLETIONS, RESPONSES, NotAllowed

MOST: Final = 1 << 31
"""No number of tokens, choices or prompts is as large."""
_MODEL_LENGTH: Final = 256
_TEMPLATE: Final = 256
"""Tokens that a chat template may add to a request of its own accord."""
_DEPTH: Final = 100
_VALUES: Final = 1 << 16
_BRACKETS: Final = 1 << 18
"""In a body, in texts too: each may be an object, and making millions of them would keep other connections waiting."""
_PER_VALUE: Final = 8
"""Tokens around a message, a part of it, a key or value of a tool's schema: role marks, quotes, indentation."""
_IMAGE: Final = 1 << 14
"""Tokens of one image or sound, at most."""
_VIDEO: Final = 1 << 17

_SAMPLING: Final = frozenset(
    "model stream stream_options n temperature top_p top_k min_p seed stop stop_token_ids user frequency_penalty "
    "presence_penalty repetition_penalty length_penalty logit_bias logprobs top_logprobs prompt_logprobs "
    "logprob_token_ids min_tokens ignore_eos bad_words allowed_token_ids skip_special_tokens "
    "spaces_between_special_tokens include_stop_str_in_output truncate_prompt_tokens truncation_side "
    "add_special_tokens response_format structured_outputs guided_json guided_regex guided_choice guided_grammar "
    "return_tokens_as_token_ids return_token_ids cache_salt prompt_cache_key metadata max_tokens".split()
)
_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    COMPLETIONS: _SAMPLING | set("prompt suffix echo best_of".split()),
    CHAT: _SAMPLING
    | set(
        "messages tools tool_choice functions function_call parallel_tool_calls max_completion_tokens reasoning_effort "
        "thinking_token_budget include_reasoning reasoning chat_template_kwargs documents add_generation_prompt "
        "continue_final_message echo modalities prediction verbosity".split()
    ),
    RESPONSES: frozenset(
        "model stream input instructions max_output_tokens max_tool_calls metadata parallel_tool_calls reasoning text "
        "tool_choice tools temperature top_p top_k min_p top_logprobs truncation user include include_reasoning "
        "logit_bias presence_penalty frequency_penalty repetition_penalty seed stop skip_special_tokens "
        "include_stop_str_in_output prompt_cache_key safety_identifier structured_outputs ignore_eos".split()
    ),
}
_REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params"), ("reaches_out", "it names another engine")),
    **dict.fromkeys(
        ("lora", "lora_path", "lora_request", "adapter"),
        ("weights", "weights are not a tool's to choose: name a model"),
    ),
    **dict.fromkeys(("prompt_embeds", "chat_template", "logits_processors"), ("code", "the engine would run it")),
    "use_beam_search": ("uncounted", "the prompt is computed again for every token, and the answer does not tell"),
    **dict.fromkeys(
        ("previous_response_id", "conversation", "background"), ("stored_state", "nothing is kept between requests")
    ),
}
_TEXT_PARTS: Final = frozenset(
    "text input_text output_text refusal thinking reasoning reasoning_text summary_text".split()
)
_MEDIA_PARTS: Final[Mapping[str, int]] = {
    **dict.fromkeys("image_url input_image input_audio audio_url image audio".split(), _IMAGE),
    "video_url": _VIDEO,
}
_ITEMS: Final = frozenset(
    "message reasoning function_call function_call_output custom_tool_call custom_tool_call_output local_shell_call "
    "local_shell_call_output shell_call shell_call_output apply_patch_call apply_patch_call_output".split()
)
"""What the input of the Responses API is made of."""
_LOCAL_TOOLS: Final = frozenset({"function", "custom", "local_shell", "shell", "apply_patch"})
"""Tools that the client itself runs."""


class BadRequest(Exception):
    """A body that cannot be read; ``param`` is the field."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param


class Ask(NamedTuple):
    """What a request asks for."""

    path: str
    model: str
    prompt: int
    """Tokens of the prompt, at most (of all prompts)."""
    choices: int
    """How many answers each prompt has: so often is it computed, at most."""
    copies: int
    """How many answers are generated."""
    output: int | None
    """Tokens of each, at most; None: the request does not say."""
    stream: bool
    usage: bool
    """The client wants to see the usage of a stream."""
    each_usage: bool
    """And that in every event."""
    content: dict[str, Any]
    """The body to send, but for what :func:`compose` adds."""
    dropped: tuple[str, ...]
    """Fields that go nowhere."""


def read(path: str, body: bytes) -> Ask:
    """What the body of a call asks for.

    Raises:
        BadRequest: it is no JSON object, or a number in it is none.
        NotAllowed: it reaches for more than an answer.
    """
    given = _decode(body)
    for field, (reason, text) in _REFUSED.items():
        if given.get(field) not in (None, False):
            raise NotAllowed(reason, f"{field}: {text}")
    kwargs = given.get("chat_template_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("chat_template") is not None:
        raise NotAllowed("code", "chat_template_kwargs: the engine would run a template")
    if path == RESPONSES and given.get("prompt") is not None:
        raise NotAllowed("stored_state", "prompt: a template that is stored with the server")
    content = {key: value for key, value in given.items() if key in _FIELDS[path] and value is not None}
    prompts, prompt = _prompts(content) if path == COMPLETIONS else (1, 0)
    prompt += _TEMPLATE + _bound(value for key, value in content.items() if key != "prompt")
    prompt += _judge_content(path, content)
    _judge_tools(content)
    choices = max(_count(content, "n", 1), _count(content, "best_of", 1))
    stream = _flag(content, "stream")
    options = content.pop("stream_options", None)
    options = options if isinstance(options, dict) else {}
    if path == RESPONSES:
        content["store"] = False
    elif stream:
        content["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return Ask(
        path=path,
        model=_model(content),
        prompt=prompt,
        choices=choices,
        copies=choices * prompts,
        output=_output(path, content),
        stream=stream,
        usage=path == RESPONSES or options.get("include_usage") is True,
        each_usage=path == RESPONSES or options.get("continuous_usage_stats") is True,
        content=content,
        dropped=tuple(sorted(key[:64] for key in given if key not in _FIELDS[path] and given[key] is not None))[:32],
    )


def compose(ask: Ask, fill: int | None) -> bytes:
    """The body that goes to the engine; ``fill``: how much each answer may be, where the request does not say."""
    content = ask.content
    if fill is not None:
        content = {**content, "max_output_tokens" if ask.path == RESPONSES else "max_tokens": fill}
    return json.dumps(content, separators=(",", ":")).encode()


def _decode(body: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise BadRequest("a key is given twice")
        return found

    def constant(word: str) -> NoReturn:
        raise BadRequest(f"{word} is not JSON")

    def number(word: str) -> float:
        return float(word) if math.isfinite(float(word)) else constant(word)

    if body.count(b"[") + body.count(b"{") > _BRACKETS:
        raise BadRequest(f"it has more than {_BRACKETS} brackets")
    try:
        given = json.loads(body.decode(), object_pairs_hook=unique, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(given, dict):
        raise BadRequest("the body is not a JSON object")
    return given


def _model(content: Mapping[str, Any]) -> str:
    model = content.get("model", "")
    if not isinstance(model, str) or len(model) > _MODEL_LENGTH or not model.isprintable():
        raise BadRequest("model is the name of a model", "model")
    return model


def _count(content: Mapping[str, Any], field: str, absent: int) -> int:
    value = content.get(field, absent)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise BadRequest(f"{field} is a whole number, not negative", field)
    return value


def _flag(content: Mapping[str, Any], field: str) -> bool:
    value = content.get(field, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{field} is true or false", field)
    return value


def _output(path: str, content: dict[str, Any]) -> int | None:
    if path == COMPLETIONS:  # what the API says where the request does not
        content.setdefault("max_tokens", 16)
    names = ("max_output_tokens",) if path == RESPONSES else ("max_tokens", "max_completion_tokens")
    said = [_count(content, name, 0) for name in names if name in content]
    return max(1, *said) if said else None  # asked for none, with ``echo``, vLLM generates one


# -- how long the prompt can be ----------------------------------------------------------------------------------------


def _prompts(content: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts there are, and their tokens, which are given or bounded."""
    prompt = content.get("prompt", "")
    if isinstance(prompt, str):
        return 1, _bound([prompt])
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("prompt is text, tokens, or a list of these", "prompt")
    if all(type(each) is int for each in prompt):
        return 1, len(prompt)
    if all(isinstance(each, str) for each in prompt):
        return len(prompt), _bound(prompt)
    if all(isinstance(each, list) and all(type(token) is int for token in each) for each in prompt):
        return len(prompt), sum(map(len, prompt))
    raise BadRequest("prompt is text, tokens, or a list of these", "prompt")


def _bound(values: Iterable[Any]) -> int:
    """Tokens of these values at most: one for each byte of text, and some around each value.

    No tokenizer that falls back to bytes makes more of a text than it has bytes. Raises BadRequest where they are
    nested deeper than any request is, or so many that reading them would keep others waiting.
    """
    count, left = 0, [(value, 1) for value in values]
    seen = 0
    while left:
        value, depth = left.pop()
        seen += 1
        if seen + len(left) > _VALUES:
            raise BadRequest(f"it has more than {_VALUES} values")
        count += _PER_VALUE
        if isinstance(value, str):
            count += _bytes(value)
        elif isinstance(value, dict | list):
            if depth == _DEPTH:
                raise BadRequest("it is nested too deeply")
            if len(value) > _VALUES:
                raise BadRequest(f"it has more than {_VALUES} values")
            left += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
            count += sum(map(_bytes, value)) if isinstance(value, dict) else 0
        elif not isinstance(value, bool | None):
            count += len(str(value))
    return count


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# -- what it reaches for -----------------------------------------------------------------------------------------------


def _judge_content(path: str, content: Mapping[str, Any]) -> int:
    """Tokens of all media at most, less the bytes that carry them: these are no text.

    Raises NotAllowed for a medium that the engine would have to fetch.
    """
    messages = content.get("input" if path == RESPONSES else "messages", [])
    if path == COMPLETIONS or isinstance(messages, str):
        return 0
    if not isinstance(messages, list):
        raise BadRequest("messages are a list", "messages")
    return sum(_judge_message(message) for message in messages)


def _judge_message(message: object) -> int:
    if not isinstance(message, dict):
        raise BadRequest("a message is an object", "messages")
    kind = _kind(message, "message")
    if kind in _TEXT_PARTS or kind in _MEDIA_PARTS:  # the Responses API takes parts without a message around them
        return _judge_part(message)
    if kind not in _ITEMS:
        raise NotAllowed("content", f"{kind[:40]!r}: messages, and calls of the client's own tools with their outputs")
    count = 0
    for field in ("content", "output", "summary"):
        parts = message.get(field)
        if isinstance(parts, dict):
            parts = [parts]
        if isinstance(parts, list):
            count += sum(_judge_part(part) for part in parts)
    return count


def _kind(value: Mapping[str, Any], absent: str) -> str:
    kind = value.get("type")
    return absent if kind is None else kind if isinstance(kind, str) else "?"


def _judge_part(part: object) -> int:
    if isinstance(part, str):
        return 0
    if not isinstance(part, dict):
        raise BadRequest("a part of a message is an object", "messages")
    kind = _kind(part, "")
    if kind not in _TEXT_PARTS and kind not in _MEDIA_PARTS:
        raise NotAllowed("content", f"a part of a message is text, an image, sound or video, not {kind[:40]!r}")
    carried = 0
    for key, value in part.items():
        if key.endswith(("_embeds", "file_id")) and value is not None:
            raise NotAllowed("content", f"{key}: text and data: URLs alone")
        if key == "input_audio" and isinstance(value, dict) and isinstance(value.get("data"), str):
            carried += len(value["data"])
        elif key != "annotations":  # what a model has cited is not fetched
            carried += _carried(key, value)
    return _MEDIA_PARTS[kind] - carried if kind in _MEDIA_PARTS else 0


def _carried(key: str, value: object) -> int:
    """Bytes of the data: URLs in it. Raises NotAllowed for any other."""
    if isinstance(value, dict):
        return sum(_carried(inner, each) for inner, each in value.items())
    if isinstance(value, list):
        return sum(_carried(key, each) for each in value)
    if not isinstance(value, str) or not key.endswith(("url", "image", "audio", "video")):
        return 0
    if not value.startswith("data:"):
        raise NotAllowed("reaches_out", f"{key}: the engine would fetch it; send it as data: instead")
    return _bytes(value)


def _judge_tools(content: Mapping[str, Any]) -> None:
    choice = content.get("tool_choice")
    for tool in [*_tools(content.get("tools")), *([choice] if isinstance(choice, dict) else [])]:
        kind = _kind(tool, "function") if isinstance(tool, dict) else ""
        if kind == "allowed_tools":
            _judge_tools({"tools": tool.get("tools")})
        elif kind not in _LOCAL_TOOLS:
            raise NotAllowed("remote_tool", f"the server would run {kind[:40]!r}; a tool is a function of the client")


def _tools(tools: object) -> list[Any]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadRequest("tools are a list", "tools")
    return tools

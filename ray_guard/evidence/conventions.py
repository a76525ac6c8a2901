"""What other instrumentations call tool calls, agents and model calls, in the words of the trace model. Runs later.

Pure. They say what a span is in an attribute, each in one of its own, and call it what they like: :func:`told` gives
such a span the model's name, and the attributes that the model has for what it said elsewhere. Nothing is taken away.
Names as of 2026-11: semantic-conventions-genai, OpenInference 0.1.42, OpenLLMetry 0.62, Langfuse 5.0, MLflow 3,
LangSmith, and the AI SDK of Vercel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from ray_guard.records import Attributes, AttributeValue, SpanRecord

_TOOL: Final = "execute_tool"
_AGENT: Final = "invoke_agent"
_CHAT: Final = "chat"
_MODEL: Final = ("execute_tool", "invoke_agent", "chat ", "egress ", "process ", "rl.", "ray_guard.")
"""What the names of the trace model begin with."""

#: attribute, and what its values (in lower case) mean: others are of no concern here
_SAID: Final[tuple[tuple[str, Mapping[str, str]], ...]] = (
    (
        "gen_ai.operation.name",
        {
            "execute_tool": _TOOL,
            "invoke_agent": _AGENT,
            "invoke_workflow": _AGENT,
            "chat": _CHAT,
            "text_completion": _CHAT,
            "generate_content": _CHAT,
        },
    ),
    ("openinference.span.kind", {"tool": _TOOL, "agent": _AGENT, "llm": _CHAT}),
    ("traceloop.span.kind", {"tool": _TOOL, "agent": _AGENT, "workflow": _AGENT}),
    ("llm.request.type", {"chat": _CHAT, "completion": _CHAT}),
    ("langfuse.observation.type", {"tool": _TOOL, "agent": _AGENT, "generation": _CHAT}),
    (
        "ai.operationId",
        {
            "ai.toolcall": _TOOL,
            "ai.generatetext": _AGENT,
            "ai.streamtext": _AGENT,
            "ai.generatetext.dogenerate": _CHAT,
            "ai.streamtext.dostream": _CHAT,
        },
    ),
    ("mlflow.spanType", {"tool": _TOOL, "agent": _AGENT, "llm": _CHAT, "chat_model": _CHAT}),
    ("langsmith.span.kind", {"tool": _TOOL, "llm": _CHAT}),
)

_INPUT: Final = ("traceloop.entity.input", "langfuse.observation.input", "input.value", "mlflow.spanInputs")
#: of each kind, what the model calls an attribute, and what others do, the most telling first
_ALIASES: Final[Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    _TOOL: (
        ("gen_ai.tool.name", ("tool.name", "ai.toolCall.name", "traceloop.entity.name")),
        ("gen_ai.tool.call.id", ("tool_call.id", "tool.id", "ai.toolCall.id")),
        (
            "gen_ai.tool.call.arguments",
            ("ai.toolCall.args", "tool_arguments", *_INPUT, "gen_ai.prompt", "tool.parameters"),
        ),
    ),
    _AGENT: (("gen_ai.agent.name", ("agent.name", "traceloop.entity.name", "ai.telemetry.functionId")),),
    _CHAT: (
        (
            "gen_ai.request.model",
            ("gen_ai.response.model", "llm.model_name", "langfuse.observation.model.name", "ai.model.id"),
        ),
        (
            "gen_ai.usage.input_tokens",
            ("gen_ai.usage.prompt_tokens", "llm.token_count.prompt", "ai.usage.inputTokens", "ai.usage.promptTokens"),
        ),
        (
            "gen_ai.usage.output_tokens",
            (
                "gen_ai.usage.completion_tokens",
                "llm.token_count.completion",
                "ai.usage.outputTokens",
                "ai.usage.completionTokens",
            ),
        ),
    ),
}
#: the attribute by which a span of the kind is named
_NAMED: Final = {_TOOL: "gen_ai.tool.name", _AGENT: "gen_ai.agent.name", _CHAT: "gen_ai.request.model"}


def told(span: SpanRecord) -> SpanRecord:
    """The span as the trace model has it; itself where it already is of the model, or nothing the model knows."""
    about = span.attributes
    if span.name.startswith(_MODEL) or "ray_guard.source" in about:
        return span
    kind = _kind(about)
    if kind is None:
        return span
    more: dict[str, AttributeValue] = {}
    for name, aliases in _ALIASES[kind]:
        value = about.get(name) or next((about[alias] for alias in aliases if about.get(alias)), None)
        if value is not None:
            more[name] = value
    arguments = more.get("gen_ai.tool.call.arguments")
    if isinstance(arguments, str):
        more["gen_ai.tool.call.arguments"] = _passed(arguments)
    named = more.setdefault(_NAMED[kind], span.name)
    return span._replace(name=f"{kind} {named}", attributes={**about, **more})


def _kind(about: Attributes) -> str | None:
    for attribute, kinds in _SAID:
        said = about.get(attribute)
        if isinstance(said, str) and (kind := kinds.get(said.strip('"').lower())):  # MLflow writes all values as JSON
            return kind
    return None


def _passed(arguments: str) -> str:
    """What a tool was called with, without what decorators (``kwargs``) and LangChain (``inputs``) wrap around it."""
    try:
        said: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if not isinstance(said, dict):
        return arguments
    if said.keys() == {"args", "kwargs"}:
        inner = said if said["args"] else said["kwargs"]
    else:
        inner = said.get("inputs") if "input_str" in said else said
    return json.dumps(inner, ensure_ascii=False) if inner and inner is not said else arguments

"""What a mixture-of-experts policy costs: parameters and FLOPs per token, from its Hugging Face ``config.json``. Pure.

Runs anywhere. Standard library only. An architecture that is not listed in :data:`ARCHITECTURES`, a field that changes
the arithmetic, or one that is missing is an error, never a guess: a library's default is not the checkpoint's value.

    per token at context length n:   flops_per_token + n · flops_per_context_token

Each weight that a token passes counts one multiplication and one addition. The output projection counts, the embedding
does not (it is looked up). Attention over the context counts its two products, without the causal half: a token's own
context *is* its half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from ray_guard.errors import UnknownArchitecture

_MOST: Final = (1 << 31) - 1
"""Of any field: more is a mistake, and its cost would be no number that a budget could be held to."""
_MOST_LAYERS: Final = 10_000


class Cost(NamedTuple):
    """Parameters are counted, FLOPs estimated from them.

    ``active_*``: parameters that one token passes: its top-k experts of each layer, the shared ones, everything that is
    not an expert. Publishers differ in which of the two vocabulary matrices they count, so each count says it in its
    name; ``active_params`` counts both. Where the two are tied there is one matrix, and it counts once.
    """

    total_params: int
    active_params: int
    active_params_no_embedding: int
    active_params_with_lm_head: int
    flops_per_token: int
    """Floating-point operations per token with an empty context."""
    flops_per_context_token: int
    """More, per token and per token of its context."""

    def flops(self, tokens: int, context: int) -> int:
        """FLOPs of ``tokens`` tokens in a row, the first of which sees ``context`` tokens before it."""
        seen = tokens * context + tokens * (tokens - 1) // 2
        return tokens * self.flops_per_token + seen * self.flops_per_context_token


class Weights(NamedTuple):
    """``matrix``: weights that are multiplied with, biases included. ``other``: norms and the like."""

    matrix: int
    other: int = 0

    def __mul__(self, count: object) -> Weights:
        if not isinstance(count, int):
            return NotImplemented
        return Weights(self.matrix * count, self.other * count)

    def __add__(self, more: object) -> Weights:
        if not isinstance(more, Weights):
            return NotImplemented
        return Weights(self.matrix + more.matrix, self.other + more.other)

    @property
    def all(self) -> int:
        return self.matrix + self.other


class Shape(NamedTuple):
    """A decoder of ``layers`` layers, ``dense`` of which have an ordinary MLP where the others have experts."""

    hidden: int
    layers: int
    dense: int
    vocabulary: int
    tied: bool
    attention: Weights
    """Of one layer, its norms included."""
    context_flops: int
    """Of one layer, per token of the context."""
    expert: Weights
    experts: int
    chosen: int
    shared: Weights
    """All shared experts of one layer."""
    router: Weights
    mlp: Weights
    """Of one dense layer."""

    def cost(self) -> Cost:
        sparse = self.layers - self.dense
        norms = Weights(0, 2 * self.hidden * self.layers + self.hidden)
        always = self.attention * self.layers + (self.shared + self.router) * sparse + self.mlp * self.dense + norms
        active = always + self.expert * self.chosen * sparse
        whole = always + self.expert * self.experts * sparse
        matrix = self.vocabulary * self.hidden
        both = matrix if self.tied else 2 * matrix
        return Cost(
            total_params=whole.all + both,
            active_params=active.all + both,
            active_params_no_embedding=active.all,
            active_params_with_lm_head=active.all + matrix,
            flops_per_token=2 * (active.matrix + matrix),
            flops_per_context_token=self.layers * self.context_flops,
        )


class _Config:
    """A configuration, read field by field; each complaint names the field, its value and what would be right."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def count(self, *names: str) -> int:
        """A whole number above zero under ``names``, of which the file states one, or all of them alike."""
        found = [(name, self._values[name]) for name in names if self._values.get(name) is not None]
        if not found:
            raise UnknownArchitecture(names[0], None, "the configuration must state it")
        for name, value in found:
            if not _is_count(value) or value == 0:
                raise UnknownArchitecture(name, value, f"a whole number above zero, and at most {_MOST}")
            if value != found[0][1]:
                raise UnknownArchitecture(name, value, f"the same as {found[0][0]}, which is {found[0][1]}")
        value = found[0][1]
        return int(value)

    def maybe(self, name: str, missing: int) -> int:
        """A whole number, zero allowed; ``missing`` where the field is absent or null."""
        value = self._values.get(name)
        if value is None:
            return missing
        if not _is_count(value):
            raise UnknownArchitecture(name, value, f"a whole number, not negative, and at most {_MOST}")
        return int(value)

    def stated(self, name: str) -> int:
        """A whole number that the file must state; zero and null mean that there is none."""
        if name not in self._values:
            raise UnknownArchitecture(name, None, "the configuration must state it, as null where there is none")
        return self.maybe(name, 0)

    def flag(self, name: str, missing: bool) -> bool:  # noqa: FBT001 - the value of a missing field
        value = self._values.get(name)
        if value is None:
            return missing
        if not isinstance(value, bool):
            raise UnknownArchitecture(name, value, "true or false")
        return value

    def layers(self) -> int:
        """How many there are."""
        count = self.count("num_hidden_layers")
        if count > _MOST_LAYERS:
            raise UnknownArchitecture("num_hidden_layers", count, f"at most {_MOST_LAYERS}")
        return count

    def numbers(self, name: str, below: int) -> frozenset[int]:
        """Different numbers from zero on."""
        value = self._values.get(name)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(_is_count(each) and each < below for each in value):
            raise UnknownArchitecture(name, value, f"a list of layer numbers below {below}")
        return frozenset(value)

    def texts(self, name: str) -> list[str]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise UnknownArchitecture(name, value, "a list of names")
        return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def cost(config: Mapping[str, Any]) -> Cost:
    """The cost of the model that a ``config.json`` describes.

    Raises:
        UnknownArchitecture: it is none of :data:`ARCHITECTURES`, or the file does not say what is needed.
    """
    if not isinstance(config, Mapping):
        raise UnknownArchitecture("config", config, "an object, as in a Hugging Face config.json")
    kind = config.get("model_type")
    known = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise UnknownArchitecture("model_type", kind, f"one of {', '.join(sorted(ARCHITECTURES))}")
    fields = _Config(config)
    _check_kind(config, fields)
    shape = known(fields)
    if shape.chosen > shape.experts:
        raise UnknownArchitecture(
            "num_experts_per_tok", shape.chosen, f"at most the number of experts, {shape.experts}"
        )
    if not 0 <= shape.dense <= shape.layers:
        raise UnknownArchitecture("first_k_dense_replace", shape.dense, f"at most the {shape.layers} layers")
    return shape.cost()


def _check_kind(config: Mapping[str, Any], fields: _Config) -> None:
    """Refuses what makes a model of a known type another one. Raises UnknownArchitecture."""
    if config.get("text_config") is not None:
        raise UnknownArchitecture("text_config", "…", "a language model alone: give the text model's own configuration")
    classes = fields.texts("architectures")
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise UnknownArchitecture("architectures", classes, "a causal language model (…ForCausalLM)")
    kinds = fields.texts("layer_types")
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnknownArchitecture("layer_types", sorted(strange), "full_attention or sliding_attention")
    if kinds and len(kinds) != fields.layers():
        raise UnknownArchitecture("layer_types", len(kinds), f"one for each of the {fields.layers()} layers")


# Parts -------------------------------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> Weights:
    return Weights(inputs * outputs + (outputs if bias else 0))


def _gated_mlp(hidden: int, inner: int) -> Weights:
    """gate, up and down projections."""
    return Weights(3 * hidden * inner)


def _grouped_attention(
    config: _Config, width: int, *, bias: bool, output_bias: bool, norms: int = 0
) -> tuple[Weights, int]:
    """Grouped-query attention: its weights, and FLOPs per token of context.

    ``width``: of a head; ``norms``: further weights, of norms.
    """
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    groups = config.count("num_key_value_heads")
    if heads % groups:
        raise UnknownArchitecture("num_key_value_heads", groups, f"a divisor of the {heads} attention heads")
    weights = (
        _linear(hidden, heads * width, bias=bias)
        + _linear(hidden, groups * width, bias=bias) * 2
        + _linear(heads * width, hidden, bias=output_bias)
        + Weights(0, norms)
    )
    return weights, 4 * heads * width


def _head(config: _Config) -> int:
    """Size of a head. Mixtral and OLMoE may leave it out (hidden / heads); others have another, and state it."""
    return config.count("head_dim")


def _head_or_share(config: _Config) -> int:
    """The same, where it may be left out."""
    if config.maybe("head_dim", -1) >= 0:
        return config.count("head_dim")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if hidden % heads:
        raise UnknownArchitecture(
            "hidden_size", hidden, f"a multiple of the {heads} attention heads, or state head_dim"
        )
    return hidden // heads


def _latent_attention(config: _Config) -> tuple[Weights, int]:
    """Multi-head latent attention (DeepSeek-V2): queries and keys have a rotated part and one that is not."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    rank, rotated = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    plain, value = config.count("qk_nope_head_dim"), config.count("v_head_dim")
    bias = config.flag("attention_bias", missing=False)
    query_rank = config.stated("q_lora_rank")
    if query_rank:
        query = _linear(hidden, query_rank, bias=bias) + _linear(query_rank, heads * (plain + rotated))
        query += Weights(0, query_rank)
    else:
        query = _linear(hidden, heads * (plain + rotated))
    weights = (
        query
        + _linear(hidden, rank + rotated, bias=bias)
        + Weights(0, rank)
        + _linear(rank, heads * (plain + value))
        + _linear(heads * value, hidden, bias=bias)
    )
    return weights, 2 * heads * (plain + rotated) + 2 * heads * value


# Architectures -----------------------------------------------------------------------------------------------------


def _qwen3(config: _Config) -> Shape:
    hidden, layers = config.count("hidden_size"), config.layers()
    experts, width = config.count("num_experts", "num_local_experts"), _head(config)
    bias = config.flag("attention_bias", missing=False)
    attention, context = _grouped_attention(config, width, bias=bias, output_bias=bias, norms=2 * width)
    step, dense_layers = config.maybe("decoder_sparse_step", 1), config.numbers("mlp_only_layers", below=layers)
    if step == 0:
        raise UnknownArchitecture("decoder_sparse_step", step, "a whole number above zero")
    sparse = [at for at in range(layers) if at not in dense_layers and (at + 1) % step == 0]
    dense = layers - len(sparse)
    inner = config.maybe("shared_expert_intermediate_size", 0)  # no published one has it; vLLM builds it where stated
    return Shape(
        hidden=hidden,
        layers=layers,
        dense=dense,
        vocabulary=config.count("vocab_size"),
        tied=config.flag("tie_word_embeddings", missing=False),
        attention=attention,
        context_flops=context,
        expert=_gated_mlp(hidden, config.count("moe_intermediate_size")),
        experts=experts,
        chosen=config.count("num_experts_per_tok"),
        shared=_gated_mlp(hidden, inner) + _linear(hidden, 1) if inner else Weights(0),
        router=_linear(hidden, experts),
        mlp=_gated_mlp(hidden, config.count("intermediate_size")) if dense else Weights(0),
    )


def _mixtral(config: _Config) -> Shape:
    attention, context = _grouped_attention(config, _head_or_share(config), bias=False, output_bias=False)
    return _all_sparse(config, attention, context, config.count("num_local_experts", "num_experts"))


def _olmoe(config: _Config) -> Shape:
    width = _head_or_share(config)
    norms = width * (config.count("num_attention_heads") + config.count("num_key_value_heads"))
    bias = config.flag("attention_bias", missing=False)
    attention, context = _grouped_attention(config, width, bias=bias, output_bias=bias, norms=norms)
    return _all_sparse(config, attention, context, config.count("num_experts", "num_local_experts"))


def _all_sparse(config: _Config, attention: Weights, context: int, experts: int) -> Shape:
    """Every layer has experts, of ``intermediate_size``, and none is shared."""
    hidden = config.count("hidden_size")
    return Shape(
        hidden=hidden,
        layers=config.layers(),
        dense=0,
        vocabulary=config.count("vocab_size"),
        tied=config.flag("tie_word_embeddings", missing=False),
        attention=attention,
        context_flops=context,
        expert=_gated_mlp(hidden, config.count("intermediate_size")),
        experts=experts,
        chosen=config.count("num_experts_per_tok"),
        shared=Weights(0),
        router=_linear(hidden, experts),
        mlp=Weights(0),
    )


def _gpt_oss(config: _Config) -> Shape:
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    experts = config.count("num_local_experts", "num_experts")
    bias = config.flag("attention_bias", missing=True)
    sinks = config.count("num_attention_heads")
    attention, context = _grouped_attention(config, _head(config), bias=bias, output_bias=bias, norms=sinks)
    return Shape(
        hidden=hidden,
        layers=config.layers(),
        dense=0,
        vocabulary=config.count("vocab_size"),
        tied=config.flag("tie_word_embeddings", missing=False),
        attention=attention,
        context_flops=context,
        expert=_linear(hidden, 2 * inner, bias=True) + _linear(inner, hidden, bias=True),
        experts=experts,
        chosen=config.count("num_experts_per_tok", "experts_per_token"),
        shared=Weights(0),
        router=_linear(hidden, experts, bias=True),
        mlp=Weights(0),
    )


def _deepseek_v2(config: _Config) -> Shape:
    return _first_dense(config, *_latent_attention(config), corrected=False)


def _deepseek_v3(config: _Config) -> Shape:
    return _first_dense(config, *_latent_attention(config), corrected=True)


def _glm4(config: _Config) -> Shape:
    width = _head(config)
    norms = 2 * width if config.flag("use_qk_norm", missing=False) else 0
    bias = config.flag("attention_bias", missing=False)
    attention, context = _grouped_attention(config, width, bias=bias, output_bias=False, norms=norms)
    return _first_dense(config, attention, context, corrected=True)


def _first_dense(config: _Config, attention: Weights, context: int, *, corrected: bool) -> Shape:
    """The first layers are dense, the others have routed and shared experts (DeepSeek's design).

    Layers that only predict further tokens in training (``num_nextn_predict_layers``) are not part of the policy.
    ``corrected``: the router has a bias per expert, which is added and not multiplied with.
    """
    hidden, inner = config.count("hidden_size"), config.count("moe_intermediate_size")
    layers, experts = config.layers(), config.count("n_routed_experts")
    if (most := config.maybe("index_topk", 0)) != 0:
        raise UnknownArchitecture("index_topk", most, "no sparse attention: what its indexer costs is not known")
    if config.maybe("moe_layer_freq", 1) != 1:
        raise UnknownArchitecture("moe_layer_freq", config.maybe("moe_layer_freq", 1), "1: no other is in use")
    dense = config.stated("first_k_dense_replace")
    return Shape(
        hidden=hidden,
        layers=layers,
        dense=dense,
        vocabulary=config.count("vocab_size"),
        tied=config.flag("tie_word_embeddings", missing=False),
        attention=attention,
        context_flops=context,
        expert=_gated_mlp(hidden, inner),
        experts=experts,
        chosen=config.count("num_experts_per_tok"),
        shared=_gated_mlp(hidden, inner) * config.stated("n_shared_experts"),
        router=_linear(hidden, experts) + Weights(0, experts if corrected else 0),
        mlp=_gated_mlp(hidden, config.count("intermediate_size")) if dense else Weights(0),
    )


ARCHITECTURES: Final[Mapping[str, Callable[[_Config], Shape]]] = MappingProxyType(
    {
        "deepseek_v2": _deepseek_v2,
        "deepseek_v3": _deepseek_v3,
        "glm4_moe": _glm4,
        "gpt_oss": _gpt_oss,
        "kimi_k2": _deepseek_v3,
        "mixtral": _mixtral,
        "olmoe": _olmoe,
        "qwen3_moe": _qwen3,
    }
)
"""What is understood, by ``model_type``."""

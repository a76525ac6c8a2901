"""The cost of published models, beside the numbers that their publishers and an independent count give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_guard.cli.__main__ import main
from ray_guard.compute.moe import cost
from ray_guard.errors import PolicyError, UnknownArchitecture

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
}  # fmt: skip
QWEN3_235B = {
    **QWEN3_30B, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": None, "intermediate_size": 14336, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X22B = {
    **MIXTRAL_8X7B, "hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48,
    "intermediate_size": 16384, "vocab_size": 32768,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "intermediate_size": 18432,
    "vocab_size": 129280, "tie_word_embeddings": False, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "intermediate_size": 10944,
    "vocab_size": 102400, "tie_word_embeddings": False,
}  # fmt: skip
KIMI_K2 = {
    **DEEPSEEK_V3, "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "vocab_size": 163840,
}  # fmt: skip
GPT_OSS_120B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 128,
    "num_experts_per_tok": 4, "vocab_size": 201088, "attention_bias": True, "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}  # fmt: skip
GPT_OSS_20B = {
    **GPT_OSS_120B, "num_hidden_layers": 24, "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
GLM_45_AIR = {
    "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 128,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 10944,
    "vocab_size": 151552, "attention_bias": True, "use_qk_norm": False, "tie_word_embeddings": False,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 50304, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip

#: total, active without embedding, with lm_head, with both [10⁹]; GFLOP per token, MFLOP per context token
PUBLISHED = [
    pytest.param(QWEN3_30B, (30.532, 2.731, 3.042, 3.353), 6.08, 0.786, id="Qwen3-30B-A3B"),
    pytest.param(QWEN3_235B, (235.094, 20.946, 21.568, 22.191), 43.14, 3.080, id="Qwen3-235B-A22B"),
    pytest.param(MIXTRAL_8X7B, (46.703, 12.618, 12.749, 12.880), 25.50, 0.524, id="Mixtral-8x7B"),
    pytest.param(MIXTRAL_8X22B, (140.630, 38.759, 38.960, 39.161), 77.92, 1.376, id="Mixtral-8x22B"),
    pytest.param(DEEPSEEK_V3, (671.026, 35.699, 36.626, 37.552), 73.25, 4.997, id="DeepSeek-V3"),
    pytest.param(DEEPSEEK_V2_LITE, (15.706, 2.242, 2.451, 2.661), 4.90, 0.276, id="DeepSeek-V2-Lite"),
    pytest.param(KIMI_K2, (1026.4, 30.513, 31.687, 32.862), 63.37, 2.499, id="Kimi-K2"),
    pytest.param(GPT_OSS_120B, (116.829, 4.554, 5.133, 5.712), 10.27, 0.590, id="GPT-OSS-120B"),
    pytest.param(GPT_OSS_20B, (20.915, 3.029, 3.608, 4.187), 7.22, 0.393, id="GPT-OSS-20B"),
    pytest.param(GLM_45_AIR, (106.852, 12.183, 12.803, 13.424), 25.61, 2.261, id="GLM-4.5-Air"),
    pytest.param(OLMOE, (6.919, 1.076, 1.179, 1.282), 2.36, 0.131, id="OLMoE-1B-7B"),
]


@pytest.mark.parametrize(("config", "params", "gflop", "mflop"), PUBLISHED)
def test_published_models(
    config: dict[str, Any], params: tuple[float, float, float, float], gflop: float, mflop: float
) -> None:
    found = cost(config)
    total, none, head, both = params
    assert found.total_params / 1e9 == pytest.approx(total, abs=0.06 if total > 1000 else 0.0006)
    assert found.active_params_no_embedding / 1e9 == pytest.approx(none, abs=0.0006)
    assert found.active_params_with_lm_head / 1e9 == pytest.approx(head, abs=0.0006)
    assert found.active_params / 1e9 == pytest.approx(both, abs=0.0006)
    assert found.flops_per_token / 1e9 == pytest.approx(gflop, abs=0.0051)
    assert found.flops_per_context_token / 1e6 == pytest.approx(mflop, abs=0.0006)


def test_tokens_in_a_row_see_each_other() -> None:
    found = cost(QWEN3_30B)
    one_by_one = sum(found.flops(1, context) for context in range(100, 110))
    assert found.flops(10, 100) == one_by_one
    assert found.flops(1, 0) == found.flops_per_token


def test_a_tied_matrix_counts_once() -> None:
    apart, tied = cost(OLMOE), cost({**OLMOE, "tie_word_embeddings": True})
    assert apart.total_params - tied.total_params == 50304 * 2048
    assert tied.flops_per_token == apart.flops_per_token
    assert tied.active_params == tied.active_params_with_lm_head


def test_dense_layers_among_sparse_ones() -> None:
    every_second = cost({**QWEN3_30B, "decoder_sparse_step": 2})
    by_hand = cost({**QWEN3_30B, "mlp_only_layers": list(range(0, 48, 2))})
    assert every_second == by_hand
    assert every_second.total_params < cost(QWEN3_30B).total_params


def test_a_shared_expert_that_vllm_would_build_is_counted() -> None:
    """In each of the 48 layers: gate, up and down of 2048 × 512, and one weight per input that says how much of it."""
    without, found = cost(QWEN3_30B), cost({**QWEN3_30B, "shared_expert_intermediate_size": 512})
    more = 48 * (3 * 2048 * 512 + 2048)
    assert found.total_params - without.total_params == more
    assert found.flops_per_token - without.flops_per_token == 2 * more


def test_sparse_attention_is_not_understood() -> None:
    with pytest.raises(UnknownArchitecture, match="index_topk"):
        cost({**DEEPSEEK_V3, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "qwen3_next"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["qwen3_moe"]}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures"),
        ({"text_config": {}}, "text_config"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": 48}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"architectures": 5}, "architectures"),
        ({"text_config": {"hidden_size": 1}}, "text_config"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"mlp_only_layers": ""}, "mlp_only_layers"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"head_dim": None}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**40}, "vocab_size"),
        ({"hidden_size": -2048}, "hidden_size"),
        ({"hidden_size": 2048.0}, "hidden_size"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"num_local_experts": 64}, "num_local_experts"),
        ({"attention_bias": "yes"}, "attention_bias"),
    ],
)
def test_what_is_not_understood_is_an_error(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UnknownArchitecture) as raised:
        cost({**QWEN3_30B, **change})
    assert raised.value.key == field
    assert isinstance(raised.value, PolicyError)


_NEEDED = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok", "vocab_size",
    "num_key_value_heads", "head_dim", "moe_intermediate_size", "intermediate_size",
    "num_experts", "num_local_experts", "n_routed_experts",
    "n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim",
}  # fmt: skip
#: what an architecture does not go by, or what it may leave out
_FREE = {
    "qwen3_moe": {"intermediate_size"},
    "mixtral": {"head_dim"},
    "deepseek_v3": {"num_key_value_heads", "head_dim"},
    "deepseek_v2": {"num_key_value_heads"},
    "kimi_k2": {"num_key_value_heads", "head_dim"},
}
_WRONG = [None, "8", -1, 1.5, True, [8], {}, 1 << 31, float("nan"), float("inf")]


@pytest.mark.parametrize("config", [param.values[0] for param in PUBLISHED], ids=[str(p.id) for p in PUBLISHED])
def test_every_field_that_counts_must_be_there_and_right(config: dict[str, Any]) -> None:
    """Each missing, and each with every kind of nonsense: an error that names it, never a cost."""
    free = _FREE.get(config["model_type"], set())
    null_is_none = {"q_lora_rank", "n_shared_experts", "first_k_dense_replace"}
    for field in (_NEEDED & set(config)) - free:
        without = {name: value for name, value in config.items() if name != field}
        wrong = [{**config, field: value} for value in _WRONG if value is not None or field not in null_is_none]
        for bad in (without, *wrong):
            with pytest.raises(UnknownArchitecture) as raised:
                cost(bad)
            assert raised.value.key == field


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B))
    assert main(["cost", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == cost(QWEN3_30B)._asdict()
    assert main(["cost", str(path), "--context", "1000"]) == 0
    assert "6.870 G" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["cost", str(path), "--context", "9" * 400])
    assert "not a number of tokens" in capsys.readouterr().err
    path.write_text('{"model_type": "mamba"}')
    assert main(["cost", str(path)]) == 1
    assert "mamba" in capsys.readouterr().err
    path.write_text("{")
    assert main(["cost", str(path)]) == 1
    assert main(["cost", str(tmp_path / "none.json")]) == 1

"""The count of parameters beside real models: transformers builds each architecture small, and counts its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from ray_guard.compute.moe import ARCHITECTURES, cost

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make env installs it")
torch = pytest.importorskip("torch", reason="torch is not installed: make env installs it")

_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
_SMALL: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "decoder_sparse_step": 2},
        {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [0], "attention_bias": True},
    ],
    "mixtral": [{"num_local_experts": 8}],
    "deepseek_v2": [_LATENT, {**_LATENT, "q_lora_rank": None}],
    "deepseek_v3": [_LATENT],
    "gpt_oss": [{"num_local_experts": 8, "head_dim": 16}],
    "glm4_moe": [
        {**_LATENT, "head_dim": 16, "attention_bias": bias, "use_qk_norm": norm}
        for bias, norm in ((True, False), (False, True))
    ],
    "olmoe": [{"num_experts": 8}, {"num_experts": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}],
}
_CASES = [pytest.param(kind, fields, id=f"{kind}-{at}") for kind in _SMALL for at, fields in enumerate(_SMALL[kind])]


def test_every_architecture_is_built() -> None:
    assert set(ARCHITECTURES) - set(_SMALL) == {"kimi_k2"}, "Kimi-K2 is DeepSeek-V3's architecture, not transformers'"


@pytest.mark.parametrize(("kind", "fields"), _CASES)
def test_parameters_of_a_real_model(kind: str, fields: dict[str, Any]) -> None:
    common = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
              "intermediate_size": 40, "vocab_size": 100, "num_experts_per_tok": 2, "pad_token_id": 0}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**common, **fields})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    corrections = [b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert cost(config.to_dict()).total_params == counted + sum(corrections)

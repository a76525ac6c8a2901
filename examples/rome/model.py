"""A small Qwen3-MoE, made on the spot: config, random weights and tokenizer; and the vLLM engine that serves it.

Nothing is downloaded. The weights are random, so the model has no intentions: it picks among the actions it is offered,
which is all the example needs. Everything else is what a full-sized policy has: a Qwen3-MoE with routed experts, a
byte-level tokenizer, vLLM's engine with its child processes, continuous batching and structured output.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

NAME = "qwen3-moe-tiny"

# What vLLM must find in its environment, in the actor and in the processes it starts: no network, one node on
# loopback, a small cache.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}

_SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_SEED = 20251231


def build(folder: Path, corpus: list[str]) -> Path:
    """The model's folder, made if it is not there yet: complete or absent, whoever else builds it meanwhile.

    Args:
        folder: where to put it.
        corpus: lines the tokenizer learns its merges from. Any other text still encodes, byte by byte.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        _write_tokenizer(unfinished, corpus)
        _write_weights(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_tokenizer(folder: Path, corpus: list[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        corpus, vocab_size=_SHAPE["vocab_size"] - 8, show_progress=False, special_tokens=["<|end|>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(learner.to_str()),
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(_SEED)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    model.to(torch.float32).save_pretrained(folder)


@dataclass(frozen=True)
class Choice:
    """What the model answered, and what it cost in tokens."""

    text: str
    input_tokens: int
    output_tokens: int


class Engine:
    """vLLM's asynchronous engine around the small model: many rollouts ask at once, one batch answers."""

    def __init__(self, folder: str, corpus: list[str]) -> None:
        os.environ.update(ENVIRONMENT)
        build(Path(folder), corpus)
        import torch
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=folder,
                served_model_name=NAME,
                dtype="auto" if torch.cuda.is_available() else "float32",
                max_model_len=2048,
                max_num_seqs=16,
                enforce_eager=True,
                enable_log_requests=False,
                disable_log_stats=True,
                gpu_memory_utilization=0.2,
            )
        )
        self._requests = 0

    async def choose(self, prompt: str, choices: list[str], seed: int) -> Choice:
        """One of ``choices``, picked by the model: its sampling is restricted to them, token by token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        self._requests += 1
        parameters = SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=512,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(choice=choices),
        )
        answers = [a async for a in self._engine.generate(prompt, parameters, f"choice-{self._requests}")]
        output = answers[-1].outputs[0]
        return Choice(output.text, len(answers[-1].prompt_token_ids), len(output.token_ids))

    async def close(self) -> None:
        """Ends the engine's processes."""
        self._engine.shutdown()

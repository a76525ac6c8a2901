"""vLLM's throughput with the hook and without: one confined process, one engine, the hook put in and taken out.

A small Qwen3-MoE on the CPU, so a request is short and what the hook costs for each is as large a part as it can be.
Goal: at least 0.98 of the throughput without. Both run confined, so what differs is the hook alone: a span, a
reservation and a settlement per request, and a look at each of the engine's outputs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Contestant, Report

HERE = Path(__file__).parent
REQUESTS = 32
TOKENS = 256


class Engine:
    """``LLM`` with a model made here, confined under budgets that are never reached."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(HERE.parent / "examples"))
        from rome.model import ENVIRONMENT, build

        os.environ.update(ENVIRONMENT)
        os.environ["RAY_GUARD_EVIDENCE"] = str(folder / "evidence")
        model = build(folder / "model", ["the quick brown fox", "jumps over the lazy dog"])

        import ray_guard

        ray_guard.confine(
            {
                "role": "policy",
                "gpu": "engine",
                "egress": {"allow": [f"unix://{folder.parent}/*", "collectives"]},
                "budgets": {"actor": {"tokens": 10**12, "flops": 1e21}},
            }
        )
        from vllm import LLM, SamplingParams

        from ray_guard.integrations.vllm import watch

        self._hook = watch
        self._episode = ray_guard.episode
        self._llm = LLM(
            model=str(model), dtype="float32", max_model_len=512, max_num_seqs=16, enforce_eager=True,
            enable_prefix_caching=False,
        )  # fmt: skip
        self._parameters = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        self._prompts: list[Any] = [{"prompt_token_ids": [5 + at] * 32} for at in range(REQUESTS)]
        self.cpu_us: dict[bool, list[float]] = {True: [], False: []}

    def run(self, *, hooked: bool) -> Sequence[float]:
        """Tokens per second of one batch."""
        if hooked:
            self._hook.install()
        else:
            self._hook.remove()
        with self._episode(budget={"tokens": 10**9}):
            began, cpu = time.perf_counter(), time.process_time()
            outputs = self._llm.generate(self._prompts, self._parameters, use_tqdm=False)
            lasted, cpu = time.perf_counter() - began, time.process_time() - cpu
        self.cpu_us[hooked].append(cpu / REQUESTS * 1e6)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == REQUESTS * TOKENS
        return [tokens / lasted]


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=20).parse_args()
    report = Report(options)
    with harness.scratch() as folder:
        engine = Engine(folder)
        outcomes = harness.compare(
            [
                Contestant("without the hook", lambda: engine.run(hooked=False)),
                Contestant("with the hook", lambda: engine.run(hooked=True)),
            ],
            options.rounds,
        )
        report.add(f"{REQUESTS} requests of {TOKENS} tokens", "tokens/s", outcomes, ["without the hook"])
        cost = sorted(engine.cpu_us[True])[options.rounds // 2] - sorted(engine.cpu_us[False])[options.rounds // 2]
        report.add_facts("CPU of vLLM's front end that the hook adds", {"µs per request": cost})
        middle, _, _ = harness.ratios(outcomes[1], outcomes[0])
        report.goal("throughput with the hook, of that without", middle, 0.98, at_least=True)
        report.close()


if __name__ == "__main__":
    main()

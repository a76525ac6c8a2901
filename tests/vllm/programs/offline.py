"""``LLM`` under budgets. Says what vLLM counted, what was refused, and what became of an engine that died."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any

from common import ENGINE, MODEL, NAME, confine, counted, described, refused, say

import ray_guard
from ray_guard.client.engine import EngineProcess


def main() -> None:
    confine(budgets={"actor": {"tokens": 3000, "flops": 1e12}})
    phases: list[tuple[int, str]] = []
    enter = EngineProcess.enter

    def noted(self: EngineProcess, phase: Any) -> None:
        phases.append((self.pid, phase.value))
        enter(self, phase)

    EngineProcess.enter = noted  # type: ignore[method-assign]

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    def most(tokens: int, **more: Any) -> SamplingParams:
        return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=1, **more)

    # Blocks of 128 tokens: eight of them are too few for what comes last.
    llm = LLM(**ENGINE, disable_log_stats=False, enable_prefix_caching=True, num_gpu_blocks_override=8)
    quiet = {"use_tqdm": False}
    long = "the quick brown fox jumps over the lazy dog " * 4

    with ray_guard.episode(id="several", policy_version="3"), ray_guard.turn(1):
        outputs = llm.generate(["the quick", "brown fox jumps", "over"], most(8), **quiet)
        outputs += llm.generate([long], most(3, n=2), **quiet)
        ray_guard_version("4")
        outputs += llm.generate([long], most(3), **quiet)  # its prompt is in the cache by now
        ray_guard_version(None)
        say("several", [counted(each) for each in outputs])

    with ray_guard.episode(id="short", budget={"tokens": 100}):
        served = []
        while True:
            try:
                served += llm.generate(["the lazy dog"], most(20), **quiet)
            except ray_guard.BudgetExceeded as error:
                say("short refused", described(error))
                break
        say("short", [counted(each) for each in served])
        say("batch", refused(lambda: llm.generate(["over", "over"], most(90), **quiet)))

    def chat() -> None:
        for _ in range(3):
            with ray_guard.chat("mine", config=f"{MODEL}/config.json") as mine:
                (output,) = llm.generate(["over"], most(20), **quiet)
                said = counted(output)
                mine.usage(said["input"], said["output"])
                charged.append(said["input"] + said["output"])

    charged: list[int] = []
    with ray_guard.episode(id="chat", budget={"tokens": 60}):
        say("chat", [refused(chat), charged])

    with ray_guard.episode(id="preempted"):
        outputs = llm.generate([f"the fox {n}" for n in range(6)], most(150), **quiet)
        say("preempted", [counted(each) for each in outputs])

    with ray_guard.episode(id="beams"):
        found = llm.beam_search([{"prompt": "brown"}], BeamSearchParams(beam_width=2, max_tokens=3))
        say("beams", [len(each.tokens) for each in found[0].sequences])

    with ray_guard.episode(id="aborted"):
        llm.llm_engine.add_request("gone", "the fox", most(200))
        while not (step := llm.llm_engine.step()) and llm.llm_engine.output_processor.request_states:
            if next(iter(llm.llm_engine.output_processor.request_states.values())).detokenizer.num_output_tokens() > 2:
                break
        llm.llm_engine.abort_request(["gone"])
        say("aborted", [len(step), llm.llm_engine.get_num_unfinished_requests()])

    llm.collective_rpc("check_health")
    say("perf", estimated(llm.llm_engine.vllm_config))
    say("engines", {"phases": phases, "pids": sorted({pid for pid, _ in phases}), "titles": titles(phases)})

    with ray_guard.episode(id="dead"):
        llm.llm_engine.add_request("last", "the dog", most(200))
        llm.llm_engine.step()
        # Not the core: were it killed, LLM itself would wait for ever (vLLM 0.32).
        worker = next(pid for pid, title in titles(phases).items() if "Worker" in title)
        os.kill(int(worker), signal.SIGKILL)

        def run() -> None:
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()

        say("dead", refused(run))
    say("model", NAME)


def ray_guard_version(version: str | None) -> None:
    from ray_guard.integrations.vllm import policy_version

    policy_version(version)


def titles(phases: list[tuple[int, str]]) -> dict[str, str]:
    found = {}
    for pid in {pid for pid, _ in phases}:
        with suppress(OSError), open(f"/proc/{pid}/cmdline") as line:
            found[str(pid)] = line.read().replace("\0", " ").strip()
    return found


def estimated(config: Any) -> dict[str, int]:
    """vLLM's own estimate, and what the two are known to differ in."""
    from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

    metrics = ModelMetrics(config)

    def flops(tokens: int, context: int, *, is_prefill: bool) -> int:
        return metrics.get_num_flops(ExecutionContext.from_single_request(tokens, context, is_prefill))

    return {"decode": flops(1, 100, is_prefill=False), "prefill": flops(50, 50, is_prefill=True)}


if __name__ == "__main__":
    main()

"""vLLM's throughput with the hook and without: one confined process, one engine, the hook put in and taken out.

A small Qwen3-MoE on the CPU, so a request is short and what the hook costs for each is as large a part as it can be.
Goal: at least 0.98 of the throughput without. Both run confined, so what differs is the hook alone: a span, a
reservation and a settlement per request, and a look at each of the engine's outputs.

A reservation waits for the supervisor, so on a busy machine the ratio measures how long that waits for a core. The CPU
time below does not: of this process within the hook, and of the supervisor, beside what the engine needs for a request.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import psutil
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
        self._clocked = _clock_hook()
        self.hook_us: list[float] = []
        """CPU per request, in this process."""
        self.supervisor_us: list[float] = []
        self.request_us: list[float] = []
        """CPU of everything for a request without the hook."""

    def run(self, *, hooked: bool) -> Sequence[float]:
        """Tokens per second of one batch."""
        if hooked:
            self._hook.install()
        else:
            self._hook.remove()
        self._clocked.clear()
        before = _cpu()
        with self._episode(budget={"tokens": 10**9}):
            began = time.perf_counter()
            outputs = self._llm.generate(self._prompts, self._parameters, use_tqdm=False)
            lasted = time.perf_counter() - began
        used = {pid: us - before.get(pid, 0) for pid, us in _cpu().items()}
        if hooked:
            self.hook_us.append(sum(self._clocked) / REQUESTS * 1e6)
            self.supervisor_us.append(used[_supervisor()] / REQUESTS)
        else:
            self.request_us.append(sum(used.values()) / REQUESTS)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == REQUESTS * TOKENS
        return [tokens / lasted]


def _clock_hook() -> list[float]:
    """Seconds of this thread's CPU within the hook, appended by each of its parts."""
    from ray_guard.integrations.vllm.requests import Ledger

    spent: list[float] = []

    def clocked(method: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*args)
            finally:
                spent.append(time.thread_time() - began)

        return run

    for name in ("admit", "running", "saw", "finished"):
        setattr(Ledger, name, clocked(getattr(Ledger, name)))
    return spent


def _supervisor() -> int:
    for process in psutil.process_iter(["cmdline"]):
        if "ray_guard.supervisor.__main__" in " ".join(process.info["cmdline"] or ()):
            return int(process.pid)
    raise SystemExit("no supervisor runs here")


def _cpu() -> dict[int, float]:
    """µs of CPU by pid, of this process, its tree, and the supervisor."""
    found = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True), psutil.Process(_supervisor())):
        times = process.cpu_times()
        found[process.pid] = (times.user + times.system) * 1e6
    return found


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
        hook, supervisor = statistics.median(engine.hook_us), statistics.mean(engine.supervisor_us)
        # The core and its worker spin while they wait for each other, longer on a busy machine: hence the least.
        request = min(engine.request_us)
        report.add_facts(
            "CPU per request [µs]",
            {
                "the hook": hook,
                "the supervisor": supervisor,
                "everything, without": request,
                "share [%]": 100 * (hook + supervisor) / request,
            },
        )
        middle, _, _ = harness.ratios(outcomes[1], outcomes[0])
        report.goal("throughput with the hook, of that without", middle, 0.98, at_least=True)
        report.close()


if __name__ == "__main__":
    main()

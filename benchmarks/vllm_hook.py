"""vLLM's throughput with the hook and without: one confined process, one engine, the hook put in and taken out.

A small Qwen3-MoE on the CPU, so a request is short and what the hook costs for each is as large a part as it can be.
Goal: at least 0.98 of the throughput without. Both run confined, so what differs is the hook alone: a span, a
reservation and a settlement per request, and a look at each of the engine's outputs.

On a busy machine single rounds differ by half. So there are many and short ones, in random order, with the same
prompts and lengths; the median of the ratios within a round comes with its 95 % interval; and what the hook takes is
measured by itself too: how long the thread that feeds the engine is within it, waiting included, and CPU times.
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
TOKENS = 128


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
        self._clocks = _clock_hook()
        self._names = {os.getpid(): "front", _supervisor(): "supervisor"}
        self.batch_ms: list[float] = []
        self.within_ms: list[float] = []
        """Of a batch with the hook, how long its thread was within it."""
        self.hook_us: list[float] = []
        """CPU of that, per request."""
        self.used_us: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        """CPU per request of the process that feeds the engine, of the supervisor, and of the engine's processes."""

    def run(self, *, hooked: bool) -> Sequence[float]:
        """Tokens per second of one batch."""
        if hooked:
            self._hook.install()
        else:
            self._hook.remove()
        with self._episode(budget={"tokens": 10**9}):
            self._clocks.reset()
            before = self._cpu()
            began = time.perf_counter()
            outputs = self._llm.generate(self._prompts, self._parameters, use_tqdm=False)
            lasted = time.perf_counter() - began
            after = self._cpu()
        self.used_us[hooked].append({name: (after[name] - us) / REQUESTS for name, us in before.items()})
        if hooked:
            self.batch_ms.append(lasted * 1e3)
            self.within_ms.append(self._clocks.wall * 1e3)
            self.hook_us.append(self._clocks.cpu * 1e6 / REQUESTS)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == REQUESTS * TOKENS
        return [tokens / lasted]

    def _cpu(self) -> dict[str, float]:
        """µs of CPU so far."""
        found = dict.fromkeys(("front", "engine", "supervisor"), 0.0)
        for process in (psutil.Process(), *psutil.Process().children(recursive=True), psutil.Process(_supervisor())):
            found[self._names.get(process.pid, "engine")] += _run_time_us(process.pid)
        return found


class _Clocks:
    """How long this thread was within the hook, and its CPU time there [s]."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.wall = self.cpu = 0.0


def _clock_hook() -> _Clocks:
    from ray_guard.integrations.vllm.requests import Ledger

    clocks = _Clocks()

    def clocked(method: Any) -> Any:
        def run(*args: Any) -> Any:
            began, used = time.perf_counter(), time.thread_time()
            try:
                return method(*args)
            finally:
                clocks.cpu += time.thread_time() - used
                clocks.wall += time.perf_counter() - began

        return run

    for name in ("admit", "running", "saw", "finished"):
        setattr(Ledger, name, clocked(getattr(Ledger, name)))
    return clocks


def _run_time_us(pid: int) -> float:
    """CPU of all its threads: in ns by the scheduler, where utime and stime are ticks of 10 ms."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e3


def _supervisor() -> int:
    for process in psutil.process_iter(["cmdline"]):
        if "ray_guard.supervisor.__main__" in " ".join(process.info["cmdline"] or ()):
            return int(process.pid)
    raise SystemExit("no supervisor runs here")


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=40).parse_args()
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
        low, high = harness.interval(outcomes[1], outcomes[0])
        report.add_facts("the ratio's 95 % interval", {"from": f"{low:.3f}", "to": f"{high:.3f}"})
        within = [100 * inside / whole for inside, whole in zip(engine.within_ms, engine.batch_ms, strict=True)]
        report.add_facts(
            f"the thread that feeds the engine, within the hook, of a batch of {REQUESTS}",
            {
                "ms, median": statistics.median(engine.within_ms),
                "share [%], median": f"{statistics.median(within):.2f}",
                "share [%], three quarters of the batches below": f"{harness.percentile(within, 0.75):.2f}",
            },
        )
        median = {
            (hooked, name): statistics.median(used[name] for used in engine.used_us[hooked])
            for hooked in (True, False)
            for name in ("front", "supervisor", "engine")
        }
        whole = sum(median[False, name] for name in ("front", "supervisor", "engine"))
        added = statistics.median(engine.hook_us) + median[True, "supervisor"] - median[False, "supervisor"]
        report.add_facts(
            "CPU per request [µs]",
            {
                "the hook": statistics.median(engine.hook_us),
                "the process that feeds the engine, with and without": f"{median[True, 'front']:.0f}, "
                f"{median[False, 'front']:.0f}",
                "the supervisor, with and without": f"{median[True, 'supervisor']:.0f}, "
                f"{median[False, 'supervisor']:.0f}",
                "everything, without": whole,
                "hook and supervisor, share [%]": f"{100 * added / whole:.2f}",
            },
        )
        middle, _, _ = harness.ratios(outcomes[1], outcomes[0])
        report.goal("throughput with the hook, of that without", middle, 0.98, at_least=True)
        report.close()


if __name__ == "__main__":
    main()

"""An env actor whose episodes ask a policy actor, which serves them with ``AsyncLLM``: real Ray, both guarded."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import ray
from common import ENGINE, counted, described, say

import ray_guard


@ray_guard.guard(role="policy", gpu="engine", budgets={"actor": {"tokens": 5000}})
@ray.remote(num_cpus=0, max_concurrency=8)
class Policy:
    def __init__(self) -> None:
        os.environ["VLLM_PLUGINS"] = (
            "lora_filesystem_resolver"  # somebody else's choice: the hook is there all the same
        )
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**ENGINE, disable_log_stats=True))

    async def answer(self, text: str, tokens: int, name: str) -> dict[str, Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True)
        return counted([each async for each in self._engine.generate(text, parameters, name)][-1])

    async def dies(self) -> dict[str, Any]:
        """Its core is killed while it answers."""
        from vllm import SamplingParams

        async def ask() -> Any:
            return [each async for each in self._engine.generate("the dog", SamplingParams(max_tokens=200), "last")]

        asked = asyncio.create_task(ask())
        await asyncio.sleep(0.1)
        for process in self._engine.engine_core.resources.engine_manager.processes:
            os.kill(process.pid, signal.SIGKILL)
        (error,) = await asyncio.gather(asked, return_exceptions=True)
        return described(error)


@ray_guard.guard(role="env")
@ray.remote(num_cpus=0, max_concurrency=2)
class Environment:
    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def rollout(self, name: str, budget: dict[str, int] | None) -> dict[str, Any]:
        served: list[Any] = []
        refusal = None
        with ray_guard.episode(id=name, budget=budget):
            for number in range(4):
                with ray_guard.turn(number):
                    try:
                        # The same request id in both episodes: who asked is not told by it.
                        served.append(ray.get(self._policy.answer.remote("the fox", 12, f"turn-{number}")))
                    except ray_guard.BudgetExceeded as error:
                        refusal = described(error)
            violations = [found["kind"] for found in ray_guard.violations()]
        return {"served": served, "refused": refusal, "violations": violations}


def main() -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=True)
    policy = Policy.remote()
    environment = Environment.remote(policy)
    names: dict[str, dict[str, int] | None] = {"rich": None, "poor": {"tokens": 50}}
    found = ray.get([environment.rollout.remote(name, budget) for name, budget in names.items()])
    say("rollouts", dict(zip(names, found, strict=True)))
    with ray_guard.episode(id="last"):
        say("dies", ray.get(policy.dies.remote()))
    ray.wait([actor.__ray_terminate__.remote() for actor in (policy, environment)], num_returns=2, timeout=10)
    ray.shutdown()


if __name__ == "__main__":
    main()

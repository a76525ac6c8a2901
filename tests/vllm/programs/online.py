"""``AsyncLLM`` under budgets, and then the OpenAI server around the same engine, until it is told to stop."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from common import ENGINE, confine, counted, described, say

import ray_guard


async def main(port: int) -> None:
    confine(
        budgets={"actor": {"tokens": 2500}},
        egress={"allow": ["unix:///tmp/*", "collectives"], "listen": [port]},
    )
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ["--host", "127.0.0.1", "--port", str(port), "--disable-log-stats"]
    for name, value in {**ENGINE, "max_model_len": 2048}.items():
        flag = f"--{name.replace('_', '-')}"
        options += [flag] if value is True else [flag, str(value)]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)

    async with build_async_engine_client(args) as engine:
        await ask(engine)
        address, sock = setup_server(args, reuse_port=False)
        with ray_guard.episode(id="whoever started the server"):
            say("serving", port)  # or will in a moment
            await (await build_and_serve(engine, address, sock, args))
    sock.close()
    say("stopped", value=True)


async def ask(engine: Any) -> None:
    """Many episodes at once, each in a task of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = iter(range(1000))

    def stream(text: str, tokens: int, **more: Any) -> Any:
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, **more)
        return engine.generate(text, parameters, f"request-{next(names)}")

    async def rollout(name: str, budget: dict[str, int] | None) -> None:
        served, refusal = [], None
        with ray_guard.episode(id=name, budget=budget):
            for number in range(4):
                try:
                    with ray_guard.turn(number):
                        served.append([each async for each in stream(f"the fox {name}", 10)][-1])
                except ray_guard.BudgetExceeded as error:
                    refusal = described(error)
        say(name, {"served": [counted(each) for each in served], "refused": refusal})

    await asyncio.gather(rollout("rich", None), rollout("poor", {"tokens": 50}), rollout("other", None))

    with ray_guard.episode(id="left"):
        answers = stream("the dog", 150)
        async for _ in answers:
            break
        await answers.aclose()

    with ray_guard.episode(id="cancelled"):
        answers = stream("the dog", 150, output_kind=RequestOutputKind.FINAL_ONLY)
        task = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with ray_guard.episode(id="pieces", policy_version="3"):
        await engine.update_weight_version("w2")
        pieces = [each async for each in stream("the lazy", 6, n=2, output_kind=RequestOutputKind.DELTA)]
        say("pieces", sum(len(output.token_ids) for each in pieces for output in each.outputs))
    say("in flight", engine.get_num_unfinished_requests())


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[3])))

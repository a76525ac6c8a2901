"""vLLM's OpenAI server in a guarded policy actor's process, with whatever an engine serves beside its API."""

from __future__ import annotations

import asyncio
import sys

from common import EGRESS, ENGINE, confine

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


async def serve(port: int) -> None:
    """Until it is stopped."""
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ["--host", "127.0.0.1", "--port", str(port), "--chat-template", TEMPLATE]
    for name, value in {**ENGINE, "max_model_len": 2048}.items():
        flag = f"--{name.replace('_', '-')}"
        options += [flag] if value is True else [flag, str(value)]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    async with build_async_engine_client(args) as engine:
        address, sock = setup_server(args, reuse_port=False)
        await (await build_and_serve(engine, address, sock, args))


def main(port: int, job_tokens: int) -> None:
    confine(budgets={"job": {"tokens": job_tokens, "flops": 1e15}}, egress={**EGRESS, "listen": [port]})
    asyncio.run(serve(port))


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]))

"""vLLM's OpenAI server in a guarded policy actor; an agent in a guarded env actor's call ring asks it. Real Ray."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from typing import Any

import ray
import serving
from common import EGRESS, say
from ray.cloudpickle import register_pickle_by_value

import ray_guard

AGENT = """
import json, sys, urllib.error, urllib.request
where = f"http://127.0.0.1:{sys.argv[1]}"
def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(where + path, data,
                                    {"Content-Type": "application/json"}), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")
ask = {"model": "tiny", "max_tokens": 8}
answers = [call("/v1/chat/completions", {**ask, "messages": [{"role": "user", "content": "the quick brown fox"}]}),
           call("/v1/completions", {**ask, "prompt": "the lazy dog"}),
           call("/v1/responses", {"model": "tiny", "input": "over", "max_output_tokens": 8})]
print(json.dumps({
    "models": [each["id"] for each in call("/v1/models")[1]["data"]],
    "answered": [status for status, _ in answers],
    "tokens": [answer["usage"]["total_tokens"] for _, answer in answers],
    "others": [call(path, body)[0] for path, body in
               (("/tokenize", {"model": "tiny", "prompt": "a"}), ("/health", None), ("/v1/embeddings", {}))],
    "too much": call("/v1/completions", {**ask, "prompt": "a", "max_tokens": 1500})[0],
}))
"""


@ray.remote(num_cpus=0)
class Policy:
    def serve(self, port: int) -> None:
        asyncio.run(serving.serve(port))  # a method of one at a time is run in the main thread, as vLLM's server wants


@ray.remote(num_cpus=0)
class Environment:
    @ray_guard.tool
    def agent(self, port: int) -> Any:
        argv = [sys.executable, "-I", "-S", "-c", AGENT, str(port)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    def rollout(self, port: int) -> Any:
        with ray_guard.episode(id="agent"):
            return self.agent(port)


def main() -> None:
    port = int(sys.argv[3])
    register_pickle_by_value(serving)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=True)
    engine = ray_guard.guard(
        {
            "role": "policy",
            "gpu": "engine",
            "egress": {**EGRESS, "listen": [port]},
            "budgets": {"job": {"tokens": 10**6}},
        }
    )(Policy).remote()
    serving_ = engine.serve.remote(port)
    while True:  # its log says why, should it never be there: whoever started this program has a deadline
        assert not ray.wait([serving_], timeout=0)[0], ray.get(serving_)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            time.sleep(0.3)
        else:
            break
    policy = {"model_endpoint": f"127.0.0.1:{port}", "budgets": {"call": {"tokens": 1000}, "job": {"tokens": 10**6}}}
    say("found", ray.get(ray_guard.guard(policy)(Environment).remote().rollout.remote(port)))
    ray.shutdown()


if __name__ == "__main__":
    main()

"""An agent in an env actor's call ring asks a policy actor's OpenAI server: model calls alone, charged and traced."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_guard import BudgetExceeded, episode, guard, tool
from ray_guard.client.quota import announce_price, reserve

pytestmark = [pytest.mark.ray, pytest.mark.kernel, pytest.mark.usefixtures("cluster")]

SUPPORT = str(Path(__file__).parents[1] / "supervisor")
TOOL_TOKENS = 500

#: what an agent CLI does, by the standard library: asks, and then looks what else there is
AGENT = """
import http.client, json, sys
port, others = int(sys.argv[1]), json.loads(sys.argv[2])
def call(method, path, body=None, to=port):
    link = http.client.HTTPConnection("127.0.0.1", to, timeout=20)
    try:
        link.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = link.getresponse()
        return [answer.status, answer.read().decode()]
    except OSError as error:
        return [type(error).__name__, ""]
say = {"model": "tiny", "max_tokens": 3}
asked = [("/v1/chat/completions", {**say, "messages": [{"role": "user", "content": "hello"}]}),
         ("/v1/completions", {**say, "prompt": "hello"}),
         ("/v1/responses", {"model": "tiny", "input": "hello", "max_output_tokens": 3})]
found = {path: call("POST", path, body)[0] for path, body in asked}
found["models"] = call("GET", "/v1/models")[0]
found["others"] = [call("POST", path, {})[0] for path in others]
found["elsewhere"] = call("GET", "/", to=int(sys.argv[3]))[0]
status, text = call("POST", "/v1/completions", {**say, "prompt": "hello", "max_tokens": 1900})
found["too much"] = [status, json.loads(text)["error"]["code"]] if status == 429 else status
print(json.dumps(found))
"""


class Policy:
    """Its server stands for an engine's, with all that an engine serves beside its API."""

    def serve(self, port: int) -> None:
        sys.path.insert(0, SUPPORT)
        from model_server import ModelServer

        announce_price(["tiny"], per_token=1e6, per_context_token=0)
        self.server = ModelServer(port=port)

    def seen(self) -> list[str]:
        found: list[str] = self.server.paths()
        self.server.seen.clear()
        return found


@pytest.fixture(scope="module")
def policy(cluster: Any) -> tuple[Any, int]:
    """The policy actor, and where it serves."""
    for port in range(20_000, 30_000):  # none that the kernel gives to somebody else meanwhile
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        actor = guard(role="policy", listen=[port])(ray.remote(num_cpus=0, max_concurrency=4)(Policy)).remote()
        ray.get(actor.serve.remote(port))
        return actor, port
    pytest.fail("no port is free")


class Env:
    """Not guarded yet: see below."""

    @tool
    def agent(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", AGENT, *arguments], capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout or json.dumps(done.stderr))
        return found

    def roll_out(self, *arguments: str) -> tuple[dict[str, Any], float]:
        """What the agent found, and what its tokens left of the episode's."""
        with episode(id="rollout", group="g"):
            found = self.agent(*arguments)
            try:
                reserve(tokens=10**6, flops=1).release()
            except BudgetExceeded as error:
                return found, error.value - 10**6
            return found, 0


def test_an_agents_model_calls_go_to_the_policy_actor_and_nothing_else_does(
    policy: tuple[Any, int], sink: Any, recorded: Callable[..., Any]
) -> None:
    sys.path.insert(0, SUPPORT)
    from model_server import ADMIN, MODEL, PIECES, PROMPT_TOKENS

    engine, port = policy
    arguments = str(port), json.dumps(ADMIN), str(sink.port)

    free, _ = ray.get(ray.remote(num_cpus=0)(Env).remote().roll_out.remote(*arguments))  # the positive control
    assert free["others"] == [200] * len(ADMIN)
    assert sink.accepted == 1
    assert len(ray.get(engine.seen.remote())) == 4 + len(ADMIN)

    budgets = {"call": {"tokens": TOOL_TOKENS}, "episode": {"tokens": 10_000, "flops": 1e12}}
    limited = guard(model_endpoint=f"127.0.0.1:{port}", budgets=budgets)(ray.remote(num_cpus=0)(Env))
    found, spent = ray.get(limited.remote().roll_out.remote(*arguments))
    paths = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    assert [found[path] for path in (*paths, "models")] == [200] * 4
    assert found["others"] == [403] * len(ADMIN)
    assert found["elsewhere"] == "PermissionError"
    assert found["too much"] == [429, "insufficient_quota"]
    assert ray.get(engine.seen.remote()) == [f"POST {path}" for path in paths], "the server is the judge"
    assert sink.accepted == 1

    each = PROMPT_TOKENS + len(PIECES)
    assert spent == 3 * each
    calls = {span.span_id for span in recorded(lambda span: span.name == "execute_tool agent")}
    processes = recorded(lambda span: span.name.startswith("process ") and span.parent_id in calls)
    (process,) = processes
    chats = recorded(lambda span: span.name == f"chat {MODEL}" and span.parent_id == process.span_id and span.end_ns)
    assert len(chats) == 4
    assert {span.attributes["ray_guard.source"] for span in chats} == {"supervisor"}
    assert {span.attributes["rl.rollout.id"] for span in chats} == {"rollout"}
    charged = [span.attributes for span in chats if "error.type" not in span.attributes]
    assert [about["ray_guard.tokens.charged"] for about in charged] == [each] * 3
    assert [about["ray_guard.flops"] for about in charged] == [each * 1e6] * 3


def test_the_endpoint_stands_open_to_nobody_else(policy: tuple[Any, int]) -> None:
    """An env actor whose policy names no model_endpoint: the same server on the same port."""
    engine, port = policy
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    closed = guard(allow=[])(ray.remote(num_cpus=0)(Env)).remote()
    said, _ = ray.get(closed.roll_out.remote(str(port), "[]", str(port)))
    assert {said[path] for path in ("/v1/completions", "models", "elsewhere")} == {"PermissionError"}
    assert ray.get(engine.seen.remote()) == []

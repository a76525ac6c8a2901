"""``model_endpoint`` before a real engine: vLLM's OpenAI server, asked by the openai client and by curl in a tool."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "escapes"))

from harness import PYTHON, Host, Namespace, wait  # noqa: E402 - tests are no package

pytest.importorskip("vllm", reason="vLLM is not installed: make env installs it")
pytest.importorskip("openai", reason="the openai client is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(420)]

MODEL = "tiny"
JOB_TOKENS = 100_000
JOB: dict[str, Any] = {"job": {"tokens": JOB_TOKENS, "flops": 1e15}}


class Engine:
    """vLLM's server on loopback, in a guarded policy actor's process of the same job: see programs/serving.py."""

    def __init__(self, folder: Path) -> None:
        small = runpy.run_path(str(ROOT / "examples" / "rome" / "model.py"), run_name="rome.model")
        model = small["build"](folder / "model", ["the quick brown fox", "jumps over the lazy dog"])
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self.namespace = Namespace()
        self.evidence = folder / "evidence"
        self._log = (folder / "log").open("w+")
        program = [PYTHON, str(HERE / "programs" / "serving.py"), str(model), str(folder / "said")]
        self._process = subprocess.Popen(
            [*self.namespace.prefix, *program, str(self.port), str(JOB_TOKENS)],
            env={
                **os.environ,
                **small["ENVIRONMENT"],
                "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_LOGGING_LEVEL": "INFO",
                "RAY_GUARD_EVIDENCE": str(self.evidence),
                "RAY_GUARD_RUN_ID": "served",
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def await_ready(self) -> None:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def metric(self, name: str) -> float:
        """The sum of a counter of the engine's own."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"vllm:{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def tokens(self) -> float:
        return self.metric("prompt_tokens_total") + self.metric("generation_tokens_total")

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-8000:]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.namespace.close()
        self._log.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(tmp_path_factory.mktemp("engine"))
    try:
        made.await_ready()
        yield made
    finally:
        made.close()


@pytest.fixture
def confined(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Host]]:
    """Confines a process of the engine's job, whose tools may call the engine's model."""
    monkeypatch.setenv("RAY_GUARD_RUN_ID", "served")
    with contextlib.ExitStack() as stack:

        def confine(call: dict[str, Any] | None = None) -> Host:
            policy = {"model_endpoint": f"127.0.0.1:{engine.port}", "budgets": {**JOB, "call": call or {}}}
            host = Host(policy, tmp_path / "evidence", engine.namespace)
            stack.callback(host.close)
            return host

        yield confine


def taken(host: Host) -> int:
    """Tokens of the job so far, as a reservation that cannot be granted is told."""
    asks = """
from ray_guard.client.quota import reserve
import ray_guard
try:
    reserve(tokens=10**9, flops=1.0)
except ray_guard.BudgetExceeded as error:
    result = error.value - 10**9 if error.scope == "job" else None
"""
    found: int = host.inside(asks)
    return found


def chats(host: Host, count: int) -> list[dict[str, Any]]:
    def find() -> Any:
        found = [s["attributes"] for s in host.journal() if s["name"] == f"chat {MODEL}" and s["ended"]]
        return found if len(found) == count else None

    found: list[dict[str, Any]] = wait(find, "not all chat spans have ended")
    return found


_AGENT = """
import json, sys, openai
client = openai.OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none", max_retries=2)
say = {"role": "user", "content": "the quick brown fox"}
found = {"models": [each.id for each in client.models.list().data]}
whole = client.chat.completions.create(model="tiny", messages=[say], max_tokens=8)
found["whole"] = whole.usage.total_tokens
pieces = list(client.chat.completions.create(model="tiny", messages=[say], max_tokens=8, stream=True))
found["usage_seen"] = any(getattr(piece, "usage", None) for piece in pieces)
found["streamed"] = len(pieces)
told = list(client.chat.completions.create(model="tiny", messages=[say], max_tokens=8, stream=True,
                                           stream_options={"include_usage": True}))
found["told"] = told[-1].usage.total_tokens
found["text"] = client.completions.create(model="tiny", prompt=["a b", "c"], max_tokens=4).usage.total_tokens
answer = client.responses.create(model="tiny", input="the lazy dog", max_output_tokens=8)
found["answer"] = answer.usage.total_tokens
last = list(client.responses.create(model="tiny", input="the lazy dog", max_output_tokens=8, stream=True))[-1]
found["answered"] = last.response.usage.total_tokens
try:
    client.chat.completions.create(model="tiny", messages=[say], max_tokens=2000)
    found["refused"] = None
except openai.RateLimitError as error:
    found["refused"] = error.code
print(json.dumps(found))
"""


def test_an_agent_is_served_and_charged_as_the_engine_counts(engine: Engine, confined: Callable[..., Host]) -> None:
    """And once: its job is also the engine's, whose hook counts the same tokens."""
    host = confined({"tokens": 2000})
    before, job = engine.tokens(), taken(host)
    outcome = host.run("call", [PYTHON, "-c", _AGENT, str(engine.port)], timeout=90)
    assert outcome.stdout.strip(), f"{outcome}\n{engine.log()}"
    found = json.loads(outcome.stdout.splitlines()[-1])
    spans = chats(host, 7)
    assert found["models"] == [MODEL]
    assert found["streamed"] > 1
    assert not found["usage_seen"]
    assert found["refused"] == "insufficient_quota"
    used = [each for each in spans if "ray_guard.tokens.charged" in each]
    charged = [each["ray_guard.tokens.charged"] for each in used]
    assert {each["ray_guard.tokens.bound"] for each in used} == {"exact"}
    told = [found[name] for name in ("whole", "told", "text", "answer", "answered")]
    assert sorted(charged) == sorted([*told, found["whole"]])
    assert sum(charged) == engine.tokens() - before, "the engine itself counts otherwise"
    assert wait(lambda: taken(host) - job == sum(charged), f"the job was charged {taken(host) - job}")
    assert all(each["ray_guard.flops"] > 0 for each in used)
    assert all(each["ray_guard.tokens.reserved"] >= each["ray_guard.tokens.charged"] for each in used)


CURL = shutil.which("curl")
ADMIN = (
    *("/reset_prefix_cache", "/collective_rpc", "/v1/load_lora_adapter", "/tokenize", "/pause", "/v1/embeddings"),
    "/v1/completions/../../reset_prefix_cache",
)


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_nothing_else_of_it_is_reached(engine: Engine, confined: Callable[..., Host]) -> None:
    """The engine's own log is the judge; unconfined they get to it."""
    assert CURL is not None
    body = ["-X", "POST", "-H", "Content-Type: application/json", "-d", "{}"]
    argv = [CURL, "-sS", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}"]
    host = confined()
    for path in ADMIN:
        outcome = host.run("call", [*argv, "--path-as-is", *body, f"http://127.0.0.1:{engine.port}{path}"])
        assert outcome.stdout == "403", (path, outcome)
    assert not [path for path in ADMIN if f"POST {path}" in engine.log()]
    said = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    url = f"http://127.0.0.1:{engine.port}/v1/chat/completions"
    outcome = host.run("call", [*argv, *body[:4], "-d", said, url])
    assert outcome.stdout == "200", outcome
    url = f"http://127.0.0.1:{engine.port}/reset_prefix_cache"
    done = subprocess.run([*argv, *body, url], capture_output=True, text=True, timeout=30)
    assert done.stdout == "200", done
    assert "POST /reset_prefix_cache" in engine.log()


def test_who_gives_no_limit_gets_what_is_left(engine: Engine, confined: Callable[..., Host]) -> None:
    program = _AGENT.split("found =", maxsplit=1)[0] + (
        'print(client.chat.completions.create(model="tiny", messages=[say], extra_body={"ignore_eos": True})'
        ".usage.total_tokens)"
    )
    before = engine.tokens()
    host = confined({"tokens": 600})
    outcome = host.run("call", [PYTHON, "-c", program, str(engine.port)], timeout=90)
    assert outcome.stdout.strip(), outcome
    (span,) = chats(host, 1)
    assert int(outcome.stdout) == span["ray_guard.tokens.charged"] == engine.tokens() - before
    assert 150 < int(outcome.stdout) <= 600


def test_who_goes_away_stops_the_engine(engine: Engine, confined: Callable[..., Host]) -> None:
    program = (
        _AGENT.split("found =", maxsplit=1)[0]
        + """
stream = client.chat.completions.create(model="tiny", messages=[say], stream=True, max_tokens=1900,
                                        extra_body={"ignore_eos": True})
print(len([next(stream) for _ in range(5)]), flush=True)
import os
os._exit(0)
"""
    )
    for attempt in (1, 2, 3):  # on a machine that has no core to spare the engine may be done before anybody notices
        before = engine.tokens()
        host = confined({"tokens": 5000})
        outcome = host.run("call", [PYTHON, "-c", program, str(engine.port)], timeout=90)
        assert outcome.stdout.strip() == "5", outcome
        span = chats(host, attempt)[-1]
        time.sleep(0.5)
        spent = engine.tokens() - before
        if spent < 1000:
            break
    assert span["ray_guard.tokens.bound"] == "lower", span
    assert spent < 1000
    assert 5 <= span["ray_guard.tokens.charged"] <= spent + 20

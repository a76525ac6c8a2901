"""A guarded actor that lists names: in its own process, in what it starts and in its tools, while Ray goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "escapes"))

from harness import read_journal
from names import named

pytestmark = pytest.mark.ray

_JOB = """
import asyncio, json, socket, subprocess, sys
import ray, ray_guard

port, policy = int(sys.argv[1]), json.loads(sys.argv[2])
PROGRAM = f"import socket; print(socket.create_connection(('index.example.org', {port}), 5).recv(9).decode())"


@ray_guard.guard(policy)
@ray.remote
class Worker:
    def own(self):
        with ray_guard.tool_call("own", {}):
            with socket.create_connection(("index.example.org", port), 5) as sock:
                return sock.recv(9).decode()

    def child(self):
        return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True).stdout.strip()

    def tool(self):
        with ray_guard.tool_call("tool", {}):
            return ray_guard.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True).stdout.strip()

    async def loop(self):
        with ray_guard.tool_call("loop", {}):
            reader, writer = await asyncio.open_connection("index.example.org", port)
            said = (await reader.read(9)).decode()
            writer.close()
            return said

    def other(self):
        try:
            return socket.gethostbyname("evil.example.com")
        except OSError as error:
            return type(error).__name__

    def nested(self):
        return ray.get(task.remote())

    def sends(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.7", 80))
            try:
                sock.send(b"x")
            except OSError as error:
                return type(error).__name__


@ray.remote
def task():
    return socket.create_connection(("index.example.org", port), 5).recv(9).decode()


ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
worker = Worker.remote()
kinds = ("own", "child", "tool", "loop", "other", "nested", "sends", "own")
print(json.dumps([ray.get(getattr(worker, kind).remote(), timeout=60) for kind in kinds]))
ray.shutdown()
"""


def test_an_actor_that_lists_names(tmp_path: Path) -> None:
    with named(tmp_path) as stage:
        evidence = tmp_path / "evidence"
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(evidence), "PYTHONWARNINGS": "ignore"}
        argv = [sys.executable, "-c", _JOB, str(stage.sink.port), json.dumps(stage.policy())]
        done = subprocess.run(
            [*stage.namespace.prefix, *argv], env=environment, capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, done.stderr[-3000:]
        hello, refused = "hello", "gaierror"
        said = json.loads(done.stdout.splitlines()[-1])
        assert said == [hello, hello, hello, hello, refused, hello, "BrokenPipeError", hello]
        assert not stage.upstream.asked("evil.example.com")
        spans = [s["attributes"] for s in read_journal(evidence) if s["name"] == "egress connect"]
        named_ = [s for s in spans if s["ray_guard.egress.reason"] == "name" and s["network.transport"] == "tcp"]
        assert {s["server.address"] for s in named_} == {"index.example.org"}
        assert {s["ray_guard.egress.scope"] for s in named_} >= {"exact"}
        assert [s for s in spans if s["server.address"] == "evil.example.com"]

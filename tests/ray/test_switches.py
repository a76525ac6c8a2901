"""Ray's own clean-up of processes, by whichever switch: the supervisor outlives the actor that started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

SUBREAPER = {
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "1",
    "RAY_kill_child_processes_on_worker_exit": "1",
}
PROCESS_GROUP = {"RAY_process_group_cleanup_enabled": "1"}

_PROGRAM = """
import json, os, socket, sys, time
import ray, ray_guard
granted, denied = int(sys.argv[1]), int(sys.argv[2])
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)

def reach(port, text):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
            return "sent"
    except OSError as error:
        return type(error).__name__

@ray_guard.guard(allow=[f"127.0.0.1:{granted}"])
@ray.remote(num_cpus=0)
class Worker:
    def pid(self): return os.getpid()
    def reach(self, port, text): return reach(port, text)
    def tool(self, port, text):
        code = f"import socket; socket.create_connection(('127.0.0.1', {port})).send(b'{text}')"
        with ray_guard.tool_call("connect", {}):
            return ray_guard.run([sys.executable, "-I", "-S", "-c", code], capture_output=True).returncode

first = Worker.remote()
said = {"first": ray.get(first.reach.remote(granted, "first "))}
second = Worker.remote()
said["second"] = ray.get(second.reach.remote(granted, "second "))
ray.kill(first)
time.sleep(6)  # Ray looks for what an actor left behind some seconds after its end
try:
    said["after"] = ray.get(second.reach.remote(granted, "after "), timeout=20)
    said["refused"] = ray.get(second.reach.remote(denied, "refused"), timeout=20)
    said["tool"] = ray.get(second.tool.remote(granted, "tool "), timeout=20)
    said["tool refused"] = ray.get(second.tool.remote(denied, "refused"), timeout=20)
except Exception as error:
    said["error"] = str(error)[:500]
third = Worker.remote()
said["third"] = ray.get(third.reach.remote(granted, "third "), timeout=60)
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(SUBREAPER, id="subreaper", marks=pytest.mark.slow),
        pytest.param(PROCESS_GROUP, id="group", marks=pytest.mark.slow),
        pytest.param({**SUBREAPER, **PROCESS_GROUP}, id="both"),
    ],
)
def test_the_supervisor_outlives_the_actor_that_started_it(
    sink: Any, other: Any, tmp_path: Path, switches: dict[str, str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, str(program), str(sink.port), str(other.port)]
    environment = {**os.environ, **switches, "RAY_GUARD_EVIDENCE": str(tmp_path / "evidence")}
    if os.geteuid() == 0:  # a supervisor of its own: the session's would have outlived anything
        command = ["unshare", "-m", "--propagation", "private", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "first": "sent",
        "second": "sent",
        "after": "sent",
        "refused": "PermissionError",
        "tool": 0,
        "tool refused": 1,
        "third": "sent",
    }
    assert all(sink.saw(text) for text in ("first", "second", "after", "tool", "third"))
    assert other.accepted == 0

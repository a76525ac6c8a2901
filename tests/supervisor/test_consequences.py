"""What follows a violation beyond its refusal, by ``on_violation``: judged by what a confined program still can do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.kernel

_PRELUDE = """
import json, socket, subprocess, sys, time
import ray_guard
granted, denied, action = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ray_guard.confine({"egress": {"allow": [f"127.0.0.1:{granted}"]}, "on_violation": action,
                   "budgets": {"episode": {"connections": 3}}})
said = {}

def reach(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
        return "reached"
    except OSError as error:
        return type(error).__name__

def tried(name, action):
    try:
        said[name] = action()
    except Exception as error:
        said[name] = type(error).__name__

def tool(port):
    program = f"import socket, time; print(socket.socket().connect_ex(('127.0.0.1', {port})), flush=True)"
    if port == denied:
        program += "; time.sleep(60)"
    done = ray_guard.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=20)
    return [done.returncode, done.stdout.strip()]

def call(port):
    with ray_guard.tool_call("bash"):
        return tool(port)
"""


@pytest.fixture
def listening() -> Iterator[tuple[int, int]]:
    """Two ports that accept: the granted one, and one that is not."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]

    def accept(server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return

    for server in servers:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
    yield servers[0].getsockname()[1], servers[1].getsockname()[1]
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def _run(program: str, action: str, ports: tuple[int, int], folder: Path) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
    argv = [sys.executable, "-c", _PRELUDE + program + "\nprint(json.dumps(said))", *map(str, ports), action]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}


_ONE_OF_TWO_CALLS = """
with ray_guard.episode(id="r"):
    tried("offending", lambda: call(denied))
    tried("another", lambda: call(granted))
"""


def test_deny_refuses_and_nothing_more(tmp_path: Path, listening: tuple[int, int]) -> None:
    program = """
with ray_guard.episode(id="r"):
    with ray_guard.tool_call("bash"):
        said["offending"] = reach(denied)
        said["afterwards"] = reach(granted)
"""
    status, said = _run(program, "deny", listening, tmp_path)
    assert (status, said) == (0, {"offending": "PermissionError", "afterwards": "reached"})


def test_kill_call_ends_the_call_that_offended_and_no_other(tmp_path: Path, listening: tuple[int, int]) -> None:
    status, said = _run(_ONE_OF_TWO_CALLS, "kill_call", listening, tmp_path)
    assert status == 0
    assert said == {"offending": "EgressDenied", "another": [0, "0"]}


def test_a_call_in_the_own_process_is_granted_nothing_more(tmp_path: Path, listening: tuple[int, int]) -> None:
    program = """
with ray_guard.episode(id="r"):
    def offend():
        with ray_guard.tool_call("python"):
            held = socket.create_connection(("127.0.0.1", granted))
            said["before"] = reach(granted)
            said["offending"] = reach(denied)
            said["afterwards"] = reach(granted)
            try:
                held.settimeout(2)
                said["what it had open"] = "ended" if held.recv(1) == b"" else "open"
            except ConnectionError:
                said["what it had open"] = "ended"
    tried("scope", offend)
    tried("another", lambda: call(granted))
"""
    status, said = _run(program, "kill_call", listening, tmp_path)
    assert status == 0
    assert said["before"] == "reached"
    assert said["offending"] == said["afterwards"] == "PermissionError"
    assert said["scope"] == "EgressDenied"
    assert said["another"] == [0, "0"]


def test_an_ended_episode_gets_past_handlers_that_make_text_of_errors(
    tmp_path: Path, listening: tuple[int, int]
) -> None:
    program = """
def episode():
    with ray_guard.episode(id="r"):
        tried("offending", lambda: call(denied))
        tried("another call", lambda: call(granted))
        def turn():
            with ray_guard.turn(1):
                return "begun"
        tried("turn", turn)
        said["in the open"] = reach(granted)
tried("episode", episode)
def next_episode():
    with ray_guard.episode(id="s"):
        return call(granted)
tried("next", next_episode)
"""
    status, said = _run(program, "end_episode", listening, tmp_path)
    assert status == 0
    assert said["offending"] == said["another call"] == said["turn"] == said["episode"] == "EgressDenied"
    assert said["next"] == [0, "0"]


def test_a_budget_ends_its_episode_by_name(tmp_path: Path, listening: tuple[int, int]) -> None:
    program = """
def episode():
    with ray_guard.episode(id="r"):
        for turn in range(6):
            tried(f"call {turn}", lambda: call(granted))
tried("episode", episode)
"""
    status, said = _run(program, "end_episode", listening, tmp_path)
    assert status == 0
    assert said["call 2"] == [0, "0"]
    assert said["call 4"] == said["episode"] == "BudgetExceeded"


def test_kill_actor_ends_the_process(tmp_path: Path, listening: tuple[int, int]) -> None:
    program = """
with ray_guard.episode(id="r"):
    tried("offending", lambda: call(denied))
time.sleep(30)
"""
    status, _ = _run(program, "kill_actor", listening, tmp_path)
    assert status == -9

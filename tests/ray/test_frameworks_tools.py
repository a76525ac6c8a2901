"""A framework's own tool, unchanged, in a guarded actor: its subprocess is a call's, confined apart from the actor."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import pytest
import ray

from ray_guard import guard, tool

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CONNECT = """
import os, socket, sys
try:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5) as sock:
        sock.sendall(sys.argv[2].encode())
    print("sent", os.environ.get("RAY_ADDRESS", "no address"), os.getsid(0) == os.getpid())
except OSError as error:
    print(type(error).__name__, os.environ.get("RAY_ADDRESS", "no address"), os.getsid(0) == os.getpid())
"""


def python_code_tool(program: str, *arguments: str, timeout: float = 20.0) -> str:
    """As RL frameworks have it: a file, an interpreter, a timeout; nothing of it knows of any guard."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        command = [sys.executable, "-I", "-S", file.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    return done.stdout.strip() or done.stderr


def worker_class() -> type:
    class Worker:
        @tool
        def within_a_call(self, port: int, text: str) -> str:
            return python_code_tool(CONNECT, str(port), text)

        def outside(self, port: int, text: str) -> str:
            return python_code_tool(CONNECT, str(port), text)

    return Worker


def test_unguarded_it_gets_out(sink: Any) -> None:
    actor = ray.remote(num_cpus=0)(worker_class()).remote()
    assert ray.get(actor.outside.remote(sink.port, "unguarded")).startswith("sent")
    assert sink.saw("unguarded")


def test_within_a_call_it_is_confined_and_owned(sink: Any) -> None:
    actor = guard(allow=[])(ray.remote(num_cpus=0)(worker_class())).remote()
    inside = ray.get(actor.within_a_call.remote(sink.port, "inside"))
    outside = ray.get(actor.outside.remote(sink.port, "outside"))
    assert inside == "PermissionError no address True"
    assert outside.startswith("PermissionError")  # the actor's own child: the actor's ring
    assert outside.endswith("False")
    assert not sink.saw("inside", 0.2)
    assert not sink.saw("outside", 0.1)


def test_what_is_granted_it_reaches(sink: Any) -> None:
    actor = guard(allow=[f"127.0.0.1:{sink.port}"])(ray.remote(num_cpus=0)(worker_class())).remote()
    assert ray.get(actor.within_a_call.remote(sink.port, "granted")) == "sent no address True"
    assert sink.saw("granted")

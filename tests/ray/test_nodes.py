"""A job's limits hold over its nodes: two raylets of one real cluster, each in a mount namespace and so with a
supervisor of its own."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from ray_guard import BudgetExceeded, guard
from ray_guard.client import channel
from ray_guard.client.quota import reserve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("second_node")]

_LIMIT = 1000


@pytest.fixture(scope="module")
def second_node(cluster: Any) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("a second node needs a mount namespace of its own, which only root can make")
    address = ray.get_runtime_context().gcs_address
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=4", "--block"]
    # Its own supervisor is what a node of its own would have; that it shares files with the first changes nothing here.
    argv = ["unshare", "-m", *argv, '--resources={"second": 10}', "--node-ip-address=127.0.0.1"]
    node = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while len(ray.nodes()) < 2:
        if time.monotonic() > deadline or node.poll() is not None:
            node.kill()
            pytest.fail(f"no second node: {node.communicate()[0]}")
        time.sleep(0.1)
    yield
    node.terminate()
    node.communicate(timeout=20)


@guard(allow=[], budgets={"job": {"tokens": _LIMIT}})
@ray.remote(num_cpus=0)
class Spender:
    def supervisor(self) -> int:
        line = channel.current()
        if line is None:
            return 0
        with socket.socket(fileno=os.dup(line.fileno())) as sock:
            pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid

    def spend(self, tokens: int, times: int) -> int:
        """Spends so often, or until nothing is left; how much that was."""
        spent = 0
        for _ in range(times):
            try:
                held = reserve(tokens=tokens)
            except BudgetExceeded as error:
                if (error.kind, error.scope, error.limit) != ("tokens", "job", _LIMIT):
                    raise
                break
            held.settle(tokens=tokens)
            spent += tokens
        return spent


def test_the_sum_over_two_supervisors_never_passes_the_jobs_limit() -> None:
    here = Spender.remote()
    there = Spender.options(resources={"second": 1}).remote()
    supervisors = ray.get([here.supervisor.remote(), there.supervisor.remote()])
    assert 0 not in supervisors
    assert supervisors[0] != supervisors[1]
    spent = sum(ray.get([actor.spend.remote(7, 20) for actor in (here, there)]))
    assert spent == 2 * 140, "both had room"
    # All that is left is to be had on one node, though the other has claimed some of it and lies idle.
    deadline = time.monotonic() + 25
    while spent < _LIMIT - 3 * 8 and time.monotonic() < deadline:
        spent += ray.get(here.spend.remote(7, 1000))
        time.sleep(0.5)
    assert _LIMIT - 3 * 8 <= spent <= _LIMIT
    spent += sum(ray.get([actor.spend.remote(1, 1000) for actor in (here, there)]))
    assert spent <= _LIMIT

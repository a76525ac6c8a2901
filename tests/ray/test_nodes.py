"""A job's limits hold over its nodes: two raylets of one real cluster, each in namespaces and so with a
supervisor of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_guard import BudgetExceeded, guard
from ray_guard.client import channel
from ray_guard.client.quota import reserve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("second_node")]

_LIMIT = 1000


@pytest.fixture(scope="module")
def second_node(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("a second node needs namespaces of its own, which only root can make")
    address = ray.get_runtime_context().gcs_address
    argv = [
        "unshare",
        "-m",
        "-p",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-m",
        "ray.scripts.scripts",
    ]
    argv += ["start", f"--address={address}", "--num-cpus=4", "--block", '--resources={"second": 10}']
    current = Path("/tmp/ray/ray_current_cluster")
    written = current.exists()
    said = tmp_path_factory.mktemp("node") / "said"
    with open(said, "w") as output, subprocess.Popen(argv, stdout=output, stderr=output) as node:
        try:
            _wait_for_two(node, said)
            yield
        finally:
            if not written:
                current.unlink(missing_ok=True)  # else the next ray.init of this user would join this cluster
            node.kill()


def _wait_for_two(node: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + 60
    while len(ray.nodes()) < 2 or "Ray runtime started" not in said.read_text():
        if time.monotonic() > deadline or node.poll() is not None:
            pytest.fail(f"no second node: {said.read_text()}")
        time.sleep(0.1)


@guard(allow=[], budgets={"job": {"tokens": _LIMIT}})
@ray.remote(num_cpus=0)
class Spender:
    def supervisor(self) -> str:
        """Where it is met."""
        line = channel.current()
        if line is None:
            return ""
        with socket.socket(fileno=os.dup(line.fileno())) as sock:
            return str(sock.getpeername())

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
    here = Spender.options(resources={"node:__internal_head__": 0.001}).remote()
    there = Spender.options(resources={"second": 1}).remote()
    supervisors = ray.get([here.supervisor.remote(), there.supervisor.remote()])
    assert "" not in supervisors
    assert supervisors[0] != supervisors[1]
    spent = sum(ray.get([actor.spend.remote(7, 20) for actor in (here, there)]))
    assert spent == 2 * 140, "both had room"
    ray.kill(there)  # what its node had claimed and not used is free again
    deadline = time.monotonic() + 25
    while spent < _LIMIT - 3 * 8 and time.monotonic() < deadline:
        spent += ray.get(here.spend.remote(7, 1000))
        time.sleep(0.2)
    assert _LIMIT - 3 * 8 <= spent <= _LIMIT
    again = Spender.options(resources={"second": 1}).remote()
    spent += sum(ray.get([actor.spend.remote(1, 1000) for actor in (here, again)]))
    assert spent <= _LIMIT

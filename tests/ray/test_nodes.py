"""A job's limits hold over its nodes, and an episode's wherever it is computed for.

Two raylets of one real cluster, each in namespaces and so with a supervisor of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_guard import BudgetExceeded, Popen, episode, guard, tool_call
from ray_guard.actors.job_budget import Gcs
from ray_guard.client import channel
from ray_guard.client.quota import reserve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("second_node")]

_LIMIT = 1000
_FIRST = {"node:__internal_head__": 0.001}
"""What only the first node has."""


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
    here = Spender.options(resources=_FIRST).remote()
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


@guard(allow=[], budgets={"job": {"memory": "300MiB", "processes": 40, "wall_seconds": 3600}})
@ray.remote(num_cpus=0)
class Holder:
    def hold(self) -> bool:
        """A tool takes 180 MiB; whether it has them."""
        self._call = tool_call("hold")  # stays open
        self._call.__enter__()
        program = "import sys; m = bytearray(b'x') * (180 << 20); print(flush=True); sys.stdin.read()"
        self._tool = Popen([sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._tool.stdout is not None
        self._tool.stdout.readline()
        try:
            return self._tool.wait(1.5) is None
        except subprocess.TimeoutExpired:
            return True

    def let_go(self) -> int:
        """What ended it: the limit, or its input's end."""
        self._tool.communicate()
        return self._tool.wait()

    def start_all(self) -> int:
        """Starts as many tools as it may; how many those are, with the ones from before."""
        self._many = getattr(self, "_many", [])
        with suppress(BudgetExceeded):
            while True:
                self._many.append(Popen(["sleep", "600"]))
        return len(self._many)


def test_levels_are_one_jobs_on_two_nodes() -> None:
    """What one node holds, of more than its first part of the limit, the other cannot have; what is free it can."""
    here = Holder.options(resources=_FIRST).remote()
    there = Holder.options(resources={"second": 1}).remote()
    assert ray.get(here.hold.remote())
    assert not ray.get(there.hold.remote())
    assert ray.get([here.let_go.remote(), there.let_go.remote()]) == [0, -signal.SIGKILL]
    gcs = Gcs(ray.get_runtime_context().gcs_address)
    assert 1 <= len(list(gcs.keys("began/"))) <= 2, "when the job began is known to both"
    ray.kill(there)
    deadline = time.monotonic() + 25
    while (started := ray.get(here.start_all.remote())) < 40 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert started == 40
    ray.kill(here)


@guard(allow=[], role="policy")
@ray.remote(num_cpus=0, max_concurrency=4)
class Engine:
    def generate(self, tokens: int) -> tuple[str, bool]:
        held = reserve(tokens=tokens)
        held.settle(tokens=tokens)
        return held.scope, held.unknown


@guard(allow=[], budgets={"episode": {"tokens": 100}, "actor": {"tokens": 180}})
@ray.remote(num_cpus=0)
class Env:
    def roll_out(self, engines: list[Any], tokens: int) -> tuple[int, set[Any], str]:
        """Asks one engine after the other until nothing is left: what it spent, who paid, how it ended."""
        spent, said = 0, set()
        with episode(id="away"), tool_call("ask"):
            for turn in range(50):
                try:
                    said.add(ray.get(engines[turn % len(engines)].generate.remote(tokens)))
                except BudgetExceeded as error:
                    return spent, said, f"{error.kind} of {error.limit:g} in {error.scope}"
                spent += tokens
        return spent, said, ""


def test_an_episode_is_charged_by_engines_of_two_nodes_together_and_never_past_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_GUARD_RUN_ID", "another run")  # of the limit above nothing is left
    near = Engine.options(resources=_FIRST).remote()
    far = Engine.options(resources={"second": 1}).remote()
    env = Env.options(resources=_FIRST).remote()
    spent, said, ended = ray.get(env.roll_out.remote([near, far], 9))
    assert ended == "tokens of 100 in episode"
    assert 100 - 2 * 9 - 13 <= spent <= 100  # a part is 13 tokens, and the rest of one is too small
    assert said == {("call", False), ("episode", False)}
    spent, _, ended = ray.get(env.roll_out.remote([far], 9))
    assert ended == "tokens of 180 in actor"
    assert spent <= 180 - 69

"""A Ray cluster of which a part dies: the actor, its worker, the driver, the raylet, the supervisor below."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import FAULTS, Row
from harness import wait
from judge import judge, read_ledger
from otlp import Traces, by_http
from stage import FOLDER, dead_after, lives, resident, supervisor_beside, unproven

from ray_guard.evidence.verify.check import check
from ray_guard.kernel import rendezvous

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Cluster:
    """One cluster_job.py, flowing."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.evidence, self.ledger, self.batch_ledger = folder / "evidence", folder / "ledger", folder / "batch"
        self._driver = subprocess.Popen(
            [sys.executable, str(FOLDER / "cluster_job.py"), str(self.ledger), str(self.batch_ledger), endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "RAY_GUARD_EVIDENCE": str(self.evidence), "PYTHONPATH": str(FOLDER)},
            text=True,
            bufsize=1,
        )
        self.pids: dict[str, int] = self.answer(60.0)
        self.supervisor = supervisor_beside(os.getpid())
        wait(lambda: self.ledger.stat().st_size > 50_000, "no calls are made", 10)

    def answer(self, seconds: float) -> dict[str, Any]:
        stdout = self._driver.stdout
        assert stdout is not None
        while True:
            assert select.select([stdout], [], [], seconds)[0], "the driver does not answer"
            line = stdout.readline()
            assert line, "the driver has ended"
            if line.startswith("{"):  # else Ray says something
                answer: dict[str, Any] = json.loads(line)
                return answer

    def tell(self, word: str) -> float:
        """When that was said."""
        assert self._driver.stdin is not None
        self._driver.stdin.write(word + "\n")
        return time.monotonic()

    def kill(self, which: str) -> float:
        began = time.monotonic()
        os.kill(self.supervisor if which == "supervisor" else self.pids[which], signal.SIGKILL)
        return began

    def close(self) -> None:
        if self._driver.poll() is None:
            self._driver.communicate(timeout=60)


@pytest.fixture
def receiver() -> Traces:
    return Traces()


@pytest.fixture
def cluster(tmp_path: Path, receiver: Traces) -> Iterator[Cluster]:
    name = f"@{rendezvous.address()[1:]}"  # looked up, not connected to: it would stay for us
    wait(lambda: name not in Path("/proc/net/unix").read_text(), "another supervisor does not end", 20)
    with by_http(receiver) as endpoint:
        made = Cluster(tmp_path, endpoint)
        try:
            yield made
        finally:
            made.close()
            for pid in filter(lives, made.pids.values()):
                os.kill(pid, signal.SIGKILL)


def _shut_down(cluster: Cluster) -> float:
    return cluster.tell("shutdown")


def _ray_kill(cluster: Cluster) -> float:
    return cluster.tell("kill")


def _kill_workers(cluster: Cluster) -> float:
    cluster.kill("batch_worker")
    return cluster.kill("worker")


def _kill_raylet(cluster: Cluster) -> float:
    """Ray leaves the workers alone then, guarded or not: their calls go on, until they are killed as well."""
    cluster.kill("raylet")
    before = cluster.ledger.stat().st_size
    time.sleep(1.0)
    assert cluster.ledger.stat().st_size > before
    return _kill_workers(cluster)


@pytest.mark.parametrize(
    ("fault", "strike", "patience"),
    [
        pytest.param("ray.kill", _ray_kill, 5.0, id="ray.kill"),
        pytest.param("Ray worker SIGKILL", _kill_workers, 5.0, id="worker"),
        pytest.param("driver: ray.shutdown", _shut_down, 15.0, id="shutdown"),
        pytest.param("raylet SIGKILL, worker SIGKILL", _kill_raylet, 5.0, id="raylet"),
    ],
)
def test_a_part_of_the_cluster_dies(
    cluster: Cluster, receiver: Traces, fault: str, strike: Callable[[Cluster], float], patience: float
) -> None:
    memory = resident(cluster.supervisor)
    began = strike(cluster)
    took = dead_after(began, [cluster.pids["worker"], cluster.pids["tool"]], patience)
    dead_after(began, [cluster.pids["batch_worker"]], patience)
    ledger, batch = read_ledger(cluster.ledger), read_ledger(cluster.batch_ledger)
    cluster.close()
    assert unproven(cluster.evidence) == []
    found = judge(cluster.evidence, ledger)
    without = len(receiver.await_all(batch.finished, 1.0))
    FAULTS.note(Row.of(fault, found, took, memory, f"{without} of {len(batch.finished)}"))
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])


def test_the_supervisor_below_a_cluster_is_killed(cluster: Cluster) -> None:
    """Ray starts the env actor anew; a policy actor goes on with what it holds."""
    cluster.tell("policy")
    served = cluster.answer(30.0)
    memory = resident(cluster.supervisor)
    began = cluster.kill("supervisor")
    took = dead_after(began, [cluster.pids["worker"], cluster.pids["tool"]])
    ledger = read_ledger(cluster.ledger)
    cluster.tell("policy")
    assert cluster.answer(30.0) == {**served, "asked": served["asked"] + 1}
    cluster.tell("again")
    cluster.answer(30.0)
    back = time.monotonic() - began
    assert supervisor_beside(os.getpid()) != cluster.supervisor
    cluster.close()
    assert unproven(cluster.evidence) == []
    assert len(check(cluster.evidence)) == 2
    found = judge(cluster.evidence, ledger)
    row = Row.of("supervisor SIGKILL, Ray restarts the actor", found, took, memory)
    FAULTS.note(row._replace(dead_after=f"{row.dead_after}, back after {back:.1f} s"))
    assert (found.unclosed, found.duplicates) == ([], [])
    assert took < 1.0
    assert found.lost == []

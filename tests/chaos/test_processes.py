"""Processes that are killed: the job, its supervisor, the zygote, both at once. Calls are flowing all the while."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults import FAULTS, Row
from harness import PYTHON, ROOT, Namespace, wait
from judge import judge
from stage import (
    FullPort,
    Job,
    Sink,
    batch_lost,
    children,
    dead_after,
    kill_together,
    lives,
    resident,
    restarted,
    unproven,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="needs a supervisor of its own, and so a mount namespace"),
]
SLEEP = ["sleep", "1000"]


def test_the_job_is_killed(namespace: Namespace, tmp_path: Path) -> None:
    """A worker's SIGKILL: what it said before is known, what it had open is ended by the supervisor."""
    evidence = tmp_path / "evidence"
    with Job(tmp_path, evidence, namespace=namespace) as job:
        job.ask("calls", 300)
        tool = job.ask("hold", SLEEP)
        job.ask("flow")
        job.calls_on()
        memory = resident(job.supervisor)
        took = dead_after(job.kill(), [job.pid, tool])
        ledger = job.ledger()
    assert unproven(evidence) == []
    found = judge(evidence, ledger)
    FAULTS.note(Row.of("worker SIGKILL", found, took, memory, batch_lost(tmp_path)))
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])
    assert found.closed_by["supervisor"] >= 1
    assert took < 1.0


@pytest.mark.parametrize("victims", ["supervisor", "zygote", "supervisor and zygote", "both, without control groups"])
def test_the_guard_is_killed(namespace: Namespace, tmp_path: Path, victims: str) -> None:
    """Nothing goes on unguarded: job and tools die within a second, and the next supervisor ends what was open."""
    if victims == "both, without control groups":
        hide = ["mount", "-t", "tmpfs", "-o", "ro", "none", "/sys/fs/cgroup"]
        subprocess.run([*namespace.outside, *hide], check=True)
    evidence = tmp_path / "evidence"
    with Job(tmp_path, evidence, namespace=namespace) as job:
        job.ask("calls", 300)
        tool = job.ask("hold", SLEEP)
        detached = job.ask("hold", ["sh", "-c", "setsid sleep 1000 & wait"])
        job.await_witness()
        job.ask("flow")
        job.calls_on()
        zygote = job.zygote
        family = [job.supervisor, zygote, *children(zygote)]
        tools = [tool, detached, *wait(lambda: children(detached), "it starts nothing")]
        chosen = {"supervisor": [job.supervisor], "zygote": [zygote]}.get(victims, [job.supervisor, zygote])
        memory = resident(job.supervisor)
        took = dead_after(kill_together(chosen), [job.pid, *tools])
        dead_after(time.monotonic(), family, 10)
        ledger = job.ledger()
    restarted(tmp_path, evidence, namespace)
    assert unproven(evidence) == []
    found = judge(evidence, ledger)
    FAULTS.note(Row.of(f"{victims} SIGKILL", found, took, memory))
    assert (found.unclosed, found.duplicates) == ([], [])
    assert took < 1.0
    assert found.lost == []


_CONNECTING = """
import itertools, socket, sys, time
for number in itertools.count():
    if number < int(sys.argv[2]):
        try: socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1).close()
        except OSError: pass
    time.sleep(0.01)
"""


_PATIENCE_S = 5.0
"""Within so long a policy actor or a driver is taken over."""

_WAITING = """
import socket, sys
sock = socket.socket()
sock.connect(("127.0.0.1", int(sys.argv[1])))
sock.sendall(b"made")
"""


@pytest.mark.parametrize("victims", ["supervisor", "zygote", "supervisor and zygote"])
def test_the_jobs_own_children(namespace: Namespace, tmp_path: Path, sink: Sink, victims: str) -> None:
    """Those of the actor ring, whom no leader leads: they die with it."""
    with Job(tmp_path, tmp_path / "evidence", namespace=namespace, allow=[f"127.0.0.1:{sink.port}"]) as job:
        child = job.ask("child", [PYTHON, "-I", "-S", "-c", _CONNECTING, str(sink.port), "1000000"])
        try:
            wait(lambda: sink.taken > 5, "the control does not connect")
            job.await_witness()
            both = {"supervisor": job.supervisor, "zygote": job.zygote}
            began = kill_together([both[name] for name in victims.split(" and ")])
            took = dead_after(began, [job.pid, child])
            FAULTS.note(Row(f"{victims} SIGKILL, an actor's own children", "–", "–", "–", "", f"{took:.2f} s", "", "–"))
            assert took < 1.0
        finally:
            if lives(child):
                os.kill(child, signal.SIGKILL)


def test_a_driver_outlives_its_supervisor(namespace: Namespace, tmp_path: Path) -> None:
    """Whoever is only observed goes on, and its calls under the next supervisor."""
    evidence = tmp_path / "evidence"
    with Job(tmp_path, evidence, namespace=namespace, observes=True) as driver:
        driver.ask("flow", "spans")
        for _ in range(2):
            driver.calls_on()
            driver.kill_supervisor(_PATIENCE_S)
            driver.calls_on()
        assert lives(driver.pid)
        driver.kill()
        ledger = driver.ledger()
    assert unproven(evidence) == []
    found = judge(evidence, ledger)
    FAULTS.note(Row.of("supervisor SIGKILL twice, a driver that is observed", found, None, 0))
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])


def test_a_policy_actor_is_armed_again(namespace: Namespace, tmp_path: Path, sink: Sink) -> None:
    """It is stopped, not ended; another supervisor goes on with its calls, its rules and what its budget has left."""
    evidence = tmp_path / "evidence"
    full = FullPort()
    rules, budgets = [f"127.0.0.1:{port}" for port in (sink.port, full.port)], {"actor": {"connections": 33}}
    took: list[float] = []
    with full, Job(tmp_path, evidence, namespace=namespace, role="policy", allow=rules, budgets=budgets) as job:
        assert job.ask("connects", sink.port, 10) == [0] * 10
        child = job.ask("child", [PYTHON, "-I", "-S", "-c", _CONNECTING, str(sink.port), "5"])
        waiting = job.ask("child", [PYTHON, "-I", "-S", "-c", _WAITING, str(full.port)])
        wait(lambda: full.asked_by(waiting), "it does not connect")
        tool = job.ask("hold", SLEEP)  # from here on what is started belongs to a call
        memory = resident(job.supervisor)
        wait(lambda: sink.taken == 15, "the child does not connect")
        job.ask("flow")
        for _ in range(2):
            job.calls_on()
            before = job.supervisor
            began = job.kill_supervisor(_PATIENCE_S)
            job.calls_on()
            took.append(time.monotonic() - began)
            assert (lives(job.pid), lives(child), lives(tool), lives(before)) == (True, True, False, False)
            refused = [errno.EPERM, errno.EPERM, errno.ENOSYS, errno.EPERM, errno.EPERM, errno.EPERM, errno.EPERM]
            for keeper in (job.supervisor, job.zygote):
                os.kill(keeper, signal.SIGCONT)  # the control: from outside it can be done
                assert job.ask("touches", keeper) == refused, "its filter knows but its first keepers"
            assert job.ask("touches", child) == [0, 0, errno.ENOSYS, 0, 0, 0, 0]
        assert full.hear() == b"made", "the connect that was under way is lost"
        assert job.ask("connects", sink.port + 1, 1) == [errno.EACCES]
        # Used are 10, 5, and the one under way, which was begun anew, and so counts, under each supervisor.
        assert job.ask("connects", sink.port, 16) == [0] * 15 + [errno.EACCES], "its budget is another"
        wait(lambda: sink.taken == 30, "other connections were made than it counted")
        dead_after(job.kill(), [job.pid])
        os.kill(child, signal.SIGKILL)
        ledger = job.ledger()
    assert unproven(evidence) == []
    found = judge(evidence, ledger)
    fault = "supervisor SIGKILL twice, a policy actor is armed again"
    FAULTS.note(Row.of(fault, found, None, memory)._replace(dead_after=f"goes on after {max(took):.2f} s"))
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])
    assert max(took) < _PATIENCE_S


def test_a_policy_actor_that_cannot_be_held_to_its_budget_ends(namespace: Namespace, tmp_path: Path) -> None:
    """Nobody would count what its open connections still send."""
    budgets = {"actor": {"egress_bytes": "1GiB"}}
    with Job(tmp_path, tmp_path / "evidence", namespace=namespace, role="policy", budgets=budgets) as job:
        job.ask("calls", 10)
        zygote = job.zygote
        os.kill(job.supervisor, signal.SIGKILL)
        dead_after(time.monotonic(), [job.pid], 2 * _PATIENCE_S)
        dead_after(time.monotonic(), [zygote], 2 * _PATIENCE_S)
    assert unproven(tmp_path / "evidence") == []

"""The collector breaks: it is down and comes back, it answers errors. The journal is the queue; memory is not."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from faults import FAULTS, Row
from harness import ROOT, Namespace, wait
from judge import judge
from otlp import Traces, by_http
from stage import Job, children, resident

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="needs a supervisor of its own, and so a mount namespace"),
]
CALLS = 5000
"""More than a batch processor's queue holds (2048)."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def forwarder(supervisor: int) -> int:
    """The pid of its forwarder."""
    for pid in children(supervisor):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"ray_guard.evidence.forward" in words:
            return pid
    raise AssertionError("there is no forwarder")


def outage(folder: Path, namespace: Namespace, seconds: float, receiver: Traces, *, down: bool) -> Row:
    """A job of ours and one with a batch processor before the same outage; its end is the caller's business."""
    port = free_port()
    batch_receiver = Traces(receiver.answer)
    batch_port = free_port()
    evidence = folder / "evidence"
    with (
        Job(folder, evidence, namespace=namespace, endpoint=f"http://127.0.0.1:{port}") as job,
        Job(folder, None, endpoint=f"http://127.0.0.1:{batch_port}") as batch,
    ):
        began = time.monotonic()
        if not down:
            ours, theirs = by_http(receiver, port=port), by_http(batch_receiver, port=batch_port)
            ours.__enter__()
            theirs.__enter__()
        job.ask("spans", 100)
        sends = wait(lambda: forwarder(job.supervisor), "there is no forwarder")
        before = resident(job.supervisor)
        job.ask("spans", CALLS - 100)
        batch.ask("spans", CALLS)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        memory = resident(job.supervisor)
        sender = resident(sends)
        if down:
            ours, theirs = by_http(receiver, port=port), by_http(batch_receiver, port=batch_port)
            ours.__enter__()
            theirs.__enter__()
        try:
            ledger = job.ledger()
            missing = receiver.await_all(ledger.finished, 45)
            batch.close()
            lost = len(batch_receiver.lacks(batch.ledger().finished))
        finally:
            ours.__exit__(None, None, None)
            theirs.__exit__(None, None, None)
    found = judge(evidence, ledger)
    found.lost.extend(missing)
    found.duplicates.extend(receiver.different())
    assert memory - before < 8 << 20, "the supervisor keeps what could not be sent"
    assert sender < 160 << 20, f"the forwarder keeps what could not be sent: {sender >> 20} MiB"
    assert found.lost == [], f"{len(missing)} did not arrive"
    assert (found.unclosed, found.duplicates) == ([], [])
    return Row.of("", found, None, memory + sender, f"{lost} of {CALLS}")


@pytest.mark.slow
def test_the_collector_is_down_for_a_while(namespace: Namespace, tmp_path: Path) -> None:
    row = outage(tmp_path, namespace, 12.0, Traces(), down=True)
    FAULTS.note(row._replace(fault="collector down for 12 s"))


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503])
def test_the_collector_answers_errors(namespace: Namespace, tmp_path: Path, status: int) -> None:
    until = time.monotonic() + 8.0
    receiver = Traces(lambda _: 200 if time.monotonic() > until else status)
    row = outage(tmp_path, namespace, 8.0, receiver, down=False)
    FAULTS.note(row._replace(fault=f"collector answers {status} for 8 s"))


def test_the_forwarder_is_killed(namespace: Namespace, tmp_path: Path) -> None:
    """Another goes on where it was; what comes twice is the same."""
    receiver = Traces()
    evidence = tmp_path / "evidence"
    port = free_port()
    with Job(tmp_path, evidence, namespace=namespace, endpoint=f"http://127.0.0.1:{port}") as job:
        job.ask("calls", 300)
        sends = wait(lambda: forwarder(job.supervisor), "there is no forwarder")
        os.kill(sends, 9)
        job.ask("calls", 100)
        ledger = job.ledger()
        memory = resident(job.supervisor)
        with by_http(receiver, port=port):
            missing = receiver.await_all(ledger.finished, 20)
    found = judge(evidence, ledger)
    found.lost.extend(missing)
    found.duplicates.extend(receiver.different())
    FAULTS.note(Row.of("forwarder SIGKILL", found, None, memory))
    assert (found.lost, found.duplicates) == ([], [])

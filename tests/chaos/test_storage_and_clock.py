"""What is around the supervisor breaks: the disk is full, the wall clock jumps. No call is lost, no seal broken."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FAULTS, Row
from harness import ROOT, Namespace
from judge import judge
from otlp import Traces, by_http
from stage import FOLDER, Job, Sink, interpreter, resident, unproven

from ray_guard.evidence.reader import Quarantine, read

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="needs a supervisor of its own, and so a mount namespace"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Six mebibytes, mounted before the namespace is made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def denied(evidence: Path) -> int:
    spans = [entry.span for entry in read([evidence], Quarantine())]
    ended = {span.span_id: span for span in spans if span.name == "egress connect" and span.end_ns is not None}
    return sum(span.attributes["ray_guard.egress.decision"] == "deny" for span in ended.values())


def test_the_disk_is_full(small_disk: Path, tmp_path: Path, sink: Sink) -> None:
    """What goes on is recorded from the reserve, denials to the last; nothing new is granted."""
    evidence = small_disk / "evidence"
    receiver = Traces()
    namespace = Namespace()
    try:
        with Job(tmp_path, evidence, namespace=namespace, allow=[f"127.0.0.1:{sink.port}"]) as job:
            job.ask("spans", 200)
            filler = small_disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096) == 4096:
                    pass
            granted = job.ask("connects", sink.port, 2500)
            refused = granted.index(1)  # when what had been set aside for grants was used up
            assert set(granted[refused:]) == {1}
            job.ask("spans", 300)
            assert job.ask("connects", 9, 50) == [13] * 50
            memory = resident(job.supervisor)
            filler.unlink()
            assert job.ask("connects", sink.port, 1) == [0]
            job.ask("spans", 200)
            ledger = job.ledger()
    finally:
        namespace.close()
    assert unproven(evidence) == []
    found = judge(evidence, ledger)
    with by_http(receiver) as endpoint, Job(tmp_path, None, endpoint=endpoint) as batch:
        batch.ask("spans", 700)
        batch.close()  # its spans are in memory, and leave in order: it asks nothing of a disk
        without = len(receiver.lacks(batch.ledger().finished))
    FAULTS.note(Row.of("full disk", found, None, memory, f"{without} of 700"))
    assert denied(evidence) == 50
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])
    assert memory < 60 << 20


@pytest.mark.skipif(shutil.which("cc") is None, reason="missing: a C compiler")
@pytest.mark.parametrize("hours", [-1, 1])
def test_the_clock_is_stepped(namespace: Namespace, tmp_path: Path, hours: int) -> None:
    """Of job, supervisor and signer alike, between the start and the end of calls."""
    step, library = tmp_path / "step", tmp_path / "clock.so"
    step.write_bytes(bytes(8))
    where = f'-DSTEP="{step}"'
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", where, "-o", library, str(FOLDER / "clock.c")], check=True)
    python = str(interpreter(tmp_path, library))
    evidence = tmp_path / "evidence"
    with Job(tmp_path, evidence, namespace=namespace, python=(python,), environment={"CHAOS_PYTHON": python}) as job:
        job.ask("calls", 200)
        held = job.ask("hold", ["sleep", "1000"])
        with step.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", hours * 3600 * 10**9))
        job.ask("calls", 200)
        os.kill(held, 0)
        memory = resident(job.supervisor)
        ledger = job.ledger()
    assert unproven(evidence) == []
    times = [entry.span.start_ns for entry in read([evidence], Quarantine())]
    assert max(times) - min(times) > 3500 * 10**9, "the clock was not stepped"
    found = judge(evidence, ledger)
    FAULTS.note(Row.of(f"clock stepped by {hours:+d} h", found, None, memory))
    assert (found.lost, found.unclosed, found.duplicates) == ([], [], [])

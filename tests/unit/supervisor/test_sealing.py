"""Journals are forced to disk beside the loop, whatever the disk takes."""

from __future__ import annotations

import errno
import signal
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from ray_guard.evidence.journal import Journal, JournalError
from ray_guard.evidence.verify.check import Kind, State, check
from ray_guard.supervisor.loop import Loop
from ray_guard.supervisor.sealing import Sealer, Syncer


class SlowJournal:
    """A journal whose disk takes as long as the test wants, and says no the first time."""

    folder = "slow"

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.blocked: set[int] = set()
        self.count = 0

    def sync(self) -> None:
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        self.begun.release()
        assert self.may_end.acquire(timeout=10)
        self.count += 1
        if self.count == 1:
            raise JournalError(errno.EIO, "the disk says no")


def test_a_slow_disk_holds_up_nobody_and_is_not_asked_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    journal = SlowJournal()
    journals = (cast("Journal", journal),)
    syncer = Syncer()
    began = time.monotonic()
    syncer.ask(journals)
    assert journal.begun.acquire(timeout=10)
    for _ in range(100):  # while the first one is under way: one more is remembered
        syncer.ask(journals)
    assert time.monotonic() - began < 5
    assert signal.SIGALRM in journal.blocked  # the tick that interrupts a slow connect is not taken there
    journal.may_end.release(3)
    assert journal.begun.acquire(timeout=10)
    assert not journal.begun.acquire(timeout=0.1)
    assert journal.count == 2  # an error is told, and the next request served
    assert "the disk says no" in caplog.text
    syncer.ask(journals)
    assert journal.begun.acquire(timeout=10)


def test_a_signer_that_does_not_start_is_told_once(tmp_path: Path) -> None:
    loop = Loop()
    with Journal(tmp_path / "e") as journal:
        sealer = Sealer(loop)  # nobody has said how one is started: its line ends at once
        sealer.add(journal, {})
        loop.later(1.5, loop.stop)
        loop.run()
        sealer.close(ended=True)
        content = Path(journal.path).read_bytes()
    assert content.count(b'"error.type","value":{"stringValue":"unsealed"}') == 1
    (report,) = check(tmp_path / "e")
    assert report.state is State.KILLED
    assert report.findings[0].kind is Kind.UNSEALED

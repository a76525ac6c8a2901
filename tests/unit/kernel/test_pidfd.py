"""How a process ended, asked while its parent may wait for it at any moment."""

from __future__ import annotations

import os
import signal

import pytest

from ray_guard.kernel import pidfd, procfs


def test_an_exit_status_is_told_before_and_after_its_parent_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    descriptor = os.pidfd_open(pid)
    try:
        assert pidfd.exit_status(descriptor, pid) is None, "it runs"
        os.kill(pid, signal.SIGTERM)
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
        assert pidfd.exit_status(descriptor, pid) == signal.SIGTERM

        def just_now(asked: int) -> int | None:
            """As :func:`procfs.zombie_status`, when the parent waits right before it reads."""
            os.waitpid(asked, 0)
            return found(asked)

        found = procfs.zombie_status
        monkeypatch.setattr(procfs, "zombie_status", just_now)
        status = pidfd.exit_status(descriptor, pid)
        if status is None:
            pytest.skip("before Linux 6.15 nobody can tell any more")
        assert status == signal.SIGTERM
        assert pidfd.exit_status(descriptor, pid) == signal.SIGTERM
    finally:
        os.close(descriptor)

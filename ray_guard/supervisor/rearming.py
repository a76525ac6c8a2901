"""What a supervisor does with a policy actor that another one had before it. Runs in the supervisor.

Loaded with the first: see :mod:`ray_guard.supervisor.handover`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_guard.errors import NotEnforced
from ray_guard.kernel import libc, procfs
from ray_guard.kernel.seccomp import Listener
from ray_guard.kernel.syscalls import NUMBERS
from ray_guard.policy.budgets import EGRESS, RECEIVED, SENT
from ray_guard.supervisor import orphans
from ray_guard.supervisor.node import inherit

if TYPE_CHECKING:
    from ray_guard.supervisor.book import Estate
    from ray_guard.supervisor.node import Node
    from ray_guard.supervisor.target import Target


def restore(node: Node, target: Target, estate: Estate) -> None:
    """What was open is open again, and what was used stays used. Raises JournalError, BadPacket."""
    for opened in estate.opened:
        target.begin(opened)
        span = target.open[opened["span"]]
        if span.account is not None and span.account.began is not None:
            span.account.began -= max(0, time.time_ns() - span.record.start_ns) / 1e9
        node.quotas.opened(target, span.record.span_id)
    _since_it_started(target)
    used = estate.used
    inherit(target.account, used.actor, node.leases)
    node.inherit_job(target.run_id, used.job)
    accounts = {"": target.account, **{id: each.account for id, each in target.open.items() if each.account}}
    for span_id, spent in used.spans.items():
        if span_id in accounts:
            inherit(accounts[span_id], spent, node.leases)
    for scope in used.barred:
        if scope in accounts:
            accounts[scope].bar()


def _since_it_started(target: Target) -> None:
    """Its time, and its job's, count from its process's start: when it was armed, which was later, nobody remembers."""
    started = procfs.start_time(target.pid)
    if started is None:
        return
    began = time.monotonic() - (procfs.uptime() - started / os.sysconf("SC_CLK_TCK"))
    for account in (target.account, target.account.root):
        account.began = began if account.began is None else min(account.began, began)


def require_countable(target: Target) -> None:
    """Raises NotEnforced where bytes are limited: those of connections from before are counted by nobody here."""
    limited = [kind for kind in (EGRESS, SENT, RECEIVED) if target.account.limits_any((kind,))]
    if limited:
        raise NotEnforced(limited, "what its open connections still send would not be counted: it ends")


def tie(line: socket.socket, pid: int) -> None:
    """Has the kernel stop process ``pid`` when the other end of ``line`` closes, as long as anybody holds this one."""
    fcntl.fcntl(line, fcntl.F_SETOWN, pid)
    fcntl.fcntl(line, fcntl.F_SETSIG, signal.SIGSTOP)
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)


def go_on(listener: Listener, about: int, root: int) -> None:
    """Lets a stopped target continue.

    Calls that the supervisor before had received and not answered are begun anew: the kernel tells nobody of them a
    second time, but with a signal pending a caller may be sent back to make its call again. The signal is a stop, so
    nothing else comes of it.

    Args:
        about: see :meth:`Listener.stale`.
        root: the target's first process.
    """
    stale = listener.stale(about)
    stopped = [root]
    if stale:
        stopped = [root, *_behind(root)]
        for pid in stopped:
            for tid in _threads(pid):
                with contextlib.suppress(OSError):
                    libc.syscall(NUMBERS["tgkill"], pid, tid, signal.SIGSTOP)
        for notification in stale:
            listener.restart(notification)
    for pid in reversed(stopped):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _behind(root: int) -> Iterator[int]:
    """All others behind the filter of ``root``."""
    below = procfs.descendants(root)
    yield from below
    marked, born = orphans.mark(root), procfs.start_time(root)
    if marked is None or born is None:
        return
    marked = marked._replace(since=born)
    for pid in procfs.processes():
        start_time = procfs.start_time(pid)
        if pid not in (root, *below) and start_time is not None and orphans.carries(pid, start_time, marked):
            yield pid


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []

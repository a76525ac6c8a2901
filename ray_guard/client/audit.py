"""target: says, just before a system call that sends somewhere, which tool call it belongs to.

The supervisor sees a thread's system call but not the contextvar that tells which of many episodes (ROLL: threads;
async actors: tasks of one thread) is running there. Python's audit events are raised in that thread, in that context,
before the call. Code that makes its own system calls (gRPC, libcurl, uvloop) raises none: its egress stays "ambiguous".
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any

from ray_guard.client.carry import current
from ray_guard.client.outlet import outlet
from ray_guard.client.spans import warn_once

_EVENTS = frozenset(
    (
        "socket.connect",
        "socket.sendto",
        "socket.sendmsg",
        "socket.bind",
        # The C library asks the resolver from inside these, on a socket of its own.
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.gethostbyaddr",
        "socket.getnameinfo",
    )
)


def _intent(event: str, args: tuple[Any, ...]) -> None:
    node = current()
    if node is None:
        return
    descriptor = -1
    if isinstance(args[0], socket.SocketType):
        if args[1] is None:
            return  # sendmsg on a connected socket: nothing is decided about it
        descriptor = args[0].fileno()
    where = outlet()
    if where is None or not where.binding:
        return
    node.segments.count += 1  # the supervisor will write a span for it
    span = node.call or node.span
    where.post(
        f'{{"op":"intent","tid":{threading.get_native_id()},"span":"{span}","event":"{event}","fd":{descriptor}}}'.encode()
    )


class _Busy(threading.local):
    now = False


class _Audit:
    """The hook: installed once, because the interpreter never lets go of one."""

    def __init__(self) -> None:
        self._installed = False

    def install(self) -> None:
        """Adds the hook to this interpreter, for good. Calling it again does nothing."""
        if self._installed:
            return
        self._installed = True
        # Bound here, because the hook runs for every audited event (each import, open, id()) and to the very end of the
        # interpreter, when module globals are gone.
        busy, events, intent, warn = _Busy(), _EVENTS, _intent, warn_once

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event not in events or busy.now:
                return
            busy.now = True  # sending the intent may itself be a sendmsg
            try:
                intent(event, args)
            except Exception:  # noqa: BLE001
                # Raising here would forbid the system call. That decision is the supervisor's.
                warn("audit", "ray_guard: a connection could not be announced; it is attributed as ambiguous")
            finally:
                busy.now = False

        sys.addaudithook(hook)


install_audit = _Audit().install

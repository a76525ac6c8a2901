"""Takes what the recoverer says of former supervisors' logs into the journal. Runs in the supervisor."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ray_guard.evidence.journal import Journal
from ray_guard.evidence.layout import ASKS, VOUCHES, unvouched
from ray_guard.log import logger

if TYPE_CHECKING:
    from ray_guard.egress.made import Waiting

log = logger("ray_guard.recovery")

_PIECE = 1 << 16
"""Read at one go: calls wait for the loop."""


class Recovery:
    """One folder's: see :mod:`ray_guard.evidence.recovery`. Where nothing is to be done, no helper is started.

    Args:
        start: starts the recoverer at that end of its line.
    """

    def __init__(self, loop: Waiting, journal: Journal, start: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._journal = journal
        self._rest = b""
        try:
            if not unvouched(journal.folder, journal.log):
                return
            self._line, theirs = socket.socketpair()
            with theirs:
                start(theirs)
        except OSError as error:
            log.warning("former logs in %s are not seen to: %s", journal.folder, error)
            return
        self._line.sendall(json.dumps({"folder": journal.folder, "log": journal.log}).encode() + b"\n")
        loop.watch(self._line.fileno(), select.EPOLLIN, lambda _events: self._ready())

    def _ready(self) -> None:
        try:
            piece = self._line.recv(_PIECE, socket.MSG_DONTWAIT)
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                if line == ASKS:
                    self._line.sendall(json.dumps(sorted(self._journal.continued)).encode() + b"\n")
                    continue
                self._journal.append(line + b"\n")
                if line.startswith(VOUCHES):
                    self._line.sendall(b"\1")
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError) as error:  # JournalError is one: what is not done now is done by the next
            log.warning("former logs in %s are not all seen to: %s", self._journal.folder, error)
            piece = b""
        if not piece:
            self._loop.forget(self._line.fileno())
            self._line.close()

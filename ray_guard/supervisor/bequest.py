"""What a supervisor leaves of a target to the next one, should it die: kept up to date. Runs in the supervisor.

Loaded with the first policy actor or driver: see :mod:`ray_guard.supervisor.handover`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray_guard.log import logger
from ray_guard.supervisor.book import Book

if TYPE_CHECKING:
    from ray_guard.kernel.seccomp import Listener
    from ray_guard.policy.budgets import Account
    from ray_guard.supervisor.care import Line
    from ray_guard.supervisor.loop import Loop
    from ray_guard.supervisor.target import Target

log = logger("ray_guard.bequest")


class Bequest:
    """One policy actor's or driver's. Where its book cannot be kept any more, the actor ends with this supervisor, as
    an env actor does, and the driver has to find the next one itself.

    Args:
        listener: None: a driver, which is observed and has no budgets.
        hello: how it introduced itself.
        warded: its line, in care.
        said: what it has said under former supervisors.
        stopper: see :meth:`Line.bequeath`.

    Raises:
        OSError: nothing can be left.
    """

    def __init__(
        self,
        loop: Loop,
        target: Target,
        listener: Listener | None,
        warded: Line,
        hello: dict[str, Any],
        *,
        said: Sequence[dict[str, Any]] = (),
        stopper: socket.socket | None = None,
    ) -> None:
        self._loop = loop
        self._target = target
        self._listener = listener
        self._warded = warded
        self._limited: dict[str, Account] = {}
        """The accounts of open spans that have limits of their own."""
        for span_id in target.open:
            self._note_limits(span_id)
        self._book: Book | None = Book(hello, target.key, said)
        armed = () if listener is None else (listener.fd,)
        warded.bequeath(self._book.fileno(), armed if stopper is None else (*armed, stopper.fileno()))
        self._book.renewed = warded.renew_book
        if listener is not None:
            loop.each_round.append(self._keep)

    def take(self, message: dict[str, Any]) -> None:
        """The target has said that, and it was taken."""
        span_id = str(message.get("span"))
        if message["op"] == "open":
            self._note_limits(span_id)
        elif message["op"] == "close":
            self._limited.pop(span_id, None)
        if (book := self._book) is not None:
            self._write(lambda: book.take(message))

    def close(self) -> None:
        """There is nothing to be left any more."""
        if self._book is not None:
            self._book.close()
            self._book = None
            if self._listener is not None:
                self._loop.each_round.remove(self._keep)
            with contextlib.suppress(OSError):
                self._warded.disinherit()

    def _note_limits(self, span_id: str) -> None:
        span = self._target.open.get(span_id)
        if span is not None and span.account is not None and span.account.limits:
            self._limited[span_id] = span.account

    def _keep(self) -> None:
        """What was used, after each round of the loop."""
        if (book := self._book) is not None and (listener := self._listener) is not None:
            self._write(lambda: book.use(self._target.account, self._limited, listener.last))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            log.warning("the book of target %d is not kept, so it is not handed on: %s", self._target.pid, error)
            self.close()

"""Seals journals: has their checkpoints signed, and everything forced to disk, beside the loop. Runs in the supervisor.

Once a second: cut → sign (in the signer, another process) → segment to disk → checkpoint to disk. One at a time for
each journal: a slow disk or signer makes batches larger, and calls wait for neither.
"""

from __future__ import annotations

import base64
import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from ray_guard.errors import NotEnforced
from ray_guard.evidence.journal import Cut, Journal, JournalError
from ray_guard.evidence.otlp import LineEncoder, resource_line
from ray_guard.kernel import seqpacket
from ray_guard.log import logger
from ray_guard.records import AttributeValue, Resource, Source, SpanKind, SpanRecord, StatusCode

if TYPE_CHECKING:
    from ray_guard.egress.made import Waiting
    from ray_guard.evidence.note import Key
    from ray_guard.supervisor.courier import Courier

SEAL_S: Final = 1.0
"""How often journals are forced to disk, and sealed."""
_FIRST_S: Final = 0.2
"""When the signer is started: loading its library must not compete with the first tool's start."""
_BACKOFF_S: Final = (1.0, 60.0)
_LAST_S: Final = 5.0
"""How long the last checkpoint is waited for."""
_DESTINATION: Final = "RAY_GUARD_EVIDENCE_CHECKPOINTS"
"""Where checkpoints are taken to: see :func:`ray_guard.evidence.courier.destination`."""
_PATIENCE_S: Final = 5.0
"""How long a signature may take."""
_TOLD_S: Final = 60.0
"""How often it is said that a journal is full."""

log = logger("ray_guard.sealing")


class Syncer:
    """Works beside the loop: forcing a file to disk can take a fifth of a second, and calls wait for the loop.

    Its thread does nothing else and takes no signal: the ticks that interrupt a slow connect are the loop's.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sync", daemon=True)
        self._thread.start()

    def ask(self, journals: tuple[Journal, ...]) -> None:
        """Soon; nothing where the last request has not been begun: a slow disk must not pile them up."""
        if self._asked.empty():
            for journal in journals:
                self._asked.put(journal.sync)

    def do(self, job: Callable[[], None]) -> None:
        self._asked.put(job)

    def end(self) -> None:
        """After what was asked for, or in a few seconds."""
        self._asked.put(None)
        self._thread.join(_LAST_S)

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while (job := self._asked.get()) is not None:
            try:
                job()
            except OSError as error:
                log.warning("%s", error)


class Sealer:
    """See the module."""

    def __init__(self, loop: Waiting) -> None:
        self.start: Callable[[socket.socket], None] = lambda _line: None
        """Starts a signer at that end of its line; set by whoever has a zygote."""
        self.recover: Callable[[socket.socket], None] = lambda _line: None
        """Starts a recoverer at that end of its line; set likewise."""
        self._loop = loop
        self._syncer = Syncer()
        self._journals: list[Journal] = []
        self._line: socket.socket | None = None
        self._public: bytes | None = None
        """The signer's key, once it is ready."""
        self._delay = _BACKOFF_S[0]
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[Journal, Cut]] = {}
        self._waiting_since = 0.0
        """When the oldest of those was asked for."""
        self._busy: set[int] = set()
        """Journals (by id) of which a checkpoint is being signed or written."""
        self._couriers: dict[int, Courier] = {}
        self._stale: dict[int, tuple[str, str]] = {}
        """Why a journal (by id) needs a new log: nobody can seal the old one any more."""
        self._told: dict[int, float] = {}
        """When it was last said of a journal (by id) that it is full."""
        self._encoder = LineEncoder(Resource({"service.name": "ray_guard", "host.name": socket.gethostname()}))

    def add(self, journal: Journal, environment: Mapping[str, str]) -> None:
        """Seals it from here on.

        Args:
            environment: says where its checkpoints are taken to.

        Raises:
            NotEnforced: what signs is not installed, or checkpoints cannot be taken there.
        """
        self._send_courier(journal, environment)
        if not self._journals:
            # Not find_spec, which lists every folder: the first call would wait.
            if not any(os.path.isdir(f"{entry}/cryptography") for entry in sys.path):
                raise NotEnforced(["evidence"], "its seal needs the package cryptography: pip install cryptography")
            self._loop.later(_FIRST_S, self._start)
            self._loop.later(SEAL_S, self._tick)
        self._journals.append(journal)
        if self._public is not None:
            self._introduce(journal)
        self._loop.later(_FIRST_S, lambda: self._recover(journal))

    def close(self, *, ended: bool) -> None:
        """Seals what there is for the last time; the journals can then be closed. ``ended``: and says so in them."""
        self._syncer.end()
        if self._line is None and self._journals:
            self._start()
        for journal in self._journals:
            self._seal_last(journal, ended=ended)
        if self._line is not None:
            self._line.close()
        for each in self._couriers.values():
            each.close()

    def _send_courier(self, journal: Journal, environment: Mapping[str, str]) -> None:
        spelled = environment.get(_DESTINATION, "").strip()
        if not spelled:
            return
        # Here alone: whoever has no destination need not wait until it is loaded.
        from ray_guard.evidence.courier import CourierError, destination
        from ray_guard.supervisor.courier import Courier

        def told(why: str) -> None:
            log.warning("checkpoints do not reach %s: %s", spelled, why)
            self._violation(journal, "checkpoint not exported", f"{spelled}: {why}")

        try:
            destination(spelled, environment)
            self._couriers[id(journal)] = Courier(self._loop, spelled, environment, told)
        except (CourierError, OSError) as error:
            raise NotEnforced(["evidence"], f"{_DESTINATION}: {error}") from error

    def _recover(self, journal: Journal) -> None:
        from ray_guard.supervisor.recovery import Recovery

        Recovery(self._loop, journal, self.recover)

    # -- the signer ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._line is not None:
            return
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.start(theirs)
            except OSError as error:
                log.warning("the signer cannot be started: %s", error)
        self._loop.watch(self._line.fileno(), select.EPOLLIN, lambda _events: self._ready())

    def _ready(self) -> None:
        if self._line is None:
            return
        try:
            received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            self._lost()
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        if message.get("op") == "ready":
            self._is_ready(str(message["public"]))
        else:
            self._signed(int(message["id"]), str(message["signature"]))

    def _is_ready(self, public: str) -> None:
        self._public = base64.b64decode(public)
        self._delay = _BACKOFF_S[0]
        for journal in self._journals:
            self._renew(journal)
            self._introduce(journal)
            self._seal(journal)

    def _introduce(self, journal: Journal) -> None:
        said = {"ray_guard.journal.log": journal.log, "ray_guard.journal.key": str(self._key(journal))}
        self._keep(journal, resource_line(said))

    def _key(self, journal: Journal) -> Key:
        from ray_guard.evidence.note import ORIGIN, Key  # with the first seal, as in the journal

        assert self._public is not None  # noqa: S101 - asked only once it is there
        return Key(f"{ORIGIN}{journal.log}", self._public)

    def _signed(self, number: int, signature: str) -> None:
        asked = self._asked.pop(number, None)
        self._waiting_since = time.monotonic()
        if asked is not None:
            journal, cut = asked
            self._syncer.do(partial(self._write, journal, cut, self._key(journal), base64.b64decode(signature)))

    def _write(self, journal: Journal, cut: Cut, key: Key, signature: bytes) -> None:
        """Beside the loop."""
        try:
            journal.seal(cut, key, signature)
            if (carries := self._couriers.get(id(journal))) is not None:
                carries.take(str(key), cut.checkpoint.signed(key, signature))
        finally:
            self._busy.discard(id(journal))

    def _lost(self) -> None:
        """It has been killed, or could not be started. What it signed stays; whoever signs next begins a new log."""
        assert self._line is not None  # noqa: S101 - it is watched only while it is there
        self._loop.forget(self._line.fileno())
        self._line.close()
        self._line = None
        log.error("the signer is gone%s", "" if self._public is None else ": new logs are begun")
        for journal, cut in self._asked.values():
            self._busy.discard(id(journal))
            if cut.finished:
                os.close(cut.descriptor)
        self._asked.clear()
        if self._public is not None:
            self._public = None
            why = ("signer lost", "what signs checkpoints was ended or stopped from outside")
            self._stale = {id(journal): why for journal in self._journals}
        elif self._delay == _BACKOFF_S[0]:
            for journal in self._journals:
                self._violation(journal, "unsealed", "what signs checkpoints does not start: see the supervisor's log")
        self._loop.later(self._delay, self._start)
        self._delay = min(2 * self._delay, _BACKOFF_S[1])

    def _look_at_seal(self, journal: Journal) -> None:
        if id(journal) in self._busy or id(journal) in self._stale:
            return
        altered = journal.seal_altered()
        if altered is not None:
            self._stale[id(journal)] = ("altered", altered)

    def _renew(self, journal: Journal) -> None:
        why = self._stale.get(id(journal))
        if why is None or id(journal) in self._busy:
            return
        try:
            journal.renew()
        except OSError as error:
            log.warning("%s stays unsealed: %s", journal.log, error)
        else:
            del self._stale[id(journal)]
            self._violation(journal, *why)
            if self._public is not None:
                self._introduce(journal)

    # -- sealing -------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._asked and time.monotonic() - self._waiting_since > _PATIENCE_S:
            self._lost()  # it was stopped, or hangs; it ends when it finds its line closed
        for journal in self._journals:
            altered = journal.altered()
            if altered is not None:
                self._violation(journal, "altered", altered)
            self._look_at_seal(journal)
            self._tell_if_full(journal)
            self._renew(journal)
            self._seal(journal)
        self._loop.later(SEAL_S, self._tick)

    def _seal(self, journal: Journal) -> None:
        if self._line is None or self._public is None or id(journal) in self._busy or id(journal) in self._stale:
            self._syncer.ask((journal,))
            return
        cut = journal.cut()
        if cut is None:
            return
        try:
            self._ask(self._line, journal, cut)
        except OSError:
            return  # its end is about to be told
        self._busy.add(id(journal))

    def _ask(self, line: socket.socket, journal: Journal, cut: Cut) -> int:
        number = next(self._numbers)
        if not self._asked:
            self._waiting_since = time.monotonic()
        self._asked[number] = (journal, cut)
        seqpacket.send(line, {"op": "sign", "id": number, "text": cut.checkpoint.text()})
        return number

    def _seal_last(self, journal: Journal, *, ended: bool) -> None:
        """Waits for it: the loop has ended."""
        cut = journal.cut(last=ended)
        if cut is None or self._line is None or id(journal) in self._stale:
            return
        self._line.settimeout(_LAST_S)
        try:
            number = self._ask(self._line, journal, cut)
            while number in self._asked and (received := seqpacket.receive(self._line)) is not None:
                message = received[0]
                if message.get("op") == "ready":
                    self._public = base64.b64decode(str(message["public"]))
                elif (asked := self._asked.pop(int(message["id"]), None)) is not None:
                    self._write(*asked, self._key(asked[0]), base64.b64decode(str(message["signature"])))
        except (OSError, seqpacket.BadPacket) as error:
            log.warning("%s is not sealed to its end: %s", journal.log, error)

    # -- what is told --------------------------------------------------------------------------------------------------

    def _tell_if_full(self, journal: Journal) -> None:
        error, lost = journal.refused, journal.lost
        now = time.monotonic()
        if error is None or now - self._told.get(id(journal), -_TOLD_S) < _TOLD_S:
            return
        journal.refused = None
        self._told[id(journal)] = now
        log.error("nothing more is granted: %s", error)
        self._violation(journal, "full", f"nothing is granted while this lasts: {error}", lost)

    def _violation(self, journal: Journal, reason: str, detail: str, lost: int = 0) -> None:
        """Something is wrong with the evidence itself: nobody's call, so a trace of its own."""
        now = time.time_ns()
        attributes: dict[str, AttributeValue] = {
            "ray_guard.violation.kind": "evidence",
            "ray_guard.violation.destination": detail,
            "error.type": reason,
            "ray_guard.source": Source.SUPERVISOR.value,
        }
        if lost:
            attributes["ray_guard.journal.lost_records"] = lost
        trace, span = os.urandom(16).hex(), os.urandom(8).hex()
        record = SpanRecord(
            trace, span, None, "ray_guard.violation", SpanKind.INTERNAL, now, now, attributes, StatusCode.ERROR, detail
        )
        self._keep(journal, self._encoder.encode(record))

    @staticmethod
    def _keep(journal: Journal, line: bytes) -> None:
        try:
            journal.keep(line)
        except JournalError as error:
            log.warning("%s", error)

"""A ring: everything behind one listener, judged as one. Runs in the supervisor.

The actor ring asks which call a thread acts for; the call ring knows, because the listener is the call's own. Order of
work for every request: decide (pure) → account → journal → only then may the gate act.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ray_guard.egress.gate import Ruling
from ray_guard.egress.meter import Flow, Meter
from ray_guard.evidence.journal import JournalError
from ray_guard.kernel import procfs
from ray_guard.policy.budgets import CONNECTIONS, EGRESS, RECEIVED, SENT, UNLIMITED, Account, Exceeded
from ray_guard.policy.decide import (
    CompiledPolicy,
    Decision,
    Operation,
    Process,
    Reason,
    Request,
    Surroundings,
    Verdict,
    decide,
)
from ray_guard.policy.destination import Transport
from ray_guard.records import AttributeValue, Role, SpanEvent, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor.target import Origin, Target, new_span_id

if TYPE_CHECKING:
    from ray_guard.supervisor.node import Node

log = logging.getLogger("ray_guard.ring")

_OWN_SOCKETS_LIMIT: Final = 1024
_DATAGRAM_FLOWS_LIMIT: Final = 4096


class Ring:
    """The judge of one listener.

    Args:
        node: what is known of the node: cluster endpoints, peers' ports, the meter.
        target: whose evidence and budgets.
        policy: with the role that applies behind this listener.
        root: the process whose tree this is.
        origin: the call that everything here belongs to; None: ask thread by thread (actor ring).
    """

    def __init__(
        self, node: Node, target: Target, policy: CompiledPolicy, root: int, origin: Origin | None = None
    ) -> None:
        self._node = node
        self._meter: Meter = node.meter
        self.target = target
        self.policy = policy
        self.root = root
        self._origin = origin
        self.mute = origin is None and not grants_datagrams(policy)
        """Datagram sockets of this ring cannot send (see rings.actor_ring)."""
        self._own_unix: dict[tuple[int, int], int] = {}
        self._surroundings: Surroundings | None = None
        self._connections: set[Connection] = set()
        self._datagrams: dict[tuple[str, int, str | None], Connection] = {}
        self._missed: dict[tuple[str, int], float] = {}
        node.surroundings_changed.append(self._forget_surroundings)

    # -- Judge ---------------------------------------------------------------------------------------------------------

    def rule(
        self,
        operation: Operation,
        transport: Transport,
        tid: int,
        address: str = "",
        port: int = 0,
        path: str | None = None,
        inode: tuple[int, int] | None = None,
        size: int = 0,
    ) -> Ruling:
        process = Process.OTHER if self._origin is not None else self._process(tid)
        unix = transport is Transport.UNIX
        request = Request(operation, transport, address, port, ("\0" if path is None else path) if unix else "",
                          process, inode)  # fmt: skip
        decision = decide(self.policy, self._around(), self.target.account, request)
        if decision.reason is Reason.NOT_LISTED and self._may_have_missed(request):
            return _WAIT
        origin = self._origin or self._origin_of(tid, decision)
        if operation is Operation.SEND and decision.allowed:
            return self._send(request, decision, origin, size)
        if operation in (Operation.BIND, Operation.LISTEN):
            return self._inward(request, decision, origin)
        return self._connect(request, decision, origin)

    def known_flow(self, cookie: int, address: str, port: int) -> bool:
        flow = self._meter.find(cookie)
        return flow is not None and (flow.address, flow.port) == (address, port)

    def dissolved(self, cookie: int, info: bytes) -> None:
        if self._meter.find(cookie) is not None and len(info) >= 216:
            (received,) = struct.unpack_from("=Q", info, 128)
            sent, again = struct.unpack_from("=QQ", info, 200)
            self._meter.settle(cookie, sent - again, received)

    def bound(self, pinned: int) -> None:
        found = os.fstat(pinned)
        key = (found.st_dev, found.st_ino)
        if key in self._own_unix or len(self._own_unix) >= _OWN_SOCKETS_LIMIT:
            os.close(pinned)
            return
        self._own_unix[key] = pinned
        self._surroundings = None

    def listening(self, address: str, port: int) -> None:
        if self.policy.role is Role.POLICY:
            self._node.announce(self.target, address, port)

    def may_borrow(self, tid: int, pid: int) -> bool:
        return self.policy.role is Role.POLICY and procfs.is_in_tree(pid, self.root)

    def fault(self, what: str) -> None:
        log.warning("target %d: %s", self.target.pid, what)

    # ------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nobody is left behind the listener: what flows on is cut and settled."""
        self._node.surroundings_changed.remove(self._forget_surroundings)
        self._meter.finish([c.flow for c in self._connections if c.flow is not None])
        for connection in list(self._datagrams.values()):
            connection.finish()
        self._datagrams.clear()
        for pinned in self._own_unix.values():
            os.close(pinned)
        self._own_unix.clear()

    def _forget_surroundings(self) -> None:
        self._surroundings = None

    def _around(self) -> Surroundings:
        if self._surroundings is None:
            base = self._node.surroundings(self.target)
            self._surroundings = replace(base, own_unix=frozenset(self._own_unix))
        return self._surroundings

    def _process(self, tid: int) -> Process:
        own = tid == self.root or os.path.exists(f"/proc/{self.root}/task/{tid}")
        return Process.OWN if own else Process.OTHER

    def _origin_of(self, tid: int, decision: Decision) -> Origin:
        if decision.reason in (Reason.CLUSTER, Reason.COLLECTIVES):
            self.target.pump()
            call = self.target.intents.pop(tid, None)
            if call is None or call not in self.target.open:
                return self.target.own_origin()  # Ray's own threads: no call has caused it
            return self.target.origin_of_call(call)
        return self.target.origin_of_thread(tid)

    def _may_have_missed(self, request: Request) -> bool:
        """Whether the cluster may have grown since its tables were read: then the question waits for a reading."""
        directory = self._node.directory(self.target)
        if (
            directory is None
            or request.process is not Process.OWN
            or request.transport is not Transport.TCP
            or request.operation is not Operation.CONNECT
        ):
            return False
        key = (request.address, request.port)
        if len(self._missed) > 4096:
            self._missed.clear()
        since = self._missed.setdefault(key, time.monotonic())
        if directory.fresh(since):
            del self._missed[key]
            return False
        return True

    # -- outward -------------------------------------------------------------------------------------------------------

    def _connect(self, request: Request, decision: Decision, origin: Origin) -> Ruling:
        account = origin.account
        connection = Connection(self, origin, request)
        if decision.allowed and request.transport is not Transport.UNIX:
            exceeded = account.reserve(CONNECTIONS, 1)
            if exceeded is not None:
                decision = _over_budget(decision, exceeded)
        if not decision.allowed and self.mute and request.transport is Transport.UDP:
            return self._look_up(connection, decision)
        if not decision.allowed:
            account.count_refused()
            try:
                connection.refused(decision)
            except JournalError:
                log.exception("a denial could not be journaled")
                return Ruling(errno.EPERM)
            return Ruling(errno.EACCES)
        try:
            connection.granted(decision)
        except JournalError:  # an allowance that leaves no record is not given
            log.exception("a decision could not be journaled")
            if request.transport is not Transport.UNIX:
                account.release(CONNECTIONS, 1)
            return Ruling(errno.EPERM)
        return Ruling(0, connection)

    def _look_up(self, connection: Connection, decision: Decision) -> Ruling:
        """A mute socket is "connected" to somewhere that is not granted: that is how Ray and vLLM learn their own address.

        It can send nothing, so it may; the denial stands in the journal all the same, without being a violation.
        """
        try:
            connection.looked_up(decision)
        except JournalError:
            log.exception("a denial could not be journaled")
            return Ruling(errno.EPERM)
        return Ruling(0)

    def _send(self, request: Request, decision: Decision, origin: Origin, size: int) -> Ruling:
        """A datagram. Its flow is journaled once per destination and call; its bytes are reserved before it goes."""
        key = (request.address or request.path, request.port, origin.call)
        connection = self._datagrams.get(key)
        if connection is None:
            if len(self._datagrams) >= _DATAGRAM_FLOWS_LIMIT:
                return Ruling(errno.ENOBUFS)
            ruling = self._connect(request, decision, origin)
            if ruling.error or not isinstance(ruling.attempt, Connection):
                return ruling
            connection = ruling.attempt
            connection.settle_connection()
            self._datagrams[key] = connection
        exceeded = origin.account.reserve(SENT, size)
        if exceeded is not None and not exceeded.report_only:
            connection.over_budget(exceeded)
            return Ruling(errno.EACCES)
        origin.account.settle(SENT, size, size)
        connection.sent += size
        return Ruling(0)

    # -- inward --------------------------------------------------------------------------------------------------------

    def _inward(self, request: Request, decision: Decision, origin: Origin) -> Ruling:
        if decision.allowed:
            return Ruling(0)
        origin.account.count_refused()
        where = _spelled(request)
        try:
            self.target.violation(
                origin, None, request.operation.value, reason=decision.reason.value, destination=where
            )
        except JournalError:
            log.exception("a denial could not be journaled")
        return Ruling(errno.EACCES if request.transport is Transport.UNIX else errno.EPERM)


_WAIT: Final = Ruling(-1)
"""No answer yet: the gate asks again shortly."""


def _over_budget(decision: Decision, exceeded: Exceeded) -> Decision:
    if exceeded.report_only:
        return decision._replace(reason=Reason.BUDGET, report_only=True, exceeded=exceeded)
    return Decision(Verdict.DENY, Reason.BUDGET, exceeded=exceeded)


def _spelled(request: Request) -> str:
    if request.transport is Transport.UNIX:
        return f"unix:{request.path}" if request.path != "\0" else "unix:(abstract)"
    host = f"[{request.address}]" if ":" in request.address else request.address
    return f"{request.transport.value}://{host}:{request.port}"


class Connection:
    """One connect (or datagram destination) of a target: its record, its share of the budgets, its flow."""

    __slots__ = ("_attributes", "_decision", "_over", "_ring", "_settled", "_span", "_start", "capped", "flow", "origin",
                 "request", "sent")  # fmt: skip

    def __init__(self, ring: Ring, origin: Origin, request: Request) -> None:
        self._ring = ring
        self.origin = origin
        self.request = request
        self.flow: Flow | None = None
        self.sent = 0
        self.capped = _limits_bytes(origin.account)
        self._span = new_span_id()
        self._start = time.time_ns()
        self._attributes: dict[str, AttributeValue] = {}
        self._decision: Decision = Decision()
        self._settled = False
        self._over = False

    # -- decided -------------------------------------------------------------------------------------------------------

    def granted(self, decision: Decision) -> None:
        """Journals that it was granted, before it is. Raises JournalError."""
        self._describe(decision)
        self._ring.target.write(self._record(None), self.origin.identity)

    def refused(self, decision: Decision) -> None:
        """Journals the refusal, complete. Raises JournalError."""
        self._describe(decision)
        where = _spelled(self.request)
        if decision.exceeded is not None:
            event = self._ring.target.exceeded(self.origin, self._span, decision.exceeded, where)
        else:
            event = self._ring.target.violation(
                self.origin, self._span, "egress", reason=decision.reason.value, destination=where
            )
        self._attributes["error.type"] = "EACCES"
        record = self._record(time.time_ns(), StatusCode.ERROR, f"{where} is refused: {decision.reason.value}", event)
        self._ring.target.write(record, self.origin.identity)

    def looked_up(self, decision: Decision) -> None:
        """Journals a denied connect of a datagram socket that cannot send."""
        self._describe(decision)
        self._attributes["ray_guard.egress.mute"] = True
        self._ring.target.write(self._record(time.time_ns()), self.origin.identity)

    def _describe(self, decision: Decision) -> None:
        request = self.request
        self._decision = decision
        attributes = self._attributes
        attributes["network.transport"] = request.transport.value
        if request.transport is Transport.UNIX:
            attributes["network.peer.address"] = request.path if request.path != "\0" else "(abstract)"
        else:
            attributes["network.peer.address"] = request.address
            attributes["network.peer.port"] = request.port
        attributes["server.address"] = attributes["network.peer.address"]
        attributes.update(decision.attributes())
        if decision.rule is not None:
            attributes["ray_guard.egress.rule"] = decision.rule
        candidates = self.origin.candidates
        attributes["ray_guard.egress.scope"] = "ambiguous" if candidates else "exact"
        if candidates:
            attributes["ray_guard.egress.candidates"] = candidates

    def _record(
        self, end_ns: int | None, status: StatusCode = StatusCode.UNSET, text: str = "", *events: SpanEvent
    ) -> SpanRecord:
        return SpanRecord(
            trace_id=self.origin.trace_id,
            span_id=self._span,
            parent_id=self.origin.parent_id,
            name="egress connect",
            kind=SpanKind.CLIENT,
            start_ns=self._start,
            end_ns=end_ns,
            attributes=dict(self._attributes),
            status=status,
            status_message=text,
            events=events,
        )

    # -- Attempt -------------------------------------------------------------------------------------------------------

    def connected(self, cookie: int | None, local: tuple[str, int] | None, holder: tuple[int, int]) -> None:
        if local is not None:
            self._attributes["network.local.address"], self._attributes["network.local.port"] = local
        if self.request.transport is not Transport.UNIX:
            self.settle_connection()
        if cookie is None:
            self._end()
            return
        self.flow = Flow(cookie, self.request.address, self.request.port, holder, self, self._ring.root)
        self._ring._connections.add(self)
        self._ring._meter.begin(self.flow)

    def failed(self, error: int) -> None:
        if self.request.transport is not Transport.UNIX:
            self.settle_connection()
        name = errno.errorcode.get(error, str(error))
        self._attributes["error.type"] = name
        if self.flow is not None:
            self._ring._meter.discard(self.flow.cookie)
            self._ring._connections.discard(self)
        self._end(StatusCode.ERROR, os.strerror(error))

    def settle_connection(self) -> None:
        if not self._settled:
            self._settled = True
            self.origin.account.settle(CONNECTIONS, 0 if self.origin.account.closed else 1, 1)

    # -- FlowOwner -----------------------------------------------------------------------------------------------------

    def progressed(self, flow: Flow, sent: int, received: int) -> bool:
        account = self.origin.account
        over = account.charge(SENT, sent) if sent else None
        over = (account.charge(RECEIVED, received) if received else None) or over
        if over is None or over.report_only:
            return True
        self.over_budget(over)
        return False

    def over_budget(self, exceeded: Exceeded) -> None:
        """Says once that this connection passed a limit."""
        if not self._over:
            self._over = True
            try:
                self._ring.target.exceeded(self.origin, self._span, exceeded, _spelled(self.request))
            except JournalError:
                log.exception("a violation could not be journaled")

    def ended(self, flow: Flow, *, exact: bool) -> None:
        self._ring._connections.discard(self)
        self._attributes["ray_guard.egress.bytes_sent"] = flow.sent
        self._attributes["ray_guard.egress.bytes_received"] = flow.received
        if not exact:
            self._attributes["ray_guard.egress.bytes_exact"] = False
        if self._over:
            self._attributes["error.type"] = "budget"
            self._end(StatusCode.ERROR, "cut: a budget was reached")
        else:
            self._end()

    def finish(self) -> None:
        """A datagram destination is done with: its call has ended."""
        self._attributes["ray_guard.egress.bytes_sent"] = self.sent
        self._end()

    def _end(self, status: StatusCode = StatusCode.UNSET, text: str = "") -> None:
        try:
            self._ring.target.write(self._record(time.time_ns(), status, text), self.origin.identity)
        except JournalError:
            log.exception("the end of a flow could not be journaled")


def grants_datagrams(policy: CompiledPolicy) -> bool:
    """Whether any destination is granted by UDP."""
    return any(
        transport is Transport.UDP
        for layer in policy.layers
        for transport in (*layer.ranges, *(key[0] for key in layer.addresses))
    )


def _limits_bytes(account: Account) -> bool:
    return any(account.room(kind) is not UNLIMITED for kind in (EGRESS, SENT, RECEIVED))

"""A ring: everything behind one listener, judged as one. Runs in the supervisor.

The actor ring asks which call a thread acts for; the call ring knows, because the listener is the call's own. Order of
work for every request: decide (pure) → account → journal → only then may the gate act.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ray_guard.egress.gate import Ruling
from ray_guard.egress.meter import Flow, Meter
from ray_guard.evidence.journal import JournalError
from ray_guard.evidence.otlp import EgressForm, fragment, tail
from ray_guard.ids import new_span_id
from ray_guard.kernel import libc, procfs
from ray_guard.log import logger
from ray_guard.policy.budgets import CONNECTIONS, EGRESS, RECEIVED, SENT, Account, Exceeded, Scope
from ray_guard.policy.decide import (
    CompiledPolicy,
    Decision,
    Endpoint,
    Operation,
    Process,
    Reason,
    Request,
    Route,
    Surroundings,
    decide,
)
from ray_guard.policy.destination import Transport
from ray_guard.records import AttributeValue, Role, SpanEvent, StatusCode
from ray_guard.supervisor.names import Names
from ray_guard.supervisor.proxies import Standing
from ray_guard.supervisor.target import Origin, Target

if TYPE_CHECKING:
    from ray_guard.egress.relay.crossing import Crossing, End
    from ray_guard.egress.relay.datagrams import Way
    from ray_guard.egress.relay.proxy import Proxied
    from ray_guard.supervisor.model_calls import ModelCalls
    from ray_guard.supervisor.node import Node
    from ray_guard.supervisor.view import View

log = logger("ray_guard.ring")

_OWN_SOCKETS_LIMIT: Final = 1024
_LOOK_EVERY_S: Final = 0.05
"""At the limit: how often it is looked for sockets whose file is gone."""
_DATAGRAM_FLOWS_LIMIT: Final = 4096
_CUDA: Final = b"cuda-uvmfd-"


class Ring:
    """The judge of one listener.

    Args:
        node: what is known of the node: cluster endpoints, peers' ports, the meter.
        target: whose evidence and budgets.
        policy: with the role that applies behind this listener.
        root: the process whose tree this is.
        origin: the call that everything here belongs to; None: ask thread by thread (actor ring).
        view: what may be written behind this listener; None: whatever its user may.
    """

    def __init__(
        self,
        node: Node,
        target: Target,
        policy: CompiledPolicy,
        root: int,
        origin: Origin | None = None,
        *,
        view: View | None = None,
    ) -> None:
        self.node = self._node = node
        self._meter: Meter = node.meter
        self.target = target
        self.policy = policy
        self.root = root
        self._origin = origin
        self.origin_of: Callable[[int], Origin] = target.origin_of_thread if origin is None else lambda _tid: origin
        """Whose doing a thread's calls are; within a call a process of its own may be known (see processes)."""
        self._view = view
        self.mute = origin is None and not policy.datagrams
        """Datagram sockets of this ring cannot send (see rings.actor_ring)."""
        self._own_unix: dict[tuple[int, int], int] = {}
        self._looked = 0.0
        self._surroundings: Surroundings | None = None
        self._flows: dict[int, Flow] = {}
        self._crossings: set[Crossing] = set()
        self._seen: set[int] = set()
        self._faults = 0
        self._known: dict[tuple[str, int], _Known] = {}
        """Destinations of connects that :meth:`again` may grant, see :meth:`_is_repeatable`."""
        self._texts: dict[tuple[object, ...], str] = {}
        self._datagrams: dict[tuple[str, int, str | None], Connection] = {}
        self._ways: set[Way] = set()
        self._names: Names | None = Names(self) if policy.names else None
        self._missed: dict[tuple[str, int], float] = {}
        node.surroundings_changed.append(self._forget_surroundings)

    # -- Judge ---------------------------------------------------------------------------------------------------------

    def rule(
        self,
        operation: Operation,
        transport: Transport,
        tid: int,
        *,
        address: str = "",
        port: int = 0,
        path: str | None = None,
        inode: tuple[int, int] | None = None,
        size: int = 0,
    ) -> Ruling:
        origin = self.origin_of(tid)
        if self._names is not None and self._names.changed():
            self._surroundings = None
        unix = transport is Transport.UNIX
        request = Request(operation, transport, address, port, ("\0" if path is None else path) if unix else "",
                          self._process(tid), inode)  # fmt: skip
        decision = decide(self.policy, self._surroundings or self._around(), origin.account, request)
        if self._node.proxies.named and not unix and (error := self._proxy_unknown(request, decision)):
            return Ruling(error)
        if decision.reason is Reason.NOT_LISTED and self._may_have_missed(request):
            if origin.call is not None:
                self.target.intents[tid] = origin.call
            return _WAIT
        if decision.reason in _OF_THE_ACTOR and origin.candidates:
            origin = self.target.own_origin()  # Ray's own threads: no call has caused it
        if self._names is not None:
            if decision.route is Route.RESOLVER:
                return self._names.lead(request, decision, origin)
            if not decision.allowed and self._names.sorts(request):
                return self._names.sort(request, origin)
        if operation is Operation.SEND and decision.allowed:
            return self._send(request, decision, origin, size)
        if operation in (Operation.BIND, Operation.LISTEN):
            return self._inward(request, decision, origin)
        return self._connect(request, decision, origin)

    def again(self, address: tuple[str, int], cookie: int, tid: int) -> Connection | None:
        known = self._known.get(address)
        if known is None or cookie in self._meter.flows:
            return None
        proxies = self._node.proxies
        if proxies.named and proxies.at_port(address[1]) is not Standing.KNOWN:
            return None  # it may be a proxy's by now
        origin = self.origin_of(tid)
        account = origin.account
        if not account.free:
            if origin.call is not None:
                self.target.intents[tid] = origin.call
            return None
        connection = Connection(self, origin, known.request)
        origin = connection.origin
        form = known.form if known.origin is origin else known.form_for(self.target, origin)
        try:
            connection.granted_again(form)
        except JournalError:
            return None  # asked in full it is refused, and logged
        account.count(CONNECTIONS)
        return connection

    def known_flow(self, cookie: int, address: str, port: int) -> bool:
        flow = self._meter.flows.get(cookie)
        return flow is not None and (flow.address, flow.port) == (address, port)

    def dissolved(self, cookie: int, info: bytes) -> None:
        if cookie in self._meter.flows and len(info) >= 216:
            (received,) = struct.unpack_from("=Q", info, 128)
            sent, again = struct.unpack_from("=QQ", info, 200)
            self._meter.settle(cookie, sent - again, received)

    def may_take(self, name: bytes, tid: int) -> bool:
        """CUDA's own alone, of a process that may use a GPU: without it the driver starts in no process. It hands its
        memory manager's descriptor on to those whom it tells of memory."""
        if not name.startswith(_CUDA):
            return False
        from ray_guard.supervisor.gpu_target import granted

        word = granted(self.policy)
        return (word == "any" or (word == "engine" and self._origin is None)) and name == _CUDA + procfs.self_image(tid)

    def make_socket(self, duplicate: int, raw: bytes, tid: int) -> int:
        return libc.bind(duplicate, raw) if self._view is None else self._view.bind(duplicate, raw, tid)

    def bound(self, pinned: int) -> None:
        found = os.fstat(pinned)
        key = (found.st_dev, found.st_ino)
        if len(self._own_unix) >= _OWN_SOCKETS_LIMIT:
            now = time.monotonic()
            if now - self._looked >= _LOOK_EVERY_S:  # not each time: who binds by the thousand must not hold up others
                self._forget_deleted()
                self._looked = now
        if key in self._own_unix or len(self._own_unix) >= _OWN_SOCKETS_LIMIT:
            os.close(pinned)
            return
        self._own_unix[key] = pinned
        self._surroundings = None

    def _forget_deleted(self) -> None:
        """Sockets whose file is gone are reached by nobody any more: an actor may make and delete many in its life."""
        for key, pinned in list(self._own_unix.items()):
            if os.fstat(pinned).st_nlink == 0:
                os.close(self._own_unix.pop(key))
        self._surroundings = None

    def listening(self, address: str, port: int) -> None:
        if self.policy.role is Role.POLICY:
            self._node.announce(self.target, address, port)

    def counts(self) -> bool:
        account = self.target.account if self._origin is None else self._origin.account
        return self.policy.datagrams and (
            account.limits_any(_BYTES) or any(kind in self.policy.limits(scope) for scope in Scope for kind in _BYTES)
        )

    def hears(self) -> bool:
        return self.policy.datagrams or self.policy.names

    def may_borrow(self, pid: int) -> bool:
        return self.policy.role is Role.POLICY and procfs.is_in_tree(pid, self.root)

    def fault(self, what: str) -> None:
        self._faults += 1
        if self._faults <= _FAULTS_TOLD:  # a target can cause as many as it likes
            log.warning("target %d: %s", self.target.pid, what)

    # ------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nobody is left behind the listener: what flows on is cut and settled."""
        self._node.surroundings_changed.remove(self._forget_surroundings)
        if self._names is not None:
            self._names.close()
        self._meter.finish(list(self._flows.values()))
        for crossing in list(self._crossings):
            self._node.means.relay.finish(crossing)
        for way in list(self._ways):
            way.finish()
        for connection in list(self._datagrams.values()):
            connection.finish()
        self._datagrams.clear()
        for pinned in self._own_unix.values():
            os.close(pinned)
        self._own_unix.clear()

    def _forget_surroundings(self) -> None:
        self._surroundings = None
        self._known.clear()

    def tighten(self, policy: CompiledPolicy) -> None:
        """Replaces the policy by a stricter one."""
        self.policy = policy
        if self._names is not None:
            self._names.policy_changed()
        elif policy.names:
            self._names = Names(self)
        self._forget_surroundings()

    @property
    def call(self) -> str | None:
        """The call that everything here belongs to; None: it is an actor's ring."""
        return None if self._origin is None else self._origin.call

    def note(self, request: Request, decision: Decision, origin: Origin, *, mute: bool = False) -> None:
        """Journals a decision about a name, or about a socket that asks for names. Raises JournalError."""
        connection = Connection(self, origin, request)
        if decision.allowed:
            connection.noted(decision, mute=mute)
        else:
            origin.account.count_refused()
            connection.refused(decision)

    def _around(self) -> Surroundings:
        if self._surroundings is None:
            base = self._node.surroundings(self.target)
            names = self._names.by_address() if self._names is not None else base.names
            self._surroundings = base._replace(own_unix=frozenset(self._own_unix), names=names)
        return self._surroundings

    def _process(self, tid: int) -> Process:
        if self._origin is not None or self._node.directory(self.target) is None:
            return Process.OTHER
        own = tid == self.root or os.path.exists(f"/proc/{self.root}/task/{tid}")
        return Process.OWN if own else Process.OTHER

    def _proxy_unknown(self, request: Request, decision: Decision) -> int:
        """Non-zero where it is not known yet, or not at all, which address a proxy has that this is about.

        A destination at a proxy's port may be that proxy, which nobody but the relay may reach.
        """
        proxies = self._node.proxies
        if not decision.allowed:
            return 0
        standing = proxies.at_port(request.port) if decision.proxy is None else proxies.standing(decision.proxy)
        if standing is Standing.UNKNOWN and decision.proxy is not None:
            return errno.ECONNREFUSED
        return {Standing.KNOWN: 0, Standing.ASKED: _WAIT.error, Standing.UNKNOWN: errno.EACCES}[standing]

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

    # -- flows ---------------------------------------------------------------------------------------------------------

    def relayed(self, crossing: Crossing) -> None:
        if self._origin is None:
            self._held_by(crossing.holder[0])
        self._crossings.add(crossing)

    def relay_left(self, crossing: Crossing) -> None:
        self._crossings.discard(crossing)

    def _held_by(self, tid: int) -> None:
        if tid != self.root and tid not in self._seen:
            self._remember(tid)

    def began(self, flow: Flow) -> None:
        if self._origin is None:
            self._held_by(flow.holder[0])
        self._flows[flow.cookie] = flow
        self._meter.begin(flow)

    def _remember(self, tid: int) -> None:
        """A process beside the actor's own has a connection: should this process die, the zygote ends it as well.

        By then it may have lost its parents, so that nothing would lead from the actor to it.
        """
        if not self._seen:
            self._node.loop.later(_REMEMBERED_S, self._seen.clear)  # the number may be another thread's by then
        self._seen.add(tid)
        pid = procfs.thread_group(tid)
        if pid is not None and pid != self.root:
            self._node.care.ward(pid, self.root)

    def cut_barred(self) -> None:
        """Cuts the flows of scopes to which nothing more is granted."""
        owned = ((flow, flow.owner) for flow in self._flows.values())
        barred = [flow for flow, owner in owned if isinstance(owner, Connection) and owner.origin.account.barred]
        if barred:
            self._meter.finish(barred)
        for crossing in [crossing for crossing in self._crossings if crossing.owner.account.barred]:
            self._node.means.relay.finish(crossing)

    def left(self, flow: Flow) -> None:
        self._flows.pop(flow.cookie, None)

    def failed(self, flow: Flow) -> None:
        """It was begun, but never established."""
        self.left(flow)
        self._meter.discard(flow.cookie)

    def decision_text(self, request: Request, decision: Decision) -> str:
        """The attributes that say what was decided, encoded; the same for every connect to the same place."""
        key = (*request[1:5], decision.verdict, decision.reason, decision.rule, decision.report_only, decision.name)
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.clear()
            text = self._texts[key] = fragment(_decided(request, decision)).encoded
        return text

    # -- outward -------------------------------------------------------------------------------------------------------

    def _connect(self, request: Request, decision: Decision, origin: Origin) -> Ruling:
        connection = Connection(self, origin, request)
        try:
            if decision.allowed and request.transport is Transport.UNIX:
                connection.noted(decision)  # no bytes are counted there, so its record is complete at once
                return Ruling(0)
            if decision.allowed:
                connection.granted(decision)
                origin.account.charge(CONNECTIONS, 1)  # decide() has just found room for it
                if decision.model is not None:
                    connection.calls_model(decision, decision.model)
                    return Ruling(0, relayed=connection)
                if request.transport is Transport.UDP and self.counts():
                    return Ruling(0, counted=connection)
                if decision.route is Route.RELAY and request.operation is Operation.CONNECT:
                    from ray_guard.supervisor import relayed

                    connection.speech = relayed.speech(request, decision, judged=bool(self.target.policy.detect))
                    if decision.proxy is not None and decision.name is not None:
                        address = self._node.proxies.address(decision.proxy)
                        connection.proxied = relayed.Proxied(address, decision.name, request.port)
                    return Ruling(0, relayed=connection)
                if len(self._known) < _TEXTS_KEPT and self._is_repeatable(request, decision, origin.account):
                    self._known[request.address, request.port] = _Known(request, self.decision_text(request, decision))
                return Ruling(0, connection)
            if self.mute and request.transport is Transport.UDP and request.operation is Operation.CONNECT:
                # That is how Ray and vLLM learn their own address. The socket can send nothing, so it may be
                # "connected"; the denial stands in the journal all the same, without being a violation.
                connection.noted(decision, mute=True)
                return Ruling(0)
            origin.account.count_refused()
            connection.refused(decision)
        except JournalError:  # an allowance that leaves no record is not given
            log.exception("a decision could not be journaled")
            return Ruling(errno.EPERM)
        return Ruling(errno.EACCES)

    def _is_repeatable(self, request: Request, decision: Decision, account: Account) -> bool:
        """Whether the same would be said, as long as policy and surroundings stand, to whoever here asks the same.

        So it is of a rule that names the address, for TCP, by the direct way; but of several policies another may have
        agreed because it was the actor's own process that asked. Budgets are no part of it: :meth:`again` looks.
        """
        if (
            decision.reason is not Reason.RULE
            or decision.route is not Route.DIRECT
            or decision.report_only
            or request.operation is not Operation.CONNECT
            or request.transport is not Transport.TCP
        ):
            return False
        others = request._replace(process=Process.OTHER)
        return request.process is Process.OTHER or decide(self.policy, self._around(), account, others) == decision

    def _send(self, request: Request, decision: Decision, origin: Origin, size: int) -> Ruling:
        """A datagram. Its flow is journaled once per destination and call; its bytes are reserved before it goes."""
        key = (request.address or request.path, request.port, origin.call)
        connection = self._datagrams.get(key)
        if connection is None:
            if len(self._datagrams) >= _DATAGRAM_FLOWS_LIMIT:
                return Ruling(errno.ENOBUFS)
            ruling = self._connect(request, decision, origin)
            granted = ruling.attempt or ruling.counted
            if ruling.error or not isinstance(granted, Connection):
                return ruling
            connection = self._datagrams[key] = granted
        if request.transport is Transport.UDP and self.counts():
            return Ruling(0, counted=connection)  # whoever sends it reserves
        exceeded = origin.account.reserve(SENT, size)
        if exceeded is not None and not exceeded.report_only:
            connection.over_budget(exceeded)
            return Ruling(errno.EACCES)
        origin.account.settle(SENT, size, size)
        connection.sent += size
        return Ruling(0)

    def way_opened(self, way: Way) -> None:
        self._ways.add(way)

    def way_closed(self, way: Way) -> None:
        self._ways.discard(way)

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


def _decided(request: Request, decision: Decision) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"network.transport": request.transport.value}
    if request.transport is Transport.UNIX:
        attributes["network.peer.address"] = request.path if request.path != "\0" else "(abstract)"
    else:
        attributes["network.peer.address"] = request.address
        attributes["network.peer.port"] = request.port
    attributes["server.address"] = decision.name or attributes["network.peer.address"]
    attributes.update(decision.attributes())
    if decision.rule is not None:
        attributes["ray_guard.egress.rule"] = decision.rule
    return attributes


def _spelled(request: Request) -> str:
    if request.transport is Transport.UNIX:
        return f"unix:{request.path}" if request.path != "\0" else "unix:(abstract)"
    host = f"[{request.address}]" if ":" in request.address else request.address
    return f"{request.transport.value}://{host}:{request.port}"


class _Known:
    """A destination that a rule has granted, and the words that say so, by who asked."""

    __slots__ = ("_forms", "_text", "form", "origin", "request")
    form: EgressForm
    """Of the last that asked, :attr:`origin`."""

    def __init__(self, request: Request, text: str) -> None:
        self.request = request
        self._text = text
        self._forms: dict[int, tuple[Origin, EgressForm]] = {}
        self.origin: Origin | None = None

    def form_for(self, target: Target, origin: Origin) -> EgressForm:
        found = self._forms.get(id(origin))
        if found is None or found[0] is not origin:
            if len(self._forms) >= _FORMS_KEPT:
                self._forms.clear()
            found = self._forms[id(origin)] = (origin, _form(target, origin, self._text))
        self.origin, self.form = found
        return self.form


def _form(target: Target, origin: Origin, decided: str) -> EgressForm:
    """``decided``: the attributes that say what was decided, encoded."""
    return target.egress_form(origin, decided + (_ambiguous(origin.candidates) if origin.candidates else _EXACT))


class Connection:
    """One connect (or datagram destination) of a target: its record, its share of the budgets, its flow."""

    __slots__ = (
        "_form",
        "_models",
        "_more",
        "_offended",
        "_over",
        "_ring",
        "_span",
        "_start",
        "capped",
        "flow",
        "origin",
        "proxied",
        "received",
        "request",
        "sent",
        "speech",
    )  # fmt: skip
    _form: EgressForm

    def __init__(self, ring: Ring, origin: Origin, request: Request) -> None:
        self._ring = ring
        self.origin = origin = origin.tally.placed(ring.target, origin)
        self.request = request
        self.flow: Flow | None = None
        self.sent = self.received = 0
        self.speech: dict[str, Any] = {}
        """What may be spoken, where it is relayed."""
        self.proxied: Proxied | None = None
        self._models: ModelCalls | None = None
        self.capped = not origin.account.free and origin.account.limits_any(_BYTES)
        self._span = new_span_id()
        self._start = time.time_ns()
        self._more = ""
        """Attributes beyond those of the form, encoded: this is the path of every connect."""
        self._over = False
        self._offended = False

    # -- decided -------------------------------------------------------------------------------------------------------

    def granted(self, decision: Decision) -> None:
        """Journals that it was granted, before it is. Raises JournalError."""
        self._describe(decision)
        self._ring.target.journal.append(self._form.begun(self._span, self._start))

    def granted_again(self, form: EgressForm) -> None:
        """:meth:`granted`, in words that were used before. Raises JournalError."""
        self._form = form
        self._ring.target.journal.append(form.begun(self._span, self._start))

    def refused(self, decision: Decision) -> None:
        """Journals the refusal, complete. Raises JournalError."""
        self._describe(decision)
        where = decision.name or _spelled(self.request)
        if decision.exceeded is not None:
            self._ring.target.exceeded(self.origin, self._span, decision.exceeded, where)
        else:
            reason = decision.reason.value
            self._ring.target.violation(self.origin, self._span, "egress", reason=reason, destination=where)
        self._add({"error.type": "EACCES"})
        self._write(StatusCode.ERROR, f"{where} is refused: {decision.reason.value}")

    def noted(self, decision: Decision, *, mute: bool = False) -> None:
        """Journals a decision after which nothing is counted. ``mute``: the socket cannot send. Raises JournalError."""
        self._describe(decision)
        if mute:
            self._add({"ray_guard.egress.mute": True})
            self._write()
        else:
            self._ring.target.journal.append(self._ended())

    def _describe(self, decision: Decision) -> None:
        self._form = _form(self._ring.target, self.origin, self._ring.decision_text(self.request, decision))

    def _add(self, attributes: dict[str, AttributeValue]) -> None:
        self._more += "," + fragment(attributes).encoded

    def _write(self, status: StatusCode = StatusCode.UNSET, message: str = "") -> None:
        self._ring.target.journal.keep(self._ended(tail(self._offences(), status, message)))

    def _offences(self) -> Sequence[SpanEvent]:
        """The violations that it has to tell; their kind goes among its attributes, beside its own ``error.type``."""
        events, attributes, error = self._ring.target.offences(self._span)
        if events:
            self._add({key: value for key, value in attributes.items() if key != "error.type"})
        self._offended = self._offended or error
        return events

    def _ended(self, said: str = "") -> bytes:
        return self._form.ended(self._span, self._start, time.time_ns(), self._more, said)

    # -- Attempt -------------------------------------------------------------------------------------------------------

    def connected(self, cookie: int, holder: tuple[int, int]) -> None:
        request = self.request
        flow = self.flow = Flow(cookie, request.address, request.port, holder, self, self._ring.root)
        self._ring.began(flow)

    @property
    def account(self) -> Account:
        return self.origin.account

    def relayed(self, crossing: Crossing) -> None:
        self._ring.relayed(crossing)

    def calls_model(self, decision: Decision, model: Endpoint) -> None:
        """It leads to a model endpoint: the relay reads along."""
        from ray_guard.supervisor import relayed

        self.speech = relayed.model_speech(model, self.request.address, enforced=decision.route is Route.MODEL)
        self._models = relayed.ModelCalls(self._ring, self.origin, self._span, model)

    def heard(self, message: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        if message["op"] == "seen":
            self._seen(message.get("protocol"), message.get("offence"))
        elif self._models is not None:
            self._models.heard(message, answer)

    def _seen(self, protocol: str | None, offence: str | None) -> None:
        """Journals what its first bytes are, for the judge: the flow is still open, and may be so for long."""
        if offence is not None:
            self._add({"ray_guard.egress.offence": offence})
        spoken = {"ray_guard.egress.protocol": protocol} if protocol is not None else {}
        line = self._form.begun(
            self._span, self._start, f"{self._more},{fragment(spoken).encoded}" if spoken else self._more
        )
        self._journaled(self._ring.target.journal.keep, line)

    def left(self, crossing: Crossing, end: End) -> None:
        if self._models is not None:
            self._models.close()
        self._ring.relay_left(crossing)
        found: dict[str, AttributeValue] = {"ray_guard.egress.route": "relay"}
        for key, value in (("protocol", end.protocol), ("verified", end.verified), ("server_name", end.name)):
            if value is not None:
                found[f"ray_guard.egress.{key}"] = value
        self._add(found)
        from ray_guard.supervisor import relayed

        if end.why and not self._over and end.why != relayed.MOVER_LOST:
            try:
                where = _spelled(self.request)
                self._ring.target.violation(self.origin, self._span, "egress", reason=end.why, destination=where)
            except JournalError:
                log.exception("a violation could not be journaled")
        line = self._counted(crossing.local, end.sent, end.received, exact=end.exact, why=end.why)
        self._journaled(self._ring.target.journal.keep, line)

    def associated(self, local: tuple[str, int] | None) -> None:
        if local is not None:
            self._more += _local(local)
        self._end()

    def failed(self, error: int) -> None:
        self._add({"error.type": errno.errorcode.get(error, str(error))})
        if self.flow is not None:
            self._ring.failed(self.flow)
            self.flow = None
        self._end(StatusCode.ERROR, os.strerror(error))

    # -- whose datagrams are counted one by one ------------------------------------------------------------------------

    def takes(self, kind: str, size: int) -> bool:
        account = self.origin.account
        if account.closed or account.barred:
            return False
        exceeded = account.reserve(kind, size)
        if exceeded is not None and not exceeded.report_only:
            self.over_budget(exceeded)
            return False
        account.settle(kind, size, size)
        if kind == SENT:
            self.sent += size
        else:
            self.received += size
        return True

    def opened(self, way: Way) -> None:
        self._ring.way_opened(way)

    def closed(self, way: Way) -> None:
        self._ring.way_closed(way)
        if self.request.operation is Operation.CONNECT:  # of a message's destination: see finish()
            self._add({"ray_guard.egress.route": "relay"})
            line = self._counted(way.local, way.sent, way.received, exact=True)
            self._journaled(self._ring.target.journal.keep, line)

    # -- FlowOwner -----------------------------------------------------------------------------------------------------

    def progressed(self, sent: int, received: int) -> bool:
        account = self.origin.account
        if account.free:
            account.count(SENT, sent)
            account.count(RECEIVED, received)
            return True
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
        self._ring.left(flow)
        self.flow = None  # they name each other: both would wait for the garbage collector
        line = self._counted(flow.local, flow.sent, flow.received, exact=exact)
        # Until all that have ended with it are told of: the meter flushes.
        self._journaled(self._ring.target.journal.postpone, line)

    def _counted(self, local: tuple[str, int] | None, sent: int, received: int, *, exact: bool, why: str = "") -> bytes:
        """The line of its end."""
        own = "" if local is None else _local(local)
        self._more += (
            f'{own},{{"key":"ray_guard.egress.bytes_sent","value":{{"intValue":"{sent}"}}}}'
            f',{{"key":"ray_guard.egress.bytes_received","value":{{"intValue":"{received}"}}}}'
        )
        if not exact:
            self._add({"ray_guard.egress.bytes_exact": False})
        events, status, cut = self._offences(), StatusCode.UNSET, "a budget was reached" if self._over else why
        if cut:
            self._add({"error.type": "budget" if self._over else why})
        if cut or self._offended:
            status = StatusCode.ERROR
        return self._ended(tail(events, status, f"cut: {cut}" if cut else ""))

    @staticmethod
    def _journaled(write: Callable[[bytes], None], line: bytes) -> None:
        try:
            write(line)
        except JournalError:
            log.exception("the end of a flow could not be journaled")

    def finish(self) -> None:
        """A datagram destination is done with: its call has ended."""
        self._add({"ray_guard.egress.bytes_sent": self.sent})
        if self.request.transport is Transport.UDP and self._ring.counts():
            self._add({"ray_guard.egress.bytes_received": self.received})
        self._end()

    def _end(self, status: StatusCode = StatusCode.UNSET, message: str = "") -> None:
        try:
            self._write(status, message)
        except JournalError:
            log.exception("the end of a flow could not be journaled")


def _local(name: tuple[str, int]) -> str:
    return (
        f',{{"key":"network.local.address","value":{{"stringValue":"{name[0]}"}}}}'
        f',{{"key":"network.local.port","value":{{"intValue":"{name[1]}"}}}}'
    )


def _ambiguous(candidates: tuple[str, ...]) -> str:
    attributes: dict[str, AttributeValue] = {
        "ray_guard.egress.scope": "ambiguous",
        "ray_guard.egress.candidates": candidates,
    }
    return "," + fragment(attributes).encoded


_BYTES: Final = (EGRESS, SENT, RECEIVED)
_EXACT: Final = "," + fragment({"ray_guard.egress.scope": "exact"}).encoded
_OF_THE_ACTOR: Final = (Reason.CLUSTER, Reason.COLLECTIVES)
_TEXTS_KEPT: Final = 4096
_FORMS_KEPT: Final = 64
_REMEMBERED_S: Final = 1.0
_FAULTS_TOLD: Final = 100

"""A session: one connected process, from its hello to its end. Runs in the supervisor.

Every packet is checked before it means anything. What is wrong is answered, or logged, and costs the sender its
connection at most: a target without one is a target that has gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import termios
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ray_guard import errors
from ray_guard.errors import NotEnforced, PolicyError, RayGuardError
from ray_guard.evidence.journal import JournalError
from ray_guard.kernel import borrowing, libc, procfs, seqpacket
from ray_guard.kernel.seccomp import Listener
from ray_guard.log import logger
from ray_guard.policy.budgets import Scope
from ray_guard.policy.decide import CompiledPolicy, Operation, Process, Request, decide
from ray_guard.policy.destination import Group, Transport, canonical_address
from ray_guard.policy.enforcement import SUPPORTED, unenforced
from ray_guard.records import Mode, Resource, Role
from ray_guard.supervisor import fields
from ray_guard.supervisor.consequences import Consequences, acts
from ray_guard.supervisor.limits import PROCESSES
from ray_guard.supervisor.node import Endpoint, Membership, Node, resource_attributes
from ray_guard.supervisor.quota import FLOPS, TOKENS
from ray_guard.supervisor.scratch import Scratches
from ray_guard.supervisor.start import read_start
from ray_guard.supervisor.target import Target
from ray_guard.supervisor.tools import Call, Tool
from ray_guard.supervisor.unread import About
from ray_guard.supervisor.view import Views, refused_descriptor, unavailable

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate
    from ray_guard.policy.budgets import Amount
    from ray_guard.supervisor.bequest import Bequest
    from ray_guard.supervisor.book import Estate
    from ray_guard.supervisor.care import Line
    from ray_guard.supervisor.leases import Lease
    from ray_guard.supervisor.ring import Ring

log = logger("ray_guard.session")

_BATCH: Final = 64
"""Packets read at one go: a chatty target must not keep others waiting."""
_NO_BYTES: Final = bytes(4)
_KINDS: Final = ("actor", "program", "run", "observer")
_FILTERED: Final = ("actor", "program")
_ENV_ROLES: Final = (Role.ENV, Role.POLICY)
_TRIES: Final = 50
_TRY_S: Final = 0.001
"""How often, and how soon, a purse that its process is drawing from is tried again: it may have been stopped there."""


class Session:
    """See the module.

    Args:
        sock: the accepted connection.
        ended: called once, when the process and all it started are gone.
    """

    def __init__(self, sock: socket.socket, node: Node, ended: Callable[[Session], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._descriptor = sock.fileno()
        self._unread = bytearray(_NO_BYTES)  # what is waiting, in bytes, as the kernel writes it
        self._node = node
        self._ended = ended
        self._target: Target | None = None
        self._gate: Gate | None = None
        self._ring: Ring | None = None
        self._tools: list[Tool] = []
        self._lifeline: socket.socket | None = None
        self._hello_said: dict[str, Any] = {}
        """Of a policy actor; empty: it ends with this process."""
        self._bequest: Bequest | None = None
        self._warded: Line | None = None
        self._pidfd = -1
        self._connected = True
        self._dead = False
        self._handlers: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            "open": self._open_span,
            "close": self._close_span,
            "intent": self._intent,
            "identify": self._identify,
            "reward": self._reward,
            "hello": self._hello,
            "adopt": self._adopt,
            "armed": self._armed,
            "start": self._start,
            "violations": self._violations,
            "ended": self._ended_for,
            "reserve": self._reserve,
            "settle": self._settle,
            "price": self._price,
            "engine": self._engine,
            "engine_state": self._engine_state,
            "tighten": self._tighten,
        }
        node.loop.watch(sock.fileno(), select.EPOLLIN, self._ready)

    # -- packets -------------------------------------------------------------------------------------------------------

    def _ready(self, _events: int) -> None:
        self._read(_BATCH)

    def pump(self) -> None:
        """Takes in all that the target has sent so far."""
        # Asked before every connect of an actor, and mostly in vain: a receive that fails costs ten times as much.
        if self._connected:
            fcntl.ioctl(self._descriptor, termios.FIONREAD, self._unread)
            if self._unread != _NO_BYTES:
                self._read(1 << 16)

    def _read(self, count: int) -> None:
        inbox, number = self._node.care.inbox, -1 if self._warded is None else self._warded.number
        for _ in range(count):
            if not self._connected:
                return
            try:
                received = inbox.receive(self._sock, number)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, seqpacket.BadPacket) as error:
                inbox.done()
                log.warning("a packet of %s is unusable: %s", self._name(), error)
                if isinstance(error, OSError):
                    self._disconnected()
                    return
                continue
            if received is None:
                self._disconnected()
                return
            self._handle(*received)
            inbox.done()

    def _handle(self, message: dict[str, Any], descriptors: list[int]) -> None:
        handler = self._handlers.get(str(message.get("op")))
        try:
            if handler is None:
                raise seqpacket.BadPacket(f"unknown operation {message.get('op')!r:.80}")
            handler(message, descriptors)
            if self._bequest is not None and handler != self._tighten:  # which says so itself, once it has been done
                self._bequest.take(message)
        except (seqpacket.BadPacket, JournalError, RayGuardError, ValueError, KeyError, TypeError, OSError) as error:
            log.warning("%s of %s: %s: %s", message.get("op"), self._name(), type(error).__name__, error)
            if descriptors or message.get("op") == "armed":
                known = isinstance(error, RayGuardError) and not isinstance(error, JournalError)
                refusal = (
                    error
                    if isinstance(error, RayGuardError) and known
                    else RayGuardError(f"{type(error).__name__}: {error}")
                )
                self._reply(self._way_back(descriptors), errors.to_wire(refusal))
        finally:
            seqpacket.close_all(descriptors)

    def _way_back(self, descriptors: list[int]) -> int:
        """A question brings the descriptor to answer on; one that could not is answered on the line itself."""
        return descriptors[0] if descriptors else self._sock.fileno()

    def _name(self) -> str:
        return "a stranger" if self._target is None else f"{self._target.kind} {self._target.pid}"

    def _known(self) -> Target:
        if self._target is None:
            raise seqpacket.BadPacket("no hello yet")
        return self._target

    @staticmethod
    def _reply(descriptor: int, message: dict[str, Any], passed: tuple[int, ...] = ()) -> None:
        try:
            with _line(descriptor) as sock:
                sock.setblocking(False)
                seqpacket.send(sock, message, passed)
        except OSError as error:
            log.warning("an answer could not be delivered: %s", error)

    # -- hello ---------------------------------------------------------------------------------------------------------

    def _hello(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if self._target is not None:
            raise seqpacket.BadPacket("a second hello")
        kind = message.get("kind")
        if kind not in _KINDS:
            raise seqpacket.BadPacket(f"unknown kind {kind!r:.40}")
        self._require_own_user()
        identity = dict(message.get("identity") or {})
        policy, membership = self._asked_of(message)
        if self._waits_for_gpus(policy, message, descriptors) or self._waits_for_rules(policy, message, descriptors):
            return
        if kind != "observer" and self._must_lease(identity, message, descriptors, policy, membership):
            return
        target = self._target_of(message, policy)
        if membership is not None:
            self._node.join(target, membership)
        told = membership.told if membership is not None else frozenset()
        refused = self._refused_sockets(target, message.get("sockets") or (), told)
        refused += self._refused_listeners(target, message.get("listening") or ())
        if refused and policy.mode is Mode.ENFORCE:
            if membership is not None:
                self._node.leave(target)
            raise NotEnforced(refused, "these sockets are open already and no rule grants them: close them first")
        self._enter(target, message)
        if policy.role is Role.POLICY and kind in _FILTERED:
            self._hello_said = message
        self._lifeline, stops = socket.socketpair()
        held, kills = socket.socketpair()
        with stops, held, kills:
            self._ward(target, held)
            welcome = {
                "ok": True,
                "supervisor": os.getpid(),
                "keepers": (os.getpid(), self._node.zygote),
                "role": policy.role.value,
                "datagrams": policy.datagrams,
                "borrows": borrowing.works(),
                "names": policy.names,
                **self._told_of(target),
            }
            if kind == "observer":
                self._bequeath(target, None, message)
            self._reply(descriptors[0], welcome, (stops.fileno(), kills.fileno()))

    def _require_own_user(self) -> None:
        _, uid = self._peer()
        if uid != os.getuid():
            raise NotEnforced(["supervisor"], f"it belongs to user {os.getuid()}, not to user {uid}")

    def _asked_of(self, hello: dict[str, Any]) -> tuple[CompiledPolicy, Membership | None]:
        """The policy that a target asks to be held to, and its cluster. Raises NotEnforced, PolicyError."""
        access = hello.get("cluster")
        membership = Membership(access) if access else None
        if hello["kind"] == "observer":
            return CompiledPolicy(), membership
        policy = _policy(hello["policy"], hello["kind"], clustered=membership is not None, borrows=borrowing.works())
        self._require_means(policy)
        return policy, membership

    def _require_means(self, policy: CompiledPolicy) -> None:
        """Raises NotEnforced where what the policy needs besides is not to be had."""
        if policy.names:
            self._node.resolver.require()
        self._require_proxies(policy)

    def _target_of(self, hello: dict[str, Any], policy: CompiledPolicy) -> Target:
        identity = dict(hello.get("identity") or {})
        pid, _ = self._peer()
        views = Views(hello.get("places"))
        target = Target(
            pid=pid,
            kind=str(hello["kind"]),
            policy=policy,
            resource=Resource(resource_attributes(self._node, identity)),
            journal=self._node.journal(str(hello["evidence"]), fields.environment(hello.get("export"))),
            around=self._node.charged(str(identity.get("actor_id") or ""), str(identity.get("run_id") or ""), policy),
            run_id=str(identity.get("run_id") or ""),
            actor_id=str(identity.get("actor_id") or pid),
            views=views,
            scratches=Scratches(views.temporary, self._node.number, self._node.hold, self._node.remove),
        )
        target.pump = self.pump
        return target

    def _enter(self, target: Target, hello: dict[str, Any]) -> None:
        """The target is this session's from here on. Raises NotEnforced: its calls could not be judged."""
        self._pidfd = os.pidfd_open(target.pid)
        if target.kind in _FILTERED:
            try:
                self._try_to_judge(target.pid, int(hello["descriptor"]))
            except NotEnforced:
                self._node.leave(target)
                raise
        self._node.loop.watch(self._pidfd, select.EPOLLIN, lambda _events: self._died())
        self._target = target
        self._joined(target)

    def _told_of(self, target: Target) -> dict[str, Any]:
        """What a target is told of its policy, now and whenever it is tightened."""
        policy, kinds = target.policy, (TOKENS, FLOPS)
        limits = {s.value: {k: v for k, v in policy.limits(s).items() if k in kinds} for s in Scope}
        leases = self._node.directory(target) is not None
        return {"acts": acts(policy), "account": target.key, "quotas": limits, "leases": leases}

    def _waits_for_gpus(self, policy: CompiledPolicy, message: dict[str, Any], descriptors: list[int]) -> bool:
        """Whether the hello is handled again later. Raises NotEnforced: GPUs cannot be held to ``policy`` here."""
        gpus = self._node.gpus.asked(policy)
        if gpus is None:
            return False
        if gpus.must_wait(policy):
            gpus.when_known(self._later(message, descriptors))
            return True
        gpus.admit(policy)
        return False

    def _waits_for_rules(self, policy: CompiledPolicy, message: dict[str, Any], descriptors: list[int]) -> bool:
        """Whether this message is handled again when the policy's Sigma rules are read. Raises NotEnforced."""
        if not policy.rules:
            return False
        if message.get("rules_read"):
            self._node.judging.digests(policy.rules)
            return False
        self._node.judging.read_rules(policy.rules, self._later({**message, "rules_read": True}, descriptors))
        return True

    def _must_lease(
        self,
        identity: dict[str, Any],
        message: dict[str, Any],
        descriptors: list[int],
        policy: CompiledPolicy,
        membership: Membership | None,
    ) -> bool:
        """Whether this message is handled once more when its job's first leases are there, or are not to be had."""
        if membership is None:
            return False
        run_id, job_id = str(identity.get("run_id") or ""), str(identity.get("job_id") or "")
        unknown = self._node.must_lease(run_id, job_id, policy, membership)
        return self._must_grow(unknown, message, descriptors)

    def _joined(self, target: Target) -> None:
        target.warn = self._warn
        Consequences(target, lambda: self._tools, cut=self._cut_barred, kill=self._kill)
        self._node.quotas.join(target)
        if target.policy.detect:
            self._node.judging.join(target, lambda: self._tools)
        if target.kind == "run":
            self._node.gpus.join(target)

    def _warn(self, text: str) -> None:
        """Says something unasked, to be read at the end of a call."""
        with contextlib.suppress(OSError):
            seqpacket.send(self._sock, {"warning": text})

    def _later(self, message: dict[str, Any], descriptors: list[int]) -> Callable[[], None]:
        """Handles ``message`` once more, when what it needs is known; its descriptors are kept until then."""
        kept = [os.dup(descriptor) for descriptor in descriptors]

        def again() -> None:
            if self._connected:
                self._handle(message, kept)
            else:
                seqpacket.close_all(kept)

        return again

    def _require_proxies(self, policy: CompiledPolicy) -> None:
        for layer in policy.layers:
            if layer.proxy is not None:
                self._node.proxies.require(layer.proxy)

    def _try_to_judge(self, pid: int, descriptor: int) -> None:
        """Whether calls of this process could be judged: its memory read, its sockets taken. Raises NotEnforced."""
        missing = []
        if borrowing.works():
            taken = libc.pidfd_getfd(self._pidfd, descriptor)
            if taken < 0:
                missing.append(f"pidfd_getfd ({os.strerror(-taken)})")
            else:
                os.close(taken)
        else:  # its sockets are made here then, and told apart by this
            try:
                os.readlink(f"/proc/{pid}/fd/{descriptor}")
            except OSError as error:
                missing.append(f"proc_fd ({error.strerror})")
        try:
            os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            missing.append(f"proc_mem ({error.strerror})")
        if missing:
            raise NotEnforced(missing, "without it no call of this process could be judged: CAP_SYS_PTRACE would help")

    def _ward(self, target: Target, held: socket.socket | None) -> None:
        """Puts the target's tree into care, should this process die.

        Args:
            held: the end of a line whose closing kills it; None: an observer, which nobody ends.
        """
        about = About(target.journal.folder, target.run_id, dict(target.resource.attributes))
        tied = None if target.kind == "observer" else held
        self._warded = self._node.care.take(self._sock, about, target.pid, tied)

    def _peer(self) -> tuple[int, int]:
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid = (int.from_bytes(credentials[at : at + 4], "little") for at in (0, 4))
        return pid, uid

    def _refused_sockets(self, target: Target, sockets: Any, told: frozenset[Endpoint]) -> list[str]:
        """Which of the connections that are open already no rule grants; ``told`` are Ray's own."""
        surroundings = self._node.surroundings(target)
        refused = []
        for host, port, own in sockets:
            if int(own) in surroundings.ray_listen:
                continue  # Ray's own server accepted it
            address = canonical_address(str(host))
            request = Request(Operation.CONNECT, Transport.TCP, address, int(port), process=Process.OWN)
            decision = decide(target.policy, surroundings, target.account, request)
            # What leads to a model endpoint goes by relay, which none of these does.
            if (address, int(port)) not in told and (not decision.allowed or decision.model is not None):
                refused.append(f"tcp://{address}:{port}")
        return refused

    def _refused_listeners(self, target: Target, listening: Any) -> list[str]:
        """Which listening sockets that are open already no rule grants."""
        surroundings = self._node.surroundings(target)
        refused = []
        for host, port in listening:
            address = canonical_address(str(host))
            request = Request(Operation.LISTEN, Transport.TCP, address, int(port), process=Process.OWN)
            if not decide(target.policy, surroundings, target.account, request).allowed:
                refused.append(f"listening on tcp://{address}:{port}")
        return refused

    def _armed(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """The filter stands: from here on the process runs only as far as this ring lets it."""
        target = self._known()
        if self._gate is not None:
            raise seqpacket.BadPacket("armed already")
        if len(descriptors) > 1:
            listener = os.dup(descriptors[1])
        else:
            listener = libc.pidfd_getfd(self._pidfd, int(message["listener"]))
            if listener < 0:
                raise NotEnforced(["seccomp.listener"], f"it cannot be taken: {os.strerror(-listener)}")
        armed = self._arm(target, listener)
        if self._hello_said:
            self._bequeath(target, armed, self._hello_said)
        self._reply(self._way_back(descriptors), {"ok": True})

    def _arm(self, target: Target, descriptor: int) -> Listener:
        from ray_guard.supervisor import arming

        listener = Listener(descriptor)
        self._ring = arming.Ring(self._node, target, target.policy, target.pid)
        handlers: Mapping[str, arming.Handler] = {}
        if target.policy.role is Role.POLICY:
            from ray_guard.supervisor import keepers

            handlers = keepers.handlers()
        self._gate = arming.Gate(listener, self._ring, self._node.means, self._unfiltered, handlers)
        self._node.gpus.join(target)
        return listener

    def _tighten(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """A second policy inside a confined process: what both allow."""
        target = self._known()
        if self._waits_for_rules(self._added(target, message), message, descriptors):
            return
        tries = int(message.get("tries") or 0)
        if tries < _TRIES and not self._node.quotas.collect((target.account.root,)):
            self._node.loop.later(_TRY_S, self._later({**message, "tries": tries + 1}, descriptors))
            return
        self._tighten_by(target, message)
        if self._bequest is not None:
            self._bequest.take({"op": "tighten", "policy": message["policy"]})
        self._reply(descriptors[0], {"ok": True, **self._told_of(target)})

    def _added(self, target: Target, message: dict[str, Any]) -> CompiledPolicy:
        clustered = self._node.directory(target) is not None
        return _policy(message["policy"], target.kind, clustered=clustered, borrows=borrowing.works())

    def _tighten_by(self, target: Target, message: dict[str, Any]) -> None:
        added = self._added(target, message)
        self._require_means(added)
        target.policy = target.policy.intersect(added)
        target.account.tighten(added.limits(Scope.ACTOR), added.watched(Scope.ACTOR))
        self._node.job(target.run_id, added)
        if target.policy.detect:
            self._node.judging.join(target, lambda: self._tools)
        if self._ring is not None:
            self._ring.tighten(target.policy)

    # -- one supervisor after another ----------------------------------------------------------------------------------

    def _bequeath(
        self,
        target: Target,
        listener: Listener | None,
        hello: dict[str, Any],
        said: Sequence[dict[str, Any]] = (),
        stopper: socket.socket | None = None,
    ) -> None:
        """Leaves the target to the next supervisor, should this one die."""
        from ray_guard.supervisor.bequest import Bequest

        assert self._warded is not None  # noqa: S101 - every target's is
        self._bequest = Bequest(self._node.loop, target, listener, self._warded, hello, said=said, stopper=stopper)

    def _leave_nothing(self) -> None:
        if self._bequest is not None:
            self._bequest.close()
            self._bequest = None

    def _adopt(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """The zygote of a supervisor that is gone hands a target on: see :mod:`ray_guard.supervisor.handover`."""
        from ray_guard.supervisor import book

        if self._target is not None:
            raise seqpacket.BadPacket("a target hands nobody on")
        self._require_own_user()
        _, line, written, *armed = descriptors
        estate = book.read(written, message.get("last"), journaled=bool(message.get("journaled")))
        policy, membership = self._asked_of(estate.hello)
        identity = dict(estate.hello.get("identity") or {})
        if self._waits_for_gpus(policy, message, descriptors):
            return
        if self._must_lease(identity, message, descriptors, policy, membership):
            return
        heir = self._node.admit(_line(line))
        try:
            if armed:
                listener, lifeline = armed
                with _line(lifeline) as held:
                    heir.inherit(estate, policy, membership, int(message["start_time"]), os.dup(listener), held)
            else:
                heir.observe_on(estate, policy)
        except BaseException:
            heir.disown()
            raise
        self._reply(descriptors[0], {"ok": True})

    def inherit(  # noqa: PLR0917 - what a target is, called from one place
        self,
        estate: Estate,
        policy: CompiledPolicy,
        membership: Membership | None,
        start_time: int,
        listener: int,
        held: socket.socket,
    ) -> None:
        """Goes on with a target whose supervisor is gone: where it was armed and stopped, there it continues.

        Args:
            start_time: of the process.
            listener: now ours.
            held: the end of a line whose closing kills it.

        Raises:
            NotEnforced: it cannot be judged here, or not be held to its budgets.
            OSError: it has ended.
        """
        from ray_guard.supervisor import rearming

        try:
            target = self._target_of(estate.hello, policy)
            target.key = estate.key
            if membership is not None:
                self._node.join(target, membership)
            self._enter(target, estate.hello)
            if procfs.start_time(target.pid) != start_time:
                raise ProcessLookupError(errno.ESRCH, "it has ended")
        except BaseException:
            os.close(listener)
            raise
        armed = self._arm(target, listener)
        self._hear_again(target, estate)
        rearming.restore(self._node, target, estate)
        rearming.require_countable(target)
        self._ward(target, held)
        self._lifeline, stopper = socket.socketpair()
        with stopper:
            rearming.tie(stopper, target.pid)
            self._bequeath(target, armed, estate.hello, [*estate.said, *estate.opened], stopper)
        self._hear_rest(target, estate)
        rearming.go_on(armed, estate.notification, target.pid)

    def observe_on(self, estate: Estate, policy: CompiledPolicy) -> None:
        """Goes on with a driver whose supervisor is gone."""
        from ray_guard.supervisor import rearming

        target = self._target_of(estate.hello, policy)
        target.key = estate.key
        self._enter(target, estate.hello)
        self._hear_again(target, estate)
        rearming.restore(self._node, target, estate)
        self._ward(target, None)
        self._bequeath(target, None, estate.hello, [*estate.said, *estate.opened])
        self._hear_rest(target, estate)

    def _hear_again(self, target: Target, estate: Estate) -> None:
        """What it has said to the supervisor before, and has its answer to."""
        for said in estate.said:
            if said["op"] == "tighten":
                self._tighten_by(target, said)
            else:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with ours:
                    self._handle(said, [theirs.detach()])

    def _hear_rest(self, target: Target, estate: Estate) -> None:
        """What it had said last. Nobody else ends what it has open, or ended just now."""
        target.journal.continued.update(target.open)
        for said in estate.pending:
            self._handle(said, [])
        target.journal.continued.update(
            target.open
        )  # what the old log may hold the beginning of, though the book does not
        log.warning("%s is taken over from a supervisor that is gone", self._name())

    def disown(self) -> None:
        """It could not be taken over: whoever offered it ends it."""
        self._leave_nothing()
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        self._connected = False
        self._node.loop.forget(self._sock.fileno())
        self._sock.close()
        self._died()

    # -- the target's reports ------------------------------------------------------------------------------------------

    def _open_span(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        target = self._known()
        target.begin(message)
        self._node.quotas.opened(target, message["span"])

    def _close_span(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        target = self._known()
        span = message.get("span")
        for tool in self._tools:
            if tool.call == span and tool.running and target.policy.survivors != "keep":
                tool.end()  # what a call started ends with the call
        self._tools = [tool for tool in self._tools if tool.running]
        target.scratches.end(str(span))
        target.end(message)

    def _intent(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        intents = self._known().intents
        if len(intents) > 4096:
            intents.clear()
        intents[int(message["tid"])] = str(message["span"])

    def _identify(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        names = ("actor_id", "actor_name")
        if message.get("actor_id"):
            self._node.actor_started(str(message["actor_id"]), self._known().account)
        target = self._known()
        target.identify({f"ray.{name}": str(message[name]) for name in names if message.get(name)})
        if self._warded is not None:
            self._warded.rename(target.resource.attributes)

    def _reward(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        self._known().reward(str(message["episode"]), float(message["value"]))

    def _violations(self, message: dict[str, Any], descriptors: list[int]) -> None:
        episode = message.get("episode")
        found = self._known().violations_of(None if episode is None else str(episode))
        self._reply(descriptors[0], {"violations": found})

    def _cut_barred(self) -> None:
        if self._ring is not None:
            self._ring.cut_barred()

    def _ended_for(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Whether one of these scopes was ended for a violation."""
        found = self._known().ended_for(str(span) for span in message["spans"])
        self._reply(descriptors[0], {"ended": None if found is None else found.as_message()})

    def _reserve(self, message: dict[str, Any], descriptors: list[int]) -> None:
        target = self._known()
        quotas, tries = self._node.quotas, int(message.get("tries") or 0)
        if tries < _TRIES and quotas.must_wait(target, message):
            self._node.loop.later(_TRY_S, self._later({**message, "tries": tries + 1}, descriptors))
            return
        if not message.get("waited") and self._must_grow(quotas.lacking(target, message), message, descriptors):
            return
        answer, passed = quotas.reserve(target, message)
        self._reply(descriptors[0], answer, passed)

    def _must_grow(self, lacking: list[tuple[Lease, Amount]], message: dict[str, Any], descriptors: list[int]) -> bool:
        """Whether this message is handled once more when those leases have grown, or cannot."""
        if not lacking or message.get("waited"):
            return False
        self._node.leases.wait(lacking, self._later({**message, "waited": True}, descriptors))
        return True

    def _settle(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        self._node.quotas.settle(self._known(), message)

    def _price(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        """What the models that a policy actor serves cost; nobody else's word counts."""
        target = self._known()
        if target.policy.role is not Role.POLICY:
            raise seqpacket.BadPacket("no policy actor")
        from ray_guard.supervisor.model_calls import announced  # tools alone announce nothing

        self._node.prices.update(announced(target.run_id, message))

    def _engine(self, message: dict[str, Any], descriptors: list[int]) -> None:
        self._node.gpus.watching().register(self._known(), int(message["pid"]), str(message.get("phase")))
        self._reply(descriptors[0], {"ok": True})

    def _engine_state(self, message: dict[str, Any], _descriptors: list[int]) -> None:
        phase, in_flight = message.get("phase"), message.get("in_flight")
        self._node.gpus.watching().declare(
            self._known(),
            int(message["pid"]),
            None if phase is None else str(phase),
            None if in_flight is None else int(in_flight),
        )

    # -- tools ---------------------------------------------------------------------------------------------------------

    def _start(self, message: dict[str, Any], descriptors: list[int]) -> None:
        target = self._known()
        if target.kind == "observer":
            raise NotEnforced(["subprocess"], "an observer has no policy to start a tool under")
        if self._must_grow(self._node.leases.lacking(target.account.root, {PROCESSES: 1}), message, descriptors):
            return
        if len(descriptors) < 3:
            raise seqpacket.BadPacket("a start needs a control line, a memory file and a working folder")
        try:
            start = read_start(descriptors[1])
        except OSError as error:
            self._reply(descriptors[0], {"op": "failed", "errno": error.errno or errno.EINVAL})
            return
        if len(start.descriptors) != len(descriptors) - 3:
            raise seqpacket.BadPacket(f"{len(descriptors) - 3} descriptors for {len(start.descriptors)} numbers")
        if not borrowing.works() and any(_sends_anywhere(descriptor) for descriptor in descriptors[3:]):
            raise NotEnforced(["pass_fds"], "messages on a datagram socket cannot be judged: pidfd_getfd is refused")
        for descriptor in descriptors[3:]:
            reason = refused_descriptor(descriptor, target.policy)
            if reason and target.policy.mode is Mode.ENFORCE:
                raise NotEnforced(["pass_fds"], f"{reason}: no rule grants it")
        control = _line(descriptors[0])
        given = descriptors[1:]
        del descriptors[1:]  # the tool's now
        tool = Tool(
            self._node,
            target,
            target.policy,
            start,
            _call(message),
            control=control,
            descriptors=given,
        )
        self._tools = [known for known in self._tools if known.running]
        self._tools.append(tool)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _disconnected(self) -> None:
        """The channel is closed. A filtered process that closed it has cut itself off from being judged: it ends."""
        if not self._connected:
            return
        self._connected = False
        self._hang_up()
        if self._target is None:
            self._finish()
        elif self._gate is not None:
            self._kill()
        elif self._target.kind in ("observer", "run"):
            self._died()

    def _hang_up(self) -> None:
        self._node.loop.forget(self._sock.fileno())
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # the zygote holds it too
        self._sock.close()

    def _kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except OSError:
            pass  # gone already

    def _died(self) -> None:
        """The process has ended."""
        if self._dead:
            return
        self._dead = True
        self._leave_nothing()
        self._read(1 << 16)  # what it sent before it died counts
        for tool in self._tools:
            tool.end()
        if self._connected:
            self._connected = False
            self._hang_up()
        if self._pidfd >= 0:
            self._node.loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._target is not None:
            self._node.quotas.leave(self._target)
            try:
                self._target.lost()
            except JournalError:
                log.exception("spans of %s could not be closed", self._name())
        self._try_finish()

    def abandon(self) -> None:
        """This process must end before its targets: takes in what they have said, and cuts what they have open."""
        if self._connected:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)
            self._read(1 << 16)
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _unfiltered(self) -> None:
        self._gate = None
        self._try_finish()

    def _try_finish(self) -> None:
        if not self._dead or self._gate is not None:
            return
        if any(tool.running for tool in self._tools):
            self._node.loop.later(0.05, self._try_finish)
            return
        self._finish()

    def _finish(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        if self._warded is not None:
            with contextlib.suppress(OSError):
                self._warded.end()
        if self._target is not None:
            self._node.leave(self._target)
            self._target.scratches.end_all()
            self._target.account.close()
        self._ended(self)


def _sends_anywhere(descriptor: int) -> bool:
    """Whether it is a socket whose messages may name any destination."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sock.type not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)


def _refuse_what_nobody_counts(policy: CompiledPolicy) -> None:
    """Raises NotEnforced for limits of tokens in a lone command: nobody but the relay sees what it asks a model."""
    if any(wire.get("model_endpoint") for wire in policy.wires):
        return
    kinds = [
        f"budgets.{scope.value}.{kind}" for scope in Scope for kind in (TOKENS, FLOPS) if kind in policy.limits(scope)
    ]
    if kinds:
        raise NotEnforced(
            kinds, "a command's tokens are counted at the model_endpoint alone, and the policy names none"
        )


def _line(descriptor: int) -> socket.socket:
    """A duplicate of what somebody passed to be answered on. Raises OSError where it is no socket."""
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _call(message: dict[str, Any]) -> Call:
    ids = {
        name: None if message.get(name) is None else fields.identifier(message[name], length)
        for name, length in (("span", 16), ("trace", 32), ("parent", 16))
    }
    return Call(**ids, identity=fields.identity(message.get("identity")))


def _policy(wire: Any, kind: str, *, clustered: bool, borrows: bool) -> CompiledPolicy:
    """The policy of a new target.

    Raises:
        PolicyError: it is malformed.
        NotEnforced: it asks for what this version or host does not hold, and is meant to be enforced.
    """
    if not isinstance(wire, dict):
        raise PolicyError("policy", wire, "a mapping")
    policy = CompiledPolicy.from_wire(wire, role=Role.TOOL if kind == "run" else Role.ENV)
    if policy.mode is Mode.ENFORCE:
        missing = unenforced(wire, SUPPORTED - unavailable())
        if missing:
            raise NotEnforced(missing, "this version does not enforce that yet")
        if kind == "run":
            _refuse_what_nobody_counts(policy)
        if not borrows and policy.datagrams:  # see egress.made
            text = "udp:// destinations cannot be judged here: pidfd_getfd is refused (CAP_SYS_PTRACE)"
            raise NotEnforced(["egress.allow"], text)
        capped = [scope for scope in Scope if any("egress" in kind for kind in policy.limits(scope))]
        uncounted = [f"budgets.{scope.value}.egress_bytes" for scope in capped]
        if uncounted and any(layer.listen for layer in policy.layers):
            raise NotEnforced(uncounted, "bytes of accepted connections are not counted yet: drop listen or the cap")
    if clustered and policy.role in _ENV_ROLES:
        # A Ray actor without its cluster is none: the role grants it to the actor's own process, listed or not.
        groups = {Group.CLUSTER} | ({Group.COLLECTIVES} if policy.role is Role.POLICY else set())
        layers = tuple(layer._replace(groups=layer.groups | groups) for layer in policy.layers)
        policy = policy._replace(layers=layers)
    return policy

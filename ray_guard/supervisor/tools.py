"""Tool processes: from a target's request to the record of their end. Runs in the supervisor.

For each start there are two lines: *control*, to whoever asked (started, failed, exited; signals come back on it), and
that of the leader which owns the tool's tree. The ring between them stands from before the tool is one until the last
filtered process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ray_guard import errors
from ray_guard.errors import NotEnforced
from ray_guard.evidence.journal import JournalError
from ray_guard.evidence.otlp import fragment
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.kernel import landlock, pidfd, seqpacket
from ray_guard.kernel.seccomp import Listener
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.budgets import NEAR, UNLIMITED, WALL, Account, Exceeded
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import AttributeValue, Role, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor import arguments, cgroups, memory_group, rlimits
from ray_guard.supervisor.leaders import Leader
from ray_guard.supervisor.leaf import KILL_PATIENCE_S, Leaf, OwnLeaf
from ray_guard.supervisor.limits import CPU, MEMORY, PROCESSES
from ray_guard.supervisor.memory_group import MemoryGroup
from ray_guard.supervisor.node import Node
from ray_guard.supervisor.process_spans import exit_attributes
from ray_guard.supervisor.segments import Tally
from ray_guard.supervisor.start import Start
from ray_guard.supervisor.target import Origin, Target

if TYPE_CHECKING:
    from ray_guard.egress.gate import Gate, Handler
    from ray_guard.kernel.seccomp import Notification
    from ray_guard.supervisor.processes import Processes, Usage
    from ray_guard.supervisor.ring import Ring

log = logger("ray_guard.tools")

_LOST: Final = "the process that led it was lost"
_LOOK_AGAIN_S: Final = 0.002
_NONE: Final = "no process can be made to lead it"


class Call(NamedTuple):
    """Where in the traces a start belongs, as its requester says.

    ``span`` is the open tool call; where there is none the tool becomes a call of its own below ``parent``.
    """

    span: str | None = None
    trace: str | None = None
    parent: str | None = None
    identity: Mapping[str, AttributeValue] = MappingProxyType({})


class Tool:
    """One started tool and all it ever starts.

    Args:
        node, target, policy: whose it is and what it may do.
        start: what was asked for.
        call: the tool call that asked, or where a call of the tool's own belongs.
        control: to the requester.
        descriptors: [memory file, working folder, the tool's own descriptors …], consumed.

    Raises:
        BudgetExceeded: there is no room for it; that is in the journal.
        PolicyError, NotEnforced: its view of the file system cannot be made.
        RayGuardError: what its call or episode was ended for (``on_violation``).
    """

    def __init__(
        self,
        node: Node,
        target: Target,
        policy: CompiledPolicy,
        start: Start,
        call: Call,
        *,
        control: socket.socket,
        descriptors: list[int],
    ) -> None:
        self._node = node
        self._target = target
        self._policy = policy
        self._start = start
        self._control: socket.socket | None = control
        self._gate: Gate | None = None
        self._ring: Ring | None = None
        self._pid = 0
        self._pidfd = -1
        self._base_ns = 0
        self._born = cgroups.Groups(None, {})
        self._refused: dict[str, Any] | None = None
        self._executable = _executable(start)
        self._began = time.time_ns()
        self._span = new_span_id()
        self._implicit: SpanRecord | None = None
        self._account: Account | None = None
        self._processes: Processes | None = None
        self._why: str | None = None
        self._left = False
        self._strays: tuple[str, ...] = ()
        self._leaf: Leaf | None = None
        self._pages: MemoryGroup | None = None
        self._leader: Leader | None = None
        self._descriptors = descriptors
        self._call = call.span if call.span is not None and call.span in target.open else self._span
        scratch = target.scratches.enter(self._call)
        try:
            asking = target.open.get(self._call)
            since = self._began if asking is None else asking.record.start_ns
            self._view = target.views.of(
                policy, start, descriptors[1], scratch=scratch, since=since, hidden=node.hidden()
            )
            descriptors.insert(1, self._view.descriptor())
            self._fit = self._view.fit()
            self._origin = self._find_origin(call)
            self._origin.tally.another(self._origin)  # the process that it begins with
            self._held = self._origin.account.limits_any((CPU,))  # a clock must be there before it runs
            self._admit()
        except BaseException:
            target.scratches.leave(self._call, last=self._call == self._span)
            self._close_descriptors()
            control.close()
            raise
        self.running = True
        node.loop.watch(control.fileno(), select.EPOLLIN, lambda _events: self._from_requester())
        node.leaders.take(self._fit, self._begin)
        from ray_guard.supervisor import arming  # noqa: F401 - loaded while the first leader gets ready

    def _admit(self) -> None:
        """Raises what keeps it from starting: its scope was ended, or has no room."""
        ended = self._target.ended_for((self._origin.call or "", self._origin.episode or ""))
        if ended is not None:
            raise errors.of_violation(ended.as_message())
        exceeded = self._enter()
        if exceeded is not None:
            raise exceeded.error()

    def _find_origin(self, call: Call) -> Origin:
        if call.span is not None and call.span in self._target.open:
            return self._target.origin_of_call(call.span)._replace(parent_id=self._span)
        # Nobody said which call this is: it is one, named after its program, and recorded by the supervisor itself.
        span_id = new_span_id()
        name = os.path.basename(self._start.argv[0])[:128]
        self._implicit = SpanRecord(
            trace_id=call.trace or new_trace_id(),
            span_id=span_id,
            parent_id=call.parent,
            name=f"execute_tool {name}",
            kind=SpanKind.INTERNAL,
            start_ns=self._began,
            end_ns=None,
            attributes={
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": name,
                "gen_ai.tool.call.id": span_id,
                "ray_guard.arguments.sha256": arguments.digest(self._start.argv),
            },
        )
        identity = fragment({"rl.run.id": self._target.run_id, **call.identity, "ray_guard.source": "supervisor"})
        self._target.write(self._implicit, identity, grants=True)
        around = self._target.open.get(call.parent) if call.parent is not None else None
        episode = None if around is None else around.episode  # its budgets hold for this call too
        self._account = self._target.call_account(span_id, episode)
        return Origin(self._implicit.trace_id, self._span, identity, self._account, episode, span_id, Tally())

    # -- limits --------------------------------------------------------------------------------------------------------

    def _clocks(self) -> list[tuple[Account, float]]:
        """The scopes whose time counts for this tool, with how much of it has passed."""
        now = time.monotonic()
        return [(each, now - each.began) for each in self._origin.account.upwards() if each.began is not None]

    def _enter(self) -> Exceeded | None:
        """Takes the room that a tool needs; the limit that leaves none."""
        account = self._origin.account
        found = [
            *(account.measured(WALL, passed) for account, passed in self._clocks()),
            account.charge(CPU, 0),
            self._node.census.reserve(account),
        ]
        refusal = next((each for each in found if each is not None and not each.report_only), None)
        for each in found:
            if each is not None and (each is refusal or each.report_only):
                self._target.exceeded(self._origin, self._origin.call, each)
        if refusal is None:
            account.retain()
            return None
        if refusal.kind != PROCESSES:
            account.release(PROCESSES, 1)
        if self._implicit is not None:
            text = str(refusal.error())
            self._target.write(
                self._implicit._replace(end_ns=time.time_ns(), status=StatusCode.ERROR, status_message=text),
                self._origin.identity,
            )
            account.close()
        return refusal

    def _time_left(self) -> float | None:
        """Seconds until the first ``wall_seconds`` around this tool are over."""
        limits = [(account.limit(WALL), passed) for account, passed in self._clocks()]
        left = [limit - passed for limit, passed in limits if limit is not UNLIMITED]
        return max(0.0, min(left)) if left else None

    def _warn_of_time(self) -> None:
        """Has it noticed when a ``wall_seconds`` around this tool is almost over; all other limits are looked at."""
        for account, passed in self._clocks():
            limit = account.limit(WALL)
            if limit is not UNLIMITED:
                self._node.loop.later(max(0.0, NEAR * limit - passed), partial(_notice_time, account))

    def _over(self, exceeded: Exceeded) -> None:
        """The tree has passed a limit that ends it."""
        self.end(str(exceeded.error()))

    def _judge_time(self, *, timed_out: bool) -> None:
        for account, passed in self._clocks():
            exceeded = account.measured(WALL, passed)
            if exceeded is not None and (timed_out or exceeded.report_only):
                self._target.exceeded(self._origin, self._span, exceeded)
                self._why = self._why or str(exceeded.error())

    def _judge_end(self, unkillable: Sequence[int]) -> None:
        """Nothing more is started in a call of which something could not be ended."""
        if unkillable:
            pids = ", ".join(map(str, unkillable))
            reason = f"in uninterruptible sleep: {pids}"
            self._target.violation(self._origin, self._span, "unkillable", reason=reason, value=len(unkillable))
            call = self._target.open.get(self._origin.call or "")
            if call is not None:
                call.ended = self._target.violations[-1]

    # -- the leader ----------------------------------------------------------------------------------------------------

    def _begin(self, leader: Leader | None) -> None:
        """A leader is there; None: there can be none."""
        if not self.running:  # it came too late
            if leader is not None:
                self._node.leaders.ready(leader)
            return
        if leader is None or leader.fault:
            if leader is not None:
                leader.drop()
            self._failed({"stage": "leader", "text": _NONE} if leader is None else leader.fault)
            return
        memory = _least(self._origin.account, MEMORY)
        self._pages = None if memory is None else memory_group.below(self._target.pid, memory)
        entrance = [] if self._pages is None else [self._pages.entrance]
        prepared = leader.prepare([*self._descriptors, *entrance], joins=bool(entrance))
        seqpacket.close_all(entrance)
        if not prepared:
            self._begin_anew(leader)
            return
        # The requester waits for the start, so its leader says so itself; all else comes from here.
        asking = () if self._control is None else (self._control.fileno(),)
        request = {"wall_seconds": self._time_left(), "survivors": self._policy.survivors, "held": self._held}
        leader.start(request, asking)
        self._leader = leader
        leader.heard = self._from_leader
        # While its thread takes on what the tool shall have:
        self._born = cgroups.groups(leader, self._target.pid)
        policy = self._policy.with_role(Role.TOOL)
        from ray_guard.supervisor import arming

        self._ring = arming.Ring(self._node, self._target, policy, leader.pid, self._origin, view=self._view)
        listener, leader.listener = Listener(leader.listener), -1
        within = arming.bystanders.within(leader.pid)
        handlers = {
            **self._handlers(),
            **arming.bystanders.handlers(within),
            **arming.Metadata(self._view).handlers(),
        }
        if landlock.abi() < landlock.SIGNAL_SCOPE_ABI:
            handlers |= arming.Signals(within, leader.announce).handlers()
        if self._view.gpu:
            handlers |= arming.thread_names.handlers()
        self._gate = arming.Gate(listener, self._ring, self._node.means, self._unfiltered, handlers)

    def _begin_anew(self, leader: Leader) -> None:
        """What ``leader`` held ready is gone, or what it covers was replaced."""
        self._leader = None
        self._unring()
        self._close_groups()
        leader.drop()
        self._node.leaders.take(self._fit, self._begin)

    def _handlers(self) -> dict[str, Handler]:
        return {name: partial(self._notified, name) for name in ("execve", "execveat", "exit_group")}

    def _notified(self, name: str, gate: Gate, call: Notification) -> None:
        """An exec or an exit: the tool's, or still of the leader's child that is to become it."""
        if self._processes is None and self._leader is not None:
            while self._leader is not None and self._leader.receive():
                pass  # before the tool takes its first step its leader has said so
        if self._processes is not None:
            self._processes.handlers[name](gate, call)
        elif name == "exit_group":
            gate.listener.proceed(call.id)
        else:
            self._arm(gate, call)

    def _arm(self, gate: Gate, call: Notification) -> None:
        """The tool's process is about to execute what was asked for. Raises OSError: it shall not."""
        self._pid = call.pid
        if self._pidfd >= 0:  # it could not, somewhere along PATH; this is the next attempt
            os.close(self._pidfd)
        self._pidfd = os.pidfd_open(self._pid)
        self._leaf, self._strays = cgroups.follow(self._pid, self._born, self._target.pid)
        stage = "nftables"
        try:
            self._node.put_ceiling(self._leaf, self._policy, exact=self._origin.account.exact)
            stage = "journal"
            self._target.write(self._process_record(None), self._origin.identity, grants=True)
            if whole := arguments.unseen(self._start.argv):
                self._target.unseen(self._origin, self._span, whole, self._executable)
        except OSError as error:
            asked = "RAY_GUARD_NFTABLES asks for it: " if stage == "nftables" else ""
            log.warning("a tool was not started: %s", error)
            self._refused = {"stage": stage, "text": f"{asked}{error}"}
            gate.refuse(call, errno.EPERM)
            return
        rlimits.impose(self._pid, self._start.limits, _least(self._origin.account, MEMORY))
        self._node.gpus.began(self._pid, self._target, self._origin)
        self._base_ns = pidfd.cpu_ns(self._pid) or 0
        if gate.listener.is_valid(call.id):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)  # its leader lets it go: see embryo
        gate.listener.proceed(call.id)

    def _is_started(self) -> None:
        """The tool has been executed, and has not taken a step yet."""
        self._close_descriptors()
        leader = self._leader
        if leader is None:
            return
        from ray_guard.supervisor import arming

        self._processes = arming.Processes(
            self._node,
            self._target,
            self._origin,
            root=self._pid,
            leader=leader.pid,
            end_call=self._over,
            base_ns=self._base_ns,
            leaf=self._leaf,
            pages=self._pages,
        )
        self._warn_of_time()
        if self._gate is not None:
            self._gate.hand_over(self._processes.handlers)  # nobody stands between any more
        if self._ring is not None:
            self._ring.root = self._pid
            self._ring.origin_of = self._processes.origin_of
        if self._held:
            leader.tell({"op": "go"})

    def _close_groups(self) -> None:
        """Those that were made here."""
        if isinstance(self._leaf, OwnLeaf):
            self._leaf.close()
        if self._pages is not None:
            self._pages.close()
        self._leaf = self._pages = None

    def _close_descriptors(self) -> None:
        seqpacket.close_all(self._descriptors)
        self._descriptors = []

    def _from_leader(self, message: dict[str, Any] | None, descriptors: list[int]) -> None:
        if message is None:
            if self._leader is not None:
                self._node.end_adopted(self._leader.pid)
            self._leader = None
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # without its leader it would be nobody's
            if self._leaf is not None:
                self._leaf.leader = 0
            if self._processes is not None:
                self._end_orphans(time.monotonic() + KILL_PATIENCE_S)
            else:
                self._failed({"stage": "leader", "text": _LOST})
            return
        operation = message.get("op")
        if operation == "started":
            self._is_started()
        elif operation == "failed" and message.get("errno") == errno.ESTALE and message.get("stage") == "files":
            if self._leader is not None:
                self._begin_anew(self._leader)
        elif operation == "failed":
            self._failed(self._refused or message)
        elif operation == "ending":
            self._disarm()
        elif operation == "left":
            self._left_behind(message)
        elif operation == "exited":
            self._finished(message)
        seqpacket.close_all(descriptors)

    def _end_orphans(self, deadline: float) -> None:
        """The leader is lost: ends what it has led, as far as a control group tells who that is."""
        left: list[int] = []
        if self._leaf is not None:
            self._leaf.kill()
            with contextlib.suppress(OSError):
                left = self._leaf.pids()
            if left and time.monotonic() < deadline:
                self._node.loop.later(_LOOK_AGAIN_S, lambda: self._end_orphans(deadline))
                return
            self._leaf.remove()
        self._finished({"status": int(signal.SIGKILL), "error": _LOST, "unkillable": left})

    def _unfiltered(self) -> None:
        """The last process of the tool's tree is gone."""
        self._gate = None

    def _disarm(self) -> None:
        """What is left of the tree is being killed: every call that asks fails from now on."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    def _failed(self, message: dict[str, Any]) -> None:
        if message.get("stage") == "exec":
            self._answer({"op": "failed", "errno": int(message.get("errno", 0))})
            status: dict[str, Any] = {"error": os.strerror(int(message.get("errno", 0)))}
        else:
            error = NotEnforced([f"processes.{message.get('stage')}"], str(message.get("text")))
            self._answer(errors.to_wire(error))
            status = {"error": str(error)}
        self._finished(status)

    def _left_behind(self, message: dict[str, Any]) -> None:
        """The tool has ended; what it leaves running is kept, and still the call's (``survivors: keep``)."""
        self._left = True
        try:
            self._target.write(self._process_record(message), self._origin.identity)
            self._end_implicit(message)
        except JournalError:
            log.exception("the end of a tool could not be journaled")
        self._tell_end(message)

    def _finished(self, message: dict[str, Any]) -> None:
        """The tool's tree is dead: settle, record, tell."""
        self._node.gpus.ended(self._pid, self._target)
        self.running = False
        self._close_descriptors()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._unring()
        if self._processes is not None:
            usage = self._processes.close(message.get("cpu_seconds", 0.0), message.get("peak_memory", 0))
            message |= {"usage": usage}
        else:
            self._origin.account.release(PROCESSES, 1)
        try:
            if self._pid:
                self._judge_time(timed_out=bool(message.get("timed_out")))
                self._judge_end(message.get("unkillable", ()))
                self._target.write(self._process_record(message), self._origin.identity)
            if not self._left:
                self._end_implicit(message)
        except JournalError:
            log.exception("the end of a tool could not be journaled")
        self._origin.account.let_go()
        if self._account is not None:
            self._account.close()
        self._tell_end(message)
        self._target.scratches.leave(self._call, last=self._call == self._span)
        self._node.lift_ceiling(self._leaf)
        self._close_groups()
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.release()

    def _unring(self) -> None:
        self._disarm()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _end_implicit(self, message: dict[str, Any]) -> None:
        if self._implicit is not None:
            status = StatusCode.ERROR if message.get("status") != 0 else StatusCode.UNSET
            self._target.write(self._implicit._replace(end_ns=time.time_ns(), status=status), self._origin.identity)

    def _tell_end(self, message: dict[str, Any]) -> None:
        if "status" in message:
            keys = ("status", "timed_out", "unkillable")
            ended: dict[str, Any] = {key: message[key] for key in keys if key in message}
            if self._why is not None:
                ended["why"] = self._why
            ended["spans"] = self._origin.tally.untold()
            self._answer({"op": "exited", "pid": self._pid, **ended})
        self._hang_up()

    def _process_record(self, ended: dict[str, Any] | None) -> SpanRecord:
        attributes: dict[str, AttributeValue] = {
            "process.pid": self._pid,
            "process.parent_pid": self._target.pid,
            "process.executable.path": self._executable,
            "process.command_args": arguments.shown(self._start.argv),
            "ray_guard.arguments.sha256": arguments.digest(self._start.argv),
        }
        if self._strays:
            attributes["ray_guard.process.cgroups_left"] = self._strays
        status, text = StatusCode.UNSET, ""
        if ended is not None:
            if "status" in ended:
                attributes |= exit_attributes(int(ended["status"]))
                if attributes["process.exit.code"] != 0:
                    status = StatusCode.ERROR
            if "error" in ended or self._why is not None:
                status, text = StatusCode.ERROR, str(ended.get("error") or self._why)
            if ended.get("unkillable"):
                attributes["ray_guard.process.unkillable"] = tuple(str(pid) for pid in ended["unkillable"])
            if "usage" in ended:
                attributes |= _tree_attributes(ended["usage"])
        return SpanRecord(
            trace_id=self._origin.trace_id,
            span_id=self._span,
            parent_id=self._origin.call,
            name=f"process {os.path.basename(self._executable)[:128]}",
            kind=SpanKind.INTERNAL,
            start_ns=self._began,
            end_ns=None if ended is None else time.time_ns(),
            attributes=attributes,
            status=status,
            status_message=text,
        )

    # -- the requester -------------------------------------------------------------------------------------------------

    def _from_requester(self) -> None:
        control = self._control
        if control is None:
            return
        try:
            received = seqpacket.receive(control)
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:  # nobody waits for the tool any more; the call's end, or its actor's, ends it
            self._hang_up()
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        if message.get("op") == "signal" and isinstance(message.get("number"), int) and self._leader is not None:
            self._leader.tell({"op": "signal", "number": message["number"]})

    def _answer(self, message: dict[str, Any]) -> None:
        if self._control is not None:
            try:
                seqpacket.send(self._control, message)
            except OSError:
                self._hang_up()

    def _hang_up(self) -> None:
        if self._control is not None:
            self._node.loop.forget(self._control.fileno())
            self._control.close()
            self._control = None

    @property
    def call(self) -> str | None:
        return self._origin.call

    @property
    def origin(self) -> Origin:
        return self._origin

    def has(self, span: str) -> bool:
        """Whether that is a program's of its tree, as far as is known."""
        return span == self._span or (self._processes is not None and self._processes.has(span))

    @property
    def episode(self) -> str | None:
        return self._origin.episode

    def end(self, why: str | None = None) -> None:
        """Its call has ended, or its actor: the leader kills what is left, and says so.

        Args:
            why: it is ended before its time; the requester is told.
        """
        self._why = self._why or why
        if self._leader is not None:
            if self._leaf is not None and self._processes is not None:
                self._leaf.kill()  # at once: with hundreds of processes ready to run its leader may have to wait
            self._leader.tell({"op": "end"})
        elif self.running:
            self._failed({"stage": "leader", "text": "the call ended before the tool was started"})


def _notice_time(account: Account) -> None:
    if not account.closed and account.began is not None:
        account.measured(WALL, time.monotonic() - account.began)


def _executable(start: Start) -> str:
    """The program as exec will find it. (What /proc says later may be another: a shell execs its last command.)"""
    program = start.executable or start.argv[0]
    if "/" not in program:
        for folder in start.environment.get("PATH", os.defpath).split(os.pathsep):
            path = os.path.join(folder, program)
            if os.access(path, os.X_OK) and os.path.isfile(path):
                return path
    return program


def _tree_attributes(usage: Usage) -> dict[str, AttributeValue]:
    """On the span of the first process: what all of the tree used, itself included."""
    attributes: dict[str, AttributeValue] = {
        "ray_guard.process.cpu_seconds": usage.cpu_seconds,
        "ray_guard.process.peak_memory": usage.peak_memory,
        "ray_guard.tree.processes": usage.processes,
        "ray_guard.tree.executions": usage.executed,
    }
    if usage.cpu_bound_seconds:
        attributes["ray_guard.process.cpu_bound_seconds"] = usage.cpu_bound_seconds
    if usage.left_out:
        attributes["ray_guard.tree.left_out"] = usage.left_out
    return attributes


def _least(account: Account, kind: str) -> int | None:
    """The least limit of this scope and those around it."""
    node: Account | None = account
    limits = []
    while node is not None:
        limits.append(node.limit(kind))
        node = node.parent
    numbers = [int(limit) for limit in limits if limit is not UNLIMITED]
    return min(numbers) if numbers else None

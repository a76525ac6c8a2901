"""Tool processes: from a target's request to the record of their end. Runs in the supervisor.

For each start there are two lines: *control*, to whoever asked (started, failed, exited; signals come back on it), and
*link*, to the leader that owns the tool's tree. The ring between them stands from the moment the filter is armed until
the last filtered process is gone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ray_guard import errors
from ray_guard.egress.gate import Gate
from ray_guard.errors import NotEnforced
from ray_guard.evidence.journal import JournalError
from ray_guard.evidence.otlp import fragment
from ray_guard.kernel import seqpacket
from ray_guard.kernel.seccomp import Listener
from ray_guard.policy.budgets import Account, Scope
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import AttributeValue, Role, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor.metadata import Metadata
from ray_guard.supervisor.node import Node
from ray_guard.supervisor.ring import Ring
from ray_guard.supervisor.start import Start
from ray_guard.supervisor.target import Origin, Target, new_span_id, new_trace_id

log = logging.getLogger("ray_guard.tools")

_ARGUMENT_SHOWN: Final = 256
_ARGUMENTS_SHOWN: Final = 64
_LOST: Final = "the process that led it was lost"


@dataclass(frozen=True, slots=True)
class Call:
    """Where in the traces a start belongs, as its requester says.

    ``span`` is the open tool call; where there is none the tool becomes a call of its own below ``parent``.
    """

    span: str | None = None
    trace: str | None = None
    parent: str | None = None
    identity: Mapping[str, AttributeValue] = field(default_factory=dict)


class Tool:
    """One started tool and all it ever starts.

    Args:
        node, target, policy: whose it is and what it may do.
        start: what was asked for.
        call: the tool call that asked, or where a call of the tool's own belongs.
        control: to the requester.
        zygote: to the process that forks leaders.
        descriptors: [memory file, working folder, the tool's own descriptors …], consumed.

    Raises:
        PolicyError, NotEnforced: its view of the file system cannot be made.
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
        zygote: socket.socket,
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
        self._started = False
        self._executable = _executable(start)
        self._began = time.time_ns()
        self._span = new_span_id()
        self._implicit: SpanRecord | None = None
        self._account: Account | None = None
        self._call = call.span if call.span is not None and call.span in target.open else self._span
        scratch = target.scratches.enter(self._call)
        try:
            self._view = target.views.of(policy, start, descriptors[1], scratch, node.hidden())
            descriptors.insert(1, self._view.descriptor())
            self._origin = self._find_origin(call)
        except BaseException:
            target.scratches.leave(self._call, last=self._call == self._span)
            seqpacket.close_all(descriptors)
            control.close()
            raise
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pidfd_open(os.getpid())
        try:
            wall = policy.limits(Scope.CALL).get("wall_seconds")
            request = {"op": "start", "wall_seconds": wall, "mounts": self._view.mounts(), "gpu": self._view.gpu}
            seqpacket.send(zygote, request, [theirs.fileno(), own, *descriptors])
        finally:
            os.close(own)
            theirs.close()
            seqpacket.close_all(descriptors)
        node.loop.watch(self._link.fileno(), select.EPOLLIN, lambda _events: self._from_leader())
        node.loop.watch(control.fileno(), select.EPOLLIN, lambda _events: self._from_requester())

    def _find_origin(self, call: Call) -> Origin:
        if call.span is not None and call.span in self._target.open:
            return replace(self._target.origin_of_call(call.span), parent_id=self._span)
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
                "ray_guard.arguments.sha256": _hash(self._start.argv),
            },
        )
        identity = fragment({"rl.run.id": self._target.run_id, **call.identity, "ray_guard.source": "supervisor"})
        self._target.write(self._implicit, identity)
        self._account = self._target.call_account(span_id, None)
        return Origin(self._implicit.trace_id, self._span, identity, self._account, None, span_id)

    # -- the leader ----------------------------------------------------------------------------------------------------

    def _from_leader(self) -> None:
        try:
            received = seqpacket.receive(self._link)
        except (OSError, seqpacket.BadPacket):
            received = None
        if received is None:
            if self._started:
                self._finished({"status": int(signal.SIGKILL), "error": _LOST})
            else:
                self._failed({"stage": "leader", "text": _LOST})
            return
        message, descriptors = received
        operation = message.get("op")
        if operation == "armed" and descriptors:
            self._armed(int(message["pid"]), descriptors.pop(0))
        elif operation == "started":
            self._started = True
            self._answer({"op": "started", "pid": self._pid})
        elif operation == "failed":
            self._failed(message)
        elif operation == "exited":
            self._finished(message)
        seqpacket.close_all(descriptors)

    def _armed(self, pid: int, listener: int) -> None:
        self._pid = pid
        try:
            self._target.write(self._process_record(None), self._origin.identity)
        except JournalError as error:
            os.close(listener)
            log.warning("a tool was not started: %s", error)
            self._link.shutdown(socket.SHUT_RDWR)  # its leader ends it
            return
        policy = self._policy.with_role(Role.TOOL)
        self._ring = Ring(self._node, self._target, policy, pid, self._origin, view=self._view)
        self._gate = Gate(
            Listener(listener),
            self._ring,
            self._node.means,
            self._unfiltered,
            Metadata(self._view).handlers(),
        )
        seqpacket.send(self._link, {"op": "go"})

    def _unfiltered(self) -> None:
        """The last process of the tool's tree is gone."""
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

    def _finished(self, message: dict[str, Any]) -> None:
        """The tool's tree is dead: settle, record, tell."""
        self._node.loop.forget(self._link.fileno())
        self._link.close()
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        try:
            if self._pid:
                self._target.write(self._process_record(message), self._origin.identity)
                if message.get("timed_out"):
                    self._wall_violation()
            if self._implicit is not None:
                failed = message.get("status") != 0
                status = StatusCode.ERROR if failed else StatusCode.UNSET
                self._target.write(replace(self._implicit, end_ns=time.time_ns(), status=status), self._origin.identity)
        except JournalError:
            log.exception("the end of a tool could not be journaled")
        if self._account is not None:
            self._account.close()
        if "status" in message:
            keys = ("status", "timed_out", "unkillable", "cpu_seconds", "peak_memory")
            self._answer({"op": "exited", **{key: message[key] for key in keys if key in message}})
        self._hang_up()
        self._target.scratches.leave(self._call, last=self._call == self._span)

    def _wall_violation(self) -> None:
        limit = self._policy.limits(Scope.CALL)["wall_seconds"]
        self._target.violation(
            replace(self._origin, parent_id=self._span),
            self._span,
            "wall_seconds",
            reason="call budget",
            destination="",
            limit=limit,
            value=(time.time_ns() - self._began) / 1e9,
        )

    def _process_record(self, ended: dict[str, Any] | None) -> SpanRecord:
        argv = self._start.argv
        shown = tuple(
            argument if len(argument) <= _ARGUMENT_SHOWN else argument[:_ARGUMENT_SHOWN] + "…"
            for argument in argv[:_ARGUMENTS_SHOWN]
        )
        attributes: dict[str, AttributeValue] = {
            "process.pid": self._pid,
            "process.parent_pid": self._target.pid,
            "process.executable.path": self._executable,
            "process.command_args": shown,
            "ray_guard.arguments.sha256": _hash(argv),
        }
        status, text = StatusCode.UNSET, ""
        if ended is not None:
            if "status" in ended:
                code = os.waitstatus_to_exitcode(int(ended["status"]))
                attributes["process.exit.code"] = 128 - code if code < 0 else code
                if code < 0:
                    attributes["process.exit.signal"] = -code
                if code != 0:
                    status = StatusCode.ERROR
            if "error" in ended:
                status, text = StatusCode.ERROR, str(ended["error"])
            if ended.get("unkillable"):
                attributes["ray_guard.process.unkillable"] = tuple(str(pid) for pid in ended["unkillable"])
            for key in ("cpu_seconds", "peak_memory"):
                if key in ended:
                    attributes[f"ray_guard.process.{key}"] = ended[key]
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
        if message.get("op") == "signal" and isinstance(message.get("number"), int):
            try:
                seqpacket.send(self._link, {"op": "signal", "number": message["number"]})
            except OSError:
                pass  # it has just ended

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
    def running(self) -> bool:
        return self._link.fileno() >= 0

    def end(self) -> None:
        """Its call has ended, or its actor: the leader kills what is left, and says so."""
        if self._link.fileno() >= 0:
            try:
                self._link.shutdown(socket.SHUT_WR)
            except OSError:
                pass


def _executable(start: Start) -> str:
    """The program as exec will find it. (What /proc says later may be another: a shell execs its last command.)"""
    program = start.executable or start.argv[0]
    if "/" in program:
        return program
    return shutil.which(program, path=start.environment.get("PATH", os.defpath)) or program


def _hash(argv: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(argv).encode(errors="surrogateescape")).hexdigest()

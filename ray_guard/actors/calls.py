"""driver, target: where the caller is (its episode, turn, call) travels with every call to a guarded actor or task.

The caller's side is Ray's own hook for it: a decorator around an actor method's invocation, which is part of the
metadata from which handles are made, wherever they are made. It adds one keyword argument, ``_ray_guard_context``, when
there is a scope to speak of. The callee's side takes it off again where Ray executes a method, so that the methods
themselves, their signatures and their ``__dict__`` stay the user's. A call that brings none may bring ROLL's
``_otel_ctx`` among its arguments, which then says where it comes from.

What does not work: wrapping methods (generators, coroutine checks and frameworks' flags on them all need care, and
inherited ones must not be pinned), Ray's tracing hook (generator methods raise TypeError), runtime environments (one
per episode would be one worker each).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from ray_guard.actors import documents, internals
from ray_guard.actors.admission import CONTEXT
from ray_guard.actors.process import confinement
from ray_guard.client import carry, foreign
from ray_guard.client.scope import attach, context
from ray_guard.errors import PolicyError

_PARAMETER = inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, default=None)

Invocation = Callable[[Any, MutableMapping[str, Any]], Any]


def install() -> None:
    """Puts both sides in place, or neither: a context that nobody takes off would break the call."""
    if internals.DESCRIBE_METHODS.exists() and internals.EXECUTE_METHOD.exists():
        internals.EXECUTE_METHOD.wrap(_around_executor)
        internals.DESCRIBE_METHODS.wrap(_around_create)


class _Known:
    """Whom this process knows to be guarded, and how."""

    def __init__(self) -> None:
        self.classes: dict[Any, frozenset[str]] = {}
        self.children: set[str] = set()


_known = _Known()


def remember_child(handle: Any) -> None:
    """`handle` is of an actor that this guarded process created, so it is under the same policies."""
    _known.children.add(internals.actor_of(handle))


def is_as_guarded(handle: Any, ids: Collection[str]) -> bool:
    """The actor behind `handle` is known to be under all of `ids`."""
    if internals.actor_of(handle) in {*_known.children, internals.actor_id()}:
        return True
    return _known.classes.get(internals.class_of(handle), frozenset()).issuperset(ids)


def _carries() -> bool:
    return internals.DESCRIBE_METHODS.exists() and internals.DESCRIBE_METHODS.wrapped()


# The caller's side -------------------------------------------------------------------------------------------------


def _around_create(original: Callable[..., Any]) -> Callable[..., Any]:
    def create(cls: Any, modified_class: Any, descriptor: Any, *args: Any, **kwargs: Any) -> Any:
        meta = original(cls, modified_class, descriptor, *args, **kwargs)
        texts = () if modified_class is None else documents.of(modified_class)
        if texts:
            extend(meta)
            _known.classes[descriptor] = frozenset(documents.identify(text) for text in texts)
        return meta

    return create


def extend(meta: Any) -> None:
    """Makes the methods in `meta` carry their caller's context."""
    if not _carries():
        return
    for name, parameters in meta.signatures.items():
        # A constructor's arguments are kept for restarts, when the episode that they were given in is long over.
        if name != "__init__" and not name.startswith("__ray_") and not _takes_context(parameters):
            meta.signatures[name] = _with_parameter(parameters)
            users = meta.decorators.get(name)
            meta.decorators[name] = bring_context if users is None else functools.partial(bring_context, users)


def _takes_context(parameters: list[inspect.Parameter]) -> bool:
    return any(parameter.name == CONTEXT for parameter in parameters)


def _with_parameter(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """`parameters` with the context's, where Ray's check of arguments lets it pass."""
    if _takes_context(parameters):
        return parameters
    at = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        at -= 1
    return [*parameters[:at], _PARAMETER, *parameters[at:]]


def bring_context(invocation: Any, next_invocation: Invocation | None = None) -> Invocation:
    """Adds the caller's context to an invocation's keyword arguments.

    With two arguments the first is another such decorator, the user's, which then stands around ours.
    """
    if next_invocation is not None:
        outer: Invocation = invocation(bring_context(next_invocation))
        return outer

    def invoke(args: Any, kwargs: MutableMapping[str, Any]) -> Any:
        node = carry.current()
        if node is not None:
            kwargs = {**kwargs, CONTEXT: _written(node)}
        return invocation(args, kwargs)

    return invoke


def with_context(remote_function: Any, kwargs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The keyword arguments of a guarded task, with the caller's context."""
    node = carry.current()
    if node is None or not _carries():
        return kwargs
    internals.extend_signature(remote_function, _with_parameter)
    return {**(kwargs or {}), CONTEXT: _written(node)}


class _Last:
    """The place that was written last: an episode makes many calls from one."""

    written: tuple[carry.Node, bytes] | None = None


def _written(node: carry.Node) -> bytes:
    """The current context as a message. Bytes, because Ray copies those and pickles all else."""
    last = _Last.written
    if last is not None and last[0] is node:
        return last[1]
    text = json.dumps(context(), separators=(",", ":")).encode()
    _Last.written = (node, text)
    return text


# The callee's side -------------------------------------------------------------------------------------------------


def _around_executor(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(self: Any, method_name: str, method: Callable[..., Any]) -> Any:
        executor = original(self, method_name, method)
        run_under = runner(method)
        is_constructor = method_name == "__init__"

        def run(actor: Any, /, *args: Any, **kwargs: Any) -> Any:
            if is_constructor:
                confinement.identify(type(actor).__name__)  # confined with its whole job, its class is not marked
            given = kwargs.pop(CONTEXT, None)
            scope = None
            if given is not None:
                scope = arrive(given)
            elif not is_constructor:  # its arguments are kept for restarts
                scope = arrive_from_elsewhere(args, kwargs)
            if scope is None:
                return executor(actor, *args, **kwargs)
            return run_under(scope, functools.partial(executor, actor, *args, **kwargs))

        # Ray looks at these to see whether to run a method in the event loop.
        vars(run).update(vars(executor))
        return run

    return make


def arrive(given: bytes) -> attach:
    """The scope in which a call with the context `given` runs.

    Raises:
        PolicyError: it is no context.
    """
    return attach(_read(given))


def arrive_from_elsewhere(args: Collection[Any], kwargs: Mapping[str, Any]) -> attach | None:
    """The scope in which a call from no scope of ours runs, where its arguments name one; None: nothing does."""
    origin = foreign.find((*args, *kwargs.values()))
    return None if origin is None or origin.place is None else attach(origin)


@functools.lru_cache(maxsize=256)
def _read(given: bytes) -> Any:
    try:
        return json.loads(given)
    except (TypeError, ValueError) as error:
        raise PolicyError(CONTEXT, given, f"what ray_guard put there: {error}") from None


def runner(function: Callable[..., Any]) -> Callable[[attach, Callable[[], Any]], Any]:
    """What runs a call of `function` inside a scope, by the kind of function it is."""
    if inspect.isasyncgenfunction(function):
        return carry.run_async_generator
    if inspect.isgeneratorfunction(function):
        return carry.run_generator
    if inspect.iscoroutinefunction(function):
        return _await
    return _call


def _call(scope: attach, call: Callable[[], Any]) -> Any:
    with scope:
        return call()


async def _await(scope: attach, call: Callable[[], Any]) -> Any:
    with scope:
        return await call()

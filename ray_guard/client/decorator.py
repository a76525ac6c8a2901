"""target: the ``tool`` decorator.

The wrappers keep the kind of function (Ray, asyncio and trainers look at it), signature, ``__dict__`` and name. They
refer to nothing but importable classes and functions and the decorated one: cloudpickle takes a class defined in
``__main__`` apart, wrapper functions and their globals included, and a ContextVar among those would not pickle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, TypeVar, overload

from ray_guard.client import carry
from ray_guard.client.foreign import OTEL_CONTEXT
from ray_guard.client.scope import ToolCall
from ray_guard.client.spans import NAME_LIMIT, clean_text

F = TypeVar("F")

_DEFERRED = (CoroutineType, GeneratorType, AsyncGeneratorType)
_BOUND = ("self", "cls")


class Tool:
    """What the wrappers know of a tool: its name and how its positional arguments are called."""

    __slots__ = ("name", "positional", "rest", "skip")

    def __init__(self, name: str, positional: tuple[str, ...], rest: str, *, skip: int) -> None:
        self.name = name
        self.positional = positional
        self.rest = rest
        self.skip = skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _tool, (self.name, self.positional, self.rest, self.skip)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ToolCall:
        """The scope of one call. Arguments are those given, by name; defaults are left out."""
        given = args[self.skip :] if self.skip else args
        arguments = dict(zip(self.positional, given, strict=False))
        if len(given) > len(self.positional):
            arguments[self.rest] = list(given[len(self.positional) :])
        if kwargs:
            arguments.update(kwargs)
            arguments.pop("_ray_trace_ctx", None)  # Ray's own, when somebody has turned its tracing on
            if OTEL_CONTEXT in arguments:
                call = ToolCall(self.name, arguments)
                call.carrier = {OTEL_CONTEXT: arguments.pop(OTEL_CONTEXT)}
                return call
        return ToolCall(self.name, arguments)


def _tool(name: str, positional: tuple[str, ...], rest: str, skip: int) -> Tool:
    return Tool(name, positional, rest, skip=skip)


def _describe(function: Callable[..., Any], name: str | None) -> Tool:
    called = name if name is not None else getattr(function, "__name__", type(function).__name__)
    positional: list[str] = []
    rest, skip = "*", 0
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []  # some built-in callables tell nothing; their arguments go by position
    for at, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = f"*{parameter.name}"
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if at == 0 and parameter.name in _BOUND:
                # Whether a function is a method is not to be known while its class is being built; its first
                # parameter's name is all there is, and a convention nobody breaks.
                skip = 1
            else:
                positional.append(parameter.name)
    return Tool(clean_text(str(called), NAME_LIMIT), tuple(positional), rest, skip=skip)


def _call(tool: Tool, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scope = tool.call(args, kwargs)
    scope.__enter__()
    try:
        result = function(*args, **kwargs)
    except BaseException as error:
        scope.__exit__(type(error), error, error.__traceback__)
        raise
    if type(result) in _DEFERRED:
        return _defer(scope, result)
    scope.result(result)
    scope.__exit__(None, None, None)
    return result


def _defer(scope: ToolCall, result: Any) -> Any:
    """Keeps `scope` open for as long as what a plain function returned is still to run.

    Functions that hide their kind are common: an older ``retry`` around a coroutine, ``return self._stream(…)``.
    Without this their spans have no duration and what they do belongs to nobody.
    """
    inside = scope.suspend()
    if isinstance(result, CoroutineType):
        return carry.run_coroutine(scope, result, inside)
    if isinstance(result, GeneratorType):
        return carry.run_generator(scope, lambda: result, inside)
    return carry.run_async_generator(scope, lambda: result, inside)


def _begin(
    tool: Tool, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ToolCall, Callable[[], Any], None]:
    return tool.call(args, kwargs), functools.partial(function, *args, **kwargs), None


def _is(check: Callable[[Any], bool], function: Callable[..., Any]) -> bool:
    # inspect looks through functools.partial, but not at what makes an object callable.
    return check(function) or (not inspect.isroutine(function) and check(getattr(function, "__call__", None)))  # noqa: B004


def _wrap(function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
    spec = _describe(function, name)
    wrapper: Callable[..., Any]

    if _is(inspect.isasyncgenfunction, function):
        wrapper = carry.wrap_async_generator(functools.partial(_begin, spec, function))

    elif _is(inspect.iscoroutinefunction, function):

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            with spec.call(args, kwargs) as scope:
                result = await function(*args, **kwargs)
                scope.result(result)
                return result

        wrapper = call_async

    elif _is(inspect.isgeneratorfunction, function):

        def call_generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from carry.run_generator(*_begin(spec, function, args, kwargs)))

        wrapper = call_generator

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return _call(spec, function, args, kwargs)

        wrapper = call

    return functools.wraps(function)(wrapper)


@overload
def tool(function: F, /) -> F: ...


@overload
def tool(*, name: str | None = None) -> Callable[[F], F]: ...


def tool(function: Any = None, /, *, name: str | None = None) -> Any:
    """Makes a function a tool: each call is one span, one accounting scope and one process scope.

    Used bare (``@tool``) or with the tool's name (``@tool(name="bash")``), on functions and methods, above or below
    ``staticmethod`` and ``classmethod``, sync, async, generator and async generator alike; the kind is kept. A
    generator's span lasts from the first ``next`` to its end, and its consumer runs outside of it.

    Raises:
        TypeError: what is decorated cannot be called, or is a class.
    """
    if function is None:
        return functools.partial(tool_named, name)
    return tool_named(name, function)


def tool_named(name: str | None, function: Any) -> Any:
    """``tool(name=name)(function)``."""
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_wrap(function.__func__, name))
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"tool decorates functions and methods, not {function!r:.200}; write @tool or @tool(name=…)")
    return _wrap(function, name)

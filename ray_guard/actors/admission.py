"""target: no guarded object comes to life, and no guarded function runs, in a process that is not confined for it.

By the time Ray builds an actor its worker has been confined by the setup hook. This is the check that it was, for
whatever reason it might not have been: a program without Ray, a submission that went around the hook, a policy that was
added to the class later.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from ray_guard.actors import documents
from ray_guard.client import carry, confine
from ray_guard.client.identity import Identity
from ray_guard.errors import NotEnforced
from ray_guard.records import Mode

logger = logging.getLogger("ray_guard")

CONTEXT = "_ray_guard_context"
"""The keyword argument that brings a caller's context (:mod:`ray_guard.actors.calls`)."""
_WRAPPED = "__ray_guard_wrapped__"


def admit(instance: object) -> None:
    """Lets a guarded object be built here, or not.

    Raises:
        NotEnforced: this process is not confined under the policies of the object's class, and cannot be.
    """
    kind = type(instance)
    texts = documents.of(kind)
    ids = [documents.identify(text) for text in texts]
    worker = _ray_worker()
    if worker is None:
        _outside(kind.__name__, texts)
        return
    from ray_guard.actors import submission
    from ray_guard.actors.process import confinement

    mine = worker.current_instance() is instance
    for policy_id in confinement.lacks(ids):
        if not (mine or confinement.ids):
            # Some worker's own object, not the actor that the worker serves: confining would hit whoever shares it.
            _outside(kind.__name__, texts)
            return
        confinement.enter(policy_id, documents.read(texts[ids.index(policy_id)], policy_id))
        submission.install_in_guarded()
    if mine:
        confinement.identify(kind.__name__)


def admit_function(function: Callable[..., Any], name: str) -> None:
    """Lets a guarded function run here, or not.

    Raises:
        NotEnforced: this process is not confined under the function's policies. It is not confined now either: other
            tasks share it.
    """
    texts = documents.of(function)
    if _ray_worker() is not None:
        from ray_guard.actors.process import confinement

        if not confinement.lacks(documents.identify(text) for text in texts):
            return
    _outside(name, texts)


def _outside(name: str, texts: tuple[str, ...]) -> None:
    """A guarded thing where no Ray worker was made for it."""
    for text in texts:
        policy = documents.read(text, documents.identify(text))
        if confine.policies():
            # A confined program: what both allow. Who it is was said when it was confined first.
            confine.enter(policy, Identity(evidence=""))
        elif policy.mode is Mode.ENFORCE:
            raise NotEnforced(
                ("guard",),
                f"{name} is guarded, and this process is not confined under its policy: use it as a Ray actor or task "
                "(its worker is confined first), or in a program without Ray call ray_guard.confine first",
            )
        else:
            logger.warning("ray_guard: %s runs unguarded here; its policy only reports", name)


def _ray_worker() -> Any:
    """The internals, where this process is one of Ray's workers; None elsewhere, without importing Ray."""
    if "ray" not in sys.modules:
        return None
    from ray_guard.actors import internals

    return internals if internals.in_worker() else None


# Wrappers ----------------------------------------------------------------------------------------------------------


def guard_class(cls: type, document: str) -> None:
    """Puts `cls`, in place, under `document`: its instances are admitted before their ``__init__`` runs."""
    first = not documents.of(cls)
    documents.mark(cls, document)
    if "__init__" in vars(cls):
        guard_init(cls)
    elif not getattr(inspect.getattr_static(cls, "__init__"), _WRAPPED, False):
        _add_init(cls)
    if first:
        _follow_subclasses(cls)


def guard_init(cls: type) -> None:
    """Wraps the ``__init__`` that `cls` itself defines; an ``async`` one, which Ray allows, stays so."""
    original = vars(cls)["__init__"]
    if getattr(original, _WRAPPED, False):
        return
    wrapper: Callable[..., Any]
    if inspect.iscoroutinefunction(original):

        async def init_async(self: Any, *args: Any, **kwargs: Any) -> None:
            admit(self)
            await original(self, *args, **kwargs)

        wrapper = init_async
    else:

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            admit(self)
            original(self, *args, **kwargs)

        wrapper = init
    wrapper = functools.wraps(original)(wrapper)
    setattr(wrapper, _WRAPPED, True)
    cls.__init__ = wrapper  # type: ignore[misc]


def _add_init(cls: type) -> None:
    """An ``__init__`` for a class that inherits its own: it hands on to whatever is next, as without it."""
    inherited: Any = cls.__init__  # type: ignore[misc]
    wrapper: Any
    if inspect.iscoroutinefunction(inherited):

        async def init_async(self: Any, *args: Any, **kwargs: Any) -> None:
            admit(self)
            await _next(cls, self).__init__(*args, **kwargs)

        wrapper = init_async
    else:

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            admit(self)
            _next(cls, self).__init__(*args, **kwargs)

        wrapper = init
    if inspect.isfunction(inherited):
        wrapper = functools.wraps(inherited)(wrapper)
    else:  # object's, or one written in C
        wrapper.__name__ = "__init__"
        wrapper.__qualname__ = f"{cls.__qualname__}.__init__"
        if inherited is object.__init__:
            self_only = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            wrapper.__signature__ = inspect.Signature([self_only])
    wrapper.__module__ = cls.__module__
    setattr(wrapper, _WRAPPED, True)
    cls.__init__ = wrapper  # type: ignore[misc]


def _next(cls: Any, instance: Any) -> Any:
    """``super()`` as a method defined in `cls` sees it."""
    return super(cls, instance)


def _follow_subclasses(cls: type) -> None:
    """A subclass with an ``__init__`` of its own need not call ours; it is admitted all the same."""
    original = vars(cls).get("__init_subclass__")

    def __init_subclass__(subclass: Any, /, **kwargs: Any) -> None:  # noqa: N807
        if original is None:
            _next(cls, subclass).__init_subclass__(**kwargs)
        else:
            original.__get__(None, subclass)(**kwargs)
        # Ray's own ActorClass derives from the actor's class too, and has an __init__ that is none.
        if "__init__" in vars(subclass) and subclass.__module__ != "ray.actor":
            guard_init(subclass)

    cls.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


def guard_function(function: Callable[..., Any], document: str) -> Callable[..., Any]:
    """A function of the same kind that runs under `document` or not at all."""
    if getattr(function, _WRAPPED, False):
        documents.mark(function, document)
        return function
    name = getattr(function, "__qualname__", repr(function))
    wrapper: Callable[..., Any]

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        admit_function(wrapper, name)
        return _arrive(kwargs.pop(CONTEXT, None), args, kwargs)

    if inspect.isgeneratorfunction(function):

        def call_generator(*args: Any, **kwargs: Any) -> Any:
            scope = enter(args, kwargs)
            return (yield from carry.run_generator(scope, functools.partial(function, *args, **kwargs)))

        wrapper = call_generator
    elif inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"guard: Ray runs no async functions as tasks; make {name} a method of an actor")
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            with enter(args, kwargs):
                return function(*args, **kwargs)

        wrapper = call
    wrapper = functools.wraps(function)(wrapper)
    setattr(wrapper, _WRAPPED, True)
    documents.mark(wrapper, document)
    return wrapper


def _arrive(given: bytes | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The scope that a task runs in: its caller's, or none."""
    from ray_guard.actors import calls  # there is a Ray to speak of: it is being run by one

    scope = calls.arrive(given) if given is not None else calls.arrive_from_elsewhere(args, kwargs)
    return contextlib.nullcontext() if scope is None else scope

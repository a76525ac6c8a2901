"""driver: the ``guard`` decorator.

Decorating marks a class or function with its policy; confinement happens in the Ray worker that will run it, before
that worker is given anything of the user's (:mod:`ray_guard.actors.hook`). The marked class is the user's own, changed
in place: methods are left alone, and ``__init__`` is wrapped, to refuse life in a process that is not confined.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeVar

from ray_guard.actors import admission, documents
from ray_guard.policy.model import Policy

T = TypeVar("T")


def guard(
    policy: Policy | Mapping[str, Any] | str | PathLike[str] | None = None, /, **shorthand: Any
) -> Callable[[T], T]:
    """Puts an actor class, an ``ActorClass`` or a remote function under a policy; above or below ``@ray.remote``.

    The decorated class keeps its name, signatures and methods. Guarding a class again, or guarding a subclass, adds a
    policy; all of them must allow. What a guarded actor submits to Ray is under its policies as well.

    Args:
        policy: a :class:`~ray_guard.Policy`, the path of a policy file, or a mapping like one.
        shorthand: the policy's own names instead: ``guard(allow=["10.0.0.7:443"], egress_bytes="1GiB")``. Limits
            given so are the actor's.

    Raises:
        PolicyError: the policy cannot be meant.
        TypeError: what is decorated is no class, actor class or remote function.
        NotEnforced: at ``.remote()`` or in the actor, where this host or version of Ray cannot hold the policy.
    """
    if policy is not None and _is_guardable(policy):
        # Bare @guard would read like "guarded somehow"; it means the policy that allows nothing.
        raise TypeError("guard: write @guard(policy) or @guard(allow=[…]); @guard() allows nothing")
    document = documents.canonical(Policy.of(policy, **shorthand))
    return functools.partial(_apply, document)


def _apply(document: str, target: Any) -> Any:
    ray = _ray_internals()
    if ray is not None:
        from ray_guard.actors import calls, submission

        submission.install()
        if isinstance(target, ray.ActorClass):
            meta = ray.metadata(target)
            admission.guard_class(meta.modified_class, document)
            calls.extend(meta.method_meta)
            ray.export_again(target)  # workers must not get the class as it was
            return target
        if isinstance(target, ray.RemoteFunction):
            ray.replace_function(target, admission.guard_function(ray.function_of(target), document))
            return target
    if inspect.isclass(target):
        admission.guard_class(target, document)
        return target
    if inspect.isfunction(target):
        return admission.guard_function(target, document)
    if type(target).__name__ in {"ActorOptionWrapper", "FuncWrapper"}:
        raise TypeError("guard: guard the class or function, then call .options(…) on what it returns")
    raise TypeError(f"guard decorates an actor class or a remote function, not {type(target).__name__}")


def _is_guardable(target: object) -> bool:
    return inspect.isclass(target) or inspect.isfunction(target) or hasattr(target, "remote")


def _ray_internals() -> Any:
    """The internals, where Ray is installed; None otherwise: guarding then only marks, and nothing is admitted."""
    if importlib.util.find_spec("ray") is None:
        return None
    from ray_guard.actors import internals

    return internals

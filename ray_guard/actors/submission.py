"""driver, target: guarded work, and whatever a guarded process submits, gets a worker that confines itself first.

Two of Ray's Python methods are wrapped, once per process: all of Ray's ways to create actors and submit tasks go by
``ActorClass._remote`` and ``RemoteFunction._remote``. Unguarded work of unguarded processes passes through untouched.

What a guarded process submits is under everything that process is under, and it can only add. A program there that
speaks Ray's protocol itself, past these methods, still submits work whose runtime environment Ray merges with its own.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray_guard.actors import calls, documents, environment, internals, registry
from ray_guard.actors.process import announce_driver, confinement, submitter
from ray_guard.errors import NotEnforced

_RUN_ANYTHING = "__ray_call__"
_lock = threading.Lock()

Settings = tuple[tuple[str, str], ...]


def install() -> None:
    """Wraps Ray's submission points; more than once does nothing more.

    Raises:
        NotEnforced: this version of Ray has them elsewhere.
    """
    with _lock:
        internals.require_known()
        if not internals.CREATE_ACTOR.wrapped():
            internals.CREATE_ACTOR.wrap(_around_actor)
            internals.SUBMIT_TASK.wrap(_around_task)
            calls.install()
            internals.after_init(announce_driver)
            announce_driver()


def install_in_guarded() -> None:
    """What only a guarded process needs besides."""
    install()
    with _lock:
        if internals.CALL_METHOD.exists() and not internals.CALL_METHOD.wrapped():
            internals.CALL_METHOD.wrap(_around_call)


def _around_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def _actor_method_call(self: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        if method_name == _RUN_ANYTHING and not calls.is_as_guarded(self, confinement.ids):
            raise NotEnforced(
                (f"ray.{_RUN_ANYTHING}",),
                "it would run a guarded process's code in an actor that is not known to be under the same policies",
            )
        return original(self, method_name, *args, **kwargs)

    return _actor_method_call


def _around_actor(original: Callable[..., Any]) -> Callable[..., Any]:
    def _remote(self: Any, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        meta = internals.metadata(self)
        texts = documents.of(meta.modified_class)
        if texts or confinement.ids:
            _require_python(not meta.is_cross_language)
            options["runtime_env"] = _guarded(options.get("runtime_env"), texts)
        handle = original(self, args, kwargs, *more, **options)
        if confinement.ids:
            calls.remember_child(handle)
        return handle

    return _remote


def _around_task(original: Callable[..., Any]) -> Callable[..., Any]:
    def _remote(
        self: Any, args: Any = None, kwargs: Any = None, serialized_runtime_env_info: str | None = None, **options: Any
    ) -> Any:
        texts = documents.of(internals.function_of(self))
        if texts or confinement.ids:
            _require_python(not internals.is_foreign(self))
            serialized_runtime_env_info = _guarded_text(serialized_runtime_env_info, texts)
            if options.get("runtime_env") or internals.in_client_mode():
                options["runtime_env"] = _guarded(options.get("runtime_env"), texts)  # what Ray Client looks at
        if texts:
            kwargs = calls.with_context(self, kwargs)
        return original(self, args, kwargs, serialized_runtime_env_info, **options)

    return _remote


def _require_python(is_python: bool) -> None:  # noqa: FBT001
    if not is_python:
        raise NotEnforced(("ray.language",), "a Java or C++ worker cannot be confined, and guarded work gets no other")


def _prepare(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Ids of what the submitted work will be under, all of them known to the job's registry.

    Raises:
        NotEnforced: a policy asks for what this version does not hold. Said here, because here it reaches the caller as
            itself and not as the death of an actor.
    """
    for text in texts:
        missing = documents.unenforced_in(text)
        if missing:
            raise NotEnforced(missing, "this version does not enforce that yet")
    internals.ensure_connected()
    return (*confinement.ids, *registry.publish(texts))


def _guarded(asked: Mapping[str, Any] | None, texts: tuple[str, ...]) -> Any:
    """The runtime environment `asked` for, such that its worker is confined under `texts` and all that holds here."""
    ids = _prepare(texts)
    env = _with_guard(asked or {}, internals.runtime_environment(), ids, submitter(), _settings())
    return internals.as_runtime_env(env)


def _guarded_text(serialized: str | None, texts: tuple[str, ...]) -> str:
    """:func:`_guarded` for what a remote function hands to Ray's core."""
    ids = _prepare(texts)
    return _text(serialized, internals.runtime_environment_text(), ids, submitter(), _settings())


@functools.lru_cache(maxsize=256)
def _text(
    serialized: str | None, inherited: str, ids: tuple[str, ...], charged_to: str | None, settings: Settings
) -> str:
    # Remembered: one function is submitted many times, and taking JSON apart costs more than submitting.
    asked = internals.asked_environment(serialized)
    env = _with_guard(asked, internals.parse_environment(inherited), ids, charged_to, settings)
    return internals.with_environment(serialized, env)


def _with_guard(
    asked: Mapping[str, Any],
    inherited: Mapping[str, Any],
    ids: tuple[str, ...],
    charged_to: str | None,
    settings: Settings,
) -> dict[str, Any]:
    if confinement.ids:
        asked = environment.restrain(asked, inherited)
    variables = environment.variables(
        asked.get("env_vars") or {},
        inherited.get("env_vars") or {},
        ids=ids,
        submitter=charged_to,
        settings=dict(settings),
    )
    return {**asked, "env_vars": variables}


def _settings() -> Settings:
    return tuple(environment.settings(os.environ).items())

"""target: the setup hook of guarded Ray workers. driver: the hook that puts a whole job under one policy.

:func:`setup` runs in a worker when it is connected and before it is given anything of the user's: no class, function or
argument has been unpickled yet. It belongs to the worker's environment, not to the code, so whatever is submitted from
a guarded worker starts with it as well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from ray_guard.actors import environment
from ray_guard.errors import NotEnforced

logger = logging.getLogger("ray_guard")

POLICY_FILE: Final = "RAY_GUARD_POLICY"
"""The variable that names the policy file of :func:`job`; ``ray_guard.yaml`` where it is not set."""
_FIELD: Final = "worker_process_setup_hook"


def setup() -> None:
    """Confines this worker under all policies it was started with; where it cannot, the worker refuses all work."""
    from ray_guard.actors import refusal

    try:
        _confine()
    except Exception as error:
        logger.exception("ray_guard: this worker cannot be confined and refuses all work")
        refusal.refuse_all_work(error)
        return
    _follow()


def _confine() -> None:
    from ray_guard.actors import internals, registry, submission
    from ray_guard.actors.process import confinement

    internals.require_known()
    ids = environment.split(os.environ.get(environment.POLICY_ID))
    if not ids:
        raise NotEnforced(("ray.policy",), f"{environment.POLICY_ID} names no policy")
    policies = [registry.look_up(each) for each in ids]
    submission.install_in_guarded()
    for each, policy in zip(ids, policies, strict=True):
        confinement.enter(each, policy)


class _Followed:
    done = False


_followed = _Followed()


def _follow() -> None:
    """Runs the setup hook that ours displaced, as Ray would have; it is confined."""
    from ray_guard.actors import internals

    following = os.environ.get(environment.NEXT_HOOK)
    if following and following != environment.SETUP and not _followed.done:
        _followed.done = True  # what follows may be a hook of `_before`, which starts with `setup`
        failure = internals.run_hook(following)
        if failure is not None:
            raise RuntimeError(failure)


# A whole job -------------------------------------------------------------------------------------------------------


def job(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """For ``RAY_RUNTIME_ENV_HOOK=ray_guard.actors.hook.job``: all actors and tasks of the job under one policy.

    Ray calls it in ``ray.init`` (not under ``uv run``, where Ray has a hook of its own unless
    ``RAY_ENABLE_UV_RUN_RUNTIME_ENV=0``). A setup hook that the job has already runs after ours, confined.

    Raises:
        PolicyError: the policy file is missing or cannot be meant.
        NotEnforced: this version of Ray cannot be told the policy.
    """
    from ray_guard.actors import documents, internals, submission
    from ray_guard.policy.model import Policy

    text = documents.canonical(Policy.load(os.environ.get(POLICY_FILE, "ray_guard.yaml")))
    submission.install()
    _job.text = text
    if not internals.after_init(_publish):
        raise NotEnforced((internals.VERSION,), "this version of Ray tells nobody when it has started")
    env = dict(runtime_env or {})
    variables = environment.variables(
        env.get("env_vars") or {}, {}, ids=[documents.identify(text)], settings=environment.settings(os.environ)
    )
    # Ray fills this variable from the field, and refuses to find it filled.
    del variables[environment.HOOK]
    previous = env.get(_FIELD)
    env[_FIELD] = environment.SETUP
    if isinstance(previous, str) and previous != environment.SETUP:
        variables[environment.NEXT_HOOK] = previous
    elif callable(previous):
        env[_FIELD] = _before(previous)
    env["env_vars"] = variables
    return env


class _Job:
    """What the job hook was told, until there is a job to tell it to."""

    text: str | None = None


_job = _Job()


def _publish() -> None:
    from ray_guard.actors import registry

    if _job.text is not None:
        registry.publish([_job.text])


def _before(hook: Callable[[], object]) -> Callable[[], None]:
    """A setup hook that confines first and then runs `hook`; Ray pickles it."""

    def setup_and_follow() -> None:
        setup()
        hook()

    return setup_and_follow

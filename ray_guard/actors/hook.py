"""target: the setup hook of guarded Ray workers. driver: the hook that puts a whole job under one policy.

:func:`setup` runs in a worker when it is connected and before it is given anything of the user's: no class, function or
argument has been unpickled yet. It belongs to the worker's environment, not to the code, so whatever is submitted from
a guarded worker starts with it as well.
"""

from __future__ import annotations

import logging
import os

from ray_guard.actors import environment
from ray_guard.errors import NotEnforced

logger = logging.getLogger("ray_guard")


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
    submission.install()
    for each, policy in zip(ids, policies, strict=True):
        confinement.enter(each, policy)


def _follow() -> None:
    """Runs the setup hook that ours displaced, as Ray would have; it is confined."""
    from ray_guard.actors import internals

    following = os.environ.get(environment.NEXT_HOOK)
    if following and following != environment.SETUP:
        failure = internals.run_hook(following)
        if failure is not None:
            raise RuntimeError(failure)

"""driver, target: what a submission's runtime environment becomes, so that the worker is confined before it works.

Pure: dictionaries in, dictionaries out. Ray hands a runtime environment down to whatever an actor or task submits, and
merges ``env_vars`` key by key; that inheritance is what carries a policy to children, and these functions make sure
that a child can add to it and never take away from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from ray_guard.errors import NotEnforced

HOOK: Final = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""The variable from which a Ray worker learns its setup hook. Ray fills it from the *job's* runtime environment alone
(``worker_process_setup_hook`` of an actor is ignored), so for actors and tasks it is set directly."""
SETUP: Final = "ray_guard.actors.hook.setup"
NEXT_HOOK: Final = "RAY_GUARD_NEXT_HOOK"
"""The setup hook that ours displaced, in Ray's own spelling; it runs after ours, confined."""
POLICY_ID: Final = "RAY_GUARD_POLICY_ID"
"""Ids of all policies a worker is under, comma-separated; all of them must allow."""
SUBMITTER: Final = "RAY_GUARD_SUBMITTER"
"""Hex id of the guarded actor whose budgets this work charges. It also gives each actor's tasks workers of their own:
a worker that served two actors could not be charged to either."""

SETTINGS: Final = ("RAY_GUARD_EVIDENCE", "RAY_GUARD_RUN_ID")
"""What workers are told of the submitter's environment, besides policies."""

_OURS: Final = "RAY_GUARD_"

# What a guarded process may choose for the work it submits. All else is carried out by Ray's own agents, outside of any
# guard: pip and uv run build scripts, working_dir fetches URLs, py_executable and container are commands.
_FREE_FIELDS: Final = frozenset(
    {"env_vars", "config", "worker_process_setup_hook", "_ray_release", "_ray_commit", "_inject_current_ray"}
)
# Variables that make the loader, the shell that starts a worker, or Python itself run something before the hook does.
_EARLY_VARIABLES: Final = frozenset(
    {"PATH", "BASH_ENV", "ENV", "IFS", "PS4", "SHELLOPTS", "BASHOPTS", "GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH"}
)
_EARLY_PREFIXES: Final = ("LD_", "PYTHON", "BASH_FUNC_", "MALLOC_", "DYLD_")


def split(ids: str | None) -> tuple[str, ...]:
    """The ids in a variable's value, in order, each once."""
    return tuple(dict.fromkeys(part.strip() for part in (ids or "").split(",") if part.strip()))


def union(*lists: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each for ids in lists for each in ids))


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in SETTINGS if name in environ}


def variables(
    own: Mapping[str, str],
    inherited: Mapping[str, str],
    *,
    ids: Iterable[str],
    submitter: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The ``env_vars`` with which work is submitted so that its worker is confined.

    Args:
        own: the ``env_vars`` that were asked for.
        inherited: the submitter's own, which Ray will put underneath.
        ids: policies that must apply besides those that `own` and `inherited` name.
        submitter: see :data:`SUBMITTER`; None: the submitter is no guarded actor.
        settings: ``RAY_GUARD_…`` variables of the submitter that the worker should know, weaker than both others.
    """
    result = {**own}
    for key, value in (settings or {}).items():
        if key not in inherited:
            result.setdefault(key, value)
    result[POLICY_ID] = ",".join(union(split(inherited.get(POLICY_ID)), ids, split(own.get(POLICY_ID))))
    result[HOOK] = SETUP
    asked = own.get(HOOK)
    if asked and asked != SETUP:
        result[NEXT_HOOK] = asked
    elif asked != SETUP:  # not a submission that went through here before
        previous = inherited.get(HOOK)
        following = inherited.get(NEXT_HOOK) if previous == SETUP else previous
        if following:
            result[NEXT_HOOK] = following
        else:
            result.pop(NEXT_HOOK, None)
    if submitter:
        result[SUBMITTER] = submitter
    return result


def restrain(asked: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What a guarded process's request for a runtime environment may be: without our own variables, or refused.

    Args:
        asked: the runtime environment that the guarded process gave.
        inherited: its own.

    Raises:
        NotEnforced: a field or variable would be acted upon outside of the guard, or before it.
    """
    for field, value in asked.items():
        if field not in _FREE_FIELDS and value and value != inherited.get(field):
            raise NotEnforced(
                (f"runtime_env.{field}",),
                "a guarded process cannot choose it for what it submits: Ray's agents act on it outside of the guard; "
                "give it where the guarded actor itself is created, from there it is inherited",
            )
    above = inherited.get("env_vars") or {}
    kept: dict[str, str] = {}
    for name, value in (asked.get("env_vars") or {}).items():
        if name.startswith(_OURS):
            continue  # ours to say; what the submitter is under is put back by `variables`
        early = name in _EARLY_VARIABLES or name.startswith(_EARLY_PREFIXES)
        if early and value != above.get(name):
            raise NotEnforced(
                (f"runtime_env.env_vars.{name}",),
                "a guarded process cannot choose it for what it submits: it takes effect before the worker is confined",
            )
        kept[name] = value
    return {**asked, "env_vars": kept}

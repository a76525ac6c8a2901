"""target: which version of the policy an engine in this process answers with. Standard library only."""

from __future__ import annotations

import os

from ray_guard.client.spans import NAME_LIMIT, clean_text


class _Set:
    version: str | None = None


_set = _Set()


def policy_version(version: str | int | None) -> None:
    """Says which weights answer from now on: ``rl.policy.version`` of the ``chat`` spans of this process's engines.

    For trainers that load weights in ways of their own. vLLM's own weight version, where it is set
    (``finish_weight_update(weight_version=…)``), comes before it; None: the episode's version stands.
    """
    _set.version = None if version is None else clean_text(str(version), NAME_LIMIT)


def current() -> str | None:
    return _set.version


def _forget() -> None:
    _set.version = None


os.register_at_fork(after_in_child=_forget)

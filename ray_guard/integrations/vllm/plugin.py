"""target: the entry point (group ``vllm.general_plugins``) that vLLM calls there and in every process it starts."""

from __future__ import annotations

import functools
from typing import Any

from ray_guard.client.engine import Phase
from ray_guard.integrations.vllm import engines, points, watch


def load() -> None:
    """Puts the hook in place where engines are built; in a process that computes, says that it does.

    Raises:
        NotEnforced: see :func:`ray_guard.integrations.vllm.install`.
    """
    if not points.is_engine_process():
        watch.install()
        return
    engines.announce()
    _tell_warm_up()


def _tell_warm_up() -> None:
    """The core profiles the model, makes its cache and warms it up in one method; where there is none, it is LOAD."""
    from vllm.v1.engine.core import EngineCore

    original = getattr(EngineCore, "_initialize_kv_caches", None)
    if original is None:
        return

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> Any:
        engines.announce_phase(Phase.WARM_UP)
        return original(self, *args, **kwargs)

    EngineCore._initialize_kv_caches = initialize  # noqa: SLF001 - vLLM offers no hook there

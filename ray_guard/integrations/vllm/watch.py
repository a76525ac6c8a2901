"""target: puts the hook's parts in place as vLLM's modules are loaded; imports nothing of vLLM by itself."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final

from ray_guard.integrations.imports import Watch
from ray_guard.integrations.vllm import limits

_POINTS: Final = "ray_guard.integrations.vllm.points"
MODULES: Final = (
    "vllm.v1.engine.output_processor",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.serve.engine.serving",
    "vllm.entrypoints.generate.base.serving",
    "vllm.entrypoints.openai.responses.serving",
)
"""Whose classes the hook has parts in."""


def _patch(module: ModuleType) -> None:
    importlib.import_module(_POINTS).patch(module)


_watch = Watch(MODULES, _patch)


def install() -> None:
    """Puts the hook in place for engines of this process; once is enough, and it is done by itself (see the package).

    Raises:
        NotEnforced: vLLM is loaded, lacks what the hook needs, and this process's policy limits tokens or FLOPs. Raised
            from vLLM's import where that comes later.
    """
    limits.mark()
    _watch.install()


def remove() -> None:
    """Takes the hook away again, for measurements and tests: engines that exist go on without it."""
    _watch.remove()
    points = sys.modules.get(_POINTS)
    if points is not None:
        points.restore()

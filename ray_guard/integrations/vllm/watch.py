"""target: puts the hook's parts in place as vLLM's modules are loaded; imports nothing of vLLM by itself.

A guarded process installs this when it is confined, which may be long before vLLM is imported or never be followed by
it. Patching when a module has been executed is the one moment that no user's import order can miss.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

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


# Neither class below derives from importlib.abc: that would load importlib.resources into every confined process.


class _Loader:
    """A module's own loader, and the patch after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _patch(module)


class _Finder:
    """Finds what the other finders find, for the modules that are waited for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # any with these two methods will do
                return spec
        return None


_finder = _Finder()


def _patch(module: ModuleType) -> None:
    importlib.import_module(_POINTS).patch(module)


def install() -> None:
    """Puts the hook in place for engines of this process; once is enough, and it is done by itself (see the package).

    Raises:
        NotEnforced: vLLM is loaded, lacks what the hook needs, and this process's policy limits tokens or FLOPs. Raised
            from vLLM's import where that comes later.
    """
    limits.mark()
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _patch(module)


def remove() -> None:
    """Takes the hook away again, for measurements and tests: engines that exist go on without it."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    points = sys.modules.get(_POINTS)
    if points is not None:
        points.restore()

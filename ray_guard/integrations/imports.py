"""target: waits for modules of libraries that integrations hook; imports nothing of them by itself.

A guarded process waits from the moment it is confined, which may be long before the library is imported or never be
followed by it. Patching when a module has been executed is the one moment that no user's import order can miss.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

# Neither class below derives from importlib.abc: that would load importlib.resources into every confined process.


class _Loader:
    """A module's own loader, and the patch after it."""

    def __init__(self, loader: Any, patch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._patch(module)


class Watch:
    """A finder that finds what the other finders find, for the modules that are waited for.

    Args:
        modules: their names.
        patch: called with each once it has been executed; what it raises is raised by the import.
    """

    def __init__(self, modules: Collection[str], patch: Callable[[ModuleType], None]) -> None:
        self._modules = modules
        self._patch = patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._patch)  # type: ignore[assignment]  # any with these two methods will do
                return spec
        return None

    def install(self) -> None:
        """Waits from here on; what is loaded already is patched now. Calling it again does no harm."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for name in self._modules:
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._patch(module)

    def remove(self) -> None:
        """Waits no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

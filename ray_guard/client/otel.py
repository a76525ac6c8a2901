"""target: the door to OpenTelemetry: open only where the process has loaded it itself, and never for good.

What lies behind (:mod:`ray_guard.client.mirror`) observes: it may fail, is then said so once and switched off, and
neither the evidence nor the code inside a scope notices.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from ray_guard.client.spans import warn_once

_R = TypeVar("_R")


class _Door:
    __slots__ = ("_mirror", "_shut")

    def __init__(self) -> None:
        self._mirror: ModuleType | None = None
        self._shut = False

    def mirror(self) -> Any:
        """The mirror module, or None: OpenTelemetry is not loaded (we never load it first) or has failed."""
        if "opentelemetry.trace" not in sys.modules or self._shut:
            return None
        if self._mirror is None:
            # Where another thread is importing OpenTelemetry just now, this waits for it.
            self._mirror = self.attempt(importlib.import_module, "ray_guard.client.mirror")
        return self._mirror

    def attempt(self, call: Callable[..., _R], *args: Any) -> _R | None:
        """Calls something of the mirror's; when it fails, None, and the door is shut."""
        try:
            return call(*args)
        except Exception:  # noqa: BLE001 - observers never break what they observe
            warn_once("opentelemetry", "ray_guard: OpenTelemetry cannot be used; spans are journaled but not mirrored")
            self._shut = True
            return None


_door = _Door()
mirror = _door.mirror
attempt = _door.attempt

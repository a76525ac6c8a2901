"""Loggers that load :mod:`logging` with the first line they write. Runs in the supervisor.

A supervisor that has nothing to complain of needs none for its first call, and loading it takes as long as starting a
tool. Should it not load any more by then (no descriptor is left), the line is written all the same.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from logging import Logger


class _Later:
    """Stands for a logger until a method of it is called."""

    to_stderr = False

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        try:
            import logging
        except (ImportError, OSError):
            return self._write
        if _Later.to_stderr:
            logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        return getattr(logging.getLogger(self._name), method)

    def _write(self, text: str, *values: object) -> None:
        sys.stderr.write(f"{self._name}: {text % values} ({sys.exc_info()[1]!r})\n")


def logger(name: str) -> Logger:
    """What ``logging.getLogger(name)`` gives."""
    return cast("Logger", _Later(name))


def to_stderr() -> None:
    """From here on lines of all loggers go to the standard error stream, with time and name."""
    _Later.to_stderr = True

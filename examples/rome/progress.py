"""One live line on a terminal; anywhere else a plain line per event."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._start = time.monotonic()
        self._last = ""

    def show(self, text: str, detail: str = "") -> None:
        """What is going on. ``detail`` may change often: it is shown on a terminal only."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            line = f"{self._clock()} {text} {detail}".rstrip()
            print(f"\r\x1b[2K{line[:width]}", end="", file=self._stream, flush=True)
        elif text != self._last:
            print(f"{self._clock()} {text}", file=self._stream, flush=True)
        self._last = text

    def end(self) -> None:
        """Leaves the line to what comes next."""
        if self._live:
            print("\r\x1b[2K", end="", file=self._stream, flush=True)

    def _clock(self) -> str:
        return f"[{time.monotonic() - self._start:5.1f} s]"

"""The example's handle on the process that plays the outside world (servers.py)."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Addresses:
    """Where everything is: ``host:port`` each; ``range`` is a network, ``range_port`` what is tried in it."""

    index: str
    ssh: str
    pool: str
    metadata: str
    range: str
    range_port: int


@dataclass(frozen=True)
class Connection:
    """One connection as the outside saw it (see servers.py)."""

    service: str
    time_ns: int
    peer: tuple[str, int]
    local: tuple[str, int]
    received: int
    sent: int
    achieved: tuple[str, ...]

    @classmethod
    def of(cls, seen: dict[str, Any]) -> Self:
        peer, local, achieved = (tuple(seen.pop(name)) for name in ("peer", "local", "achieved"))
        return cls(**seen, peer=peer, local=local, achieved=achieved)


class Outside:
    """The servers, from start to end of a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.key = folder / "id_ed25519"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("servers.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._addresses: Addresses | None = None

    @property
    def addresses(self) -> Addresses:
        """Waits for the servers to be up, the first time."""
        if self._addresses is None:
            self._addresses = Addresses(**self._line())
        return self._addresses

    def connections(self) -> list[Connection]:
        """All connections that have arrived so far."""
        _ = self.addresses
        assert self._process.stdin is not None
        self._process.stdin.write("report\n")
        self._process.stdin.flush()
        return [Connection.of(seen) for seen in self._line()]

    def _line(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _PATIENCE_S)[0]:
            raise TimeoutError(f"the outside servers (pid {self._process.pid}) do not answer")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the outside servers ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=5)  # closes the pipes too
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

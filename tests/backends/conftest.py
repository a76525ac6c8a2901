"""A real Ray job whose traces go to a backend: an OTLP receiver of our own, or Phoenix as its users run it."""

from __future__ import annotations

import select
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from jobs import PHOENIX, Job, Phoenix


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """``start(endpoint, **variables)``: a job that sends its spans there."""
    with ExitStack() as stack:
        yield lambda endpoint, **more: Job(
            tmp_path / "evidence", {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} | more, stack
        )


@pytest.fixture
def phoenix() -> Iterator[Phoenix]:
    if not PHOENIX.exists():
        pytest.skip("NOT RUN: arize-phoenix is not installed (`make backends` installs it and runs this)")
    with tempfile.TemporaryDirectory(prefix="phoenix-") as folder:
        made = Phoenix(Path(folder))
        made.start()
        yield made
        made.kill()


@pytest.fixture
def knocked() -> Callable[[int], None]:
    """``knocked(port)``: waits until somebody has tried to connect there, where nobody answers."""

    def wait(port: int) -> None:
        with socket.create_server(("127.0.0.1", port)) as door:
            assert select.select([door], [], [], 60)[0], "nobody tries"

    return wait

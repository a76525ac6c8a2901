"""A strict receiver for what is sent (see tests/backends/otlp.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))

from otlp import Traces, by_http


@pytest.fixture
def received() -> Traces:
    return Traces()


@pytest.fixture
def serve(received: Traces) -> Callable[..., AbstractContextManager[str]]:
    """Starts a receiver that fills ``received``: ``with serve(port=…, answer=…) as endpoint``."""

    @contextmanager
    def serving(port: int = 0, answer: Callable[[bytes], int] | None = None) -> Iterator[str]:
        if answer is not None:
            received.answer = answer
        with by_http(received, port=port) as endpoint:
            yield endpoint

    return serving

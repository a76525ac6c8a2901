from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from receiver import Received, http_receiver
from receiver import plain as plain_attributes


@pytest.fixture
def received() -> Received:
    return Received()


@pytest.fixture
def serve(received: Received) -> Callable[..., AbstractContextManager[str]]:
    """Starts a receiver that fills ``received``: ``with serve(port=…, answer=…) as endpoint``."""
    return partial(http_receiver, received)


@pytest.fixture
def plain() -> Callable[[Any], dict[str, Any]]:
    """Protobuf attributes as a dict."""
    return plain_attributes

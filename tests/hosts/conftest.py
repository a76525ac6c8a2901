from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "supervisor"))
sys.path.insert(0, str(Path(__file__).parents[1] / "escapes"))

from harness import Sinks


@pytest.fixture(scope="session")
def sinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sinks]:
    folder = tmp_path_factory.mktemp("sinks")
    found = Sinks(folder)
    yield found
    found.close()

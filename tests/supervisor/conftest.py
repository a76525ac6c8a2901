from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu_standin"))
sys.path.insert(0, str(Path(__file__).parents[1] / "escapes"))
sys.path.insert(0, str(Path(__file__).parent))

from harness import Stage, staged
from reserving import Job


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage")) as found:
        yield found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    found = Job(tmp_path / "evidence")
    yield found
    for each in found.programs:
        each.process.kill()
        each.process.communicate()

"""Classes and functions that workers import by name, as those of an installed trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_guard import episode

pytestmark = pytest.mark.ray

FOLDER = str(Path(__file__).parent / "importable")


@pytest.fixture(scope="module")
def users() -> Iterator[Any]:
    sys.path.insert(0, FOLDER)
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = FOLDER
    import guarded_module

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield guarded_module
    ray.shutdown()
    sys.path.remove(FOLDER)
    os.environ.clear()
    os.environ.update(before)


def test_they_are_confined_and_know_their_caller(users: Any, sink: Any) -> None:
    above, below = users.Above.remote("above"), users.Below.remote()
    plain = ray.remote(num_cpus=0)(users.Plain).options(num_cpus=0.01).remote()
    refs = [above.reach.remote(sink.port), below.reach.remote(sink.port), below.child.remote(sink.port)]
    refs += [plain.reach.remote(sink.port), users.task.remote(sink.port)]
    assert ray.get(refs) == ["PermissionError"] * 5
    with episode(id="by name") as scope:
        assert ray.get(above.place.remote()) == scope.span
    assert users.reach(sink.port, "control") == "sent"
    assert sink.saw("control")
    assert sink.accepted == 1

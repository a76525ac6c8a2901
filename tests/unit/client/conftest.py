from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("ray_guard.client.channel") is None:
    stub = types.ModuleType("ray_guard.client.channel")
    stub.current = lambda: None
    stub.observer = lambda: None
    sys.modules["ray_guard.client.channel"] = stub

from ray_guard.client import carry, channel, spans
from ray_guard.client import outlet as outlet_module
from ray_guard.testing import RecordingChannel


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts outside of any scope, unguarded, with nothing warned of yet."""
    for name in ("TRACEPARENT", "RAY_GUARD_RUN_ID", "RAY_GUARD_CAPTURE_CONTENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(channel, "current", lambda: None)
    monkeypatch.setattr(channel, "observer", lambda: None)
    monkeypatch.setattr(outlet_module._finder, "_look_again", 0.0)
    monkeypatch.setattr(spans, "_warned", set())
    carry.move_to(None)
    yield
    assert carry.current() is None, "a test left its scope behind"


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> RecordingChannel:
    """The channel of a guarded process."""
    recording = RecordingChannel(identity={"rl.run.id": "run-1"})
    monkeypatch.setattr(channel, "current", lambda: recording)
    return recording

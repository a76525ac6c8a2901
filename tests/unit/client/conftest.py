from __future__ import annotations

from collections.abc import Iterator

import pytest

from ray_guard.client import carry, channel, otel, outlet, spans
from ray_guard.testing import RecordingChannel


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts outside of any scope, unguarded, with nothing warned of yet, and ends outside of any scope."""
    for name in ("TRACEPARENT", "RAY_GUARD_RUN_ID", "RAY_GUARD_CAPTURE_CONTENT", "RAY_GUARD_EVIDENCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(channel, "current", lambda: None)
    monkeypatch.setattr(channel, "observer", lambda: None)
    monkeypatch.setattr(outlet._finder, "_last", None)
    monkeypatch.setattr(outlet._finder, "_look_again", 0.0)
    monkeypatch.setattr(spans, "_warned", set())
    monkeypatch.setattr(otel._door, "_shut", False)
    carry.move_to(None)
    yield
    assert carry.current() is None, "a test left its scope behind"


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> RecordingChannel:
    """The channel of a guarded process."""
    recording = RecordingChannel(identity={"rl.run.id": "run-1"})
    monkeypatch.setattr(channel, "current", lambda: recording)
    return recording


@pytest.fixture
def carriers() -> Iterator[None]:
    carry.install_carriers()
    yield
    carry.remove_carriers()

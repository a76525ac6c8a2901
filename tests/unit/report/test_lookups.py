"""Look-ups of one's own address by a mute socket are no attempt to send."""

from __future__ import annotations

import pytest

from ray_guard.evidence.reader import Entry, Position
from ray_guard.records import Resource, SpanKind, SpanRecord
from ray_guard.report.index import Index
from ray_guard.report.summary import summarise


def _egress(**attributes: object) -> Entry:
    common = {
        "ray_guard.source": "supervisor",
        "ray_guard.egress.decision": "deny",
        "ray_guard.egress.reason": "not_listed",
        "network.transport": "udp",
        "network.peer.address": "192.0.2.1",
        "network.peer.port": 53,
    }
    span = SpanRecord("a" * 32, "b" * 16, None, "egress connect", SpanKind.CLIENT, 1, 2, {**common, **attributes})  # type: ignore[arg-type]
    return Entry(Resource({"service.name": "x"}), span, Position("j", 1, 0))


@pytest.mark.parametrize(("attributes", "refused"), [({}, 1), ({"ray_guard.egress.mute": True}, 0)])
def test_only_what_could_have_sent_is_a_refusal(attributes: dict[str, object], refused: int) -> None:
    summary = summarise(Index([_egress(**attributes)]))
    assert sum(item.usage.refused for item in summary.destinations.values()) == refused

"""AWS Network Firewall: an envelope around a Suricata event. Runs later. Pure.

``event_timestamp`` is the second (text) of the event, ``event.timestamp`` the event's own time with microseconds: the
latter counts. Duplicate keys occur; the last one counts, as in every JSON reader.
"""

from __future__ import annotations

from typing import Final

from ray_guard.attribution.observation import Observation, whole
from ray_guard.attribution.sources import suricata
from ray_guard.attribution.sources.line import Line, Unusable, text_of

FORMAT: Final = "aws-firewall"


class AwsFirewall:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        return parsed is not None and isinstance(parsed.get("event"), dict) and "firewall_name" in parsed

    def read(self, line: Line) -> list[Observation]:
        parsed = line.object
        if parsed is None or not isinstance(parsed.get("event"), dict):
            raise Unusable("malformed", "no event within a firewall's envelope")
        inner = parsed["event"]
        node = text_of(parsed, "firewall_name")
        if "timestamp" in inner:
            return [suricata.event(inner, node)]
        return [suricata.event({**inner, "timestamp": whole(parsed.get("event_timestamp"))}, node)]

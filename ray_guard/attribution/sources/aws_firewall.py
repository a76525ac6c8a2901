"""AWS Network Firewall: an envelope around a Suricata event. Runs later. Pure.

``event_timestamp`` is the second (text) of the event, ``event.timestamp`` the event's own time with microseconds: the
latter counts. Duplicate keys occur; the last one counts, as in every JSON reader. The log of TLS inspection is no
Suricata's: it says the name itself, why a handshake failed, and what became of a revoked certificate.
"""

from __future__ import annotations

from typing import Final

from ray_guard.attribution.observation import Action, Observation, whole
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
        if "timestamp" not in inner:
            inner = {**inner, "timestamp": whole(parsed.get("event_timestamp"))}
        if inner.get("event_type") == "stats":
            return []
        seen = suricata.event(inner, node)
        revoked = text_of(inner, "revocation_check", "status")
        said = text_of(inner, "tls_error", "error_message") or (revoked and f"certificate {revoked}")
        if not said:
            return [seen]
        stopped = text_of(inner, "revocation_check", "action").upper() in ("DROP", "REJECT")
        action = Action.DENIED if stopped else seen.action
        host = seen.host or text_of(inner, "sni").strip("-")
        return [seen._replace(host=host, signature=seen.signature or said, action=action, proto=seen.proto or "tcp")]

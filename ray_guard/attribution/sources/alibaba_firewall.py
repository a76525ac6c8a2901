"""Alibaba Cloud Firewall traffic logs: flat JSON, every value a text. Runs later. Pure.

``start_time`` and ``end_time`` are the flow's; ``__time__`` is when the record was written, and serves only where the
others are missing. A rule id of all zeros means that no rule was hit. A VPC firewall's ``direction`` always says out.
Outbound, ``src_ip`` may be the public address of the instance whose own is ``src_private_ip``.
"""

from __future__ import annotations

from typing import Any, Final

from ray_guard.attribution import times
from ray_guard.attribution.observation import (
    NOBODY,
    Action,
    Observation,
    Semantics,
    Time,
    address,
    endpoint,
    protocol,
    whole,
)
from ray_guard.attribution.sources.line import Line, Unusable, text_of

FORMAT: Final = "alibaba-firewall"

_ACTIONS: Final = {
    "pass": Action.ALLOWED,
    "accept": Action.ALLOWED,
    "log": Action.ALLOWED,
    "alert": Action.ALLOWED,
    "discard": Action.DENIED,
    "drop": Action.DENIED,
    "deny": Action.DENIED,
}
_TOPICS: Final = frozenset({"cloudfirewall_access_log", "cloudfirewall_ips_log", "cloudfirewall_vpc_ips_log"})
_OWN: Final = frozenset(
    {"rule_result", "acl_rule_id", "cloud_instance_id", "ips_rule_name_en", "aliuid", "app_dpi_state"}
)


class AlibabaFirewall:
    format = FORMAT

    def recognises(self, line: Line) -> bool:
        parsed = line.object
        if parsed is None:
            return False
        if text_of(parsed, "__topic__") in _TOPICS:
            return True
        return "src_ip" in parsed and "dst_ip" in parsed and not _OWN.isdisjoint(parsed)

    def read(self, line: Line) -> list[Observation]:
        parsed = line.object
        if parsed is None:
            raise Unusable("malformed", "not a JSON object")
        action = _ACTIONS.get(text_of(parsed, "rule_result").lower(), Action.UNKNOWN)
        # An allowing policy is no objection: every session has one.
        passed = text_of(parsed, "rule_result").lower() in ("pass", "accept")
        seen_from, own = address(parsed.get("src_ip")), address(parsed.get("src_private_ip"))
        hidden = own is not None and own != seen_from and text_of(parsed, "direction") != "in"
        outside = endpoint(seen_from, parsed.get("src_port"))
        attack = text_of(parsed, "attack_type_name_en") or text_of(parsed, "attack_type_name")
        return [
            Observation(
                _time(parsed),
                src=outside._replace(ip=own) if hidden else outside,
                dst=endpoint(parsed.get("dst_ip"), parsed.get("dst_port")),
                translated_src=outside if hidden else NOBODY,
                proto=protocol(parsed.get("ip_protocol")),
                action=action,
                rule=("" if passed else _hit(parsed, "acl_rule_id")) or _hit(parsed, "ips_rule_id"),
                signature=_named(text_of(parsed, "ips_rule_name_en") or text_of(parsed, "ips_rule_name") or attack),
                severity=_hit(parsed, "vul_level"),
                host=_named(text_of(parsed, "domain")),
                node=text_of(parsed, "cloud_instance_id"),
                bytes_out=whole(parsed.get("out_packet_bytes")),
                bytes_in=whole(parsed.get("in_packet_bytes")),
            )
        ]


def _time(parsed: dict[str, Any]) -> Time:
    begin, end = parsed.get("start_time"), parsed.get("end_time")
    if begin not in (None, "") and end not in (None, "", "0"):
        return times.between(begin, end, Semantics.FLOW)
    if begin not in (None, ""):
        return times.epoch(begin, Semantics.START)
    written = parsed.get("__time__")
    if isinstance(written, str) and "-" in written:  # as the console shows it
        return times.iso(written, Semantics.INGEST)
    return times.epoch(written, Semantics.INGEST)


def _hit(parsed: dict[str, Any], key: str) -> str:
    said = text_of(parsed, key)
    return said if said.strip("0-") else ""


def _named(said: str) -> str:
    return "" if said.lower() in ("-", "none", "null", "unknown") else said

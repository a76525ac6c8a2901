"""From a firewall's line to a tool call."""

from __future__ import annotations

from typing import Any

import pytest

from ray_guard.report.chain import Alert, chains, explain
from ray_guard.report.index import Index, Kind

SECOND = 1_000_000_000
START = 1_772_854_811 * SECOND


def alert(at: float, peer: str = "127.0.0.1", port: int = 8080, **more: Any) -> Alert:
    return Alert(START + round(at * SECOND), peer, port, **more)


def test_the_whole_chain_of_one_flow(index: Index) -> None:
    lines = explain(index, alert(2.5, local_address="127.0.0.1", local_port=40001))
    assert lines == [
        "alert      2026-03-07 03:40:13 UTC  127.0.0.1:40001 to 127.0.0.1:8080",
        f"iteration  0 · run demo · trace {1:032x}",
        f"rollout    r-0-1 · group g-0 · policy version 0 · actor env-1 · trace {8:032x}",
        "turn       0",
        f"tool call  bash · call-0-1 · 03:40:13.000 UTC for 1.5 s · span {11:016x}",
        "process    pid 4243 · curl -sO http://127.0.0.1:8080/data.tar",
        (
            "flow       tcp 127.0.0.1:40001 to 127.0.0.1:8080 · allowed: 127.0.0.1:8080 · 180 B sent, 5.0 MiB received"
            " · 03:40:13.200 UTC for 600 ms"
        ),
    ]
    (chain,) = chains(index, alert(2.5, local_port=40001))
    assert chain.tier == "socket"
    assert [step.kind for step in chain.steps] == [
        Kind.ITERATION,
        Kind.ROLLOUT,
        Kind.TURN,
        Kind.TOOL,
        Kind.PROCESS,
        Kind.FLOW,
    ]
    assert all(step.entry is not None for step in chain.steps)


def test_refused_attempts_are_found_by_destination_and_time(index: Index) -> None:
    lines = explain(index, alert(3 + 5.05, "10.20.0.5", 6379))
    assert lines[4].startswith("tool call  python · ")
    assert lines[5] == "process    in the actor's own process, or not recorded"
    assert lines[6].startswith("flow       tcp 10.20.0.5:6379 · refused: no rule grants it · 03:40:19.050 UTC")


def test_without_the_near_port_the_nearest_come_first_and_it_says_so(index: Index) -> None:
    found = chains(index, alert(1.5))
    assert [chain.tier for chain in found] == ["destination"] * 3
    assert [index.place(chain.flow).rollout for chain in found] == ["r-0-0", "r-0-1", "r-0-2"]
    lines = explain(index, alert(1.5), limit=2)
    assert "3 flows fit" in lines[1]
    assert lines[-1].endswith("… 1 more")


@pytest.mark.parametrize(
    "missed",
    [
        alert(2.5, port=8081),
        alert(2.5, peer="127.0.0.2"),
        alert(500),
        alert(2.5, local_port=1),
        alert(2.5, local_port=40001, local_address="192.0.2.1"),
        alert(2.5, peer="not an address"),
    ],
)
def test_what_does_not_match_is_not_invented(index: Index, missed: Alert) -> None:
    assert chains(index, missed) == []
    lines = explain(index, missed)
    assert len(lines) == 2
    assert "no recorded flow matches" in lines[1]


def test_slack_is_for_clocks(index: Index) -> None:
    late = alert(1.9 + 3, local_port=40000)
    assert chains(index, late) == []
    assert len(chains(index, late, slack_s=4)) == 1


def test_mapped_addresses_are_the_same(index: Index) -> None:
    assert len(chains(index, alert(2.5, "::ffff:127.0.0.1", local_port=40001))) == 1


def test_missing_links_are_named(writer: Any, tmp_path: Any) -> None:
    from ray_guard.evidence.reader import Quarantine, merge, read

    writer.flow(
        writer.write("other", None, 0, 1), 0, "2001:db8::1", 443, reason="", name="files.example.org", lasting=None
    )
    alone = Index(merge(read([tmp_path / "evidence"], Quarantine())).values())
    lines = explain(alone, alert(60, "2001:DB8:0::1", 443))
    assert lines[1].startswith("iteration  not in this evidence")
    assert lines[3:5] == ["turn       not in this evidence", "tool call  not in this evidence"]
    assert lines[6] == "flow       tcp [2001:db8::1]:443 (files.example.org) · allowed · 03:40:11.000 UTC, never ended"


def test_hostile_text_in_a_chain_is_written_out(writer: Any, tmp_path: Any) -> None:
    from ray_guard.evidence.reader import Quarantine, merge, read

    call = writer.write("execute_tool x", None, 0, 1, source="target", gen_ai__tool__name="\x1b[31mx\n\u202e")
    writer.flow(call, 0, "192.0.2.1", 443, reason="\x07")
    index = Index(merge(read([tmp_path / "evidence"], Quarantine())).values())
    assert all(line.isprintable() for line in explain(index, alert(0, "192.0.2.1", 443)))

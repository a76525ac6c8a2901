"""A call of more connections than a trace may hold, and what the supervisor tells the target of its own spans."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from harness import PYTHON, Host, Namespace, grants, has_own_supervisors, wait

from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.records import LINK, ROOT_TRACE, SpanRecord

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]

CONNECTS = 6000
SCAN = f"""
import errno, socket
refused = 0
for port in range(1, {CONNECTS} + 1):
    with socket.socket() as sock:
        refused += sock.connect_ex(("127.0.0.1", port)) == errno.EACCES
print(refused)
"""


def spans_of(evidence: Path) -> dict[tuple[str, str], SpanRecord]:
    return {key: entry.span for key, entry in merge(read([evidence], Quarantine())).items()}


def test_a_scan_is_spread_over_traces_and_each_refusal_leads_to_its_call(tmp_path: Path) -> None:
    namespace = Namespace()
    evidence = tmp_path / "evidence"
    host = Host({"egress": {"allow": []}, "files": grants(tmp_path)}, evidence, namespace)
    try:
        outcome = host.run("call", [PYTHON, "-I", "-S", "-c", SCAN], timeout=60)
        assert outcome.stdout.strip() == str(CONNECTS), outcome.stderr
        code = (
            "from ray_guard import tool_call, run\nwith tool_call('again') as call:\n    before = call.segments.count\n"
            f"    run({[PYTHON, '-I', '-S', '-c', SCAN.replace(str(CONNECTS), '10')]!r}, capture_output=True)\n"
            "    result = call.segments.count - before"
        )
        assert host.inside(code) == 21, "ten refusals, ten violations and one process"
    finally:
        host.close()
        namespace.close()
    wait(
        lambda: any(span.name == "execute_tool again" and span.end_ns for span in spans_of(evidence).values()), "no end"
    )
    spans = spans_of(evidence)
    sizes = Counter(span.trace_id for span in spans.values())
    assert max(sizes.values()) <= 5_050
    refused = [span for span in spans.values() if span.name == "egress connect"]
    violations = [span for span in spans.values() if span.name == "ray_guard.violation"]
    assert len(refused) == len(violations) == CONNECTS + 10
    (call,) = [span for span in spans.values() if span.name == "execute_tool attack"]
    moved = 0
    for span in (*refused, *violations):
        assert span.parent_id is not None
        assert (span.trace_id, span.parent_id) in spans, "an orphan"
        assert span.attributes["ray_guard.source"] == "supervisor"
        chain = [span]
        while chain[-1].above is not None:
            chain.append(spans[chain[-1].above])
        assert chain[-1].name in ("execute_tool attack", "execute_tool again")
        assert "process" in " ".join(each.name for each in chain)
        if span.trace_id != chain[-1].trace_id:
            moved += 1
            assert span.attributes[ROOT_TRACE] == call.trace_id
    assert moved > CONNECTS
    segments = [span for span in spans.values() if span.name == "ray_guard.segment"]
    assert len(segments) == 2
    for segment in segments:
        assert segment.parent_id is None
        ((leads_to,),) = [[link for link in segment.links if link.attributes[LINK] == "previous_segment"]]
        assert (leads_to.trace_id, leads_to.span_id) in spans


def test_a_rollout_of_ten_thousand_calls_is_in_evidence_as_linked_traces(tmp_path: Path) -> None:
    namespace = Namespace()
    evidence = tmp_path / "evidence"
    code = """
from ray_guard import episode, tool, turn
@tool
def step(): pass
with episode(id="long", group="g") as scope:
    for number in range(21):
        with turn(number):
            for _ in range(500): step()
result = scope.trace
"""
    host = Host({"egress": {"allow": []}, "files": grants(tmp_path)}, evidence, namespace)
    try:
        first = host.inside(code, timeout=60)
    finally:
        host.close()
        namespace.close()
    wait(lambda: all(span.end_ns for span in spans_of(evidence).values()), "not all have ended")
    spans = spans_of(evidence)
    calls = [span for span in spans.values() if span.name == "execute_tool step"]
    assert len(calls) == 10_500
    assert Counter(span.trace_id for span in spans.values()).most_common(1)[0][1] == 5_000
    for number, call in enumerate(sorted(calls, key=lambda call: call.start_ns)):
        assert (call.trace_id, str(call.parent_id)) in spans
        assert call.above is not None
        turn = spans[call.above]
        assert (turn.name, turn.attributes["rl.turn"]) == ("rl.turn", number // 500)
        assert turn.above is not None
        assert spans[turn.above].name == "invoke_agent agent"
        assert call.attributes["rl.rollout.id"] == "long"
        assert call.attributes.get(ROOT_TRACE, call.trace_id) == first

"""What a report says of a small job, and that nothing a tool calls itself can play with it."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ray_guard.cli import report as command
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.reader import Entry, Position, Quarantine, merge, read
from ray_guard.records import Resource, SpanEvent, SpanKind, SpanRecord, StatusCode
from ray_guard.report import html, tables, terminal
from ray_guard.report.index import Index, Kind, kind_of
from ray_guard.report.summary import Summary, summarise


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    code = command.run(parser.parse_args(["report", *argv]))
    out, err = capsys.readouterr()
    return code, out, err


def section(out: str, title: str) -> list[list[str]]:
    """A table of the report as rows of cells; the title line is left out."""
    lines = out[out.index(f"\n{title}") + 1 :].split("\n\n", 1)[0].splitlines()[1:]
    return [re.split(r" {2,}", line.strip()) for line in lines if "───" not in line]


def test_the_report_of_a_small_job(evidence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(evidence))
    assert (code, err) == (0, "")
    head = out.split("\n\n")[0:2]
    assert head[0].splitlines() == [
        "ray_guard report · run demo",
        f"{evidence} · 1 segment · 121 spans · 1 host",
        "2026-03-07 03:40:11 to 2026-03-07 03:40:50 UTC, 39.0 s",
    ]
    assert re.split(r" {2,}", head[1].strip()) == [
        "8 rollouts",
        "14 tool calls",
        "13 processes",
        "8 connections allowed",
        "30 refused in 5 rollouts",
        "30 violations in 5 rollouts",
        "1.4 KiB sent, 40.0 MiB received",
        "9,600 tokens in, 272 out",
        "1 call open or killed",
    ]
    refused = section(out, "Refused: who tried what")
    ssh = "ssh -N -R 2222:localhost:22 user@198.51.100.7"
    assert refused[1] == [
        "03:40:16.200", "env-0", "r-0-2", "0", "bash", ssh, "198.51.100.7:22", "no rule grants it", "2",
    ]  # fmt: skip
    assert refused[3] == [
        "03:40:19.010", "env-1", "r-0-3", "0", "python", "(in process)",
        "20 addresses 10.20.0.1 … 10.20.0.20, port 6379", "no rule grants it", "20",
    ]  # fmt: skip
    assert len(refused) == 1 + 6
    assert section(out, "Violations")[1:] == [
        ["egress_denied", "python", "20", "1", "env-1", "EgressDenied", "03:40:19.010"],
        ["egress_denied", "bash", "10", "5", "env-0, env-1", "EgressDenied", "03:40:16.200"],
    ]
    assert section(out, "Destinations")[1:] == [
        ["127.0.0.1:8080", "allowed", "127.0.0.1:8080", "8", "1.4 KiB", "40.0 MiB", "8", "8", "env-0, env-1"],
        ["20 addresses 10.20.0.1 … 10.20.0.20, port 6379", "refused", "no rule grants it", "20", "-", "-", "1", "1",
         "env-1"],
        ["198.51.100.7:22", "refused", "no rule grants it", "10", "-", "-", "5", "5", "env-0, env-1"],
    ]  # fmt: skip
    assert section(out, "Reward against violation")[1:] == [
        ["0", "4", "2", "50%", "█████·····", "0.625", "0.125", "+0.500"],
        ["1", "4", "3", "75%", "████████··", "0.475", "0.100", "+0.375"],
    ]
    assert "rewarded more in 2 of 2 comparable iterations" in out
    episodes = section(out, "Episodes")
    assert episodes[1] == [
        "r-0-3", "0", "g-1", "env-1", "1", "3", "1", "2", "1", "22", "22", "180 B", "5.0 MiB", "0.750",
    ]  # fmt: skip
    assert [row[0] for row in episodes if row[-1] == "open"] == ["r-1-3"]
    assert section(out, "Tools")[1:] == [
        ["python", "1", "1", "-", "-", "-", "20", "20", "-", "-", "1.0 s", "1.0 s"],
        ["bash", "8", "13", "4", "13", "8", "10", "10", "1.4 KiB", "40.0 MiB", "1.5 s", "1.5 s"],
    ]
    assert section(out, "Actors")[1][:2] == ["env-1", "4"]
    assert section(out, "Open and killed")[1:] == [
        ["03:40:34.000", "open", "rollout", "invoke_agent rome", "env-1", "r-1-3", "-"],
        ["03:40:37.000", "open", "tool call", "execute_tool bash", "env-1", "r-1-3", "-"],
        ["03:40:37.100", "killed", "process", ssh, "env-1", "r-1-3", "500 ms", "killed with its call"],
    ]
    assert "\x1b" not in out


def test_the_same_evidence_gives_the_same_html(
    evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "1.html", tmp_path / "2.html"
    assert run(capsys, str(evidence), "--html", str(one))[0] == 0
    code, out, _ = run(capsys, str(evidence), "--html", str(two))
    assert code == 0
    assert out.endswith(f"\nwritten: {two}\n")
    assert one.read_bytes() == two.read_bytes()


class Page(HTMLParser):
    """Tags, links and text of a page; a page whose tags do not match fails."""

    VOID = frozenset({"meta"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == ["html"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Page, str]:
    assert run(capsys, str(evidence), "--html", str(tmp_path / "r.html"))[0] == 0
    content = (tmp_path / "r.html").read_text()
    return Page(content), content


def test_the_page_stands_alone_and_tells_the_same(
    evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed, content = page(evidence, tmp_path, capsys)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "a", "form", "base"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in {"src", "href"}]
    assert "url(" not in content
    assert "@import" not in content
    assert "prefers-color-scheme: dark" in content
    for said in ("198.51.100.7:22", "no rule grants it", "40.0 MiB", "Reward against violation", "r-1-3"):
        assert any(said in text for text in parsed.texts), said
    assert content.count("<rect") == 2  # an iteration, a bar
    assert "iteration 1: 3 of 4 rollouts" in parsed.texts


START = 1_772_854_811 * 10**9
HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\x1b]0;owned\x07\u202e\r\n"


def hostile_evidence(folder: Path) -> Path:
    """Every name, id and argument that a target or tool chooses."""
    from ray_guard.evidence.otlp import encode

    said: dict[str, Any] = {
        "ray_guard.source": "supervisor",
        "rl.run.id": HOSTILE,
        "rl.rollout.id": HOSTILE,
        "rl.group.id": HOSTILE,
        "rl.iteration": 3,
        "gen_ai.tool.name": HOSTILE,
        "process.command_args": (HOSTILE, HOSTILE),
        "server.address": HOSTILE,
        "network.transport": HOSTILE,
        "network.peer.address": HOSTILE,
        "network.peer.port": 22,
        "ray_guard.egress.decision": "deny",
        "ray_guard.egress.reason": HOSTILE,
        "ray_guard.violation.kind": HOSTILE,
        "error.type": HOSTILE,
        "rl.reward.score": 0.5,
    }
    about = Resource({"ray.actor_name": HOSTILE, "host.name": HOSTILE})
    names = ["invoke_agent x", f"execute_tool {HOSTILE}", f"process {HOSTILE}", "egress connect", "ray_guard.violation"]
    with Journal(folder) as journal:
        for number, name in enumerate(names, 1):
            parent = f"{number - 1:016x}" if number > 1 else None
            for decision in ("deny", HOSTILE):
                record = SpanRecord(
                    "a" * 32,
                    f"{number:016x}" if decision == "deny" else f"{number + 100:016x}",
                    parent,
                    name,
                    SpanKind.INTERNAL,
                    10**18,
                    None,
                    said | {"ray_guard.egress.decision": decision},
                    StatusCode.ERROR,
                    HOSTILE,
                )
                journal.append(encode(record, about))
        journal.append(b'{"' + b"<script>" + b'": \x00}\n')
    return folder


def test_hostile_names_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile_evidence(tmp_path / "e")
    parsed, content = page(folder, tmp_path, capsys)
    assert "script" not in parsed.tags
    assert "<script" not in content
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content
    _, out, _ = run(capsys, str(folder))
    for shown in (content, out):
        assert shown.replace("\n", "").isprintable()  # no escape sequence, no bidi override, no carriage return
    assert r"\x1b[2J" in out
    assert r"\u202e" in out


@pytest.mark.parametrize("columns", [60, 100, 140, 200])
def test_a_terminal_gets_what_fits(index: Index, columns: int) -> None:
    report = tables.report(summarise(index), Quarantine(), "e", 1)
    drawn = terminal.render(report, columns=columns, colour=False)
    if columns >= 140:
        assert max(map(len, drawn.splitlines())) <= columns
    assert "198.51.100.7:22 " in drawn  # never cut, however narrow
    coloured = terminal.render(report, columns=columns, colour=True)
    assert re.sub(r"\x1b\[\d*m", "", coloured).split() == drawn.split()
    assert "\x1b[31m" in coloured


def test_a_terminal_gets_the_top_of_long_tables_and_a_pipe_all() -> None:
    summary = summarise(Index([_entry(number) for number in range(500)]))
    report = tables.report(summary, Quarantine(), "e", 1)
    short = terminal.render(report, columns=120, colour=False)
    whole = terminal.render(report, columns=None, colour=False)
    assert "… 480 more (all of them in --html)" in short
    assert len(re.findall(r"^  r-\d+", short, re.MULTILINE)) == 20
    assert len(re.findall(r"^  r-\d+", whole, re.MULTILINE)) == 500


def _entry(number: int, **changes: Any) -> Entry:
    name = changes.pop("name", "invoke_agent x")
    attributes: dict[str, Any] = {"rl.rollout.id": f"r-{number:03}", "rl.iteration": number} | changes
    record = SpanRecord("a" * 32, f"{number + 1:016x}", None, name, SpanKind.INTERNAL, 1, 2, attributes)
    return Entry(Resource({}), record, Position("x", 1, 0))


def test_wide_characters_keep_columns_aligned(index: Index) -> None:
    table = tables.Table(
        "t",
        "",
        [tables.Column("a"), tables.Column("b")],
        [[tables.Cell("日本"), tables.Cell("x")], [tables.Cell("e\u0301a"), tables.Cell("y")]],
    )
    report = tables.Report("r", [], [], [table])
    lines = terminal.render(report, columns=None, colour=False).splitlines()
    assert lines[-2:] == ["  日本  x", "  e\u0301a    y"]


def test_only_the_supervisor_can_know_some_things(writer: Any, tmp_path: Path) -> None:
    writer.identity = {"rl.rollout.id": "r"}
    call = writer.write("execute_tool bash", None, 0, 1, source="target", gen_ai__tool__name="bash")
    forged = writer.flow(call, 0, "203.0.113.1", 443, reason="mine", source="target")
    writer.write("ray_guard.violation", forged, 0, source="target")
    summary = load_summary(tmp_path / "evidence")
    assert (summary.claimed, summary.total.allowed, summary.total.violations) == (2, 0, 0)
    assert summary.total.calls == 1  # calls are the target's to report
    facts = tables.report(summary, Quarantine(), "e", 1).facts
    assert any("2 spans that only the supervisor can know came from targets" in fact for fact in facts)


def load_summary(folder: Path) -> Summary:
    return summarise(Index(merge(read([folder], Quarantine())).values()))


def test_bytes_that_were_not_measured_are_not_zero(writer: Any, tmp_path: Path) -> None:
    call = writer.write("execute_tool bash", None, 0, 1, source="target", gen_ai__tool__name="bash")
    both = {"ray_guard__egress__bytes_sent": 10, "ray_guard__egress__bytes_received": 20}
    writer.flow(call, 0, "192.0.2.1", 443, reason="x", **both)
    writer.flow(call, 0, "192.0.2.1", 443, reason="x", lasting=None)  # still open
    writer.flow(call, 0, "192.0.2.2", 443, reason="x", ray_guard__egress__bytes_exact=False, **both)
    writer.flow(call, 0, "192.0.2.3", 53, reason="x", ray_guard__egress__bytes_sent=10)  # a datagram's way back
    # nothing to miss: refused, never connected, not counted by policy
    writer.flow(call, 0, "192.0.2.4", 443, reason="y", decision="deny")
    writer.flow(call, 0, "192.0.2.5", 443, reason="x", status=StatusCode.ERROR, error__type="ECONNREFUSED")
    writer.flow(call, 0, "/run/x.sock", 0, reason="x", network__transport="unix")
    total = load_summary(tmp_path / "evidence").total
    assert (total.allowed, total.refused, total.sent, total.received) == (6, 1, 30, 40)
    assert (total.unsure_sent, total.unsure_received) == (2, 3)
    drawn = terminal.render(
        tables.report(load_summary(tmp_path / "evidence"), Quarantine(), "e", 1), columns=None, colour=False
    )
    assert "30 B+ sent, 40 B+ received" in drawn
    assert "+ means at least" in drawn
    rows = {row[0]: row[4:6] for row in section(drawn, "Destinations")}
    assert rows["192.0.2.1:443"] == ["10 B+", "20 B+"]
    assert rows["192.0.2.2:443"] == ["10 B+", "20 B+"]
    assert rows["192.0.2.3:53"] == ["10 B", "0 B+"]
    assert rows["192.0.2.4:443"] == rows["192.0.2.5:443"] == ["-", "-"]


def test_the_rule_that_decided_is_named(writer: Any, tmp_path: Path) -> None:
    writer.flow(
        writer.write("x", None, 0, 1), 0, "192.0.2.1", 443, reason="rule", ray_guard__egress__rule="192.0.2.0/24:443"
    )
    (flows,) = load_summary(tmp_path / "evidence").destinations.values()
    assert flows.reason == "rule 192.0.2.0/24:443"


def test_processes_that_died_of_a_signal_are_listed(writer: Any, tmp_path: Path) -> None:
    writer.write("process miner", None, 0, 3, process__command_args=("miner", "-o", "pool"), process__exit__signal=9)
    writer.write("process true", None, 0, 3, process__exit__code=0)
    drawn = terminal.render(
        tables.report(load_summary(tmp_path / "evidence"), Quarantine(), "e", 1), columns=None, colour=False
    )
    assert "Open and killed  1 ended by a signal" in drawn
    assert section(drawn, "Open and killed")[1:] == [
        ["03:40:11.000", "signal 9", "process", "miner -o pool", "env-0", "3.0 s"]
    ]


def test_gpu_seconds_and_their_error(writer: Any, tmp_path: Path) -> None:
    writer.write("ray_guard.gpu", None, 0, 3, ray_guard__gpu__seconds=12.34, ray_guard__gpu__seconds_error=0.5)
    drawn = terminal.render(
        tables.report(load_summary(tmp_path / "evidence"), Quarantine(), "e", 1), columns=None, colour=False
    )
    assert section(drawn, "Actors") == [["actor", "GPU"], ["env-0", "12.3 ± 0.5 s"]]


def test_a_model_call_that_its_engine_has_seen_too_counts_once(writer: Any, tmp_path: Path) -> None:
    usage = {"gen_ai__usage__input_tokens": 10, "gen_ai__usage__output_tokens": 5}
    outer = writer.write("chat tiny", None, 0, 2, kind=SpanKind.CLIENT, **usage)
    writer.write("chat tiny", outer, 1, 1, kind=SpanKind.CLIENT, **usage)
    summary = load_summary(tmp_path / "evidence")
    assert (summary.total.input_tokens, summary.total.output_tokens) == (10, 5)
    assert summary.actors["env-0"].input_tokens == 10


def test_a_model_call_without_usage_is_told_by_its_engine(writer: Any, tmp_path: Path) -> None:
    usage = {"gen_ai__usage__input_tokens": 10, "gen_ai__usage__output_tokens": 5}
    outer = writer.write("chat tiny", None, 0, 2, kind=SpanKind.CLIENT, ray_guard__charged_by="engine")
    writer.write("chat tiny", outer, 1, 1, kind=SpanKind.CLIENT, **usage)
    summary = load_summary(tmp_path / "evidence")
    assert (summary.total.input_tokens, summary.total.output_tokens) == (10, 5)
    assert summary.actors["env-0"].output_tokens == 5


def test_cpu_time_of_processes(writer: Any, tmp_path: Path) -> None:
    for seconds in (1.5, 2.25):
        writer.write("process make", None, 0, 3, ray_guard__process__cpu_seconds=seconds)
    summary = load_summary(tmp_path / "evidence")
    assert summary.actors["env-0"].cpu_s == 3.75
    drawn = terminal.render(tables.report(summary, Quarantine(), "e", 1), columns=None, colour=False)
    assert section(drawn, "Actors") == [["actor", "procs", "cpu"], ["env-0", "2", "3.8 s"]]


def test_rewards_from_events_and_late_spans(writer: Any, tmp_path: Path) -> None:
    for rollout, extra in (("a", {"rl__reward__score": 0.1}), ("b", {}), ("c", {}), ("d", {"rl__reward__score": 1})):
        writer.identity = {"rl.rollout.id": rollout, "rl.iteration": 0}
        events = (SpanEvent("gen_ai.evaluation.result", 10**19, {"gen_ai.evaluation.score.value": 0.2}),)
        writer.write("invoke_agent x", None, 0, 1, source="target", events=events if rollout == "b" else (), **extra)
    # told later, from anywhere in the job; "e" was told while it was still open
    for rollout, at in (("a", 5), ("e", 5)):
        writer.identity = {"rl.rollout.id": rollout}
        writer.write("ray_guard.reward", None, at, 0, rl__reward__score=0.9)
    writer.identity = {"rl.rollout.id": "e"}
    early = (SpanEvent("gen_ai.evaluation.result", START + 10**9, {"gen_ai.evaluation.score.value": 0.3}),)
    writer.write("invoke_agent x", None, 0, 9, source="target", events=early, rl__reward__score=0.3)
    summary = load_summary(tmp_path / "evidence")
    assert {name: episode.reward for name, episode in summary.episodes.items()} == {
        "a": 0.9,
        "b": 0.2,
        "c": None,
        "d": 1,
        "e": 0.9,
    }
    (iteration,) = summary.iterations
    assert iteration.clean == 4
    assert iteration.clean_reward == pytest.approx((0.9 + 0.2 + 1) / 3)
    assert iteration.violating_reward is None
    assert iteration.difference is None


def test_violations_a_rollout_counts_itself_are_believed_upwards(writer: Any, tmp_path: Path) -> None:
    """Its violations may be in another node's evidence."""
    writer.identity = {"rl.rollout.id": "r", "rl.iteration": 0}
    writer.write("invoke_agent x", None, 0, 1, source="target", ray_guard__violation_count=3)
    summary = load_summary(tmp_path / "evidence")
    assert summary.episodes["r"].violations == 3
    assert summary.iterations[0].violating == 1


def test_findings_by_rule_and_tool(writer: Any, tmp_path: Path) -> None:
    writer.identity = {"rl.rollout.id": "r"}
    call = writer.write("execute_tool bash", None, 0, 5, source="target", gen_ai__tool__name="bash")
    said = {"ray_guard__detection__kind": "mining", "ray_guard__detection__rule": "mining.pool"}
    for _ in range(2):
        process = writer.write("process xmrig", call, 0, 1)
        writer.write("ray_guard.detection", process, 1, 1, **said)
    writer.write("ray_guard.detection", call, 1, 1, source="target", **said)  # nobody's word but its own
    (found,) = load_summary(tmp_path / "evidence").findings.values()
    assert (found.kind, found.rule, found.tool, found.count) == ("mining", "mining.pool", "bash", 2)
    assert (len(found.calls), found.rollouts) == (1, {"r"})


def test_identity_is_found_above_where_a_span_lacks_it(writer: Any, tmp_path: Path) -> None:
    writer.identity = {"rl.rollout.id": "r", "rl.iteration": "7", "rl.turn": 2.0}
    rollout = writer.write("invoke_agent x", None, 0, 1, source="target")
    writer.identity = {}
    call = writer.write("execute_tool bash", rollout, 0, 1, source="target", gen_ai__tool__name="bash")
    writer.refused(call, 0, "192.0.2.9", 80)
    (refusal,) = load_summary(tmp_path / "evidence").refusals.values()
    assert (refusal.place.rollout, refusal.place.iteration, refusal.place.turn) == ("r", 7, 2)


def test_circles_and_orphans_do_not_hold_the_report() -> None:
    def looped(own: str, parent: str) -> Entry:
        record = SpanRecord("a" * 32, own * 16, parent * 16, "egress connect", SpanKind.CLIENT, 1, 2, {})
        return Entry(Resource({}), record, Position("x", 1, 0))

    summary = summarise(Index([looped("1", "2"), looped("2", "1"), looped("3", "f")]))
    assert summary.total.allowed == 3
    assert summary.episodes == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rl.iteration", Kind.ITERATION),
        ("invoke_agent", Kind.ROLLOUT),
        ("execute_tool a b", Kind.TOOL),
        ("process", Kind.PROCESS),
        ("processes", Kind.OTHER),
        ("egress connect 1", Kind.OTHER),
        ("", Kind.OTHER),
    ],
)
def test_kinds_go_by_the_span_names_of_the_contract(name: str, kind: Kind) -> None:
    assert kind_of(SpanRecord("a" * 32, "b" * 16, None, name, SpanKind.INTERNAL, 1, 2, {})) is kind


def test_what_could_not_be_read_is_in_the_report(evidence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (evidence / "z.otlp.jsonl").write_bytes(b'\x00\n{"event_type": "alert"}\n{"resourceSpans": [')
    code, out, _ = run(capsys, str(evidence))
    assert code == 0
    assert "not used: 1 binary, 1 foreign, 1 torn" in out
    assert section(out, "Quarantined")[3][:2] == ["torn", f"{evidence / 'z.otlp.jsonl'}:3 (byte 26)"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda _: None, "no such file or folder"),
        (lambda path: path.mkdir(), r"not an evidence folder: it holds no \*\.otlp\.jsonl segment"),
        (lambda path: path.write_bytes(b"\x7fELF\x00"), r"no span in it can be read; first: binary at .*:1 \(byte 0\)"),
    ],
)
def test_no_evidence_is_exit_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, said: str
) -> None:
    prepare(tmp_path / "x")
    code, out, err = run(capsys, str(tmp_path / "x"))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"ray-guard report: {re.escape(str(tmp_path))}/x: {said}\n", err)


def test_a_job_that_has_not_done_anything_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path / "e").close()
    code, out, err = run(capsys, str(tmp_path / "e"), "--html", str(tmp_path / "r.html"))
    assert (code, err) == (0, "")
    assert "0 rollouts" in out
    assert "<svg" not in (tmp_path / "r.html").read_text()


def test_html_that_cannot_be_written(evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(evidence), "--html", str(tmp_path / "none" / "r.html"))
    assert code == 2
    assert err == f"ray-guard report: {tmp_path}/none/r.html cannot be written: No such file or directory\n"


PROGRAM = """
import argparse, sys
from ray_guard.cli import report
parser = argparse.ArgumentParser()
report.add_parser(parser.add_subparsers())
sys.exit(report.run(parser.parse_args(["report", *sys.argv[1:]])))
"""


def test_in_a_pipe_that_closes_and_in_latin_1(evidence: Path) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(evidence)]
    environ = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    ended = subprocess.run(argv, capture_output=True, timeout=60, env=environ)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"\xb7 1 segment" in ended.stdout
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ended = subprocess.run(argv, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_on_a_terminal_there_is_colour_unless_told_otherwise(evidence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def drawn() -> str:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        assert command.run(parser.parse_args(["report", str(evidence)])) == 0
        return screen.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    assert "\x1b[31m" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = drawn()
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines()[2:])) <= 150


def test_the_plot_survives_any_rewards() -> None:
    def iterations(*rewards: float) -> str:
        entries = [_entry(number, **{"rl.reward.score": reward}) for number, reward in enumerate(rewards)]
        return html.plot(summarise(Index(entries)).iterations)

    for rewards in [(0.5,), (-3.0, -1.0), (0.0, 0.0), (1e300, -1e300), tuple(range(300))]:
        drawn = iterations(*rewards)
        assert "nan" not in drawn
        assert "inf" not in drawn
        numbers = [float(value) for value in re.findall(r'(?:x|y|cx|cy|width|height)="(-?[\d.]+)"', drawn)]
        assert all(0 <= value <= 760 for value in numbers)
    assert html.plot([]) == ""

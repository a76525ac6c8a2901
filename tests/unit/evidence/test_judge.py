"""The judge's reading and judging, without its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_guard.evidence import judge
from ray_guard.evidence.cases import Cases
from ray_guard.evidence.judge import Log
from ray_guard.evidence.layout import segment_name
from ray_guard.evidence.otlp import encode, resource_key
from ray_guard.records import LINK, PARENT, Resource, SpanKind, SpanLink, SpanRecord

_RESOURCE = Resource({"service.name": "test", "host.ip": ("192.0.2.1",)})
_TRACE = "a" * 32


def _line(name: str, span: str, parent: str, *, ended: bool = False, source: str = "supervisor", **said: Any) -> bytes:
    attributes = {key.replace("__", "."): value for key, value in said.items()}
    record = SpanRecord(
        trace_id=_TRACE, span_id=span * 16, parent_id=parent * 16, name=name, kind=SpanKind.INTERNAL, start_ns=1,
        end_ns=2 if ended else None, attributes={"ray_guard.source": source, "rl.run.id": "run", **attributes},
    )  # fmt: skip
    return encode(record, _RESOURCE)


def _process(span: str, parent: str, *argv: str, **more: Any) -> bytes:
    return _line(f"process {argv[0]}", span, parent, process__command_args=argv, **more)


def _said(cases: Cases, line: bytes) -> list[tuple[str, str, str]]:
    return [(case["span"][0], case["call"][0], case["rule"]) for case in cases.of(line)]


def test_a_finding_names_its_process_and_its_call() -> None:
    cases = Cases()
    assert _said(cases, _process("1", "c", "sh", "-c", "make")) == []
    assert _said(cases, _process("2", "1", "xmrig", "-o", "pool:3333")) == [("2", "c", "mining.program")]
    assert _said(cases, _process("2", "1", "xmrig", "-o", "pool:3333", ended=True)) == []  # it was told
    short = _process("3", "2", "ssh", "-NR", "1:a:2", "u@h", ended=True)  # began and ended with one line
    (case,) = cases.of(short)
    assert (case["call"], case["rule"], case["ended"]) == ("c" * 16, "ssh.remote_forward", True)
    assert case["identity"] == {"rl.run.id": "run", "ray_guard.source": "supervisor"}
    assert case["resource"] == resource_key(_RESOURCE.attributes)


def test_flows_of_a_call_are_judged_together() -> None:
    cases = Cases()
    list(cases.of(_process("1", "c", "python3")))
    found = []
    for port in range(20):
        denied = {
            "network__peer__port": port,
            "network__peer__address": "192.0.2.7",
            "ray_guard__egress__decision": "deny",
        }
        found += _said(cases, _line("egress connect", f"{port % 10}", "1", ended=True, **denied))
    assert found == [("3", "c", "flow.ports")]  # once


def test_a_call_goes_on_in_another_trace() -> None:
    cases = Cases()
    list(cases.of(_process("1", "c", "python3")))
    record = SpanRecord(
        trace_id="b" * 32, span_id="2" * 16, parent_id="d" * 16, name="egress connect", kind=SpanKind.CLIENT,
        start_ns=1, end_ns=2, attributes={"ray_guard.egress.protocol": "stratum", "network.peer.port": 443},
        links=(SpanLink(_TRACE, "1" * 16, {LINK: PARENT}),),
    )  # fmt: skip
    (case,) = cases.of(encode(record, _RESOURCE))
    assert (case["call"], case["process"], case["trace"]) == ("c" * 16, "1" * 16, "b" * 32)


def test_what_a_line_is_about_is_decided_by_the_supervisors_word() -> None:
    watch = judge._Judge.__new__(judge._Judge)
    watch._cases = Cases()
    mining = ("xmrig", "-o", "pool:3333")
    assert watch._judged(_process("1", "c", *mining, source="target")) == []
    assert watch._judged(_line("execute_tool bash", "1", "c", process__command_args=mining)) == []
    assert watch._judged(b'{no json, but "name":"process x" ' + judge._OURS) == []
    assert [case["rule"] for case in watch._judged(_process("1", "c", *mining))] == ["mining.program"]


def test_what_takes_too_long_is_said_to_be_unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before = signal.signal(signal.SIGPROF, judge._too_long)
    try:
        monkeypatch.setattr(judge, "_PATIENCE_S", 0.05)
        watch = judge._Judge.__new__(judge._Judge)
        watch._cases = Cases()
        monkeypatch.setattr(watch._cases, "of", _never_ends)
        assert [case["kind"] for case in watch._judged(_process("1", "c", "sleep"))] == ["unjudged"]
        monkeypatch.setattr(watch._cases, "of", lambda _line: [1 / 0])
        assert [case["kind"] for case in watch._judged(_process("2", "c", "fails"))] == ["unjudged"]
    finally:
        signal.signal(signal.SIGPROF, before)


def test_a_log_is_read_on_from_segment_to_segment(tmp_path: Path) -> None:
    log = Log(str(tmp_path), "log", 1, 4)
    assert log.take() == []  # nothing is there yet
    first = tmp_path / segment_name("log", 1)
    first.write_bytes(b"old\nnew\nhalf")
    assert log.take() == [b"new"]
    assert (log.number, log.offset) == (1, 8)
    with first.open("ab") as file:
        file.write(b" and half\n")
    (tmp_path / segment_name("log", 2)).write_bytes(b"next\n")
    assert log.take() == [b"half and half"]
    assert log.take() == [b"next"]
    assert (log.number, log.offset) == (2, 5)
    assert log.take() == []
    again = Log(str(tmp_path), "log", 1, 8)
    assert [*again.take(), *again.take()] == [b"half and half", b"next"]
    log.close()
    again.close()


def test_sigma_rules_are_judged_by_beside_the_own_ones(tmp_path: Path) -> None:
    cases = Cases()
    (tmp_path / "bad.yml").write_text("title: [")
    assert "no Sigma rule" in cases.take(str(tmp_path / "bad.yml"))["error"]
    assert "cannot be read" in cases.take(str(tmp_path / "none.yml"))["error"]
    mine = cases.take(str(_rule(tmp_path / "mine.yml", "CommandLine|contains: frobnicate")))["digest"]
    found = list(cases.of(_process("1", "c", "widget", "--frobnicate")))
    assert [(each["kind"], each["rule"], each["rules"]) for each in found] == [("other", "sigma.a-rule", mine)]
    assert list(cases.of(_process("2", "c", "widget", "--help"))) == []
    other = cases.take(str(_rule(tmp_path / "mine.yml", "CommandLine|contains: help")))["digest"]  # it was altered
    assert other != mine
    found = [*cases.of(_process("3", "c", "widget", "--help")), *cases.of(_process("4", "c", "widget", "--frobnicate"))]
    assert [each["rules"] for each in found] == [other, mine]  # whoever had the one before still has it


def _never_ends(_line: bytes) -> list[Any]:
    while True:
        pass


def _rule(path: Path, condition: str) -> Path:
    path.write_text(
        "title: a-rule\nlogsource: {category: process_creation, product: linux}\n"
        f"detection:\n  selection:\n    {condition}\n  condition: selection\n"
    )
    return path

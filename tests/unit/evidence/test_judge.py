"""The judge's reading and judging, without its process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_guard.evidence import judge
from ray_guard.evidence.judge import Cases, Log
from ray_guard.evidence.layout import segment_name
from ray_guard.evidence.otlp import encode
from ray_guard.records import Resource, SpanKind, SpanRecord

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
    assert case["resource"] == judge.resource_key(_RESOURCE.attributes)


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

    before = signal.signal(signal.SIGALRM, judge._too_long)
    try:
        monkeypatch.setattr(judge, "_PATIENCE_S", 0.05)
        monkeypatch.setattr(judge, "_judged_command", lambda _text: time.sleep(30))
        watch = judge._Judge.__new__(judge._Judge)
        watch._cases = Cases()
        assert [case["kind"] for case in watch._judged(_process("1", "c", "sleep"))] == ["unjudged"]
        monkeypatch.setattr(judge, "_judged_command", lambda _text: 1 / 0)
        assert [case["kind"] for case in watch._judged(_process("2", "c", "fails"))] == ["unjudged"]
    finally:
        signal.signal(signal.SIGALRM, before)


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

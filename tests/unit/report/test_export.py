"""Evidence as OTLP lines, Parquet and training data, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from ray_guard.cli.__main__ import main
from ray_guard.evidence.columns import SCHEMA
from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.report.trajectories import CONTROL, SAFETY, TRUST, category


def exported(evidence: Path, form: str, *options: str) -> Path:
    out = evidence.parent / f"out.{form}"
    assert main(["export", str(evidence), "--format", form, "--out", str(out), *options]) == 0
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".out")] == []
    return out


def test_otlp_holds_every_span_that_ended_once(evidence: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exported(evidence, "otlp")
    whole = merge(read([evidence], Quarantine()))
    ended = {key: entry.span for key, entry in whole.items() if entry.span.end_ns is not None}
    again = list(read([out], quarantine := Quarantine()))
    assert quarantine.total == 0
    assert {(entry.span.trace_id, entry.span.span_id): entry.span for entry in again} == ended
    assert len(again) == len(ended) < len(whole)
    assert f"{len(ended)} spans; {len(whole) - len(ended)} left out that never ended" in capsys.readouterr().err


def test_parquet_holds_every_span_in_the_documented_columns(evidence: Path) -> None:
    out = exported(evidence, "parquet")
    whole = merge(read([evidence], Quarantine()))
    table = pq.read_table(out)
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == len(whole)
    question = f"select count(*) from '{out}' where attributes['ray_guard.egress.decision'] = 'deny'"
    ((denied,),) = duckdb.sql(question).fetchall()
    assert denied == sum(entry.span.attributes.get("ray_guard.egress.decision") == "deny" for entry in whole.values())
    assert denied > 0


def test_training_data(evidence: Path) -> None:
    flagged = [json.loads(line) for line in exported(evidence, "sft").read_text().splitlines()]
    every = [json.loads(line) for line in exported(evidence, "sft", "--clean").read_text().splitlines()]
    assert 0 < len(flagged) < len(every)
    assert [each for each in every if each["flagged"]] == flagged
    assert len({each["rollout"] for each in every}) == len(every)
    for each in every:
        assert each["schema"] == 1
        assert each["labels"] == sorted({violation["category"] for violation in each["violations"]})
        assert each["flagged"] == bool(each["violations"])
        assert {"run", "iteration", "group", "policy_version", "reward", "trace_id"} <= each.keys()
        # As chat templates take it: every call answered, by its id, arguments that are JSON.
        for call, result in zip(each["messages"][::2], each["messages"][1::2], strict=True):
            assert (call["role"], result["role"]) == ("assistant", "tool")
            assert call["tool_calls"][0]["id"] == result["tool_call_id"]
            if each["content"] == "commands":
                assert isinstance(json.loads(call["tool_calls"][0]["function"]["arguments"]), dict)
    tunnels = [each for each in flagged if "ssh -N -R" in json.dumps(each["messages"])]
    assert tunnels
    for each in tunnels:
        offence = next(v for v in each["violations"] if v["kind"] == "egress_denied")
        assert (offence["category"], offence["destination"]) == (SAFETY, "198.51.100.7:22")
        told = each["messages"][offence["message"]]["tool_calls"][0]
        assert told["id"] == offence["call_id"]
        assert "ssh -N -R 2222:localhost:22" in told["function"]["arguments"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("egress", SAFETY),
        ("listen", SAFETY),
        ("detection", SAFETY),
        ("gpu_process", SAFETY),
        ("gpu_seconds", CONTROL),
        ("egress_bytes", CONTROL),
        ("wall_seconds", CONTROL),
        ("unkillable", CONTROL),
        ("evidence", TRUST),
    ],
)
def test_categories(kind: str, expected: str) -> None:
    assert category(kind) == expected


def test_what_cannot_be_exported(evidence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ([str(tmp_path / "empty"), "--format", "otlp", "--out", str(tmp_path / "x")], "it holds no"),
        ([str(evidence), "--format", "otlp", "--out", str(tmp_path / "no" / "x")], "cannot be written: No such"),
        ([str(evidence), "--format", "parquet", "--out", str(tmp_path)], "cannot be written"),
        ([str(evidence), "--format", "otlp", "--clean", "--out", str(tmp_path / "x")], "--clean says which rollouts"),
    ):
        assert main(["export", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

"""``ray-guard attribute`` on jobs whose causes are known (benchmarks/attribution/generate.py): short forms."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "attribution"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


generate = _module("generate")
run = _module("run")


def answer(tmp_path: Path, name: str, **changed: object) -> tuple[dict[str, Any], dict[str, float]]:
    generate.generate(tmp_path, replace(generate.SCENARIOS[name], **{"minutes": 15, "guilty": 0.01, **changed}), 7)
    found = run.answers(tmp_path)
    return found, run.score(tmp_path, found)


@pytest.mark.parametrize("name", ["socket-tree", "nat-map", "aggregated"])
def test_recorded_sockets_name_the_call(tmp_path: Path, name: str) -> None:
    found, score = answer(tmp_path, name)
    assert score["caused"] >= 20
    assert score["top1"] == 1
    assert score["negatives_unobserved"] == 1
    assert all(source["skew_identifiable"] for source in found["sources"])
    assert all(abs(source["clock_skew_s"] - 37) < 0.5 for source in found["sources"])
    tiers = {alert["candidates"][0]["tier"] for alert in found["alerts"] if alert["verdict"] == "attributed"}
    assert tiers == {"nat-map": {"nat"}, "socket-tree": {"socket"}, "aggregated": {"socket", "destination"}}[name]


def test_without_sockets_the_text_tells_and_says_how_sure(tmp_path: Path) -> None:
    found, score = answer(tmp_path, "interval-skew")
    assert score["top1"] >= 0.7
    assert score["sure_wrong"] == 0
    assert score["set95"] >= 0.9
    told = [source for source in found["sources"] if source["skew_identifiable"]]
    assert told
    for source in told:  # a dozen alerts of one file: the interval is as wide as that leaves it
        low, high = source["clock_skew_interval_s"]
        assert low - 0.1 <= -112 <= high + 0.1
        assert high - low < 3


def test_a_tunnel_that_outlives_its_call_is_its_calls(tmp_path: Path) -> None:
    _, score = answer(tmp_path, "interval-survivors", skew_s=0.0, survivors=1.0)
    assert score["top1"] >= 0.2  # none without; many name nobody
    assert score["sure_wrong"] == 0


def test_alerts_of_nobody_are_called_so(tmp_path: Path) -> None:
    found, score = answer(tmp_path, "negatives-bare", guilty=0.0, minutes=40)
    assert score["negatives"] >= 50
    assert score["negatives_unobserved"] >= 0.95
    assert not any(source["skew_identifiable"] for source in found["sources"])


def test_every_record_has_a_row_whose_parts_sum_to_one(tmp_path: Path) -> None:
    found, _ = answer(tmp_path, "socket-lost")
    truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    rows = {(Path(alert["source"]).name, alert["byte_offset"]): alert for alert in found["alerts"]}
    assert rows.keys() == {(row["path"], row["byte_offset"]) for row in truth}
    for row in truth:
        alert = rows[row["path"], row["byte_offset"]]
        assert alert.get("informational", False) is not row["objected"]
        assert alert["unobserved"] + sum(each["confidence"] for each in alert["candidates"]) == pytest.approx(
            1, abs=1e-3
        )


def test_the_same_evidence_gives_the_same_answer(tmp_path: Path) -> None:
    answer(tmp_path, "interval")
    first = (tmp_path / "answer.json").read_bytes()
    run.answers(tmp_path)
    assert (tmp_path / "answer.json").read_bytes() == first


def attribute(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_guard.cli.__main__", "attribute", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.log").touch()
    (tmp_path / "t.otlp.jsonl").touch()
    traces = str(tmp_path / "t.otlp.jsonl")
    done = attribute("--traces", traces, "--alerts", str(tmp_path / "none.log"))
    assert (done.returncode, done.stderr.strip()) == (
        2,
        f"ray-guard attribute: {tmp_path}/none.log: no such file or folder",
    )
    done = attribute("--traces", traces, "--alerts", str(tmp_path / "empty.log"))
    assert done.returncode == 0
    assert "no alerts" in done.stdout
    done = attribute("--traces", traces, "--alerts", str(tmp_path / "empty.log"), "--tz", "Mars/Olympus")
    assert "no such time zone" in done.stderr


def test_alerts_without_traces_are_nobodys(tmp_path: Path) -> None:
    generate.generate(tmp_path, replace(generate.SCENARIOS["negatives"], minutes=2), 1)
    (tmp_path / "traces.otlp.jsonl").write_text("")
    found = run.answers(tmp_path)
    assert found["alerts"]
    assert {alert["verdict"] for alert in found["alerts"]} == {"unobserved"}

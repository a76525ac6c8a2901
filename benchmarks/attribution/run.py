"""Scores ``ray-guard attribute`` on jobs with known causes (generate.py), beside containment and an as-of join.

python benchmarks/attribution/run.py [--scenario NAME …] [--seeds N] [--alerts-only]
"""

from __future__ import annotations

import argparse
import bisect
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from generate import SCENARIOS, generate

HERE = Path(__file__).parent


def rows_of(path: Path) -> Iterator[dict]:
    with path.open() as lines:
        yield from map(json.loads, lines)


def answers(folder: Path) -> dict[str, object]:
    out = folder / "answer.json"
    names = sorted(str(path) for path in folder.glob("*.log"))
    command = [
        sys.executable,
        "-m",
        "ray_guard.cli.__main__",
        "attribute",
        "--traces",
        str(folder / "traces.otlp.jsonl"),
        "--alerts",
        *names,
        "--json",
        str(out),
    ]
    if (folder / "nat.csv").exists():
        command += ["--nat", str(folder / "nat.csv")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def score(folder: Path, answer: dict) -> dict[str, float]:
    truth = {(row["path"], row["byte_offset"]): row for row in rows_of(folder / "truth.jsonl")}
    kept = {
        row["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["spanId"] for row in rows_of(folder / "traces.otlp.jsonl")
    }
    count_all = right = caused = covered = wrong_sure = sure = negatives = negatives_seen = 0
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for alert in answer["alerts"]:
        row = truth[Path(alert["source"]).name, alert["byte_offset"]]
        if not row["objected"]:
            continue
        lost = row["span"] is not None and row["span"] not in kept

        def hit(
            candidate: dict, row: dict = row, *, lost: bool = lost
        ) -> bool:  # a call whose span was lost: its rollout
            return candidate["rollout"] == row["rollout"] if lost else candidate["span_id"] == row["span"]

        options = [(c["confidence"], hit(c)) for c in alert["candidates"]] + [
            (alert["unobserved"], row["span"] is None)
        ]
        for confidence, true in options:
            bins[min(9, int(confidence * 10))].append((confidence, true))
        total, within = 0.0, False
        for confidence, true in sorted(options, reverse=True):
            within |= true
            total += confidence
            if total >= 0.95:
                break
        covered += within
        count_all += 1
        first = alert["candidates"][0] if alert["candidates"] else {"span_id": None, "rollout": None, "confidence": 0.0}
        if first["confidence"] >= 0.95:
            sure += 1
            wrong_sure += not hit(first)
        if row["span"] is None:
            negatives += 1
            negatives_seen += alert["verdict"] == "unobserved"
        else:
            caused += 1
            right += hit(first)
    count = sum(map(len, bins.values()))
    error = sum(abs(sum(c for c, _ in rows) - sum(hit for _, hit in rows)) for rows in bins.values()) / max(count, 1)
    return {
        "caused": caused,
        "top1": right / max(caused, 1),
        "set95": covered / max(count_all, 1),
        "ece": error,
        "sure": sure,
        "sure_wrong": wrong_sure / max(sure, 1),
        "negatives": negatives,
        "negatives_unobserved": negatives_seen / max(negatives, 1),
    }


def baselines(folder: Path) -> dict[str, float]:
    """Top-1 of two joins by time on the alert's machine: any call that contains it, and the last one begun before."""
    calls: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for line in rows_of(folder / "traces.otlp.jsonl"):
        group = line["resourceSpans"][0]
        span = group["scopeSpans"][0]["spans"][0]
        if span["name"].startswith("execute_tool"):
            node = next(
                each["value"]["arrayValue"]["values"][0]["stringValue"]
                for each in group["resource"]["attributes"]
                if each["key"] == "host.ip"
            )
            calls[node].append((int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]), span["spanId"]))
    for rows in calls.values():
        rows.sort()
    truth = [
        row
        for row in rows_of(folder / "truth.jsonl")
        if row["path"] == "suricata.log" and row["span"] and row["objected"]
    ]
    lines = {}
    offset = 0
    for line in (folder / "suricata.log").read_text().splitlines():
        lines[offset] = json.loads(line)
        offset += len(line) + 1
    hits = asof = 0.0
    from datetime import datetime

    for row in truth:
        event = lines[row["byte_offset"]]
        at = int(datetime.fromisoformat(event["timestamp"]).timestamp() * 1e9)
        rows = calls.get(event["src_ip"], [])
        inside = [span for start, end, span in rows if start <= at <= end]
        hits += (row["span"] in inside) / max(len(inside), 1)
        before = bisect.bisect(rows, (at, 1 << 62, "")) - 1
        asof += before >= 0 and rows[before][2] == row["span"]
    return {"containment": hits / max(len(truth), 1), "as-of": asof / max(len(truth), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.scenario:
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                generate(folder, SCENARIOS[name], seed)
                answer = answers(folder)
                skews = [source["clock_skew_s"] for source in answer["sources"]]
                found = score(folder, answer) | baselines(folder)
                print(
                    f"{name:16} {seed}  "
                    + "  ".join(f"{key} {value:.4g}" for key, value in found.items())
                    + f"  skew {skews}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

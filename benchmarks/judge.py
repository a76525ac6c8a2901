"""How soon a finding follows the exec that shows it, how soon its call is dead, and what judging costs an exec.

    python benchmarks/judge.py [--rounds 60] [--execs 1000] [--json OUT]

All as recorded in the evidence: from the beginning of the process's span to the finding's, and to the end of that
process by the guard. What it costs is CPU time, of the judge and of the supervisor, per exec; with and without
``detect``, in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import memory

from ray_guard.evidence.otlp import decode
from ray_guard.records import SpanRecord

GOAL_MS = 1000.0
TURNS = 5
_MINES = """
import json, sys
import ray_guard
ray_guard.confine({"detect": {"kill_call": ["mining"]}})
for _ in range(int(sys.argv[1])):
    try:
        with ray_guard.tool_call("bash"):
            ray_guard.run(["/bin/sh", "-c", "exec sleep 60 # stratum+tcp://pool.example:3333"])
        raise SystemExit("a call was not ended")
    except ray_guard.RayGuardError:
        pass
"""
_EXECUTES = """
import json, sys
import ray_guard
ray_guard.confine(json.loads(sys.argv[2]))

def turn():
    print("ready", flush=True)
    sys.stdin.readline()

turn()
with ray_guard.tool_call("bash"):
    ray_guard.run(["/bin/sh", "-c", f"i=0; while [ $i -lt {sys.argv[1]} ]; do /bin/true $i; i=$((i+1)); done"])
turn()
"""


def spans(folder: Path) -> Iterator[SpanRecord]:
    for path in sorted(folder.glob("*.otlp.jsonl")):
        for line in path.read_bytes().splitlines():
            yield from (span for _, span in decode(line))


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=60, execs=1000).parse_args()
    report = harness.Report(options)
    with harness.scratch() as folder:
        told, dead = latencies(options.rounds, folder / "evidence")
        for what, figures in (("exec to finding, ms", told), ("exec to death, ms", dead)):
            shares = {f"p{share}": harness.percentile(figures, share / 100) for share in (50, 95, 100)}
            report.add_facts(f"{what} ({len(figures)})", shares)
        report.add_facts("CPU time, µs an exec", cost(options.execs, folder))
    report.goal("95 of 100 are dead, ms after their exec", harness.percentile(dead, 0.95), GOAL_MS)
    report.close()


def latencies(rounds: int, evidence: Path) -> tuple[list[float], list[float]]:
    """Milliseconds from each exec to its finding, and to its end."""
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(evidence)}
    subprocess.run([sys.executable, "-c", _MINES, str(rounds)], env=environment, check=True)
    began: dict[str, int] = {}
    ended: dict[str, int] = {}
    found: dict[str, int] = {}
    for span in spans(evidence):
        if span.name.startswith("process "):
            began.setdefault(span.span_id, span.start_ns)
            if span.end_ns is not None:
                ended[span.span_id] = span.end_ns
        elif span.name == "ray_guard.detection" and span.parent_id is not None:
            found.setdefault(span.parent_id, span.start_ns)
    if len(found) < rounds:
        raise SystemExit(f"only {len(found)} of {rounds} were found")
    told = [(found[span] - began[span]) / 1e6 for span in found]
    return told, [(ended[span] - began[span]) / 1e6 for span in found]


def cost(execs: int, folder: Path) -> dict[str, Any]:
    """CPU time of the guard's own processes for each exec, in microseconds."""
    taken: dict[str, list[float]] = {}
    for turn in range(TURNS):
        for name, policy in (("without", {}), ("with", {"detect": {"tag": ["all"]}})):
            environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / f"{name}{turn}")}
            for who, used in measured(execs, policy, environment).items():
                taken.setdefault(f"{who} {name}", []).append(used * 1e3 / execs)
    return {what: statistics.median(each) for what, each in sorted(taken.items())}


def measured(execs: int, policy: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """Milliseconds of CPU time, by who took them, while a call executes that many different commands."""
    argv = [sys.executable, "-c", _EXECUTES, str(execs), json.dumps(policy)]
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdout.readline()
        before = _settled()
        program.stdin.write("\n")
        program.stdin.flush()
        program.stdout.readline()
        after = _settled()
        program.stdin.write("\n")
        program.stdin.flush()
        return {who: after[who] - before.get(who, 0.0) for who in after}


def _settled() -> dict[str, float]:
    """What supervisor and judge have used, once they use no more."""
    before, now = {}, _used()
    while before != now:
        time.sleep(0.5)
        before, now = now, _used()
    return now


def _used() -> dict[str, float]:
    pids = memory.guards()
    pids.update(("judge", pid) for pid in _named("ray-guard-judge"))
    found = {}
    for who in ("supervisor", "judge"):
        if who in pids:
            fields = Path(f"/proc/{pids[who]}/stat").read_text().rpartition(")")[2].split()
            found[who] = (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")
    return found


def _named(name: str) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == name:
                yield int(path.parent.name)


if __name__ == "__main__":
    main()

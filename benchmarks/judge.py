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
    with harness.scratch() as folder:
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        subprocess.run([sys.executable, "-c", _MINES, str(options.rounds)], env=environment, check=True)
        began: dict[str, int] = {}
        ended: dict[str, int] = {}
        found: dict[str, int] = {}
        for span in spans(folder / "evidence"):
            if span.name.startswith("process "):
                began.setdefault(span.span_id, span.start_ns)
                if span.end_ns is not None:
                    ended[span.span_id] = span.end_ns
            elif span.name == "ray_guard.detection" and span.parent_id is not None:
                found.setdefault(span.parent_id, span.start_ns)
        told = sorted((found[span] - began[span]) / 1e6 for span in found)
        dead = sorted((ended[span] - began[span]) / 1e6 for span in found)
        if len(told) < options.rounds:
            raise SystemExit(f"only {len(told)} of {options.rounds} were found")
        for what, figures in (("exec to finding", told), ("exec to death", dead)):
            print(f"{what}: p50 {_at(figures, 0.5):.1f} ms, p95 {_at(figures, 0.95):.1f} ms, most {figures[-1]:.1f} ms")
        costs = cost(options.execs, folder)
    if options.json:
        Path(options.json).write_text(json.dumps({"told_ms": told, "dead_ms": dead, **costs}))
    if _at(dead, 0.95) > GOAL_MS:
        raise SystemExit(f"missed: 95 of 100 calls are to be dead within {GOAL_MS:.0f} ms")


def cost(execs: int, folder: Path) -> dict[str, Any]:
    """CPU time of the guard's own processes for each exec, in microseconds."""
    taken: dict[str, list[float]] = {}
    for turn in range(TURNS):
        for name, policy in (("without", {}), ("with", {"detect": {"tag": ["all"]}})):
            environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / f"{name}{turn}")}
            for who, used in measured(execs, policy, environment).items():
                taken.setdefault(f"{who} {name}", []).append(used * 1e3 / execs)
    found = {what: statistics.median(each) for what, each in sorted(taken.items())}
    for what, each in found.items():
        print(f"{what}: {each:.0f} µs of CPU time an exec")
    return found


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


def _at(figures: list[float], share: float) -> float:
    return harness.percentile(figures, share)


if __name__ == "__main__":
    main()

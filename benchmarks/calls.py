"""What many tool calls at once weigh: the guard's own processes with 50 calls running, beside sandlock; and 256 held.

    python benchmarks/calls.py [--calls 50] [--most 256] [--json OUT]

Each call is ``sleep`` below one confined job. Counted is the proportional set size (PSS, MiB) of the supervisor, its
zygote, and of each call's leader; sandlock's is that of the process that supervises each sandbox, which its library
forks off the job. The tools themselves and the job are nobody's overhead and are left out.
"""

from __future__ import annotations

import compileall
import os
import statistics
import sys
import time
from pathlib import Path

import harness

import ray_guard

HOLDER = Path(__file__).resolve().parent / "contestants" / "holder.py"
LIMIT_MIB = 150


def parents() -> dict[int, int]:
    """Parent by pid, of every process here."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def proportional(pid: int) -> float:
    """MiB."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass  # it has just ended
    return 0.0


def overhead(job: int, kind: str) -> dict[str, list[float]]:
    """PSS by role of what runs beside the job and its tools."""
    tree = parents()
    weights: dict[str, list[float]] = {}
    for pid, parent in tree.items():
        said = command(pid)
        if kind == "guard" and "ray_guard.supervisor" in said:
            above = tree.get(parent, 0)
            role = "supervisor"
            if "ray_guard.supervisor" in command(parent):
                role = "leaders" if "ray_guard.supervisor" in command(above) else "zygote"
            if role == "leaders" and "ray_guard.supervisor" in command(tree.get(above, 0)):
                role = "ready for the next calls"
            weights.setdefault(role, []).append(proportional(pid))
        elif kind == "sandlock" and pid != job and parent == job and not said.startswith("sleep"):
            weights.setdefault("supervising processes", []).append(proportional(pid))
    return weights


def main() -> None:
    options = harness.arguments(__doc__ or "", calls=50, most=256).parse_args()
    report = harness.Report(options)
    peers = harness.require_peers()
    # As an installed package is: a supervisor that compiles what it loads is larger for it, and so is all it forks.
    compileall.compile_dir(Path(ray_guard.__file__).parent, quiet=1)
    with harness.scratch() as folder:
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        totals = {}
        for kind, python in (("guard", sys.executable), ("sandlock", peers)):
            job = harness.Driven(kind, [python, HOLDER, kind], environment)
            (before,) = job.ask("weigh")[0]
            job.ask(f"hold {options.calls}")
            time.sleep(1.0)
            weights = overhead(job.pid, kind)
            (after,) = job.ask("weigh")[0]
            job.close()
            facts: dict[str, object] = {f"{role} ({len(each)})": sum(each) for role, each in weights.items()}
            grown = (after - before) / 1024  # sandlock's library supervises in threads of the job itself
            facts["what the job itself has grown"] = grown
            totals[kind] = sum(sum(each) for each in weights.values()) + grown
            facts["in all"] = totals[kind]
            report.add_facts(f"MiB (PSS) with {options.calls} calls at once: {kind}", facts)
        report.goal(f"MiB in all with {options.calls} calls at once", totals["guard"], LIMIT_MIB)

        job = harness.Driven("guard", [sys.executable, HOLDER, "guard"], environment)
        began = time.perf_counter()
        (held,) = job.ask(f"hold {options.most}")[0]
        seconds = time.perf_counter() - began
        weights = overhead(job.pid, "guard")
        facts = {"held": held, "seconds to start them": seconds, "MiB in all": sum(map(sum, weights.values()))}
        facts["MiB of a leader, median"] = statistics.median(weights.get("leaders", [0.0]))
        report.add_facts(f"{options.most} calls at once", facts)
        job.close()
    report.close()


if __name__ == "__main__":
    main()

"""What an exec costs in a tool call: fork, execve and wait, 200 at a go, beside plain and a supervisor in C.

    python benchmarks/execs.py [--rounds 15] [--execs 200] [--json OUT]

The same program runs plain, behind a minimal supervisor in C that is notified of every execve and records nothing, and
in a call of the guard, which journals a span for each.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent / "contestants"
SPANS_LIMIT = 4096
"""Beyond this the guard only counts, which is cheaper: see ``supervisor/process_spans.py``."""
GOAL = 1.3


def execs(client: harness.Driven, count: int) -> list[float]:
    """Microseconds of each."""
    return [each / 1e3 for each in client.ask(f"exec {count}")[0]]


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=15, execs=200).parse_args()
    if (options.rounds + 1) * options.execs > SPANS_LIMIT:
        raise SystemExit(f"at most {SPANS_LIMIT} execs in all: further ones have no span, and cost less")
    report = harness.Report(options)
    with harness.scratch() as folder, ExitStack() as stack:
        program = harness.compiled("contestants/execer.c", folder)
        supervisor = harness.compiled("contestants/notify_exec.c", folder)
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        commands: dict[str, list[str | Path]] = {
            "plain": [program],
            "C supervisor": [supervisor, program],
            "guard": [sys.executable, HERE / "guarded.py", "call", "9", program],
        }
        clients = [harness.Driven(name, command, environment) for name, command in commands.items()]
        for each in clients:
            stack.callback(each.close)
        contestants = [harness.Contestant(each.name, functools.partial(execs, each, options.execs)) for each in clients]
        outcomes = harness.compare(contestants, options.rounds, pause_s=0.02)
        recorded = sum(path.read_bytes().count(b'"name":"process true"') for path in (folder / "evidence").iterdir())
        if recorded < options.execs * options.rounds:
            raise harness.NotConfining(f"only {recorded} lines of process spans were journaled")
        report.add("fork + execve + waitpid of /usr/bin/true", "µs", outcomes, ("plain", "C supervisor"))
        by_name = {each.name: each for each in outcomes}
        report.goal("guard / C supervisor", harness.ratios(by_name["guard"], by_name["C supervisor"])[0], GOAL)
    report.close()


if __name__ == "__main__":
    main()

"""The driver's side of the example: options, start and end of everything, progress, and the verdict."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from rome import actions, report, verdict
from rome.cluster import Cluster, cluster, prepare_environment
from rome.outside import Addresses, Outside
from rome.progress import Progress
from rome.records import Outcome, Task, Turn

OUT = Path(__file__).parents[2] / "out"
LIMIT_S = 420.0  # of one run; on two idle cores it takes about 75 s


class Run:
    """What one run is made of, and what came of it."""

    def __init__(
        self, options: argparse.Namespace, progress: Progress, folder: Path, outside: Outside, node: Cluster
    ) -> None:
        self.mode: str = options.mode
        self.guarded = self.mode != "none"
        self.addresses: Addresses = outside.addresses
        self.gpus = node.gpus
        self.turns: list[Turn] = []
        self.outcomes: list[Outcome] = []
        self.world = actions.World(self.addresses, node.dashboard, self.mode)
        corpus = actions.corpus()
        digest = hashlib.sha256("\n".join(corpus).encode()).hexdigest()[:12]
        self.model: dict[str, Any] = {"folder": str(OUT / f"qwen3-moe-tiny-{digest}"), "corpus": corpus}
        self._options = options
        self._progress = progress
        self._folder = folder
        self._key = outside.key
        self._actors: list[Any] = []
        self._deadline = time.monotonic() + LIMIT_S

    def show(self, text: str, detail: str = "") -> None:
        """Progress; raises TimeoutError past the run's limit."""
        self._check_time(text)
        self._progress.show(text, detail)

    def tasks(self, iteration: int) -> list[Task]:
        """One task per rollout, each with a workspace and a hand of actions."""
        count, turns = self._options.rollouts, self._options.turns
        tasks = []
        for number in range(count):
            name = f"rollout-{number}"
            hand = {kind: actions.variants(kind, self.world, name) for kind in actions.deal(number, count, turns)}
            folder = actions.workspace(self._folder / name, self._key)
            seed = self._options.seed + 1000 * number
            tasks.append(Task(name, f"group-{number * 2 // count}", iteration, str(folder), hand, seed))
        return tasks

    def own(self, actor: Any) -> Any:
        """Remembers an actor, to end it with the run."""
        self._actors.append(actor)
        return actor

    def wait(self, references: list[Any], what: str) -> None:
        """Waits for all, showing ``what``. Raises what they raised, and TimeoutError past the run's limit."""
        pending = references
        began = time.monotonic()
        while pending:
            self.show(what, f"{len(references) - len(pending)} of {len(references)}, {time.monotonic() - began:.0f} s")
            ready, pending = ray.wait(pending, num_returns=1, timeout=0.5)
            ray.get(ready)

    def follow(self, streams: list[Any]) -> None:
        """Takes turns and outcomes from all rollouts as they come."""
        self.show(f"{len(streams)} rollouts of {self._options.turns} turns, in parallel")
        pending = list(streams)
        while pending:
            ready, _ = ray.wait(pending, num_returns=1, timeout=0.5)
            self._check_time("the rollouts")
            for stream in ready:
                try:
                    item = ray.get(next(stream))
                except StopIteration:
                    pending.remove(stream)
                    continue
                if isinstance(item, Turn):
                    self.turns.append(item)
                    ended = "done" if item.exit_status == 0 else f"exit status {item.exit_status}"
                    self.show(
                        f"{item.rollout} turn {item.number}: {item.kind}: {ended}", f"({len(self.turns)} turns done)"
                    )
                else:
                    self.outcomes.append(item)

    def end_actors(self) -> None:
        """Ends the actors in order, each by its own hand, so that all it had open is closed and on record."""
        self.show("ending the actors")
        engine, *_ = self._actors
        ray.get(engine.close.remote(), timeout=30)
        ray.wait(
            [actor.__ray_terminate__.remote() for actor in self._actors], num_returns=len(self._actors), timeout=10
        )

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{what}: not done {LIMIT_S:.0f} s after the start")


def main(train: Callable[[Run], None]) -> int:
    """Parses the command line, runs ``train`` between start and end of everything, judges, and prints."""
    options = _options()
    evidence: Path | None = None
    if options.mode != "none":
        evidence = options.evidence or OUT / time.strftime("rome-%Y%m%dT%H%M%SZ", time.gmtime())
    progress = Progress()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with _scratch() as folder, Outside(folder) as outside:
            prepare_environment(evidence)
            progress.show("starting Ray and the servers that play the outside")
            with cluster() as node:
                run = Run(options, progress, folder, outside, node)
                train(run)
                run.show("asking the outside what it has seen")
                jobs = node.submitted_jobs(60.0)
                markers = {task.name for task in folder.glob("rollout-*") if (task / "job-ran").exists()}
                run.end_actors()
            seen = verdict.Outside(tuple(outside.connections()), jobs, frozenset(markers))
        progress.end()
    except KeyboardInterrupt:
        progress.end()
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    result = verdict.judge(run.world, run.turns, run.outcomes, seen, evidence)
    report.show(run.world, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"ok": result.ok, **asdict(result)}, indent=1) + "\n")
    return 0 if result.ok else 1


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rome-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The ROME incident, replayed on one machine. Nothing leaves loopback.")
    parser.set_defaults(mode="enforce")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--no-guard",
        dest="mode",
        action="store_const",
        const="none",
        help="the same run without a guard",
    )
    modes.add_argument(
        "--report-only",
        dest="mode",
        action="store_const",
        const="report",
        help="the guard decides and records, and blocks nothing",
    )
    parser.add_argument("--rollouts", type=int, default=8, metavar="N", help="rollouts in parallel (default: 8)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns per rollout (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the model's sampling (default: 0)")
    parser.add_argument(
        "--evidence", type=Path, metavar="DIR", help="where the evidence goes (default: a new folder in out/)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here, for machines")
    options = parser.parse_args()
    if options.evidence:
        options.evidence = Path(os.path.abspath(options.evidence))
    try:
        actions.deal(0, options.rollouts, options.turns)
    except (ValueError, ZeroDivisionError) as error:
        parser.error(str(error))
    if shutil.which("ssh") is None:
        parser.error("the reverse tunnel needs the ssh client: apt-get install openssh-client")
    return options

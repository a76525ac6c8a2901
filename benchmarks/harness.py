"""What every benchmark here needs: contestants interleaved in random order, medians, paired ratios, one table.

The machines these run on are shared and noisy, so a number alone says little. Each *round* measures every contestant
once, in random order; ratios are taken within a round, and their median is what the goals speak of. With ``--json OUT``
the same is written as JSON, with the host and the versions it holds for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-bench" / "bin" / "python"
"""The interpreter with the peers (``make env-bench``)."""
_LIBRARIES = ("ray-guard", "ray", "opentelemetry-sdk")
_PEER_LIBRARIES = (
    "sandlock",
    "langfuse",
    "logfire",
    "mlflow-tracing",
    "openinference-instrumentation",
    "traceloop-sdk",
    "opentelemetry-sdk",
)


class NotConfining(SystemExit):
    """A contestant does not do what it is measured for: there is nothing to compare."""


@dataclass(frozen=True)
class Contestant:
    """``measure()`` gives one round's samples, in the unit of the table."""

    name: str
    measure: Callable[[], Sequence[float]]


@dataclass
class Outcome:
    """All samples of one contestant; one list per round."""

    name: str
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return [sample for samples in self.rounds for sample in samples]

    @property
    def medians(self) -> list[float]:
        return [statistics.median(samples) for samples in self.rounds]

    @property
    def p50(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        return percentile(self.samples, 0.95)


def percentile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratios(mine: Outcome, base: Outcome) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of the ratio of medians within a round."""
    paired = [one / other for one, other in zip(mine.medians, base.medians, strict=True)]
    return statistics.median(paired), percentile(paired, 0.25), percentile(paired, 0.75)


def interval(mine: Outcome, base: Outcome) -> tuple[float, float]:
    """Where the median ratio lies, with 95 % confidence: order statistics, whatever the distribution is."""
    paired = sorted(one / other for one, other in zip(mine.medians, base.medians, strict=True))
    rank = max(0, math.floor((len(paired) - 1.96 * math.sqrt(len(paired))) / 2))
    return paired[rank], paired[-1 - rank]


def compare(contestants: Sequence[Contestant], rounds: int, *, warm_up: int = 1, pause_s: float = 0.0) -> list[Outcome]:
    """Measures every contestant once per round, in random order. ``pause_s`` lets background work of one end first."""
    outcomes = {each.name: Outcome(each.name) for each in contestants}
    for number in range(-warm_up, rounds):
        for each in random.sample(contestants, len(contestants)):
            samples = list(each.measure())
            if number >= 0:
                outcomes[each.name].rounds.append(samples)
            time.sleep(pause_s)
    return list(outcomes.values())


def table(title: str, unit: str, outcomes: Sequence[Outcome], bases: Sequence[str], digits: int = 1) -> None:
    """Prints p50, p95 and the paired ratio to each of ``bases`` (median and quartiles)."""
    by_name = {each.name: each for each in outcomes}
    present = [base for base in bases if base in by_name]
    width = max(len(each.name) for each in outcomes) + 2
    print(f"\n{title} [{unit}]")
    print(f"{'':{width}}{'p50':>10}{'p95':>10}  " + "".join(f"{'× ' + base:>26}" for base in present))
    for each in outcomes:
        cells = []
        for base in present:
            middle, low, high = ratios(each, by_name[base])
            cells.append(f"{middle:>9.2f} ({low:.2f}–{high:.2f})".rjust(26))
        print(f"{each.name:{width}}{each.p50:>10.{digits}f}{each.p95:>10.{digits}f}  " + "".join(cells))


def as_json(title: str, unit: str, outcomes: Sequence[Outcome], bases: Sequence[str]) -> dict[str, Any]:
    by_name = {each.name: each for each in outcomes}
    rows = {}
    for each in outcomes:
        paired = {base: ratios(each, by_name[base]) for base in bases if base in by_name}
        rows[each.name] = {"p50": each.p50, "p95": each.p95, "rounds": len(each.rounds), "ratio_to": paired}
    return {"title": title, "unit": unit, "rows": rows}


@dataclass(frozen=True)
class Goal:
    """A ratio that the issue promises, and what came out."""

    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def line(self) -> str:
        said = f"{self.what}: {self.measured:.2f} (goal {'≥' if self.at_least else '≤'} {self.limit:g})"
        return f"  {'ok  ' if self.met else 'MISS'} {said}"


class Report:
    """Collects the tables of one script, and writes them where the user wants them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path | None = options.json
        self._tables: list[dict[str, Any]] = []
        self._goals: list[Goal] = []
        self._load = os.getloadavg()[0]
        print(f"{Path(sys.argv[0]).name}: {host_line()}")

    def add(
        self, title: str, unit: str, outcomes: Sequence[Outcome], bases: Sequence[str] = (), digits: int = 1
    ) -> None:
        table(title, unit, outcomes, bases, digits)
        self._tables.append(as_json(title, unit, outcomes, bases))

    def add_facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Numbers that are measured once."""
        print(f"\n{title}")
        width = max(len(name) for name in facts) + 2
        for name, value in facts.items():
            print(f"  {name:{width}}{value:.1f}" if isinstance(value, float) else f"  {name:{width}}{value}")
        self._tables.append({"title": title, "facts": dict(facts)})

    def goal(self, what: str, measured: float, limit: float, *, at_least: bool = False) -> None:
        self._goals.append(Goal(what, measured, limit, at_least))

    def close(self) -> None:
        """Prints the goals, writes the JSON."""
        if self._goals:
            print("\ngoals")
            for goal in self._goals:
                print(goal.line())
        print(f"\nload average {self._load:.1f} before, {os.getloadavg()[0]:.1f} after", flush=True)
        if self._path is not None:
            goals = [{**vars(goal), "met": goal.met} for goal in self._goals]
            content = {
                "script": Path(sys.argv[0]).name,
                "host": host(),
                "versions": versions(),
                "tables": self._tables,
                "goals": goals,
            }
            self._path.write_text(json.dumps(content, indent=1) + "\n")


def arguments(description: str, **integers: int) -> argparse.ArgumentParser:
    """A parser with ``--json`` and the given integer options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    for name, default in integers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# host and versions


def host() -> dict[str, Any]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "load": os.getloadavg()[0],
    }


def host_line() -> str:
    about = host()
    return (
        f"Linux {about['kernel']} {about['machine']}, {about['cores']} × {about['cpu'] or 'unnamed CPU'}, "
        f"{about['memory_gib']:g} GiB; Python {platform.python_version()}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
    )


def versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if PEERS.exists():
        paths = [sysconfig.get_path("purelib", vars={"base": str(PEERS.parent.parent)})]
        for distribution in metadata.distributions(path=paths):
            if distribution.name in _PEER_LIBRARIES and distribution.name not in found:
                found[distribution.name] = distribution.version
    return found


# ---------------------------------------------------------------------------------------------------------------------
# tools of the trade


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for evidence and compiled helpers, gone afterwards. On disk, as evidence is."""
    folder = Path(tempfile.mkdtemp(prefix="ray_guard-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Driven:
    """A contestant's process, driven by lines over its standard input and output (see contestants/)."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str, answers: int = 1) -> list[list[int]]:
        """Sends one line; as many lines of integers come back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        found = [[int(word) for word in self._process.stdout.readline().split()] for _ in range(answers)]
        if not all(found):
            raise SystemExit(f"{self.name}: ended, status {self._process.wait()}")
        return found

    def check(self, allowed: int, other: int, *, confined: bool) -> None:
        """Raises NotConfining unless port ``allowed`` is reached and, where confined, ``other`` refused."""
        (reached,), (refused,) = self.ask(f"try {allowed}")[0], self.ask(f"try {other}")[0]
        if reached != 0:
            raise NotConfining(f"{self.name}: the allowed port is refused: {os.strerror(reached)}")
        if confined is (refused == 0):
            raise NotConfining(f"{self.name}: another port gives {os.strerror(refused)}: nothing to compare")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compiled(source: str, folder: Path) -> Path:
    """``benchmarks/SOURCE`` compiled by gcc into ``folder``."""
    program = folder / Path(source).stem
    subprocess.run(["gcc", "-O2", "-Wall", "-pthread", "-o", program, HERE / source], check=True)
    return program


def require_peers() -> str:
    """The peers' interpreter."""
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} is missing: make env-bench")
    return str(PEERS)

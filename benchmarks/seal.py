"""What it takes to journal and seal records, next to writing them to a file.

    python benchmarks/seal.py [--rounds 20] [--seconds 5] [--rate 20000] [--json OUT]

Records are those of granted connections: one line when it begins, one when it has ended, encoded as the supervisor
does. First what a record costs the thread that writes it: encoded alone, written to a file, journaled without a seal.
Then ``--rate`` records a second for ``--seconds``, through the supervisor's own loop, journal and sealer, with a real
signer and real fdatasync: how much of one core supervisor and signer take together, and how late the loop wakes. Then
as many as it takes at all.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness

from ray_guard.evidence import signer
from ray_guard.evidence.journal import Bounds, Journal
from ray_guard.evidence.otlp import LineEncoder, fragment
from ray_guard.evidence.verify.check import State, check
from ray_guard.records import Resource
from ray_guard.supervisor.embryo import close_all_but
from ray_guard.supervisor.loop import Loop
from ray_guard.supervisor.sealing import Sealer

RATE = 20_000
TICK_S = 0.005
AT_ONCE_S = 1e-5  # not 0: what is due at once keeps the loop from its descriptors
BURST = 2000


def records() -> Iterator[bytes]:
    """Endless: the two lines of one connection after the other."""
    about = {
        "service.name": "RolloutWorker",
        "host.name": "node7",
        "host.ip": ("10.20.0.7", "fe80::1"),
        "rl.run.id": "run-1f2e3d4c",
        "ray.job_id": "02000000",
        "ray.actor_id": "8bd7d3f9f1d1f7a0c9d2b1f702000000",
    }
    identity = {
        "rl.run.id": "run-1f2e3d4c",
        "rl.iteration": 12,
        "rl.rollout.id": "rollout-0012-0007",
        "rl.group.id": "task-3",
        "rl.turn": 4,
        "ray_guard.source": "supervisor",
        "network.transport": "tcp",
        "network.peer.address": "198.51.100.7",
        "network.peer.port": 443,
        "server.address": "index.example.org",
        "ray_guard.egress.decision": "allow",
        "ray_guard.egress.reason": "rule",
        "ray_guard.egress.rule": "index.example.org:443",
        "ray_guard.egress.scope": "exact",
    }
    encoder = LineEncoder(Resource(about))
    form = encoder.egress_form("7" * 32, "8" * 16, fragment(identity).encoded)
    more = "," + fragment({"ray_guard.egress.bytes_sent": 5120, "ray_guard.egress.bytes_received": 81920}).encoded
    while True:
        for number in range(1 << 20):
            span, now = f"{number:016x}", time.time_ns()
            yield form.begun(span, now)
            yield form.ended(span, now, now + 1000, more)


def start_signer(line: socket.socket) -> None:
    if os.fork() == 0:
        close_all_but((0, 1, 2, line.fileno()))
        signer.run(line)


class Bench:
    """The supervisor's part, without targets."""

    def __init__(self, folder: Path) -> None:
        self.loop = Loop()
        self.journal = Journal(folder, Bounds())
        self.sealer = Sealer(self.loop)
        self.sealer.start = start_signer
        self.sealer.add(self.journal, {})
        self.late: list[float] = []
        self._source = records()

    def run(self, seconds: float, rate: int | None) -> tuple[int, float]:
        """Appends until the time is over; how many, and how many seconds that took."""
        began = time.perf_counter()
        done = 0
        due = time.monotonic()

        def step() -> None:
            nonlocal done, due
            now = time.perf_counter() - began
            self.late.append(time.monotonic() - due)
            wanted = done + BURST if rate is None else int(rate * now)
            for _ in range(wanted - done):
                self.journal.append(next(self._source))
            done = max(done, wanted)
            if now >= seconds:
                self.loop.stop()
                return
            pause = AT_ONCE_S if rate is None else TICK_S
            due = time.monotonic() + pause
            self.loop.later(pause, step)

        self.loop.later(0, step)
        self.loop.run()
        return done, time.perf_counter() - began

    def close(self) -> None:
        self.sealer.close()
        self.journal.close()


def cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def per_record(folder: Path, rounds: int) -> list[harness.Outcome]:
    source = records()
    lines = [next(source) for _ in range(BURST)]
    descriptor = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal = Journal(folder / "journal", Bounds(segment=1 << 40))

    def timed(work: Callable[[], object]) -> Callable[[], list[float]]:
        def sample() -> list[float]:
            began = time.process_time()
            work()
            return [(time.process_time() - began) / BURST * 1e6]

        return sample

    def encode() -> None:
        for _ in range(BURST):
            next(source)

    def write() -> None:
        for line in lines:
            os.write(descriptor, line)

    def append() -> None:
        for line in lines:
            journal.append(line)

    contestants = [
        harness.Contestant("encoded", timed(encode)),
        harness.Contestant("write(2) to a file", timed(write)),
        harness.Contestant("journal and tree", timed(append)),
    ]
    found = harness.compare(contestants, rounds)
    os.close(descriptor)
    journal.close()
    return found


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=20, seconds=5, rate=RATE).parse_args()
    report = harness.Report(options)
    with harness.scratch() as folder:
        outcomes = per_record(folder, options.rounds)
        report.add("a record, CPU of its thread", "µs", outcomes, ("write(2) to a file",), digits=2)
        facts: dict[str, object] = {}
        for name, rate in ((f"at {options.rate} a second", options.rate), ("as many as it takes", None)):
            bench = Bench(folder / f"sealed-{rate}")
            before = cpu_seconds(resource.RUSAGE_SELF)
            done, seconds = bench.run(options.seconds, rate)
            used = cpu_seconds(resource.RUSAGE_SELF) - before
            signed = cpu_seconds(resource.RUSAGE_CHILDREN)
            bench.close()
            while True:
                try:
                    os.waitpid(-1, 0)
                except ChildProcessError:
                    break
            signed = cpu_seconds(resource.RUSAGE_CHILDREN) - signed
            (log,) = check(folder / f"sealed-{rate}")
            assert log.state is State.ENDED, log
            assert not log.findings, log.findings
            late = sorted(bench.late)
            facts |= {
                f"{name}: records a second": done / seconds,
                f"{name}: bytes a record": log.size / log.records,
                f"{name}: checkpoints": log.checkpoints,
                f"{name}: supervisor, % of a core": 100 * used / seconds,
                f"{name}: signer, % of a core": 100 * signed / seconds,
                f"{name}: loop late, median, ms": 1e3 * late[len(late) // 2],
                f"{name}: loop late, 99 %, ms": 1e3 * late[len(late) * 99 // 100],
            }
            if rate is not None:
                report.goal("records a second, sustained", done / seconds, 0.99 * rate, at_least=True)
                report.goal("of one core at that rate, %", 100 * (used + signed) / seconds, 100)
        report.add_facts("journal and seal", facts)
    report.close()


if __name__ == "__main__":
    main()

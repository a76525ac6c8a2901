"""How fast evidence is verified, next to hashing its files once with SHA-256 and to reading them.

    python benchmarks/verify.py [--mib 256] [--rounds 5] [--json OUT]

The evidence is a sealed log of realistic records (those of seal.py), in the page cache. The last case is a log with one
edited record: finding out which one.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import harness
import seal

from ray_guard.evidence.verify.check import Kind, check

GOAL_MIB_S = 100
BLOCK = 1 << 22


def make(folder: Path, size: int) -> None:
    bench = seal.Bench(folder)
    source = seal.records()
    written = 0

    def step() -> None:
        nonlocal written
        for _ in range(seal.BURST):
            line = next(source)
            bench.journal.append(line)
            written += len(line)
        if written >= size:
            bench.loop.stop()
        else:
            bench.loop.later(seal.AT_ONCE_S, step)

    bench.loop.later(0, step)
    bench.loop.run()
    bench.close()


def main() -> None:
    options = harness.arguments(__doc__ or "", mib=256, rounds=5).parse_args()
    report = harness.Report(options)
    with harness.scratch() as scratch:
        folder, edited = scratch / "e", scratch / "edited"
        make(folder, options.mib << 20)
        files = sorted(folder.glob("*.otlp.jsonl"))
        size = sum(path.stat().st_size for path in files) / 2**20
        shutil.copytree(folder, edited)
        with (edited / files[-1].name).open("r+b") as file:
            file.seek(files[-1].stat().st_size // 2)
            file.write(b"!")

        def rate(work: Callable[[], object]) -> Callable[[], list[float]]:
            def sample() -> list[float]:
                began = time.process_time()
                work()
                return [size / (time.process_time() - began)]

            return sample

        def read() -> None:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while file.read(BLOCK):
                        pass

        def sha256() -> None:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    hashlib.file_digest(file, "sha256").digest()

        def verify() -> None:
            (log,) = check(folder)
            assert not log.findings, log.findings

        def find() -> None:
            (log,) = check(edited)
            assert [finding.kind for finding in log.findings] == [Kind.EDITED]

        contestants = [
            harness.Contestant("read", rate(read)),
            harness.Contestant("sha256 of the files", rate(sha256)),
            harness.Contestant("verify", rate(verify)),
            harness.Contestant("verify, one record edited", rate(find)),
        ]
        outcomes = harness.compare(contestants, options.rounds)
        report.add(f"{size:.0f} MiB, by CPU time", "MiB/s", outcomes, ("sha256 of the files",), digits=0)
        report.goal("verify, MiB/s", outcomes[2].p50, GOAL_MIB_S, at_least=True)
    report.close()


if __name__ == "__main__":
    main()

"""One decorator on a Ray actor that has a real GPU: its engine computes as fast as before, nobody else computes there.

Skipped, loudly, where there is no GPU or no Ray. Prints its figures (``pytest -s tests/gpu``), for docs/gpu.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_guard

ray = pytest.importorskip("ray", reason="NOT TESTED ON A GPU: no ray")

pytestmark = [pytest.mark.gpu, pytest.mark.kernel, pytest.mark.slow]

PROGRAMS = str(Path(__file__).with_name("programs.py"))
ROUNDS = 9
GUARD: dict[str, Any] = {"gpu": "engine", "budgets": {"actor": {"gpu_seconds": 10_000}}}


class Policy:
    """What a policy's engine does all day: products, many small kernels, memory taken and given back."""

    def __init__(self) -> None:
        began = time.monotonic()
        import torch

        self._torch = torch
        self._a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self._small = torch.randn(64, device="cuda")
        self.products(0.2)
        self._started = time.monotonic() - began

    def started(self) -> float:
        return self._started

    def products(self, seconds: float) -> float:
        return self._rate(lambda: self._torch.mm(self._a, self._a), seconds)

    def launches(self, seconds: float) -> float:
        def work() -> None:
            for _ in range(200):
                self._small.add_(1.0)

        return self._rate(work, seconds)

    def allocations(self, seconds: float) -> float:
        def work() -> None:
            self._torch.empty(1 << 28, device="cuda")
            self._torch.cuda.empty_cache()

        return self._rate(work, seconds)

    def _rate(self, work: Any, seconds: float) -> float:
        began, count = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            work()
            self._torch.cuda.synchronize()
            count += 1
        return count / (time.monotonic() - began)

    def tool(self, argv: list[str]) -> tuple[int, str]:
        done = ray_guard.run(argv, capture_output=True, text=True)
        return done.returncode, done.stderr

    def beside(self, argv: list[str]) -> tuple[int, float]:
        """A child that is no tool and no engine."""
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()  # it opens the GPU
            began = time.monotonic()
            child.communicate()
            return child.returncode, time.monotonic() - began


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_an_engine_is_as_fast_and_a_miner_beside_it_is_ended(cluster: None) -> None:
    free = ray.remote(num_gpus=0.4)(Policy).remote()
    guarded = ray_guard.guard(**GUARD)(ray.remote(num_gpus=0.4)(Policy)).remote()
    took = [ray.get(actor.started.remote()) for actor in (free, guarded)]
    print(f"torch, its context and the first products: {took[1] / took[0]:.2f} (guarded {took[1]:.1f} s)")
    for name in ("products", "launches", "allocations"):
        rates = [[ray.get(getattr(actor, name).remote(0.4)) for actor in (free, guarded)] for _ in range(ROUNDS)]
        ratios = sorted(guarded_rate / free_rate for free_rate, guarded_rate in rates)
        print(f"{name}: guarded / free {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), "
              f"{statistics.median(rate[0] for rate in rates):.0f} a second free")  # fmt: skip

    mine = [sys.executable, PROGRAMS, "miner", "20"]
    assert ray.get(free.beside.remote([*mine[:-1], "1"]))[0] == 0, "the control: the miner does not work"
    status, seconds = ray.get(guarded.beside.remote(mine))
    print(f"a miner beside the guarded engine was ended {seconds:.2f} s after it set out to open the GPU")
    assert status == -9
    status, said = ray.get(guarded.tool.remote(mine))
    assert status > 0, "a tool got a GPU"
    print(f"a miner as its tool: {said.strip().splitlines()[-1]}")
    assert ray.get(guarded.products.remote(0.2)) > 0, "the engine went with the miner"

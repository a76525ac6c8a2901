"""What a guarded Ray actor's calls cost: round trip and calls per second, guarded and unguarded in one cluster.

    python benchmarks/actor.py [--rounds 30] [--calls 200] [--json OUT]

Both actors have the same code; the guarded one may reach nothing (``allow=[]``). ``in an episode``: the caller is in
one, which then travels with each call. Before anything is timed the unguarded actor must reach a loopback port that the
guarded one is refused.
"""

from __future__ import annotations

import functools
import os
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import ray

import ray_guard


class Worker:
    def ping(self) -> None:
        """Nothing: the call itself is what is measured."""

    def echo(self, data: bytes) -> bytes:
        return data

    def attempt(self, port: int) -> int:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port))


Unguarded: Any = ray.remote(num_cpus=0)(type("Unguarded", (Worker,), {}))
Guarded: Any = ray_guard.guard(allow=[])(ray.remote(num_cpus=0)(type("Guarded", (Worker,), {})))


def round_trips(actor: Any, calls: int) -> list[float]:
    """Microseconds of each call, one after the other."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        ray.get(actor.ping.remote())
        taken.append((time.perf_counter() - began) * 1e6)
    return taken


def payloads(actor: Any, data: bytes, calls: int) -> list[float]:
    """Microseconds of each call that carries ``data`` there and back."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        ray.get(actor.echo.remote(data))
        taken.append((time.perf_counter() - began) * 1e6)
    return taken


def per_second(actor: Any, calls: int) -> list[float]:
    """Calls per second, all submitted at once."""
    began = time.perf_counter()
    ray.get([actor.ping.remote() for _ in range(calls)])
    return [calls / (time.perf_counter() - began)]


def in_episode(measure: Callable[[Any], list[float]], actor: Any) -> list[float]:
    with ray_guard.episode(id="bench", group="g", iteration=1):
        return measure(actor)


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    options = harness.arguments(__doc__ or "", rounds=30, calls=200).parse_args()
    report = harness.Report(options)
    with harness.scratch() as folder:
        os.environ["RAY_GUARD_EVIDENCE"] = str(folder / "evidence")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            actors = {"unguarded": Unguarded.remote(), "guarded": Guarded.remote()}
            listener = socket.create_server(("127.0.0.1", 0))
            reached = {name: ray.get(actor.attempt.remote(listener.getsockname()[1])) for name, actor in actors.items()}
            if reached["unguarded"] != 0 or reached["guarded"] == 0:
                raise harness.NotConfining(f"the guarded actor is not confined: errno by actor {reached}")
            measure(report, actors, options.rounds, options.calls)
        finally:
            ray.shutdown()
    report.close()


def measure(report: harness.Report, actors: dict[str, Any], rounds: int, calls: int) -> None:
    ratio: dict[str, float] = {}
    small, large = bytes(100), bytes(50_000)  # below Ray's limit for results that travel within the message
    measures: dict[str, tuple[str, Any, int]] = {
        "actor call, round trip": ("µs", functools.partial(round_trips, calls=calls), rounds),
        "actor call with 100 bytes": ("µs", functools.partial(payloads, data=small, calls=calls // 4), rounds),
        "actor call with 50 kB": ("µs", functools.partial(payloads, data=large, calls=calls // 4), rounds),
        # One sample a round, and half of them are off by a quarter: forty rounds tell 0.89 from 1.0 one time in two.
        "actor calls per second": ("1/s", functools.partial(per_second, calls=2 * calls), 5 * rounds),
    }
    for title, (unit, how, times) in measures.items():
        runs = [harness.Contestant(name, functools.partial(how, actor)) for name, actor in actors.items()]
        runs.append(harness.Contestant("guarded, in an episode", functools.partial(in_episode, how, actors["guarded"])))
        outcomes = harness.compare(runs, times, warm_up=2)
        report.add(title, unit, outcomes, ("unguarded",))
        by_name = {each.name: each for each in outcomes}
        ratio[title] = harness.ratios(by_name["guarded"], by_name["unguarded"])[0]
    report.goal("round trip, guarded / unguarded", ratio["actor call, round trip"], 1.05)
    report.goal("calls per second, guarded / unguarded", ratio["actor calls per second"], 0.95, at_least=True)


if __name__ == "__main__":
    main()

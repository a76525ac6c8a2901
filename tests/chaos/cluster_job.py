"""A Ray driver with a guarded actor and one with a batch processor, both of which make calls. Run by the suite.

    python cluster_job.py LEDGER BATCH_LEDGER ENDPOINT

Prints who is who, then does what each line on stdin says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import psutil
import ray

from ray_guard import guard


class Guarded:
    def __init__(self, ledger: str) -> None:
        self.ledger = ledger

    def begin(self) -> dict[str, int]:
        """Calls from here on, without a pause, beside one that lasts; the pids to watch."""
        import job

        work = job.Job(job.Ledger(self.ledger), job.calls_of_this_process())
        tool = work.hold(["sleep", "1000"])
        work.flow()
        return {"worker": os.getpid(), "tool": tool}


class Batched:
    def __init__(self, ledger: str, endpoint: str) -> None:
        self.ledger, self.endpoint = ledger, endpoint

    def begin(self) -> dict[str, int]:
        import job

        scope, _ = job.batched(self.endpoint)
        job.Job(job.Ledger(self.ledger), scope).flow()
        return {"batch_worker": os.getpid()}


class Served:
    """What a policy actor holds, and would lose if it were started anew."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self) -> dict[str, int]:
        self.asked += 1
        return {"policy": os.getpid(), "asked": self.asked}


def begun_again(actor: Any) -> dict[str, int]:
    """Once Ray has started it anew."""
    deadline = time.monotonic() + 30
    while True:
        try:
            found: dict[str, int] = ray.get(actor.begin.remote())
        except ray.exceptions.RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return found


def main() -> None:
    ledger, batch_ledger, endpoint = sys.argv[1:]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    guarded: Any = guard(allow=[])(ray.remote(num_cpus=0, max_restarts=1, max_task_retries=0)(Guarded))
    actors = [guarded.remote(ledger), ray.remote(num_cpus=0)(Batched).remote(batch_ledger, endpoint)]  # type: ignore[attr-defined]
    policy: Any = None
    about: dict[str, int] = {}
    for pids in ray.get([actor.begin.remote() for actor in actors]):
        about |= pids
    (about["raylet"],) = (child.pid for child in psutil.Process().children() if child.name() == "raylet")
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            for actor in actors:
                ray.kill(actor)
        elif line.strip() == "shutdown":
            ray.shutdown()
        elif line.strip() == "policy":
            policy = policy or guard(role="policy", allow=[])(ray.remote(num_cpus=0)(Served)).remote()  # type: ignore[attr-defined]
            print(json.dumps(ray.get(policy.ask.remote())), flush=True)
        elif line.strip() == "again":
            print(json.dumps(begun_again(actors[0])), flush=True)


main()

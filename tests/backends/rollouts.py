"""A Ray job of guarded rollouts, for a backend to show. Run by the tests; EVIDENCE and OTEL_* are in the environment.

    python rollouts.py PORT       PORT: what its tools may reach on loopback

Each line on stdin is the number of an iteration: two rollouts of two turns. It is answered, when they are over, with a
JSON list of what each rollout knows of itself. With the end of stdin the actors end, and then the job.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import ray

import ray_guard

TURNS = 2
REFUSED = "exec 3<>/dev/tcp/192.0.2.7/22"


class Environment:
    def __init__(self, port: int) -> None:
        self.granted = f"exec 3<>/dev/tcp/127.0.0.1/{port}"

    @ray_guard.tool
    def bash(self, command: str) -> subprocess.CompletedProcess[str]:
        return ray_guard.run(["bash", "-c", command], capture_output=True, text=True)

    @ray_guard.tool
    async def look_up(self, name: str) -> None:
        raise LookupError(name)

    async def rollout(self, iteration: dict[str, Any], step: int, number: int) -> dict[str, Any]:
        name = f"rollout-{step}-{number}"
        with ray_guard.episode(id=name, group=f"group-{step}", iteration=iteration, policy_version="41") as episode:
            for turn in range(TURNS):
                with ray_guard.turn(turn):
                    with ray_guard.chat("qwen3-moe-tiny") as chat:
                        chat.usage(input_tokens=100 + turn, output_tokens=10)
                    assert self.bash(self.granted).returncode == 0
                    assert "Permission denied" in self.bash(REFUSED).stderr
                    try:
                        await self.look_up("günther")
                    except LookupError:
                        pass
            episode.reward(0.25)
            return {"rollout": name, "trace": episode.trace, "span": episode.span, "iteration": iteration["span"]}


def main() -> None:
    port = int(sys.argv[1])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    guarded: Any = ray_guard.guard(role="env", allow=["cluster", f"127.0.0.1:{port}"])(Environment)
    environments = [ray.remote(num_cpus=0)(guarded).options(name=f"env-{n}").remote(port) for n in range(2)]
    ray.get([actor.__ray_ready__.remote() for actor in environments])
    for line in sys.stdin:
        step = int(line)
        with ray_guard.iteration(step):
            above = ray_guard.context()
            done = [actor.rollout.remote(above, step, number) for number, actor in enumerate(environments)]
            print("ROLLOUTS", json.dumps(ray.get(done)), flush=True)
    ray.wait([actor.__ray_terminate__.remote() for actor in environments], num_returns=2, timeout=10)
    ray.shutdown()


if __name__ == "__main__":
    main()

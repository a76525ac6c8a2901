"""Runs a command as ray_guard runs it: in the actor ring of a confined process, or in a call ring of its own.

    python guarded.py actor|capped|inside|tool|call|relayed PORT[,PORT] COMMAND [ARGUMENT ...]

``actor``: a plain child of a confined process; ``capped``: the same, under a byte budget that is far away. ``inside``:
COMMAND, a Python script, in the confined process itself; ``tool``: the same in an open tool call. ``call``: what
ray_guard.Popen starts; ``relayed``: the same, under a byte budget of the call that is far away. Only 127.0.0.1:PORT is
granted.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from typing import Any

import ray_guard


def main() -> int:
    kind, port, *command = sys.argv[1:]
    readable = ["system", "env", "cwd", *{os.path.dirname(os.path.abspath(word)) for word in command if "/" in word}]
    policy: dict[str, Any] = {
        "egress": {"allow": [f"127.0.0.1:{each}" for each in port.split(",")]},
        "files": {"read": readable},  # the command itself may lie anywhere
    }
    if kind == "capped":
        policy["budgets"] = {"actor": {"egress_bytes": "1000GiB"}}
    if kind == "relayed":
        policy["budgets"] = {"call": {"egress_bytes": "1000GiB"}}
    ray_guard.confine(policy)
    if kind in ("actor", "capped"):
        return subprocess.run(command, check=False).returncode
    if kind == "inside":
        runpy.run_path(command[0], run_name="__main__")
        return 0
    with (
        ray_guard.episode(id="bench", group="g", iteration=1),
        ray_guard.turn(1),
        ray_guard.tool_call("bash", {"n": 1}),
    ):
        if kind == "tool":
            runpy.run_path(command[0], run_name="__main__")
            return 0
        return ray_guard.Popen(command, stdin=0, stdout=1, stderr=2).wait()


if __name__ == "__main__":
    sys.exit(main())

"""A process that confines itself and then does what it is told, line by line: where escapes are tried from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from typing import Any

import ray_guard
from ray_guard.client import confine


def run(job: dict[str, Any]) -> dict[str, Any]:
    options = {"capture_output": True, "text": True, "timeout": job["timeout"], "stdin": subprocess.DEVNULL}
    options["cwd"] = job.get("folder")
    began = time.monotonic()
    try:
        if job["ring"] == "call":
            with ray_guard.tool_call(job["tool"], {}):
                done = ray_guard.run(job["argv"], **options)
        else:
            done = subprocess.run(job["argv"], **options)
    except subprocess.TimeoutExpired as expired:
        texts = [text if isinstance(text, str) else (text or b"").decode() for text in (expired.stdout, expired.stderr)]
        return {"status": None, "stdout": texts[0], "stderr": texts[1], "seconds": time.monotonic() - began}
    return {
        "status": done.returncode,
        "stdout": done.stdout,
        "stderr": done.stderr,
        "seconds": time.monotonic() - began,
    }


def inside(job: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {"ray_guard": ray_guard, "result": None, **job["arguments"]}
    exec(job["code"], names)
    return {"result": names["result"]}


def main() -> None:
    policy = json.loads(sys.stdin.readline())["policy"]
    about: dict[str, Any] = {"pid": os.getpid()}
    let_judge = confine._let_judge

    def learn(supervisor: int) -> None:  # nothing else tells a target its supervisor's pid
        about["supervisor"] = supervisor
        let_judge(supervisor)

    confine._let_judge = learn
    try:
        ray_guard.confine(policy)
    except ray_guard.RayGuardError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = inside(job) if job["ring"] == "inside" else run(job)
        except Exception:  # noqa: BLE001 - it is told, and judged there
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


main()

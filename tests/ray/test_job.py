"""One environment variable puts a whole job under a policy, beside whatever setup hook the job has already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

DRIVER = """
import json, os, socket, sys
import ray

port = int(sys.argv[1])

def reach(text):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
    except OSError as error:
        return type(error).__name__
    return "sent"

def hook():
    os.environ["HOOKED"] = reach("callable hook")

ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={runtime_env})

@ray.remote(num_cpus=0)
class Plain:
    def reach(self, text):
        return reach(text)
    def hooked(self):
        return os.environ.get("HOOKED")

@ray.remote(num_cpus=0)
def task(text):
    return reach(text)

answers = {"driver": reach("driver")}
plain = Plain.options(name="plain").remote()
answers["actor"] = ray.get(plain.reach.remote("actor"))
answers["task"] = ray.get(task.remote("task"))
answers["hooked"] = ray.get(plain.hooked.remote())
EXTRA
print("ANSWERS", json.dumps(answers))
"""

GUARDED = """
from ray_guard import guard
other = guard(allow=[])(ray.remote(num_cpus=0)(type("Other", (), {"reach": lambda self, text: reach(text),
                                                                  "hooked": lambda self: os.environ.get("HOOKED")})))
other = other.remote()
answers["guarded"] = ray.get(other.reach.remote("guarded"))
answers["guarded_hooked"] = ray.get(other.hooked.remote())
"""


def drive(tmp_path: Path, port: int, *, runtime_env: str, extra: str = "", **variables: str) -> dict[str, Any]:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.replace("{runtime_env}", runtime_env).replace("EXTRA", extra))
    environment = {
        **os.environ,
        "RAY_GUARD_EVIDENCE": str(tmp_path / "evidence"),
        "PYTHONPATH": str(tmp_path),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, str(script), str(port)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=110,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(lines[0].removeprefix("ANSWERS "))
    return answers


def test_the_variable_puts_every_worker_under_the_policy(tmp_path: Path, sink: Any) -> None:
    (tmp_path / "policy.yaml").write_text("egress: {allow: ['10.0.0.1:443']}\nrole: env\n")
    (tmp_path / "users_hook.py").write_text(
        textwrap.dedent("""
            import os
            def setup():
                from __main__ import __name__ as name
                os.environ["HOOKED"] = "by name"
        """)
    )
    answers = drive(
        tmp_path,
        sink.port,
        runtime_env='{"worker_process_setup_hook": "users_hook.setup"}',
        RAY_RUNTIME_ENV_HOOK="ray_guard.actors.hook.job",
        RAY_GUARD_POLICY=str(tmp_path / "policy.yaml"),
    )
    assert answers == {"driver": "sent", "actor": "PermissionError", "task": "PermissionError", "hooked": "by name"}
    assert sink.saw("driver")
    assert sink.accepted == 1


def test_a_callable_hook_of_the_job_runs_confined(tmp_path: Path, sink: Any) -> None:
    (tmp_path / "ray_guard.yaml").write_text("egress: {allow: []}\n")
    answers = drive(
        tmp_path,
        sink.port,
        runtime_env='{"worker_process_setup_hook": hook}',
        extra=GUARDED,
        RAY_RUNTIME_ENV_HOOK="ray_guard.actors.hook.job",
    )
    assert answers.pop("driver") == "sent"
    assert set(answers.values()) == {"PermissionError"}
    assert sink.saw("driver")
    assert sink.accepted == 1


def test_a_guarded_actor_keeps_the_jobs_own_hook(tmp_path: Path, sink: Any) -> None:
    answers = drive(tmp_path, sink.port, runtime_env='{"worker_process_setup_hook": hook}', extra=GUARDED)
    assert answers == {
        "driver": "sent",
        "actor": "sent",
        "task": "sent",
        "hooked": "sent",
        "guarded": "PermissionError",
        "guarded_hooked": "PermissionError",
    }
    assert sink.saw("callable hook")
    assert not sink.saw("guarded", within=0.1)


def test_a_job_without_its_policy_file_does_not_start(tmp_path: Path, sink: Any) -> None:
    with pytest.raises(AssertionError, match=r"PolicyError.*ray_guard\.yaml"):
        drive(tmp_path, sink.port, runtime_env="None", RAY_RUNTIME_ENV_HOOK="ray_guard.actors.hook.job")
    assert sink.accepted == 0

"""Who holds a GPU that it may not hold is told within a second and gone within two; what is used is counted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gpu_host import GpuHost, gpu_host
from harness import PYTHON, Host, wait

pytestmark = pytest.mark.kernel

_TOLD_S = 1.0
_ENDED_S = 2.0
GIB = 1 << 30

_HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_RDONLY); print(os.getpid(), flush=True); time.sleep(8)"


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuHost]:
    with gpu_host(tmp_path_factory.mktemp("gpu")) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[GpuHost]:
    """With an NVML whose state is this test's alone."""
    with gpu_host(tmp_path) as made:
        yield made


@contextmanager
def confined(gpus: GpuHost, folder: Path, **policy: Any) -> Iterator[Host]:
    host = Host(policy, folder / "evidence", gpus.namespace)
    try:
        time.sleep(0.7)  # the helper has started, and made its first census
        yield host
    finally:
        host.close()


def violations(host: Host, kind: str) -> list[dict[str, Any]]:
    found = [span for span in host.journal() if span["name"] == "ray_guard.violation"]
    return [span for span in found if span["attributes"]["ray_guard.violation.kind"] == kind]


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


_CHILD = """
import subprocess
child = subprocess.Popen([python, '-I', '-S', '-c', program, gpu], stdout=subprocess.PIPE, text=True)
result = int(child.stdout.readline())
"""

_DAEMON = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.open(sys.argv[1], os.O_RDONLY); print(os.getpid(), flush=True); time.sleep(8)
"""


@pytest.mark.parametrize("how", ["child", "daemon"])
def test_the_actor_ring(gpus: GpuHost, tmp_path: Path, how: str) -> None:
    program = _HOLD if how == "child" else _DAEMON
    bystander = gpus.python(program, str(gpus.gpu))
    assert bystander.stdout is not None
    free = int(bystander.stdout.readline())
    with confined(gpus, tmp_path) as host:
        pid = host.inside(_CHILD, python=PYTHON, program=program, gpu=str(gpus.gpu))
        began = time.monotonic()
        (told,) = wait(lambda: violations(host, "gpu_process"), "no violation", _TOLD_S)
        wait(lambda: gone(pid), "it still holds the GPU", _ENDED_S - (time.monotonic() - began))
        assert told["attributes"]["error.type"] == "gpu_none"
        assert f"pid {pid} " in told["attributes"]["ray_guard.violation.destination"]
        assert host.alive
        assert not gone(free), "a stranger was ended"
    os.kill(free, signal.SIGKILL)
    bystander.communicate()


def test_the_call_ring(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, gpu="engine") as host:
        outcome = host.run("call", [PYTHON, "-I", "-S", "-c", _HOLD, str(gpus.gpu)])
        assert outcome.status == -signal.SIGKILL
        assert outcome.seconds < _ENDED_S
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "tool"
        spans = {span["id"]: span for span in host.journal()}
        assert spans[told["parent"]]["name"].startswith("process python")


def test_an_engine_may_and_its_neighbour_may_not(gpus: GpuHost, tmp_path: Path) -> None:
    code = """
import os, subprocess
from ray_guard.client import engine
os.open(gpu, os.O_RDONLY)  # the actor's own process is an engine of its own accord
pids = []
for registered in (True, False):
    child = subprocess.Popen([python, '-I', '-S', '-c', 'input();' + program, gpu], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    if registered: engine.register(child.pid)
    child.stdin.write('\\n'); child.stdin.flush()
    pids.append(int(child.stdout.readline()))
result = pids
"""
    with confined(gpus, tmp_path, gpu="engine") as host:
        registered, other = host.inside(code, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: gone(other), "whoever is not registered still holds the GPU", _ENDED_S)
        time.sleep(1.2)
        assert not gone(registered)
        assert host.alive
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "not_an_engine"


def test_the_actor_itself(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path) as host:
        host.inside("import os; os.open(gpu, os.O_RDONLY)", gpu=str(gpus.gpu))
        assert host.wait(_ENDED_S) in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert len(violations(host, "gpu_process")) == 1


def test_report_mode_tells_and_ends_nothing(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, mode="report") as host:
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: violations(host, "gpu_process"), "no violation", _TOLD_S)
        time.sleep(1.2)
        assert not gone(pid)
        assert len(violations(host, "gpu_process")) == 1, "told once"


def test_gpu_seconds_run_out(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, budgets={"actor": {"gpu_seconds": 1.5}}) as host:
        pid = host.inside(
            _CHILD.replace("result =", "from ray_guard.client import engine\nengine.register(child.pid)\nresult ="),
            python=PYTHON,
            program=_HOLD,
            gpu=str(fresh.gpu),
        )
        nvml.gpus[0].runs(pid)
        nvml.gpus[0].utilization = 60
        began = time.monotonic()
        while not gone(pid):
            nvml.gpus[0].samples = [(pid, time.time_ns() // 1000, 60)]
            nvml.write()
            assert time.monotonic() - began < 6, "its budget does not end it"
            time.sleep(0.1)
        assert time.monotonic() - began > 2.0, "1.5 GPU-seconds at 60 % take 2.5 s"
        (told,) = violations(host, "gpu_seconds")
        assert told["attributes"]["ray_guard.violation.limit"] == 1.5
        assert 1.5 < told["attributes"]["ray_guard.violation.value"] < 2.2
        assert {v["attributes"]["error.type"] for v in violations(host, "gpu_process")} == {"budget"}
    (usage,) = [span for span in host.journal() if span["name"] == "ray_guard.gpu"]
    found = usage["attributes"]
    assert found["ray_guard.gpu.method"] == ["process_utilization"]
    assert abs(found["ray_guard.gpu.seconds"] - told["attributes"]["ray_guard.violation.value"]) < 1.0
    assert 0 < found["ray_guard.gpu.seconds_error"] < 3
    assert found["ray_guard.gpu.memory_peak"] == GIB

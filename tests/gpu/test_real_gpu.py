"""On a real NVIDIA GPU: who computes is found and ended, what is used is counted, NVML says what the stand-in says.

Needs torch with CUDA (and its Triton) and this package, neither Ray nor vLLM. Skipped, loudly, where there is none.
Prints its figures (``pytest -s tests/gpu``), which belong in docs/gpu.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, wait

from ray_guard.compute.gpu_meter import HIDDEN_READINGS, GpuMeter
from ray_guard.kernel import gpu_majors, nvml
from ray_guard.kernel.gpu_devices import Descriptors
from ray_guard.supervisor import gpu_helper

pytestmark = [pytest.mark.gpu, pytest.mark.kernel, pytest.mark.slow]

PROGRAMS = str(Path(__file__).with_name("programs.py"))


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@contextmanager
def confined(namespace: Namespace, folder: Path, **policy: Any) -> Iterator[Host]:
    host = Host(policy, folder / "evidence", namespace)
    try:
        time.sleep(3.0)  # NVML is loaded
        yield host
    finally:
        host.inside(_END)  # what a program leaves behind lives on, as confined as before
        host.close()


_END = """
import builtins
for child in getattr(builtins, 'children', ()):
    child.kill()
    child.wait()
"""


_START = """
import builtins, subprocess
from ray_guard.client import engine
child = subprocess.Popen([python, programs, name, seconds, share], stdout=subprocess.PIPE, text=True)
builtins.children = [*getattr(builtins, 'children', ()), child]
if registered:
    engine.register(child.pid)
child.stdout.readline()
result = [child.pid, child.stdout.readline() if registered else "", child.stdout.readline() if wait else ""]
"""


def start(
    host: Host, name: str, seconds: float, *, share: float = 1.0, registered: bool = False, wait: bool = False
) -> tuple[int, str, str]:
    told = host.inside(
        _START, python=PYTHON, programs=PROGRAMS, name=name, seconds=str(seconds), share=str(share),
        registered=registered, wait=wait,
    )  # fmt: skip
    return told[0], told[1], told[2]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def spans(host: Host, name: str) -> list[dict[str, Any]]:
    return [span for span in host.journal() if span["name"] == name]


def test_a_miner_beside_the_engine_is_ended_and_the_engine_goes_on(namespace: Namespace, tmp_path: Path) -> None:
    free = subprocess.run([PYTHON, PROGRAMS, "miner", "1"], capture_output=True, text=True)
    assert free.returncode == 0, f"the miner does not even work: {free.stderr[-2000:]}"
    with confined(namespace, tmp_path, gpu="engine") as host:
        engine, said, _ = start(host, "engine", 30, registered=True)
        assert said == "computes\n"
        miner, _, _ = start(host, "miner", 30)
        began = time.monotonic()
        wait(lambda: gone(miner), "the miner goes on", 5.0)
        print(f"a miner was gone {time.monotonic() - began:.2f} s after it set out to open the GPU")
        assert not gone(engine)
        (told,) = spans(host, "ray_guard.violation")
        assert told["attributes"]["error.type"] == "not_an_engine"


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_gpu_seconds_are_within_their_bound(namespace: Namespace, tmp_path: Path, share: float) -> None:
    with confined(namespace, tmp_path, gpu="engine", budgets={"actor": {"gpu_seconds": 1000}}) as host:
        _, _, computed = start(host, "engine", 10, share=share, registered=True, wait=True)
        time.sleep(1.5)
    (usage,) = spans(host, "ray_guard.gpu")
    found = usage["attributes"]
    seconds, error = found["ray_guard.gpu.seconds"], found["ray_guard.gpu.seconds_error"]
    print(f"share {share}: {float(computed):.2f} s of kernels, {seconds} ± {error} GPU-seconds by "
          f"{found['ray_guard.gpu.method']}, {found['ray_guard.gpu.memory_peak'] >> 20} MiB, "
          f"{found.get('ray_guard.gpu.energy_joules')} J")  # fmt: skip
    assert abs(seconds - float(computed)) <= error + 1.0, "a second of warming up before it said that it computes"
    assert found["ray_guard.gpu.memory_peak"] > 3 * 8192 * 8192 * 2


def test_two_that_compute_by_turns_share_the_time(namespace: Namespace, tmp_path: Path) -> None:
    with confined(namespace, tmp_path, gpu="engine", budgets={"actor": {"gpu_seconds": 1000}}) as host:
        pids = [start(host, "engine", 10, registered=True)[0] for _ in range(2)]
        began = time.monotonic()
        wait(lambda: all(map(gone, pids)), "they do not end", 30.0)
        seconds = time.monotonic() - began
        time.sleep(1.5)
    (usage,) = spans(host, "ray_guard.gpu")
    found, error = (usage["attributes"][f"ray_guard.gpu.{name}"] for name in ("seconds", "seconds_error"))
    print(f"two engines at once, for {seconds:.2f} s: {found} ± {error} GPU-seconds together")
    assert abs(found - seconds) <= error + 4.0, "the first had some seconds to itself, while the second loaded torch"


def test_a_budget_of_memory_ends_an_engine(namespace: Namespace, tmp_path: Path) -> None:
    with confined(namespace, tmp_path, gpu="engine", budgets={"actor": {"gpu_memory": 600 << 20}}) as host:
        pid, _, _ = start(host, "engine", 30, registered=True)
        wait(lambda: gone(pid), "it holds more than it may", 6.0)
        kinds = {span["attributes"]["ray_guard.violation.kind"] for span in spans(host, "ray_guard.violation")}
        assert "gpu_memory" in kinds


def test_processes_of_a_policy_share_memory_of_the_gpu(namespace: Namespace, tmp_path: Path) -> None:
    """As trainers hand weights to engines: CUDA passes descriptors over a socket of an abstract name of its own."""
    program = str(Path(__file__).with_name("sharing.py"))
    with confined(namespace, tmp_path, role="policy", gpu="any") as host:
        found = host.run("actor", [PYTHON, program], timeout=60)
        assert found.stdout.split() == ["1000.0", "2.0"], found.stderr[-2000:]


def test_a_budget_ends_an_engine(namespace: Namespace, tmp_path: Path) -> None:
    with confined(namespace, tmp_path, gpu="engine", budgets={"actor": {"gpu_seconds": 4}}) as host:
        pid, _, _ = start(host, "engine", 30, registered=True)
        began = time.monotonic()
        wait(lambda: gone(pid), "it has no end", 12.0)
        assert time.monotonic() - began > 2.0
        kinds = {span["attributes"]["ray_guard.violation.kind"] for span in spans(host, "ray_guard.violation")}
        assert kinds == {"gpu_seconds", "gpu_process"}


def test_a_tool_gets_no_gpu(namespace: Namespace, tmp_path: Path) -> None:
    mine = [PYTHON, PROGRAMS, "engine", "1"]  # the miner's Triton would want a cache in the home folder
    with confined(namespace, tmp_path / "any", gpu="any") as host:
        began = time.monotonic()
        free = host.run("call", mine, timeout=60)
        print(f"a tool that may use the GPU computed for a second in {time.monotonic() - began:.1f} s")
        assert free.status == 0, f"the control: a tool that may use the GPU cannot: {free.stderr[-2000:]}"
    with confined(namespace, tmp_path / "engine", gpu="engine") as host:
        start(host, "engine", 30, registered=True)
        refused = host.run("call", mine, timeout=60)
        assert refused.status not in (0, None)
        print(f"a tool that may not: {refused.stderr.strip().splitlines()[-1]}")
        assert not spans(host, "ray_guard.violation"), "it got as far as a GPU, and was only then ended"


def test_what_nvml_costs() -> None:
    library = nvml.Nvml(nvml.find_library())
    library.read()
    turns = 4 * gpu_helper.ENERGY_EVERY
    cpu, times = time.thread_time(), []
    for turn in range(turns):
        began = time.monotonic()
        readings = gpu_helper.read(library, turn)
        times.append(time.monotonic() - began)
        time.sleep(0.1)
    cpu = (time.thread_time() - cpu) / turns
    print(f"NVML: {1000 * sorted(times)[turns // 2]:.1f} ms (slowest {1000 * max(times):.1f}) for {len(readings)}, "
          f"{100 * cpu / gpu_helper.READING_S:.2f} % of a core; driver {library.driver}; {readings[0]}")  # fmt: skip
    assert cpu / gpu_helper.READING_S < 0.01 * len(readings)


def test_what_a_process_holds_that_only_asks_for_gpus() -> None:
    """Whether control nodes alone are told and not ended stands on this."""
    for visible in ("", "0"):
        program = "import torch; print(torch.cuda.is_available(), flush=True); input()"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        process = subprocess.Popen([PYTHON, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env=environment)  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        majors = gpu_majors.known_majors()
        held = Descriptors(majors).scan()[0].get(process.pid, frozenset())
        process.communicate("\n")
        kinds = sorted({str(gpu_majors.kind_of(device, majors)) for device in held})
        print(f"CUDA_VISIBLE_DEVICES={visible!r}: is_available() {said}, holds {kinds}")
        if visible == "":
            assert "nvidia" not in kinds


@pytest.mark.skipif(os.geteuid() != 0, reason="another pid namespace needs root")
def test_a_tenant_of_another_pid_namespace_is_unexplained() -> None:
    miner = subprocess.Popen([PYTHON, PROGRAMS, "miner", "20"], stdout=subprocess.PIPE, text=True)
    assert miner.stdout is not None
    miner.stdout.readline()
    try:
        program = (
            "import json, time; from ray_guard.kernel import nvml; n = nvml.Nvml(nvml.find_library())\n"
            f"for _ in range({HIDDEN_READINGS + 2}): "
            "print(json.dumps([nvml.to_wire(r) for r in n.read()]), flush=True); time.sleep(0.5)"
        )
        inside = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program]
        lines = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.splitlines()
    finally:
        miner.kill()
        miner.communicate()
    meter = GpuMeter()
    readings = [nvml.from_wire(json.loads(line)[0]) for line in lines]
    listed = [reading.processes for reading in readings if not isinstance(reading.processes, nvml.Missing)]
    assert all(process.pid != miner.pid for processes in listed for process in processes)
    found = [hidden for reading in readings if (hidden := meter.take(reading).hidden) is not None]
    print(f"a tenant that nobody sees: {found}")
    assert found

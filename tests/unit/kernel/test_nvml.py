"""The real nvidia-ml-py on a library whose GPUs are scripted: every reading is a value or says why there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_guard.kernel import nvml
from ray_guard.kernel.nvml import Missing, NotLoaded, Process, Reading, Sample, find_library, from_wire, to_wire

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu_standin"))

import standin
from standin import GIB, Gpu, Standin, now_us

_READER = """
import json, sys
from ray_guard.kernel import nvml
try: library = nvml.Nvml(sys.argv[1])
except nvml.NotLoaded as error: print(json.dumps({"error": str(error)}), flush=True); sys.exit()
print(json.dumps({"driver": library.driver}), flush=True)
for _ in sys.stdin: print(json.dumps([nvml.to_wire(reading) for reading in library.read()]), flush=True)
"""


class Reader:
    """A process with the library loaded: which libnvidia-ml.so.1 a process has it never changes."""

    def __init__(self, made: Standin) -> None:
        self.made = made
        environment = {**os.environ, "LD_LIBRARY_PATH": "/nowhere"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(made.library)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.about: dict[str, Any] = json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def read(self) -> list[Reading]:
        self.made.write()
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [from_wire(each) for each in json.loads(self._line())]

    def one(self) -> Reading:
        (reading,) = self.read()
        return reading

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    made = Reader(Standin(tmp_path_factory.mktemp("nvml")))
    yield made
    made.close()


@pytest.fixture
def reader(shared: Reader) -> Reader:
    shared.made.gpus, shared.made.errors, shared.made.delays = [Gpu()], {}, {}
    return shared


def test_an_idle_gpu_is_measured_zero(reader: Reader) -> None:
    """NVML says NOT_FOUND, which is no failure."""
    reading = reader.one()
    assert (reading.samples, reading.processes, reading.utilization) == ((), (), 0)
    assert (reading.memory_used, reading.reserved_known, reading.energy_mj, reading.mig) == (0, True, 1000, False)
    assert reading.uuid == "GPU-00000000"
    assert reader.about == {"driver": "575.57.08"}


def test_processes_and_samples(reader: Reader) -> None:
    gpu = reader.made.gpus[0]
    gpu.runs(100, 3 * GIB)
    gpu.runs(200, 2 * GIB, kind="graphics")
    now = now_us()
    gpu.utilization = 90
    gpu.samples = [(100, now - 1000, 70), (200, now - 500, 20)]
    reading = reader.one()
    assert reading.processes == (Process(100, 3 * GIB, None, None), Process(200, 2 * GIB, None, None))
    assert reading.samples == (Sample(100, now - 1000, 70), Sample(200, now - 500, 20))
    assert 0 < reading.window_s < 5
    again = reader.one()
    assert again.samples == (), "what was read is not read again: microseconds, not milliseconds"
    assert again.window_s == 0, "the next sample may be under way: that is no zero yet"
    later = now_us()
    gpu.samples.append((100, later, 50))
    assert reader.one().samples == (Sample(100, later, 50),)
    gpu.samples = []
    deadline = time.monotonic() + 20
    while not (idle := reader.one()).window_s:
        assert time.monotonic() < deadline, "for longer than a sample takes there was none, and that is no zero"
        time.sleep(0.05)
    assert idle.samples == ()
    assert idle.window_s >= 1.0


def test_memory_that_nvml_does_not_tell_is_none(reader: Reader) -> None:
    reader.made.gpus[0].runs(100, standin.UNAVAILABLE)
    assert reader.one().processes == (Process(100, None, None, None),)


def test_a_process_in_both_lists_is_one(reader: Reader) -> None:
    for kind, memory in (("compute", GIB), ("graphics", 2 * GIB)):
        reader.made.gpus[0].runs(100, memory, kind=kind)
    assert reader.one().processes == (Process(100, 2 * GIB, None, None),)


def test_mig_instances_are_kept_apart(reader: Reader) -> None:
    gpu = reader.made.gpus[0]
    gpu.mig = True
    gpu.processes = [("compute", 100, GIB, 1, 0), ("compute", 100, GIB, 2, 0)]
    reader.made.errors = {"nvmlDeviceGetProcessUtilization": standin.NOT_SUPPORTED}
    reading = reader.one()
    assert reading.mig is True
    assert reading.processes == (Process(100, GIB, 1, 0), Process(100, GIB, 2, 0))
    assert reading.samples == Missing("nvmlDeviceGetProcessUtilization", "NOT_SUPPORTED")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
        ("nvmlDeviceGetProcessUtilization", "samples"),
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_mj"),
    ],
)
@pytest.mark.parametrize(
    ("code", "error"), [(3, "NOT_SUPPORTED"), (4, "NO_PERMISSION"), (15, "GPU_IS_LOST"), (999, "UNKNOWN")]
)
def test_a_failure_is_a_missing_reading_and_no_zero(
    reader: Reader, call: str, name: str, code: int, error: str
) -> None:
    reader.made.errors = {call: code}
    found = getattr(reader.one(), name)
    assert isinstance(found, Missing)
    assert found.error == error
    assert error in str(found)


def test_a_code_without_a_name_is_told_by_its_number(reader: Reader) -> None:
    reader.made.errors = {"nvmlDeviceGetUtilizationRates": 77}
    assert reader.one().utilization == Missing("nvmlDeviceGetUtilizationRates", "code 77")


def test_an_old_driver_tells_memory_without_its_reserve(reader: Reader) -> None:
    reader.made.gpus[0].runs(100, GIB)
    reader.made.errors = {"nvmlDeviceGetMemoryInfo_v2": 13}
    reading = reader.one()
    assert (reading.memory_used, reading.reserved_known) == (GIB + GIB // 2, False)
    reader.made.errors["nvmlDeviceGetMemoryInfo"] = 999
    assert reader.one().memory_used == Missing("nvmlDeviceGetMemoryInfo", "UNKNOWN")


@pytest.mark.parametrize("error", [0, 3])
def test_a_gpu_is_told_by_the_minor_of_its_node(tmp_path: Path, error: int) -> None:
    made = Standin(tmp_path)
    made.gpus[0].minor, made.errors = 5, {"nvmlDeviceGetMinorNumber": error}
    made.write()
    reader = Reader(made)
    assert reader.one().minor == (Missing("nvmlDeviceGetMinorNumber", "NOT_SUPPORTED") if error else 5)
    reader.close()


def test_two_gpus_are_two_readings(reader: Reader) -> None:
    reader.made.gpus.append(Gpu(utilization=40))
    reader.made.write()
    other = Reader(reader.made)
    try:
        assert [(reading.device, reading.utilization) for reading in other.read()] == [(0, 0), (1, 40)]
    finally:
        other.close()


@pytest.mark.parametrize(
    ("code", "error"), [(9, "DRIVER_NOT_LOADED"), (18, "LIB_RM_VERSION_MISMATCH"), (4, "NO_PERMISSION")]
)
def test_a_library_that_does_not_fit_its_driver_says_so(tmp_path: Path, code: int, error: str) -> None:
    made = Standin(tmp_path)
    made.errors = {"nvmlInit": code}
    made.write()
    reader = Reader(made)
    reader.close()
    assert error in reader.about["error"]
    assert str(made.library) in reader.about["error"]


def test_a_library_that_sees_no_gpu_says_so(tmp_path: Path) -> None:
    """What somebody uses of one all the same would be measured as nothing."""
    made = Standin(tmp_path)
    made.gpus = []
    made.write()
    reader = Reader(made)
    assert "it sees no GPU" in reader.about["error"]
    reader.close()


def test_a_library_without_a_function_lacks_that_reading_alone(tmp_path: Path) -> None:
    reader = Reader(Standin(tmp_path, without=("WITHOUT_PROCESS_UTILIZATION",)))
    try:
        reading = reader.one()
        assert reading.samples == Missing("nvmlDeviceGetProcessUtilization", "FUNCTION_NOT_FOUND")
        assert reading.processes == ()
    finally:
        reader.close()


def test_a_file_that_is_no_library_says_so(tmp_path: Path) -> None:
    path = tmp_path / "libnvidia-ml.so.1"
    path.write_text("no library")
    with pytest.raises(NotLoaded, match=str(path)):
        nvml.Nvml(str(path))


def test_the_library_is_roots_or_is_not_used(tmp_path: Path) -> None:
    missing, planted = tmp_path / "none.so", tmp_path / "libnvidia-ml.so.1"
    with pytest.raises(NotLoaded, match="no libnvidia-ml"):
        find_library([str(missing)])
    planted.touch()
    planted.chmod(0o666)
    with pytest.raises(NotLoaded, match="can be changed by others than root"):
        find_library([str(missing), str(planted)])
    assert find_library([str(missing), "/usr/bin/env"]) == os.path.realpath("/usr/bin/env")


def test_a_reading_survives_its_message() -> None:
    reading = Reading(0, "GPU-1", 3, 1.5, 10, Missing("a", "b"), 5, False, 3, Missing("c", "d"),
                      (Process(1, None, 2, None),), (Sample(1, 2, 3),), 0.5)  # fmt: skip
    assert from_wire(json.loads(json.dumps(to_wire(reading)))) == reading
    for broken in ({}, {**to_wire(reading), "processes": [[1]]}, {**to_wire(reading), "mig": {"missing": []}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            from_wire(broken)

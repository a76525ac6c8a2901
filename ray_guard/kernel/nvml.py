"""What NVML tells of a node's GPUs, row by row, through nvidia-ml-py. Runs in the GPU helper, and in doctor's.

Importing this module loads neither pynvml nor the library. A reading that could not be had is a :class:`Missing`, which
says why: it is never zero. ``python -m ray_guard.kernel.nvml`` prints one reading of every GPU as JSON.

Sources: nvml.h of driver 575 (process rows of 24 bytes, utilization samples of 32) and nvidia-ml-py's pynvml.py. What
surprises there, and is answered here:

- ``lastSeenTimeStamp`` is microseconds, and "nothing newer than that" is the error NOT_FOUND: an idle GPU. pynvml turns
  the other way to say it, success with no rows, into an NVMLError of value 0.
- A process has one row, the mean of all samples since then (in which it was seen or not), at the time of the last in
  which it was. One whose time has come is gone from it at once. Measured on an H200, driver 580: five samples a second.
- Some calls are dear there, in CPU time: 4.3 ms for the energy, 2 to 3 ms for the samples, 0.3 ms for the MIG mode, all
  others together 0.5 ms. So they are asked for less often than the rest.
- ``usedGpuMemory`` may be all ones, which pynvml gives as None.
- pynvml loads ``libnvidia-ml.so.1`` by name. The loader does not look for a name that is loaded already, so an absolute
  path loaded before decides which library that is.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

LIBRARIES: Final = (
    *(f"/usr/lib/{machine}-linux-gnu/libnvidia-ml.so.1" for machine in ("x86_64", "aarch64")),
    "/usr/lib64/libnvidia-ml.so.1",
    "/usr/lib/libnvidia-ml.so.1",
    "/usr/local/nvidia/lib64/libnvidia-ml.so.1",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
    "/run/opengl-driver/lib/libnvidia-ml.so.1",
    *(f"/run/nvidia/driver/usr/lib/{machine}-linux-gnu/libnvidia-ml.so.1" for machine in ("x86_64", "aarch64")),
)
"""Where drivers, container runtimes and GPU operators put it; the first that is there is used."""

SAMPLE_PERIOD_S: Final = 1.0
"""The longest that NVML names for one sample; it may be as short as a sixth."""
_QUIET_US: Final = 1_250_000
"""Without a row for longer than a sample takes a GPU was idle; before that, the sample may still be under way, unless
the last one saw an idle GPU."""
_ATTEMPTS: Final = 3
"""Processes may come between the question how many there are and the question which."""
_T = TypeVar("_T")


class Missing(NamedTuple):
    """A reading that could not be had. ``error``: NVML's name for it (``NOT_SUPPORTED``), or this module's own."""

    call: str
    error: str

    def __str__(self) -> str:
        return f"{self.call}: {self.error}"


class Process(NamedTuple):
    """A process with a context on a GPU. ``memory`` in bytes; None: NVML does not tell. Instances: of a MIG GPU."""

    pid: int
    memory: int | None
    gpu_instance: int | None
    compute_instance: int | None


class Sample(NamedTuple):
    """What a process used of a GPU's multiprocessors lately, in percent; ``time_us``: microseconds since 1970."""

    pid: int
    time_us: int
    sm: int


class Reading(NamedTuple):
    """One GPU at ``monotonic`` (seconds), which was ``time_us`` of the clock that the samples carry."""

    device: int
    uuid: str
    minor: int | Missing
    """Of its device node."""
    monotonic: float
    time_us: int
    mig: bool | Missing
    memory_used: int | Missing
    """Bytes; the driver's own reserve is not among them where ``reserved_known``."""
    reserved_known: bool
    utilization: int | Missing
    """Percent of the last sample period in which something ran."""
    energy_mj: int | Missing | None
    """Millijoules since the driver was loaded; None: not asked this time."""
    processes: tuple[Process, ...] | Missing
    samples: tuple[Sample, ...] | Missing
    window_s: float
    """Seconds up to now of which the samples speak; 0: of none, they were not asked for or are still under way."""


class NotLoaded(Exception):
    """NVML cannot be used here, and why."""


def find_library(candidates: Iterable[str] = LIBRARIES) -> str:
    """The library's absolute path, links resolved.

    Raises:
        NotLoaded: there is none, or somebody other than root could have put it there.
    """
    for candidate in candidates:
        if os.path.exists(candidate):
            path = os.path.realpath(candidate)
            for part in _upwards(path):
                found = os.stat(part)
                if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise NotLoaded(f"{path} is not used: {part} can be changed by others than root")
            return path
    raise NotLoaded("no libnvidia-ml.so.1 where NVIDIA drivers put it")


def _upwards(path: str) -> Iterable[str]:
    while True:
        yield path
        if path == "/":
            return
        path = os.path.dirname(path)


class Nvml:
    """NVML, loaded and initialised from the library at ``path``.

    Raises:
        NotLoaded: it is not there, does not fit its driver, or sees no GPU: what is used of one it would not tell.
    """

    def __init__(self, path: str) -> None:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            import pynvml
        except (OSError, ImportError) as error:
            raise NotLoaded(f"{path}: {error}") from error
        self._pynvml: Any = pynvml
        self._names = _error_names(pynvml)
        try:
            pynvml.nvmlInit()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            raise NotLoaded(f"{path}: {self._name(error)}: {error}") from error
        if not self._devices:
            raise NotLoaded(f"{path}: it sees no GPU")
        self._minors = [self._map("nvmlDeviceGetMinorNumber", int, device) for device in self._devices]
        self._uuids = [_text(self._try("nvmlDeviceGetUUID", device)) for device in self._devices]
        self._since_us = [time.time_ns() // 1000] * len(self._devices)
        self._unsampled: list[Missing | None] = [None] * len(self._devices)
        self._migs: list[bool | Missing] = [self._mig(device) for device in self._devices]

    @property
    def driver(self) -> str:
        """The driver's version."""
        return _text(self._try("nvmlSystemGetDriverVersion"))

    def read(self, *, samples: bool = True, energy: bool = True) -> list[Reading]:
        """Every GPU, once.

        Args:
            samples: also what processes used, since this was last asked.
            energy: also the energy, and whether it is a MIG GPU by now.
        """
        return [self._read(index, device, sampled=samples, energy=energy) for index, device in enumerate(self._devices)]

    def _read(self, index: int, device: Any, *, sampled: bool, energy: bool) -> Reading:
        utilization = self._map("nvmlDeviceGetUtilizationRates", lambda rates: int(rates.gpu), device)
        samples: tuple[Sample, ...] | Missing = self._unsampled[index] or ()
        window_s = 0.0
        if sampled:
            samples, window_s = self._samples(index, device, idle=utilization == 0)
        memory, reserved_known = self._memory(device)
        if energy:
            self._migs[index] = self._mig(device)
        return Reading(
            device=index,
            uuid=self._uuids[index],
            minor=self._minors[index],
            monotonic=time.monotonic(),
            time_us=time.time_ns() // 1000,
            mig=self._migs[index],
            memory_used=memory,
            reserved_known=reserved_known,
            utilization=utilization,
            energy_mj=self._map("nvmlDeviceGetTotalEnergyConsumption", int, device) if energy else None,
            processes=self._processes(device),
            samples=samples,
            window_s=window_s,
        )

    def _mig(self, device: Any) -> bool | Missing:
        found = self._map("nvmlDeviceGetMigMode", lambda modes: bool(modes[0]), device)
        if isinstance(found, Missing) and found.error in ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND"):
            return False  # a GPU or a driver that has no such thing
        return found

    def _memory(self, device: Any) -> tuple[int | Missing, bool]:
        call, version = "nvmlDeviceGetMemoryInfo", self._pynvml.nvmlMemory_v2
        found = self._map(call, lambda memory: int(memory.used), device, version)
        if isinstance(found, Missing):  # before driver 510
            return self._map(call, lambda memory: int(memory.used), device), False
        return found, True

    def _processes(self, device: Any) -> tuple[Process, ...] | Missing:
        """With a compute or a graphics context; each once per instance, though NVML may name one in both lists."""
        found: dict[tuple[int, int | None, int | None], Process] = {}
        for call in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
            rows = self._map(call, lambda rows: [_process(row) for row in rows], device)
            if isinstance(rows, Missing):
                if "Graphics" in call and rows.error == "NOT_SUPPORTED":
                    continue  # a GPU that draws nothing
                return rows
            for row in rows:
                key = (row.pid, row.gpu_instance, row.compute_instance)
                known = found.get(key)
                if known is None or (known.memory is not None and (row.memory is None or row.memory > known.memory)):
                    found[key] = row
        return tuple(found.values())

    def _samples(self, index: int, device: Any, *, idle: bool) -> tuple[tuple[Sample, ...] | Missing, float]:
        """What processes used, and in how many seconds."""
        call, now = "nvmlDeviceGetProcessUtilization", time.time_ns() // 1000
        rows = self._map(call, lambda rows: tuple(_sample(row) for row in rows), device, self._since_us[index])
        if isinstance(rows, Missing) and rows.error in ("NOT_FOUND", "SUCCESS"):
            rows = ()
        self._unsampled[index] = rows if isinstance(rows, Missing) else None
        passed = max(0, now - self._since_us[index])
        if not rows and not idle and passed < _QUIET_US:
            return rows, 0.0
        self._since_us[index] = now
        return rows, passed / 1e6

    def _map(self, call: str, convert: Callable[[Any], _T], *arguments: Any) -> _T | Missing:
        found = self._try(call, *arguments)
        return found if isinstance(found, Missing) else convert(found)

    def _try(self, call: str, *arguments: Any) -> Any:
        """What ``call`` returns, or what stands in its way."""
        error = "UNKNOWN"
        for _ in range(_ATTEMPTS):
            try:
                return getattr(self._pynvml, call)(*arguments)
            except self._pynvml.NVMLError as raised:
                error = self._name(raised)
                if error != "INSUFFICIENT_SIZE":
                    break
        return Missing(call, error)

    def _name(self, error: Any) -> str:
        return self._names.get(error.value, f"code {error.value}")


def _error_names(pynvml: Any) -> dict[int, str]:
    """NVML's names of its errors, without NVML_ERROR_."""
    prefix = "NVML_ERROR_"
    names = {value: name.removeprefix(prefix) for name, value in vars(pynvml).items() if name.startswith(prefix)}
    return {**names, pynvml.NVML_SUCCESS: "SUCCESS"}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


_NO_INSTANCE: Final = 0xFFFFFFFF


def _process(row: Any) -> Process:
    memory = None if row.usedGpuMemory is None else int(row.usedGpuMemory)
    instances = (None if value in (None, _NO_INSTANCE) else int(value)
                 for value in (row.gpuInstanceId, row.computeInstanceId))  # fmt: skip
    return Process(int(row.pid), memory, *instances)


def _sample(row: Any) -> Sample:
    return Sample(int(row.pid), int(row.timeStamp), int(row.smUtil))


# ---------------------------------------------------------------------------------------------------------------------
# readings as messages


def to_wire(reading: Reading) -> dict[str, Any]:
    """The reading as plain data."""
    return {name: _plain(value) for name, value in reading._asdict().items()}


def _plain(value: object) -> object:
    if isinstance(value, Missing):
        return {"missing": list(value)}
    if isinstance(value, tuple):
        return [list(row) for row in value]
    return value


def from_wire(message: Mapping[str, Any]) -> Reading:
    """The reading that :func:`to_wire` described. Raises KeyError, TypeError or ValueError for anything else."""
    fields = {name: _found(message[name]) for name in Reading._fields}
    for name, row in (("processes", Process), ("samples", Sample)):
        if not isinstance(fields[name], Missing):
            fields[name] = tuple(row(*entry) for entry in fields[name])
    return Reading(**fields)


def _found(value: Any) -> Any:
    if isinstance(value, dict):
        call, error = value["missing"]
        return Missing(str(call), str(error))
    return value


def main() -> None:
    """Prints one reading, or why there is none."""
    try:
        path = find_library()
        nvml = Nvml(path)
        told: dict[str, Any] = {
            "library": path,
            "driver": nvml.driver,
            "devices": [to_wire(reading) for reading in nvml.read()],
        }
    except NotLoaded as error:
        told = {"error": str(error)}
    json.dump(told, sys.stdout)
    print()


if __name__ == "__main__":
    main()

"""A scripted NVML: builds nvml.c as ``libnvidia-ml.so.1`` and writes the state it reads. Runs in tests."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
GIB = 1 << 30

NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
LIB_RM_VERSION_MISMATCH = 18
UNKNOWN = 999
UNAVAILABLE = -1


@dataclass
class Gpu:
    """One GPU: memory in bytes, utilization in percent, energy in millijoules."""

    mig: bool = False
    total: int = 80 * GIB
    used: int = 0
    reserved: int = GIB // 2
    utilization: int = 0
    energy: int = 1000
    minor: int | None = None
    """Of its device node; None: the GPU's index."""
    processes: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    """(``compute`` or ``graphics``, pid, memory, GPU instance, compute instance)."""
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """(pid, microseconds since 1970, percent)."""

    def runs(self, pid: int, memory: int = GIB, *, kind: str = "compute") -> None:
        """A process with a context and so much memory. UNAVAILABLE: NVML does not tell."""
        self.processes.append((kind, pid, memory, UNAVAILABLE, UNAVAILABLE))
        self.used += max(0, memory)


class Standin:
    """The library in ``folder``, and what it says. ``without``: functions it lacks, as macros of nvml.c."""

    def __init__(self, folder: Path, *, without: tuple[str, ...] = ()) -> None:
        self.library = folder / "libnvidia-ml.so.1"
        self._state = folder / "state"
        self.gpus = [Gpu()]
        self.errors: dict[str, int] = {}
        self.delays: dict[str, int] = {}
        """Milliseconds by call."""
        self.write()
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libnvidia-ml.so.1"]
        command += [f'-DSTATE="{self._state}"', *(f"-D{name}" for name in without)]
        done = subprocess.run(
            [*command, "-o", str(self.library), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the stand-in cannot be built: {done.stderr}")

    def write(self) -> None:
        """Makes what was changed here true."""
        lines = []
        for index, gpu in enumerate(self.gpus):
            values = (int(gpu.mig), gpu.total, gpu.used, gpu.reserved, gpu.utilization, gpu.energy)
            lines.append(f"device {index} {' '.join(map(str, values))}")
            lines += [] if gpu.minor is None else [f"minor {index} {gpu.minor}"]
            lines += [f"process {index} {' '.join(map(str, row))}" for row in gpu.processes]
            lines += [f"sample {index} {' '.join(map(str, row))}" for row in gpu.samples]
        lines += [f"error {call} {code}" for call, code in self.errors.items()]
        lines += [f"delay {call} {duration}" for call, duration in self.delays.items()]
        temporary = self._state.with_suffix(".new")
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, self._state)


def now_us() -> int:
    return time.time_ns() // 1000

"""A namespace in which a GPU driver seems to be loaded: what its tests share.

The product is not told: /proc/devices says there that a character device this kernel really has is NVIDIA's, and
libnvidia-ml.so.1 stands where a GPU operator would put it.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Namespace
from standin import Standin

_CANDIDATES = ((203, 0), (10, 200), (10, 229), (10, 237))
"""Devices that hardly anybody holds open: cpuid, tun, fuse, loop-control."""


class GpuHost:
    """The namespace, its one device node (``gpu``), and what NVML says there (``nvml``; None: there is no library)."""

    def __init__(self, folder: Path, *, nvml: bool = True) -> None:
        self.namespace = Namespace()
        self.gpu, self.major = _node(folder)
        devices = folder / "devices"
        devices.write_text(f"Character devices:\n  1 mem\n{self.major:3} nvidia\n\nBlock devices:\n  7 loop\n")
        where = f"/run/nvidia/driver/usr/lib/{os.uname().machine}-linux-gnu"
        self.nvml: Standin | None = None
        script = f"mount --bind {devices} /proc/devices && mount -t tmpfs tmpfs /run && chmod 755 /run"
        if nvml:
            self.nvml = Standin(folder)
            self.nvml.gpus[0].minor = os.minor(self.gpu.stat().st_rdev)
            self.nvml.write()
            script += f" && mkdir -p {where} && cp {self.nvml.library} {where} && chmod -R go-w /run/nvidia"
        subprocess.run([*self.namespace.outside, "sh", "-ec", script], check=True)

    def python(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """An unconfined process there."""
        argv = [*self.namespace.prefix, sys.executable, "-I", "-S", "-c", code, *arguments]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        self.namespace.close()


def _node(folder: Path) -> tuple[Path, int]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a device node, and mount one over /proc/devices")
    for major, minor in _CANDIDATES:
        path = folder / f"gpu-{major}-{minor}"
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
            path.chmod(0o666)
            os.close(os.open(path, os.O_RDONLY))
        except OSError:
            continue
        return path, major
    pytest.skip("none of the devices that could stand for a GPU can be opened here")


@contextmanager
def gpu_host(folder: Path, *, nvml: bool = True) -> Iterator[GpuHost]:
    host = GpuHost(folder, nvml=nvml)
    try:
        yield host
    finally:
        host.close()

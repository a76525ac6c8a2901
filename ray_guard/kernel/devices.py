"""Device nodes by what is behind them, not by their path. Runs in target, supervisor and zygote.

Source: ``Documentation/admin-guide/devices.txt``; majors that the kernel gives out at run time are read from
/proc/devices (NVIDIA's uvm, caps and nvswitch; KFD; infiniband).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from enum import Enum
from typing import Final


class Kind(Enum):
    """What a device can be used for."""

    HARMLESS = "harmless"
    """null, zero, full, random, urandom, terminals."""
    GPU = "gpu"
    OTHER = "other"


_MEM: Final = frozenset({3, 5, 7, 8, 9})
_TERMINALS: Final = frozenset({4, 5, *range(136, 144)})
_NVIDIA: Final = 195
_DRM: Final = 226
_FIRST_RENDER: Final = 128


def _named_majors() -> dict[int, str]:
    """Name by number of the character devices in /proc/devices; empty where it cannot be read."""
    found: dict[int, str] = {}
    try:
        with open("/proc/devices") as file:
            for line in file:
                number, _, name = line.strip().partition(" ")
                if line.startswith("Block"):
                    break
                if number.isdigit():
                    found[int(number)] = name
    except OSError:
        pass
    return found


def kind(mode: int, device: int) -> Kind | None:
    """Of a file with this ``st_mode`` and ``st_rdev``; None: it is no device. A device nobody knows is OTHER."""
    if stat.S_ISBLK(mode):
        return Kind.OTHER
    if not stat.S_ISCHR(mode):
        return None
    major, minor = os.major(device), os.minor(device)
    if major == 1:
        return Kind.HARMLESS if minor in _MEM else Kind.OTHER
    if major in _TERMINALS:
        return Kind.HARMLESS
    if major == _NVIDIA or (major == _DRM and minor >= _FIRST_RENDER):
        return Kind.GPU
    name = _named_majors().get(major, "")
    return Kind.GPU if name.startswith("nvidia") or name == "kfd" else Kind.OTHER


def gpu_nodes() -> Iterator[str]:
    """The paths below /dev that stand for GPUs on this host."""
    folders = ["/dev", "/dev/dri", "/dev/nvidia-caps"]
    for folder in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if kind(found.st_mode, found.st_rdev) is Kind.GPU:
                yield entry.path

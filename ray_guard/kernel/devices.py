"""Device nodes by what is behind them, not by their path. Runs in target, supervisor and zygote.

Source: ``Documentation/admin-guide/devices.txt``. What is a GPU's is known in :mod:`ray_guard.kernel.gpu_majors`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from enum import Enum
from typing import Final

from ray_guard.kernel import gpu_majors


class Kind(Enum):
    """What a device can be used for."""

    HARMLESS = "harmless"
    """null, zero, full, random, urandom, terminals."""
    GPU = "gpu"
    OTHER = "other"


_MEM: Final = frozenset({3, 5, 7, 8, 9})
_TERMINALS: Final = frozenset({4, 5, *range(136, 144)})


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
    if major == gpu_majors.DRM_MAJOR:
        return Kind.GPU if minor >= gpu_majors.FIRST_RENDER_MINOR else Kind.OTHER
    return Kind.GPU if major == gpu_majors.NVIDIA_MAJOR or major in gpu_majors.known_majors() else Kind.OTHER


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

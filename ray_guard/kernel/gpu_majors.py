"""Which device numbers are GPUs': what is known of them, and /proc/devices. Runs in target, supervisor, zygote, helper.

Source: ``Documentation/admin-guide/devices.txt`` for those that are the same everywhere; the others (NVIDIA's uvm, caps
and nvswitch; KFD) are given out when the driver is loaded, and stand in /proc/devices (``fs/proc/devices.c``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

NVIDIA_MAJOR: Final = 195
"""Of nvidia0 … and nvidiactl, for ever; nvidia-uvm and nvidia-caps are given theirs when the driver is loaded."""
DRM_MAJOR: Final = 226
FIRST_RENDER_MINOR: Final = 128
"""Of renderD128 …; below it are the nodes of displays."""
_NVIDIA_CONTROL_MINOR: Final = 254
"""nvidia-modeset; 255 is nvidiactl. Below them every minor is a GPU."""

PROC_DEVICES: Final = "/proc/devices"


class Kind(StrEnum):
    """Whose driver a device node belongs to. ``NVIDIA_CONTROL``: nothing runs on a GPU through these alone."""

    NVIDIA = "nvidia"
    NVIDIA_CONTROL = "nvidia_control"
    DRM = "drm"
    KFD = "kfd"


Majors = Mapping[int, Kind]


def parse_majors(text: str) -> dict[int, Kind]:
    """The GPU majors in the text of /proc/devices; what is no line of it is passed over."""
    found: dict[int, Kind] = {}
    for line in text.partition("Block devices:")[0].splitlines():
        number, _, name = line.strip().partition(" ")
        if not number.isdigit():
            continue
        if name in ("nvidia", "nvidia-frontend", "nvidiactl") or int(number) == NVIDIA_MAJOR:
            found[int(number)] = Kind.NVIDIA
        elif name.startswith("nvidia"):
            found.setdefault(int(number), Kind.NVIDIA_CONTROL)
        elif name == "drm":
            found[int(number)] = Kind.DRM
        elif name == "kfd":
            found[int(number)] = Kind.KFD
    return found


def majors(path: str = PROC_DEVICES, drm: str = "/sys/class/drm") -> dict[int, Kind]:
    """The majors of GPU drivers that are loaded; empty: there is none, so no GPU can be opened.

    Raises:
        OSError: /proc/devices cannot be read: then nobody knows.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        found = parse_majors(file.read())
    if DRM_MAJOR in found and not _renders(drm):
        del found[DRM_MAJOR]  # many a virtual machine has the driver and nothing to render with
    return found


def known_majors() -> dict[int, Kind]:
    """:func:`majors`; where /proc/devices cannot be read, those that are the same everywhere."""
    try:
        return majors()
    except OSError:
        return {NVIDIA_MAJOR: Kind.NVIDIA, DRM_MAJOR: Kind.DRM}


def _renders(folder: str) -> bool:
    try:
        return any(name.startswith("renderD") for name in os.listdir(folder))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # not known to be none


def kind_of(device: int, known: Majors) -> Kind | None:
    """What ``device`` (``st_rdev``) is; None: no GPU."""
    kind = known.get(os.major(device))
    if kind is Kind.NVIDIA and os.minor(device) >= _NVIDIA_CONTROL_MINOR:
        return Kind.NVIDIA_CONTROL
    return kind

"""Removing a folder with all in it, whatever somebody hostile put there. Runs in the zygote."""

from __future__ import annotations

import contextlib
import os
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: str) -> None:
    """Removes ``path`` and all below it, following no symbolic link; what cannot be removed is left."""
    with contextlib.suppress(OSError):
        empty(path)
        os.rmdir(path)


def empty(path: str) -> None:
    """Removes all below ``path``. Folders in folders are moved to the top first, so that no depth is too deep.

    Raises:
        OSError: something cannot be removed.
    """
    try:
        top = os.open(path, _FOLDER)
    except PermissionError:
        os.chmod(path, 0o700)
        top = os.open(path, _FOLDER)
    try:
        number = 0
        while folders := _clear(top):
            for name in folders:
                number += _flatten(name, top, number)
    finally:
        os.close(top)


def _flatten(name: str, top: int, number: int) -> int:
    """Removes folder ``name`` in ``top``, whose own folders go to ``top``; how many there were."""
    folder = _open(name, top)
    try:
        inner = _clear(folder)
        for at, each in enumerate(inner):
            moved = f"ray_guard-{number + at}-{os.urandom(4).hex()}"
            os.rename(each, moved, src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)
    return len(inner)


def _open(name: str, folder: int) -> int:
    """A folder that can be listed and emptied, whatever mode it was left with."""
    try:
        descriptor = os.open(name, _FOLDER, dir_fd=folder)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=folder)
        descriptor = os.open(name, _FOLDER, dir_fd=folder)
    os.chmod(descriptor, 0o700)
    return descriptor


def _clear(folder: int) -> list[str]:
    """Removes what is no folder; the names of those that are."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return folders

"""Removing a folder with all in it, whatever somebody hostile put there. Runs in the zygote."""

from __future__ import annotations

import contextlib
import os
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: str) -> None:
    """Removes ``path`` and all below it, following no symbolic link; what cannot be removed is left.

    Folders in folders are moved to the top first, so that no depth is too deep.
    """
    try:
        top = _open(path, None)
    except OSError:
        return
    try:
        number = 0
        while folders := _clear(top):
            for name in folders:
                try:
                    folder = _open(name, top)
                except OSError:
                    return
                try:
                    for inner in _clear(folder):
                        number += 1
                        os.rename(inner, f"ray_guard-{number}-{os.urandom(4).hex()}", src_dir_fd=folder, dst_dir_fd=top)
                    os.rmdir(name, dir_fd=top)
                finally:
                    os.close(folder)
    except OSError:
        return
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _open(name: str, folder: int | None) -> int:
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

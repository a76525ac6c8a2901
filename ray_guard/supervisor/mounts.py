"""The mount namespace of a leader and its tools: what is below a grant and must not be seen or changed. Runs in zygote.

Made before the leader confines itself, because nobody in a Landlock domain may mount. So it is the leader's for good:
a call whose covers are others, or do not stand any more, gets another leader.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import Final

from ray_guard.kernel import libc, mounting, trees
from ray_guard.policy.files import HIDE, PROTECT

Covers = Sequence[Sequence[object]]
"""[path, how, device, inode] of each, what is above before what is below; how is HIDE, PROTECT or PIN."""
_SHM: Final = "/dev/shm"  # noqa: S108 - a mount point
_PTS: Final = "/dev/pts"


def enter(covers: Covers) -> None:
    """A namespace with a /dev/shm and terminals of its own, and with ``covers``.

    Raises:
        OSError: one cannot be made, or is another file by now.
    """
    libc.prctl(libc.PR_SET_DUMPABLE, 1)  # for a moment: else /proc/self belongs to root
    mounting.enter_own_namespace(mounting.way())
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    flags = mounting.MS_NOSUID | mounting.MS_NODEV
    if os.path.isdir(_SHM):
        mounting.mount("tmpfs", _SHM, "tmpfs", flags, "mode=1777")
    if os.path.isdir(_PTS):
        noexec = mounting.MS_NOSUID | mounting.MS_NOEXEC
        mounting.mount("devpts", _PTS, "devpts", noexec, "newinstance,ptmxmode=0666,mode=0620")
    for path, how, device, inode in covers:
        _cover(str(path), str(how), (device, inode))


def _cover(path: str, how: str, identity: tuple[object, object]) -> None:
    status = os.stat(path, follow_symlinks=False)
    if (status.st_dev, status.st_ino) != identity:
        raise OSError(f"{path} has been replaced meanwhile")
    if how == HIDE and stat.S_ISDIR(status.st_mode):
        mounting.mount("tmpfs", path, "tmpfs", mounting.MS_RDONLY, "size=4k,mode=0555")
    elif how == HIDE:
        empty = f"{_SHM}/.ray_guard-{os.urandom(8).hex()}"
        os.close(os.open(empty, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0))
        mounting.mount(empty, path, "none", mounting.MS_BIND)
        os.unlink(empty)
        mounting.make_read_only(path)
    else:  # a mount point can be neither moved nor removed: so nothing above what is covered can be either
        mounting.mount(path, path, "none", mounting.MS_BIND | mounting.MS_REC)
        if how == PROTECT:
            mounting.make_read_only(path)


def stand(covers: Covers) -> bool:
    """Whether what :func:`enter` covered still is.

    The kernel takes a mount away where somebody outside removes or replaces what it covers, and a new file may have the
    old one's number: so the path itself is asked.
    """
    for path, how, device, inode in covers:
        try:
            if how == PROTECT and not os.statvfs(str(path)).f_flag & os.ST_RDONLY:
                return False
            found = os.stat(str(path), follow_symlinks=False)
        except OSError:
            return False
        if ((found.st_dev, found.st_ino) == (device, inode)) is (how == HIDE):
            return False  # what is hidden is seen, or what is bound is another
    return True


def clear() -> None:
    """What a call left in its /dev/shm is not the next one's."""
    with contextlib.suppress(OSError):
        trees.empty(_SHM)

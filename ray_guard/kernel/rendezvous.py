"""Where the supervisor of this node, user and set of namespaces is found. Runs in target and supervisor.

The socket is bound by whoever needs a supervisor first and handed to the new one, so that connecting never races with
its start. A lock file keeps two from starting at once.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from ray_guard import __version__
from ray_guard.errors import NotEnforced

_NAMESPACES = ("net", "pid", "mnt", "user")


def folder() -> str:
    """The folder of this user's supervisors, made if it is missing.

    Raises:
        NotEnforced: somebody else made it, or can write into it.
    """
    # Not $TMPDIR: every process of the user must find the same one. Its owner and mode are checked below.
    path = f"/tmp/ray_guard-{os.getuid()}"  # noqa: S108
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise NotEnforced(["supervisor"], f"{path} is not a folder of this user alone: remove it")
    return path


def socket_path() -> str:
    """One name per version and set of namespaces: a supervisor can neither judge nor connect for another set."""
    numbers = "-".join(str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in _NAMESPACES)
    return f"{folder()}/{__version__}-{numbers}.sock"


def log_path(path: str) -> str:
    """The log of the supervisor whose socket is ``path``."""
    return path.removesuffix(".sock") + ".log"


@contextmanager
def start_lock(path: str) -> Iterator[None]:
    """Held while a supervisor is looked for and started."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path.removesuffix(".sock") + ".lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def bind(path: str) -> socket.socket:
    """A listening socket at ``path``, replacing what a dead supervisor left there. Call under :func:`start_lock`."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(128)
    return listener


def connect(path: str) -> socket.socket | None:
    """A connection to the supervisor at ``path``; None: there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    return sock

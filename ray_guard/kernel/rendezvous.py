"""Where the supervisor of this node, user and set of namespaces is found. Runs in target and supervisor.

At an abstract unix address: no confined process may connect to one, nor bind one but CUDA's, so none can take the
supervisor's place. (A socket in a folder could be moved away, and another put there, by any actor of the same user:
nothing judges what its own process does to files.) Whoever binds the address starts the supervisor, and hands the
listening socket to it: so two are never started at once, connecting never races with the start, and nothing is left of
one that has died.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from typing import Final

from ray_guard import __version__
from ray_guard.errors import NotEnforced

_NAMESPACES: Final = ("net", "pid", "mnt", "user")


def folder() -> str:
    """The folder of this user's supervisors (their logs), made if it is missing.

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


def name() -> str:
    """One per version and set of namespaces: a supervisor can neither judge nor connect for another set."""
    numbers = (str(os.stat(f"/proc/self/ns/{each}").st_ino) for each in _NAMESPACES)
    return "-".join((__version__, *numbers))


def log_path() -> str:
    """The log of this user's and namespaces' supervisor."""
    return f"{folder()}/{name()}.log"


def address() -> str:
    """Where the supervisor listens."""
    return f"\0ray_guard/{os.getuid()}/{name()}"


def bind() -> socket.socket | None:
    """A listening socket for a new supervisor; None: somebody else has it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address())
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener


def leave(listener: socket.socket) -> None:
    """Nobody is let in any more but who has come already; once it is closed, another supervisor may be started."""
    listener.shutdown(socket.SHUT_RD)


def connect() -> socket.socket | None:
    """A connection to the supervisor; None: there is none (or it is about to leave, or to come).

    Raises:
        NotEnforced: another user, or somebody in another container, listens in its place.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(address())
    except ConnectionRefusedError:
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise NotEnforced(["supervisor"], f"it cannot be reached: {error.strerror}") from error
    pid, uid = struct.unpack_from("=II", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.getuid() or pid == 0:
        sock.close()
        whom = f"process {pid} of user {uid}" if pid else f"user {uid}, in another container,"
        raise NotEnforced(["supervisor"], f"{whom} listens at its address (@{address()[1:]}): end it")
    return sock

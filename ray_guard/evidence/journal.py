"""The append-only journal: what the supervisor decided and saw, on disk before it is answered.

Runs in the supervisor. Standard library only.

One writer per segment, and a segment never reopened: each journal makes a file of its own, so nothing written before
can be overwritten and a torn tail left by a killed writer stays where it is, for the reader to skip and count.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import time
from typing import Final, Self

from ray_guard.errors import NotEnforced, RayGuardError
from ray_guard.evidence.otlp import LINE_LIMIT

SUFFIX: Final = ".otlp.jsonl"
_FEATURE: Final = "evidence"
_POSTPONED_LIMIT: Final = 1024


class JournalError(RayGuardError, OSError):
    """A record could not be written: whatever it would have recorded must not happen."""


class Journal:
    """A new segment in an evidence folder.

    Args:
        folder: made (0700, parents as the umask says) where it is missing; must be ours, no symlink, and writable by
            nobody else. Its parents may be reached through symlinks (Ray's ``session_latest`` is one).

    Raises:
        NotEnforced: the folder cannot hold evidence, and why.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # Not abspath or realpath: a symlink is judged, not followed. Nor a slash at its end, which would follow it.
        self.folder = os.path.join(os.getcwd(), os.fsdecode(folder)).rstrip("/") or "/"
        self._folder_fd = _open_folder(self.folder)
        self._fd = -1
        try:
            self.path, self._fd = _open_segment(self.folder, self._folder_fd)
        except OSError as error:
            self.close()
            raise NotEnforced([_FEATURE], f"{self.folder} takes no journal segment: {error.strerror}") from error
        #: Bytes in the segment.
        self.size = 0
        self._torn = False
        self._named = False
        self._postponed: list[bytes] = []

    def append(self, line: bytes) -> None:
        """Appends whole lines with one ``write(2)``; on return the kernel has them (they survive our death).

        Raises:
            JournalError: they are not recorded (disk full, quota, closed). Nothing partial is left behind where the
                file system lets us take it back; otherwise the next append ends the torn line first.
            ValueError: not whole lines, or longer than the reader takes.
        """
        if line[-1:] != b"\n" or len(line) > LINE_LIMIT:
            raise ValueError(f"a journal takes whole lines of at most {LINE_LIMIT} bytes, got {len(line)} bytes")
        if self._postponed:
            self.flush()
        self._write(line)

    def postpone(self, line: bytes) -> None:
        """Appends a whole line at the next :meth:`flush`, or before the next append; until then it can be lost.

        For what answers for nothing and comes in numbers: one ``write(2)`` takes many.

        Raises:
            JournalError: too many wait already and cannot be written; this one is not taken.
        """
        if len(self._postponed) >= _POSTPONED_LIMIT:
            self.flush()
        self._postponed.append(line)

    def flush(self) -> None:
        """Writes what was postponed. Raises JournalError: it waits on."""
        if self._postponed:
            self._write(b"".join(self._postponed))
            self._postponed.clear()

    def _write(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line
        try:
            written = os.write(self._fd, line)
            while written < len(line):  # a nearly full disk, or a signal: rare enough that a copy does not matter
                written += os.write(self._fd, line[written:])
        except OSError as error:
            self._take_back()
            raise self._failed("written", error) from error
        self._torn = False
        self.size += len(line)

    def _take_back(self) -> None:
        """Cuts a half-written line off again: it was never answered for, and must not swallow the next one."""
        try:
            os.ftruncate(self._fd, self.size)
        except OSError:
            self._torn = True
            with contextlib.suppress(OSError):
                self.size = os.fstat(self._fd).st_size

    def _failed(self, what: str, error: OSError) -> JournalError:
        return JournalError(error.errno, f"the journal cannot be {what}: {error.strerror}", self.path)

    def sync(self) -> None:
        """Waits until what was appended is on the disk.

        Raises:
            JournalError: the disk says no.
        """
        try:
            if self._fd < 0:  # fdatasync(-1) is a ValueError in Python
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            os.fdatasync(self._fd)
            if not self._named:  # the name itself must survive a power cut, once
                os.fsync(self._folder_fd)
                self._named = True
        except OSError as error:
            raise self._failed("synced", error) from error

    def close(self) -> None:
        """Closes the segment, with what is postponed if it can be; later appends raise. Closing twice is harmless."""
        if self._fd >= 0:
            with contextlib.suppress(JournalError):
                self.flush()
        for descriptor in (self._fd, self._folder_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._folder_fd = -1

    def fileno(self) -> int:
        """The segment's descriptor (-1 once closed)."""
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_folder(folder: str) -> int:
    """A descriptor of the folder, once it is known to be safe to write evidence to."""
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        # Opened first and judged by the descriptor: what is checked is what is used.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = "it is a symlink" if os.path.islink(folder) else error.strerror
        raise NotEnforced([_FEATURE], f"{folder} cannot be the evidence folder: {why}") from error
    about = os.fstat(descriptor)
    if about.st_uid != os.geteuid():
        why = f"it belongs to uid {about.st_uid}, and we are uid {os.geteuid()}"
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"others can write to it (mode {stat.S_IMODE(about.st_mode):04o}); chmod go-w it or name another folder"
    else:
        return descriptor
    os.close(descriptor)
    raise NotEnforced([_FEATURE], f"{folder} cannot be the evidence folder: {why}")


def _open_segment(folder: str, folder_fd: int) -> tuple[str, int]:
    """``<utc>-<host>-<pid>-<random>.otlp.jsonl``: sorts by start, never collides, says who wrote it."""
    utc = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    host = re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname())[:64] or "host"
    name = f"{utc}-{host}-{os.getpid()}-{os.urandom(4).hex()}{SUFFIX}"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return f"{folder}/{name}", os.open(name, flags, 0o600, dir_fd=folder_fd)

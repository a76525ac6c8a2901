"""The append-only journal: what the supervisor decided and saw, on disk before it is answered.

Runs in the supervisor. Standard library only.

Each journal is a log of its own, written by one process into segments that are never reopened: nothing written before
can be overwritten, and a torn tail left by a killed writer stays where it is, for the reader to skip and count. Every
line is a leaf of one Merkle tree over the log. :meth:`Journal.cut` says what there is to be signed, and
:meth:`Journal.seal` writes the signed checkpoint to the seal file beside the segments. docs/evidence.md has the forms.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from typing import TYPE_CHECKING, Final, Self

from ray_guard.errors import NotEnforced, RayGuardError
from ray_guard.evidence import merkle
from ray_guard.evidence.layout import SCHEMA, SEAL_SUFFIX, SHORT, VOUCHED_SUFFIX, segment_name
from ray_guard.evidence.merkle import Tree
from ray_guard.evidence.otlp import LINE_LIMIT, resource_line
from ray_guard.kernel import libc
from ray_guard.log import logger
from ray_guard.named import NamedTuple

if TYPE_CHECKING:
    from ray_guard.evidence.note import Checkpoint, Key

_FEATURE: Final = "evidence"
_POSTPONED_LIMIT: Final = 1024
_GROUP: Final = 256
"""Records that wait to be hashed at most: that takes half a millisecond, and calls wait for the loop."""
_AHEAD: Final = 1 << 20
_SEAL_RESERVE: Final = 1 << 16

log = logger("ray_guard.journal")


class JournalError(RayGuardError, OSError):
    """A record could not be written: whatever it would have recorded must not happen."""


class Bounds(NamedTuple):
    """How large a journal may become; sizes in bytes."""

    segment: int = 256 << 20
    segment_s: float = 3600.0
    reserve: int = 2 << 20
    """Of each segment, kept on the disk for what must be recorded (:meth:`Journal.keep`)."""
    total: int | None = None
    """Of the folder: all that is in it, this journal's or not."""


DEFAULT_BOUNDS: Final = Bounds()


class Cut(NamedTuple):
    """What is to be signed: see :meth:`Journal.cut`."""

    checkpoint: Checkpoint
    leaves: bytes
    descriptor: int
    """The segment's: it must be on the disk before its checkpoint is."""
    finished: bool
    """Whether the segment has been left for a new one."""


class Journal:
    """A new log in an evidence folder.

    Args:
        folder: made (0700, parents as the umask says) where it is missing; must be ours, no symlink, and writable by
            nobody else. Its parents may be reached through symlinks (Ray's ``session_latest`` is one).
        bounds: its size.

    Raises:
        NotEnforced: the folder cannot hold evidence, and why.
    """

    def __init__(self, folder: str | os.PathLike[str], bounds: Bounds = DEFAULT_BOUNDS) -> None:
        # Not abspath or realpath: a symlink is judged, not followed. Nor a slash at its end, which would follow it.
        self.folder = os.path.join(os.getcwd(), os.fsdecode(folder)).rstrip("/") or "/"
        self.bounds = bounds
        self._folder_fd = _open_folder(self.folder)
        self._fd = self._seal_fd = -1
        self._others = 0
        self._reserve = bounds.reserve
        self._postponed: list[bytes] = []
        #: Ids of spans that were begun in another log and go on in this one.
        self.continued: set[str] = set()
        #: Records that were dropped because neither disk nor memory had room for them.
        self.lost = 0
        #: Why the last record was refused that was; to be set back by whoever has told it.
        self.refused: JournalError | None = None
        try:
            self._begin()
            self.flush()  # where its first record could not be written, it says why
            self._weigh()
        except OSError as error:
            self._discard()
            raise NotEnforced([_FEATURE], f"{self.folder} takes no journal segment: {error.strerror}") from error

    def _begin(self) -> None:
        """Begins a log: its seal file, locked for as long as we live, and its first segment.

        Raises:
            OSError: nothing has changed.
        """
        name = _name()
        seal = self._create(f"{name}{SEAL_SUFFIX}")
        try:
            segment = self._create(segment_name(name, 1))
        except OSError:
            os.close(seal)
            os.unlink(f"{name}{SEAL_SUFFIX}", dir_fd=self._folder_fd)
            raise
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can tell that it is being written
            fcntl.flock(seal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        #: The log's name.
        self.log = name
        self._tree = Tree()
        self._chunks: list[bytes] = []
        self._leaves = bytearray()
        self._cut_size = self._number = self._seal_size = 0
        self._seal_fd = seal
        self._seal_backlog = _json({"schema": SCHEMA, "log": name})
        self._keyed = self._named = False
        self._use(segment)
        with contextlib.suppress(OSError):  # it is written with the first checkpoint then
            self._write_seal()

    def _discard(self) -> None:
        """Leaves no trace of a log that could not be begun: it would pass for one that was killed."""
        if self._fd >= 0:
            for name in (self._segment, f"{self.log}{SEAL_SUFFIX}"):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._folder_fd)
        self._postponed.clear()
        self.close()

    def _create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=self._folder_fd)

    def _use(self, descriptor: int, torn: int = 0) -> None:
        """Goes on in a new segment, which begins by saying what it is."""
        self._number += 1
        self._fd, self.path = descriptor, f"{self.folder}/{segment_name(self.log, self._number)}"
        self._began = time.monotonic()
        #: Bytes in the segment.
        self.size = 0
        self._allocated = self._lines = 0
        self._broken = False
        header: dict[str, str | int] = {
            "ray_guard.journal.schema": SCHEMA,
            "ray_guard.journal.log": self.log,
            "ray_guard.journal.segment": self._number,
            "ray_guard.journal.first_record": self._tree.size,
            "ray_guard.journal.unix_ns": time.time_ns(),
            "ray_guard.journal.boot_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        }
        if torn:
            header["ray_guard.journal.torn_bytes_before"] = torn
        line = resource_line(header)
        try:
            self._write(line, 0)
        except JournalError:
            self._postponed.insert(0, line)

    @property
    def _segment(self) -> str:
        """The segment's name."""
        return os.path.basename(self.path)

    # -- records -------------------------------------------------------------------------------------------------------

    def append(self, line: bytes) -> None:
        """Appends whole lines with one ``write(2)``; on return the kernel has them (they survive our death).

        For what has not happened yet and will not, if it cannot be recorded: a grant, a start.

        Raises:
            JournalError: they are not recorded (disk full but for the reserve, quota, closed).
            ValueError: not whole lines, or longer than the reader takes.
        """
        _check(line)
        try:
            if self._postponed:
                self.flush()
            self._write(line, self._reserve)
        except JournalError as error:
            self.refused = error
            raise

    def report(self, line: bytes) -> None:
        """:meth:`append`, but also from the first half of the reserve: what a target says has begun.

        It cannot be refused any more, but a target could say it for ever.
        """
        _check(line)
        if self._postponed:
            self.flush()
        self._write(line, self._reserve // 2)

    def keep(self, line: bytes) -> None:
        """Appends what has happened already, or is a refusal: also to a full disk, from the reserve.

        Where even that is used up, it waits in memory for :meth:`flush`.

        Raises:
            JournalError: there is no room in memory either; it is counted as lost.
            ValueError: as :meth:`append`.
        """
        _check(line)
        try:
            if self._postponed:
                self.flush()
            self._write(line, 0)
        except JournalError as error:
            self.refused = error
            if len(self._postponed) >= _POSTPONED_LIMIT:
                self.lost += line.count(b"\n")
                raise
            self._postponed.append(line)

    def postpone(self, line: bytes) -> None:
        """:meth:`keep`, but at the next :meth:`flush`, or before the next append; until then it can be lost.

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
            try:
                self._write(b"".join(self._postponed), 0)
            except JournalError:
                if len(self._postponed) == 1:
                    raise
                self._write_each()
            self._postponed.clear()

    def _weigh(self) -> None:
        """Counts what else is in the folder, where its size is bounded."""
        if self.bounds.total is not None:
            with os.scandir(self._folder_fd) as entries:
                sizes = [_size(entry) for entry in entries if entry.name != self._segment]
            self._others = sum(sizes)

    def _write_each(self) -> None:
        """What is left of the reserve may have room for some of them."""
        while self._postponed:
            self._write(self._postponed[0], 0)
            del self._postponed[0]

    def _write(self, data: bytes, reserve: int) -> None:
        needed = self.size + len(data) + reserve
        if needed > self._allocated and self._reserve:
            self._allocate(needed, reserve)
        total = self.bounds.total
        if total is not None and self._others + needed > total:
            raise JournalError(
                errno.EDQUOT,
                f"the evidence folder has reached its limit of {total} bytes: move finished logs away "
                "(segments and seal together), or raise RAY_GUARD_EVIDENCE_LIMIT",
                self.folder,
            )
        if self._broken:
            raise self._failed("written", OSError(errno.EIO, "the segment is not as it was written; another follows"))
        try:
            written = os.write(self._fd, data)
            while written < len(data):  # a nearly full disk, or a signal: rare enough that a copy does not matter
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._take_back()
            raise self._failed("written", error) from error
        self.size += len(data)
        self._chunks.append(data)
        if len(self._chunks) >= _GROUP:
            self.hash()

    def _allocate(self, needed: int, reserve: int) -> None:
        """Has the file system set blocks aside behind the segment's end, so that it cannot be full for us there.

        Raises:
            JournalError: it is full, and this record (that may not use the reserve) must not use up what is left.
        """
        wanted = max(needed, self.size + self._reserve) + _AHEAD
        try:
            libc.fallocate(self._fd, libc.FALLOC_FL_KEEP_SIZE, self._allocated, wanted - self._allocated)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                log.warning(
                    "%s: its file system cannot set space aside: on a full disk denials go to memory", self.path
                )
                self._reserve = 0
            elif reserve:
                raise self._failed("written but for its reserve", error) from error
        else:
            self._allocated = wanted

    def _take_back(self) -> None:
        """Cuts a half-written line off again: it was never answered for, and must not swallow the next one."""
        try:
            os.ftruncate(self._fd, self.size)
            self._allocated = self.size  # and with it what was set aside
        except OSError:
            self._broken = True  # until the next cut, which goes on in a new segment

    def _failed(self, what: str, error: OSError) -> JournalError:
        return JournalError(error.errno, f"the journal cannot be {what}: {error.strerror}", self.path)

    # -- the seal ------------------------------------------------------------------------------------------------------

    def hash(self) -> None:
        """Takes what was written into the tree. To be called now and then when nobody waits."""
        lines = b"".join(self._chunks).split(b"\n")
        lines.pop()
        self._chunks.clear()
        # As merkle.hash_leaf does it, without the call: this is on the way of every record.
        sha256 = merkle.sha256()
        hashes = [sha256(b"\0" + line).digest() for line in lines]
        self._tree.extend(hashes)
        self._leaves += b"".join([each[:SHORT] for each in hashes])
        self._lines += len(lines)

    @property
    def records(self) -> int:
        """In the log, all segments together."""
        self.hash()
        return self._tree.size

    def cut(self, *, last: bool = False) -> Cut | None:
        """What has come since the last cut, to be signed and given to :meth:`seal`; None where there is nothing.

        Begins a new segment where it is time for one. ``last``: the log ends here.
        """
        with contextlib.suppress(JournalError):
            self.flush()
        self._weigh()
        self.hash()
        if self._tree.size == self._cut_size and self._broken:
            descriptor = self._fd
            if self._rotate():
                os.close(descriptor)
                self.hash()
        if self._tree.size == self._cut_size and not last:
            return None
        leaves = bytes(self._leaves)
        self._leaves.clear()
        self._cut_size = self._tree.size
        from ray_guard.evidence.note import Checkpoint  # with the first seal, which no tool's start waits for

        checkpoint = Checkpoint(
            log=self.log,
            size=self._tree.size,
            root=self._tree.root(),
            segments=((self._segment, self._lines),),
            leaves=merkle.sha256()(leaves).digest(),
            time_ns=time.time_ns(),
            boot_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            ended=last,
        )
        descriptor = self._fd
        finished = not last and self._rotate()
        return Cut(checkpoint, leaves, descriptor, finished)

    def _rotate(self) -> bool:
        old = time.monotonic() - self._began > self.bounds.segment_s
        if not self._broken and self.size < self.bounds.segment and not old:
            return False
        try:
            segment = self._create_next()
        except OSError as error:
            log.warning("%s goes on: no new segment can be begun: %s", self.path, error.strerror)
            return False
        found = os.fstat(self._fd).st_size
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, found)  # gives back what was set aside
            os.fsync(self._folder_fd)
        self._use(segment, max(0, found - self.size))
        return True

    def _create_next(self) -> int:
        """The next segment; names that somebody else has taken are passed over, and found by whoever verifies."""
        while True:
            try:
                return self._create(segment_name(self.log, self._number + 1))
            except FileExistsError:
                self._number += 1

    def altered(self) -> str | None:
        """What somebody else has done to the segment since the last time, if anything; the next cut goes on in another.

        A look at its size and name: what was done to its content is for ``ray-guard verify`` to find.
        """
        why = None if self._broken else self._changed(self._fd, self._segment, self.size)
        self._broken = self._broken or why is not None
        return why

    def seal_altered(self) -> str | None:
        """Likewise of its seal, while :meth:`seal` is not running; what follows belongs into another log."""
        return self._changed(self._seal_fd, f"{self.log}{SEAL_SUFFIX}", self._seal_size)

    def _changed(self, descriptor: int, name: str, size: int) -> str | None:
        found = os.fstat(descriptor)
        if found.st_size != size:
            return f"{name}: it holds {found.st_size} bytes, and {size} were written"
        try:
            if os.path.samestat(found, os.stat(name, dir_fd=self._folder_fd, follow_symlinks=False)):
                return None
        except OSError:
            pass
        return f"{name}: it was removed, renamed or replaced"

    def renew(self) -> None:
        """Begins another log, because nobody is left who could seal this one; the new one's records vouch for it.

        Raises:
            OSError: this one goes on.
        """
        with contextlib.suppress(JournalError):
            self.flush()
        before = resource_line(
            {
                "ray_guard.journal.before": self.log,
                "ray_guard.journal.before.records": self.records,
                "ray_guard.journal.before.root": self._tree.root().hex(),
            }
        )
        old, segment, seal = self.log, self._fd, self._seal_fd
        self._begin()
        with contextlib.suppress(OSError):
            os.close(self._create(f"{old}{VOUCHED_SUFFIX}"))  # what is open in it goes on here
        os.close(segment)
        os.close(seal)
        self.keep(before)

    def seal(self, cut: Cut, key: Key, signature: bytes) -> None:
        """Writes the checkpoint, once what it speaks of is on the disk. May run beside the other methods, once.

        Raises:
            JournalError: the disk says no. The checkpoint is kept, and written with the next.
        """
        if not self._keyed:
            self._keyed = True
            self._seal_backlog += _json({"key": str(key)})
        from base64 import b64encode

        note = cut.checkpoint.signed(key, signature)
        self._seal_backlog += _json({"checkpoint": note, "leaves": b64encode(cut.leaves).decode()})
        try:
            os.fdatasync(cut.descriptor)
            self._sync_names()
            self._write_seal()
            os.fdatasync(self._seal_fd)
        except OSError as error:
            raise JournalError(error.errno, f"the seal cannot be written: {error.strerror}", self.log) from error
        finally:
            if cut.finished:
                os.close(cut.descriptor)

    def _write_seal(self) -> None:
        """Raises OSError; then nothing half-written is left."""
        if self._reserve:
            with contextlib.suppress(OSError):
                end = self._seal_size + len(self._seal_backlog) + _SEAL_RESERVE
                libc.fallocate(self._seal_fd, libc.FALLOC_FL_KEEP_SIZE, self._seal_size, end - self._seal_size)
        data = self._seal_backlog
        try:
            written = os.write(self._seal_fd, data)
            while written < len(data):
                written += os.write(self._seal_fd, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._seal_fd, self._seal_size)
            raise
        self._seal_size += len(data)
        self._seal_backlog = b""

    # -- its end -------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Waits until what was appended is on the disk.

        Raises:
            JournalError: the disk says no.
        """
        try:
            if self._fd < 0:  # fdatasync(-1) is a ValueError in Python
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            os.fdatasync(self._fd)
            self._sync_names()
        except OSError as error:
            raise self._failed("synced", error) from error

    def _sync_names(self) -> None:
        """A log's first names must survive a power cut too; nobody's first call waits for that. Raises OSError."""
        if not self._named:
            os.fsync(self._folder_fd)
            self._named = True

    def close(self) -> None:
        """Closes the segment, with what is postponed if it can be; later appends raise. Closing twice is harmless."""
        if self._fd >= 0:
            with contextlib.suppress(JournalError):
                self.flush()
            with contextlib.suppress(OSError):
                if not self._broken:
                    os.ftruncate(self._fd, self.size)  # gives back what was set aside
        if self._seal_fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._seal_fd, self._seal_size)
        for descriptor in (self._fd, self._seal_fd, self._folder_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._seal_fd = self._folder_fd = -1
        self._allocated = 1 << 63  # nothing more is set aside

    def fileno(self) -> int:
        """The segment's descriptor (-1 once closed)."""
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(line: bytes) -> None:
    if line[-1:] != b"\n" or len(line) > LINE_LIMIT:
        raise ValueError(f"a journal takes whole lines of at most {LINE_LIMIT} bytes, got {len(line)} bytes")


def _json(fields: dict[str, str | int]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:  # gone between listing and looking
        return 0


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


def _name() -> str:
    """``<utc>-<host>-<pid>-<random>``: sorts by start, never collides, says who wrote it."""
    utc = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    host = re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname())[:64] or "host"
    return f"{utc}-{host}-{os.getpid()}-{os.urandom(4).hex()}"

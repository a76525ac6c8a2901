"""System calls that the standard library does not offer. Runs in target, supervisor and zygote.

Each function is the call of the same name in section 2 of the manual; failures are ``OSError`` with the call's errno.
Hot calls (connect, openat2, pidfd_getfd) return ``-errno`` instead: raising costs more than the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Final

c_library: Final = ctypes.CDLL(None, use_errno=True)
_libc = c_library
get_errno = ctypes.get_errno

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_NAME: Final = 15
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
CAP_SYS_PTRACE: Final = 19
PR_SET_PTRACER: Final = 0x59616D61

PIDFD_THREAD: Final = os.O_EXCL
"""pidfd_open(2): accept a thread id that leads no process (Linux 6.9)."""

#: numbers above 423 are the same on every architecture; the two below are not
NR_PIDFD_GETFD: Final = 438
NR_CLOSE_RANGE: Final = 436
NR_OPENAT2: Final = 437
RESOLVE_NO_SYMLINKS: Final = 0x04
AT_FDCWD: Final = -100
_MACHINE = os.uname().machine
NR_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}.get(_MACHINE, -1)


_MSG_DONTWAIT: Final = 0x40


class IOVec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_unshare = _libc.unshare
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_by_number = c_library["syscall"]  # function objects of their own: with its types known a call costs a third
_by_number.restype = ctypes.c_long
_by_number.argtypes = (ctypes.c_long,) * 7
_UNUSED: Final = (0,) * 6
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_prctl_text = c_library["prctl"]
_prctl_text.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate  # musl has one, of 64 bits
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_process_vm_readv = _libc.process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_connect = _libc.connect  # without argtypes: int and bytes go as they are, in two thirds of the time
_bind = _libc.bind
_bind.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def check(result: int, call: str) -> int:
    """``result``; raises OSError where it is negative."""
    if result < 0:
        errno = get_errno()
        raise OSError(errno, f"{call}: {os.strerror(errno)}")
    return result


def syscall(number: int, *args: int) -> int:
    """Any system call by number, integer arguments only."""
    return check(_by_number(number, *args, *_UNUSED[len(args) :]), f"syscall {number}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    return check(_prctl(option, arg2, arg3, arg4, arg5), f"prctl {option}")


def set_name(name: bytes) -> None:
    """The calling thread's, of at most 15 bytes."""
    check(_prctl_text(PR_SET_NAME, name, 0, 0, 0), "prctl PR_SET_NAME")


FALLOC_FL_KEEP_SIZE: Final = 0x01


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    check(_fallocate(descriptor, mode, offset, length), "fallocate")


def unshare(flags: int) -> None:
    check(_unshare(flags), "unshare")


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """A duplicate (close-on-exec) of another process's descriptor, or ``-errno``."""
    duplicate: int = _syscall(NR_PIDFD_GETFD, pidfd, descriptor, 0)
    return duplicate if duplicate >= 0 else -get_errno()


def connect(descriptor: int, address: bytes) -> int:
    """connect(2) with a raw ``sockaddr``; 0 or ``-errno``. EINTR is reported, not retried: the caller counts on it."""
    return 0 if _connect(descriptor, address, len(address)) == 0 else -get_errno()


def bind(descriptor: int, address: bytes) -> int:
    """bind(2) with a raw ``sockaddr``; 0 or ``-errno``."""
    return 0 if _bind(descriptor, address, len(address)) == 0 else -get_errno()


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("msg_name", ctypes.c_char_p),
        ("msg_namelen", ctypes.c_uint),
        ("msg_iov", ctypes.c_void_p),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_char_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    )


def sendmsg(descriptor: int, data: bytes, address: bytes, control: bytes, flags: int) -> int:
    """sendmsg(2) with a raw ``sockaddr`` (empty: none) and raw control messages; bytes sent or ``-errno``."""
    payload = ctypes.create_string_buffer(data, len(data) or 1)
    vector = IOVec(ctypes.addressof(payload), len(data))
    header = _MsgHdr(address or None, len(address), ctypes.addressof(vector), 1, control or None, len(control), 0)
    sent: int = _libc.sendmsg(ctypes.c_int(descriptor), ctypes.byref(header), ctypes.c_int(flags))
    return sent if sent >= 0 else -get_errno()


class _MMsgHdr(ctypes.Structure):
    _fields_ = (("msg_hdr", _MsgHdr), ("msg_len", ctypes.c_uint))


class Inbox:
    """recvmmsg(2): takes many datagrams with one system call.

    Args:
        count: how many at one go.
        size: bytes kept of each; what is longer is cut off.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        #: Datagram ``n`` begins at ``n * size``.
        self.data = bytearray(count * size)
        self._room = (ctypes.c_char * len(self.data)).from_buffer(self.data)
        start = ctypes.addressof(self._room)
        self._vectors = (IOVec * count)(*(IOVec(start + n * size, size) for n in range(count)))
        self._headers = (_MMsgHdr * count)()
        for vector, header in zip(self._vectors, self._headers, strict=True):
            header.msg_hdr.msg_iov = ctypes.addressof(vector)
            header.msg_hdr.msg_iovlen = 1
        words = ctypes.sizeof(_MMsgHdr) // 4
        #: How long datagram ``n`` is, as far as it is kept.
        self.lengths = memoryview(self._headers).cast("B").cast("I")[_MMsgHdr.msg_len.offset // 4 :: words]

    def receive(self, descriptor: int) -> int:
        """How many have come (without waiting), or ``-errno``: ``-EAGAIN`` where none has."""
        received: int = _libc.recvmmsg(descriptor, self._headers, self.count, _MSG_DONTWAIT, None)
        return received if received >= 0 else -get_errno()


class Peephole:
    """process_vm_readv(2): other processes' memory, two pieces with one system call, into a buffer that is kept.

    Args:
        size: bytes it holds; of what is asked for beyond that nothing is read.
    """

    def __init__(self, size: int) -> None:
        #: What was read last, the second piece right behind the first.
        self.data = bytearray(size)
        self._room = (ctypes.c_char * size).from_buffer(self.data)
        self._vector = IOVec(ctypes.addressof(self._room), size)
        self._pieces = (IOVec * 2)()
        self._local, self._remote = ctypes.byref(self._vector), ctypes.byref(self._pieces)
        self._where = memoryview(self._pieces).cast("B").cast("Q")

    def read(self, tid: int, address: int, length: int, second: int = 0, its_length: int = 0) -> int:
        """How many bytes could be read, from the first on, or ``-errno``: EPERM also where the call is refused."""
        where = self._where
        where[0], where[1], where[2], where[3] = address, length, second, its_length
        count: int = _process_vm_readv(tid, self._local, 1, self._remote, 2, 0)
        return count if count >= 0 else -get_errno()


def write_word(pid: int, address: int, value: int) -> None:
    """Stores 32 bits in another process, where a call made for it must; a page it may not write stays as it is."""
    word = ctypes.c_uint32(value)
    local, remote = IOVec(ctypes.addressof(word), 4), IOVec(address, 4)
    _libc.process_vm_writev(
        ctypes.c_int(pid),
        ctypes.byref(local),
        ctypes.c_ulong(1),
        ctypes.byref(remote),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )


def close_range(first: int, last: int) -> None:
    """Close every descriptor in [first, last]."""
    syscall(NR_CLOSE_RANGE, first, last, 0)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_openat2 = c_library["syscall"]
_openat2.restype = ctypes.c_long
_openat2.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)


_OPEN_HOW_SIZE: Final = ctypes.sizeof(_OpenHow)


@functools.lru_cache(maxsize=16)
def _open_how(flags: int, resolve: int) -> _OpenHow:
    return _OpenHow(flags, 0, resolve)


def openat2(path: str, flags: int, resolve: int) -> int:
    """openat2(2) of an absolute path; ``-errno`` where it fails."""
    how = _open_how(flags, resolve)
    opened: int = _openat2(NR_OPENAT2, AT_FDCWD, os.fsencode(path), how, _OPEN_HOW_SIZE)
    return opened if opened >= 0 else -get_errno()


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_CapSets = _CapData * 2
_CAP_VERSION_3 = 0x20080522
_capget, _capset = c_library["capget"], c_library["capset"]


def capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) capability sets of this thread, as bit masks."""
    header, data = _CapHeader(_CAP_VERSION_3, 0), _CapSets()
    check(_capget(ctypes.byref(header), data), "capget")
    effective, permitted, inheritable = (
        data[0].effective | data[1].effective << 32,
        data[0].permitted | data[1].permitted << 32,
        data[0].inheritable | data[1].inheritable << 32,
    )
    return effective, permitted, inheritable


@functools.cache
def count_capabilities() -> int:
    """How many this kernel knows."""
    for capability in range(64):
        if _prctl(PR_CAPBSET_READ, capability, 0, 0, 0) < 0:  # EINVAL: past the last
            return capability
    return 64


@contextlib.contextmanager
def without_capabilities() -> Iterator[None]:
    """None is effective within: what is opened there carries no right of this process's.

    Other threads keep them. To be without them all the time would make its targets, which have them, unreadable.
    """
    effective, permitted, inheritable = capget()
    if not effective:
        yield
        return
    capset(0, permitted, inheritable)
    try:
        yield
    finally:
        capset(effective, permitted, inheritable)


def give_up(capability: int) -> None:
    """This thread, and whatever it starts, is without ``capability`` for good."""
    effective, permitted, inheritable = capget()
    if permitted >> capability & 1:
        with contextlib.suppress(OSError):  # EPERM without CAP_SETPCAP; no_new_privs keeps it from coming back then
            prctl(PR_CAPBSET_DROP, capability)
        kept = ~(1 << capability)
        capset(effective & kept, permitted & kept, inheritable & kept)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Sets this thread's capability sets."""
    header, data = _CapHeader(_CAP_VERSION_3, 0), _CapSets()
    for half, shift in ((0, 0), (1, 32)):
        data[half].effective = effective >> shift & 0xFFFFFFFF
        data[half].permitted = permitted >> shift & 0xFFFFFFFF
        data[half].inheritable = inheritable >> shift & 0xFFFFFFFF
    check(_capset(ctypes.byref(header), data), "capset")

"""Arguments as they are read from a process's memory: bounded, and never an error."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from contextlib import closing

import pytest

from ray_guard.supervisor import arguments
from ray_guard.supervisor.arguments import Arguments, Memory


def array(*strings: bytes, end: int | None = 0) -> tuple[int, object]:
    """The address of a pointer array to these strings, and what keeps it alive."""
    buffers = [ctypes.create_string_buffer(each) for each in strings]
    numbers = [ctypes.addressof(each) for each in buffers] + ([] if end is None else [end, 0])
    pointers = (ctypes.c_uint64 * len(numbers))(*numbers)
    return ctypes.addressof(pointers), (buffers, pointers)


def read(*strings: bytes, end: int | None = 0) -> Arguments | None:
    address, _kept = array(*strings, end=end)
    with closing(Memory(os.getpid())) as memory:
        return memory.arguments(address)


def test_they_are_read_and_hashed_as_a_start_is() -> None:
    found = read(b"sh", b"-c", "ä".encode())
    assert found == (("sh", "-c", "ä"), hashlib.sha256("sh\0-c\0ä".encode()).hexdigest(), ())
    assert found is not None
    assert found.digest == arguments.digest(("sh", "-c", "ä"))


def test_bytes_that_are_no_text_survive() -> None:
    found = read(b"\xff\xfe")
    assert found is not None
    assert found.shown == (os.fsdecode(b"\xff\xfe"),)


def test_long_ones_are_cut_and_hashed_whole() -> None:
    found = read(b"x" * 10_000, *[b"y"] * 100)
    assert found is not None
    assert found.shown[0] == "x" * arguments.SHOWN_LENGTH + "…"
    assert len(found.shown) == arguments.SHOWN
    assert found.digest == hashlib.sha256(b"\0".join([b"x" * 10_000, *[b"y"] * 100])).hexdigest()
    assert found.whole == ("x" * arguments.JUDGED,)
    found = read(b"x" * 300, *[b"y"] * 100)
    assert found is not None
    assert found.whole == ("x" * 300, *["y"] * 100)


def test_more_than_is_read_has_no_hash() -> None:
    found = read(*[b"z" * 60_000] * 6)
    assert found is not None
    assert found.digest == ""
    found = read(*[b"a"] * 5000)
    assert found is not None
    assert (len(found.shown), found.digest) == (64, "")


@pytest.mark.parametrize("address", [0x10, 0xFFFFFFFF81000000, 2**64 - 8])
def test_what_cannot_be_read_is_none(address: int) -> None:
    with closing(Memory(os.getpid())) as memory:
        assert memory.path(address) is None
        assert memory.arguments(address) is None
    assert read(b"good", end=address) is None


def test_no_arguments_at_all() -> None:
    with closing(Memory(os.getpid())) as memory:
        assert memory.arguments(0) == ((), hashlib.sha256().hexdigest(), ())


def test_a_thread_that_is_gone_reads_as_nothing() -> None:
    with closing(Memory(0x3FFFFFFF)) as memory:
        assert memory.path(0x1000) is None
        assert memory.arguments(0x1000) is None


def test_a_path_that_crosses_pages_and_one_without_an_end() -> None:
    page = mmap.mmap(-1, 3 * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    page[4000:6000] = b"p" * 2000
    with closing(Memory(os.getpid())) as memory:
        assert memory.path(address + 4000) == "p" * 2000
        page[:8192] = b"q" * 8192
        assert memory.path(address) is None, "longer than any path"


def test_whether_there_is_a_program() -> None:
    own = os.getpid()
    assert arguments.runnable(own, "/bin/sh")
    assert not arguments.runnable(own, "/etc/passwd")
    assert not arguments.runnable(own, "/tmp")
    assert not arguments.runnable(own, "/nonexistent")
    assert not arguments.runnable(own, "nul\0byte")

"""Commands as they are read from a process's memory: bounded, and never an error."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Callable

import pytest

from ray_guard.kernel import libc
from ray_guard.supervisor import arguments
from ray_guard.supervisor.arguments import Command, read_command


def array(*strings: bytes, end: int | None = 0) -> tuple[int, object]:
    """The address of a pointer array to these strings, and what keeps it alive."""
    buffers = [ctypes.create_string_buffer(each) for each in strings]
    numbers = [ctypes.addressof(each) for each in buffers] + ([] if end is None else [end, 0])
    pointers = (ctypes.c_uint64 * max(20, len(numbers)))(*numbers)
    return ctypes.addressof(pointers), (buffers, pointers)


def read(*strings: bytes, end: int | None = 0, path: bytes = b"/bin/sh") -> Command | None:
    address, _kept = array(*strings, end=end)
    name = ctypes.create_string_buffer(path, 256)
    return read_command(os.getpid(), ctypes.addressof(name), address)


def packed(*strings: bytes) -> Command | None:
    """As :func:`read`, where they lie side by side, as shells have them."""
    block = ctypes.create_string_buffer(b"\0".join(strings), 1 << 15)
    starts = [ctypes.addressof(block) + sum(len(each) + 1 for each in strings[:n]) for n in range(len(strings))]
    pointers = (ctypes.c_uint64 * max(20, len(starts) + 1))(*starts)
    name = ctypes.create_string_buffer(b"/bin/sh", 256)
    return read_command(os.getpid(), ctypes.addressof(name), ctypes.addressof(pointers))


def recorded(command: Command | None) -> tuple[list[str], str]:
    """The arguments shown, and their hash."""
    assert command is not None
    found = {each["key"]: each["value"] for each in json.loads(f"[{command.program().form.attributes}]")}
    shown = [each["stringValue"] for each in found["process.command_args"]["arrayValue"]["values"]]
    return shown, found.get("ray_guard.arguments.sha256", {}).get("stringValue", "")


@pytest.fixture(params=["process_vm_readv", "mem"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read: the second where a container's profile refuses the first."""
    if request.param == "mem":

        def refused(_self: libc.Peephole, _tid: int, *_where: int) -> int:
            return -1

        monkeypatch.setattr(libc.Peephole, "read", refused)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reading", [read, packed])
def test_they_are_read_and_hashed_as_a_start_is(reading: Callable[..., Command | None]) -> None:
    found = reading(b"sh", b"-c", "ä".encode())
    assert found is not None
    assert (found.path, found.arguments) == (b"/bin/sh", (b"sh", b"-c", "ä".encode()))
    assert recorded(found) == (["sh", "-c", "ä"], hashlib.sha256("sh\0-c\0ä".encode()).hexdigest())
    assert recorded(found)[1] == arguments.digest(("sh", "-c", "ä"))
    assert found.program().form.name == '"process sh"'


def test_what_lies_side_by_side_is_read_at_one_go_and_formed_once() -> None:
    one, other = packed(b"sh", b"-c", b"true"), packed(b"sh", b"-c", b"true")
    assert one is not None
    assert other is not None
    assert one.short
    assert one.program() is other.program()
    longer = packed(b"sh", b"-c", b"true", b"")
    assert longer is not None
    assert longer.program() != one.program(), "an empty one at the end is one more"


def test_secrets_are_not_shown() -> None:
    assert recorded(packed(b"psql", b"--password", b"hunter2"))[0] == ["psql", "--password", "[redacted]"]


@pytest.mark.usefixtures("way")
def test_bytes_that_are_no_text_survive() -> None:
    found = read(b"\xff\xfe", path=b"/\xff")
    assert found is not None
    assert (found.path, found.arguments) == (b"/\xff", (b"\xff\xfe",))
    assert recorded(found)[0] == ["\ufffd\ufffd"]


@pytest.mark.usefixtures("way")
def test_long_ones_are_cut_and_hashed_whole() -> None:
    shown, digest = recorded(read(b"x" * 10_000, *[b"y"] * 100))
    assert shown[0] == "x" * arguments.SHOWN_LENGTH + "…"
    assert len(shown) == arguments.SHOWN
    assert digest == hashlib.sha256(b"\0".join([b"x" * 10_000, *[b"y"] * 100])).hexdigest()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reading", [read, packed])
def test_what_is_not_all_shown_is_judged_whole(reading: Callable[..., Command | None]) -> None:
    def whole(*strings: bytes) -> tuple[str, ...]:
        found = reading(*strings)
        assert found is not None
        return found.program().whole

    assert whole(b"x" * 300, b"y") == ("x" * 300, "y")
    assert whole(b"x" * 256, b"y") == ()
    assert whole(b"x" * 300, *[b"y"] * 100) == ("x" * 300, *["y"] * 100)
    assert whole(b"x" * 10_000, b"y") == ("x" * arguments.JUDGED,)


@pytest.mark.usefixtures("way")
def test_more_than_is_read_has_no_hash() -> None:
    assert recorded(read(*[b"z" * 60_000] * 6))[1] == ""
    shown, digest = recorded(read(*[b"a"] * 5000))
    assert (len(shown), digest) == (64, "")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("address", [0x10, 0xFFFFFFFF81000000, 2**64 - 8])
def test_what_cannot_be_read_is_none(address: int) -> None:
    arguments, _kept = array(b"sh")
    name = ctypes.create_string_buffer(b"/bin/sh", 256)
    assert read_command(os.getpid(), address, arguments) is None
    assert read_command(os.getpid(), ctypes.addressof(name), address) is None
    assert read(b"good", end=address) is None


@pytest.mark.usefixtures("way")
def test_no_arguments_at_all() -> None:
    name = ctypes.create_string_buffer(b"/bin/sh", 256)
    found = read_command(os.getpid(), ctypes.addressof(name), 0)
    assert found == Command(b"/bin/sh", ())
    assert recorded(found) == recorded(packed()) == ([], hashlib.sha256().hexdigest())


@pytest.mark.usefixtures("way")
def test_a_thread_that_is_gone_reads_as_nothing() -> None:
    assert read_command(0x3FFFFFFF, 0x1000, 0x1000) is None


@pytest.mark.usefixtures("way")
def test_a_path_that_crosses_pages_and_one_without_an_end() -> None:
    page = mmap.mmap(-1, 3 * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    page[4000:6000] = b"p" * 2000
    words, _kept = array(b"sh")
    found = read_command(os.getpid(), address + 4000, words)
    assert found is not None
    assert found.path == b"p" * 2000
    page[:8192] = b"q" * 8192
    assert read_command(os.getpid(), address, words) is None, "longer than any path"


def test_whether_there_is_a_program() -> None:
    own = os.getpid()
    assert arguments.runnable(own, "/bin/sh")
    assert not arguments.runnable(own, "/etc/passwd")
    assert not arguments.runnable(own, "/tmp")
    assert not arguments.runnable(own, "/nonexistent")
    assert not arguments.runnable(own, "nul\0byte")

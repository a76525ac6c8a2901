"""What a contestant of bytes.py and relay.py runs: one connection, so many bytes; or many, few.

Reads lines: ``try PORT`` (errno), ``send PORT BYTES``, ``receive PORT BYTES`` (nanoseconds from connected to done),
``connect PORT COUNT`` and ``echo PORT COUNT`` (a line of nanoseconds for each connect, each byte there and back).
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

CHUNK = 1 << 18


def transfer(how: str, port: int, size: int) -> int:
    """Nanoseconds until the last byte is there: the peer acknowledges with one of its own."""
    block = memoryview(bytes(CHUNK))
    room = bytearray(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(how[0].encode() + size.to_bytes(8, "little"))
        began = time.perf_counter_ns()
        left = size
        if how == "send":
            while left:
                left -= sock.send(block[:left])
            if sock.recv(1) != b".":
                raise ConnectionError("no acknowledgement")
        else:
            while left:
                got = sock.recv_into(room)
                if not got:
                    raise ConnectionError("too few bytes")
                left -= got
        return time.perf_counter_ns() - began


def connects(port: int, count: int) -> Iterator[int]:
    for _ in range(count):
        with socket.socket() as sock:
            began = time.perf_counter_ns()
            sock.connect(("127.0.0.1", port))
            yield time.perf_counter_ns() - began


def echoes(port: int, count: int) -> Iterator[int]:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter_ns()
            sock.send(b".")
            sock.recv(1)
            yield time.perf_counter_ns() - began


def main() -> None:
    for line in sys.stdin:
        how, *numbers = line.split()
        if how == "try":
            with socket.socket() as sock:
                print(sock.connect_ex(("127.0.0.1", int(numbers[0]))))
        elif how in ("connect", "echo"):
            for each in (connects if how == "connect" else echoes)(int(numbers[0]), int(numbers[1])):
                print(each)
        else:
            print(transfer(how, int(numbers[0]), int(numbers[1])))
        sys.stdout.flush()


if __name__ == "__main__":
    main()

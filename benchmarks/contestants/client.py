"""What a contestant of connect.py runs, as client.c, with Python's socket module."""

from __future__ import annotations

import socket
import sys
import threading
import time

HOST = "127.0.0.1"


def attempt(port: int) -> int:
    """errno of one connect; 0: it was made."""
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port))


def connect(port: int, count: int, threads: int) -> tuple[int, list[int], list[int]]:
    """Nanoseconds of the whole, of each turn (socket, connect, close), of each connect alone."""
    turns: list[int] = []
    connects: list[int] = []
    barrier = threading.Barrier(threads + 1)
    address = (HOST, port)

    def work() -> None:
        now = time.perf_counter_ns
        mine: list[int] = []
        alone: list[int] = []
        barrier.wait()
        for _ in range(count):
            began = now()
            sock = socket.socket()
            before = now()
            sock.connect(address)
            after = now()
            sock.close()
            mine.append(now() - began)
            alone.append(after - before)
        turns.extend(mine)
        connects.extend(alone)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    began = time.perf_counter_ns()
    barrier.wait()
    for worker in workers:
        worker.join()
    return time.perf_counter_ns() - began, turns, connects


def serve() -> None:
    for line in sys.stdin:
        words = line.split()
        if words[0] == "try":
            print(attempt(int(words[1])))
        else:
            whole, turns, connects = connect(*(int(word) for word in words[1:]))
            print(whole)
            print(*turns)
            print(*connects)
        sys.stdout.flush()


if __name__ == "__main__":
    serve()

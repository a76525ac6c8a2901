"""What memory.py runs: so many confined processes, each of which has connected once and then waits.

python idler.py COUNT PORT      prints each one's pid; they end with its standard input
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import ray_guard


def idle(port: int) -> None:
    ray_guard.confine({"egress": {"allow": [f"127.0.0.1:{port}"]}})
    with ray_guard.episode(id=f"bench-{os.getpid()}", group="g", iteration=1), ray_guard.tool_call("bash", {"n": 1}):
        socket.create_connection(("127.0.0.1", port)).close()
    print(os.getpid(), flush=True)
    signal.pause()


def main() -> None:
    count, port = (int(word) for word in sys.argv[1:])
    if not all(
        (ray_guard.confine, ray_guard.episode, ray_guard.tool_call, ray_guard.Policy)
    ):  # imported when asked for
        raise SystemExit(2)
    children = []
    for _ in range(count):  # forked: importing everything fifty times over would be the benchmark
        child = os.fork()
        if child == 0:
            idle(port)
        children.append(child)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()

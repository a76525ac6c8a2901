"""What the guard costs per byte on the direct path: nothing, it should be.

    python benchmarks/bytes.py [--rounds 15] [--mib 256] [--json OUT]

One loopback connection carries so many bytes, sent and received by the guarded side. ``under a cap`` has a byte budget
above it that is not reached: then the flow is watched while it lives. Each contestant must first reach the allowed port
and be refused at another.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent / "contestants"
CHUNK = 1 << 18


def serve(listener: socket.socket) -> None:
    """Sends or takes as many bytes as each connection's first nine say."""
    block, room = memoryview(bytes(CHUNK)), bytearray(CHUNK)
    while True:
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(9, socket.MSG_WAITALL)
            left = int.from_bytes(head[1:], "little")
            if head[:1] == b"s":
                while left and (got := connection.recv_into(room)):
                    left -= got
                connection.sendall(b".")
            else:
                while left:
                    left -= connection.send(block[:left])


def rate(client: harness.Driven, how: str, port: int, size: int) -> list[float]:
    """GiB/s, once."""
    ((nanoseconds,),) = client.ask(f"{how} {port} {size}")
    return [size / 2**30 / (nanoseconds / 1e9)]


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=15, mib=256).parse_args()
    report = harness.Report(options)
    size = options.mib << 20
    with harness.scratch() as folder, ExitStack() as stack:
        listener, other = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        port = str(listener.getsockname()[1])
        server = os.fork()
        if server == 0:
            serve(listener)
        stack.callback(os.waitpid, server, 0)
        stack.callback(os.kill, server, signal.SIGKILL)
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        client: list[str | Path] = [sys.executable, HERE / "stream.py"]
        guard: list[str | Path] = [sys.executable, HERE / "guarded.py"]
        commands = {
            "plain": client,
            "guard, actor ring": [*guard, "actor", port, *client],
            "guard, under a cap": [*guard, "capped", port, *client],
            "guard, call ring": [*guard, "call", port, *client],
        }
        if harness.PEERS.exists():
            commands["sandlock"] = [harness.PEERS, HERE / "sandboxed.py", port, *client]
        clients = []
        for name, command in commands.items():
            each = harness.Driven(name, command, environment)
            stack.callback(each.close)
            each.check(int(port), other.getsockname()[1], confined=name != "plain")
            clients.append(each)
        for how in ("send", "receive"):
            contestants = [
                harness.Contestant(each.name, functools.partial(rate, each, how, int(port), size)) for each in clients
            ]
            outcomes = harness.compare(contestants, options.rounds)
            report.add(f"{how} {options.mib} MiB through one connection", "GiB/s", outcomes, ("plain",), digits=2)
            by_name = {each.name: each for each in outcomes}
            for name in ("guard, actor ring", "guard, call ring"):
                ratio = harness.ratios(by_name[name], by_name["plain"])[0]
                report.goal(f"{how}, {name} / plain", ratio, 0.95, at_least=True)
    report.close()


if __name__ == "__main__":
    main()

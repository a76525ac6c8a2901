"""What the relay costs: connections under a call's byte cap, whose bytes are counted as they flow.

    python benchmarks/relay.py [--rounds 15] [--mib 256] [--json OUT]

One loopback connection carries so many bytes, sent and received by the guarded side: plain, guarded and direct (no
cap), guarded and relayed (a cap that is not reached). Then the same for connecting, and for a byte there and back. Each
contestant must first reach the allowed port and be refused at another.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import bytes as streams
import harness

HERE = Path(__file__).resolve().parent / "contestants"


def serve_echo(listener: socket.socket) -> None:
    def one(sock: socket.socket) -> None:
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := sock.recv(1 << 12):
                sock.sendall(data)

    while True:
        threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()


def served(stack: ExitStack, serve: Callable[[socket.socket], None]) -> int:
    """The port that a process of its own serves."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = os.fork()
    if server == 0:
        serve(listener)
    stack.callback(os.waitpid, server, 0)
    stack.callback(os.kill, server, signal.SIGKILL)
    return int(listener.getsockname()[1])


def microseconds(client: harness.Driven, how: str, port: int, count: int) -> list[float]:
    return [each / 1e3 for (each,) in client.ask(f"{how} {port} {count}", count)]


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=15, mib=256).parse_args()
    report = harness.Report(options)
    size = options.mib << 20
    with harness.scratch() as folder, ExitStack() as stack:
        port, echo = served(stack, streams.serve), served(stack, serve_echo)
        other = socket.create_server(("127.0.0.1", 0))
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        client: list[str | Path] = [sys.executable, HERE / "stream.py"]
        guard: list[str | Path] = [sys.executable, HERE / "guarded.py"]
        ports = f"{port},{echo}"
        commands = {
            "plain": client,
            "guard, direct": [*guard, "call", ports, *client],
            "guard, relay": [*guard, "relayed", ports, *client],
        }
        clients = []
        for name, command in commands.items():
            each = harness.Driven(name, command, environment)
            stack.callback(each.close)
            each.check(port, other.getsockname()[1], confined=name != "plain")
            clients.append(each)

        def compared(title: str, unit: str, measure: Callable[..., list[float]], how: str, *numbers: int) -> float:
            """The relay's ratio to plain."""
            contestants = [
                harness.Contestant(each.name, functools.partial(measure, each, how, *numbers)) for each in clients
            ]
            outcomes = harness.compare(contestants, options.rounds)
            report.add(title, unit, outcomes, ("plain", "guard, direct"), digits=2)
            return harness.ratios(outcomes[-1], outcomes[0])[0]

        for how in ("send", "receive"):
            title = f"{how} {options.mib} MiB through one connection"
            ratio = compared(title, "GiB/s", streams.rate, how, port, size)
            report.goal(f"{how}, relay / plain", ratio, 0.6, at_least=True)
        compared("connect", "µs", microseconds, "connect", echo, 50)
        compared("a byte there and back", "µs", microseconds, "echo", echo, 200)
    report.close()


if __name__ == "__main__":
    main()

"""What a guarded connect costs: loopback socket + connect + close, beside plain and beside the peers.

    python benchmarks/connect.py [--rounds 20] [--connects 200] [--json OUT]

The same client program (in C, and in Python) runs plain and behind each of these. Before anything is timed every one of
them must let it reach the allowed port and refuse it another one that listens as well.

- *C supervisor*: the least there is (contestants/notify.c). It compares port and address and connects; it keeps no
  account and no record, and blocks while a connect blocks.
- *Python supervisor*: the same in Python, with the calls that exact counting needs and one prefabricated line written
  (contestants/notify.py): what the language alone costs.
- *sandlock*: its sandbox, by its Python library, with that one destination granted and every file readable. Its
  supervisor is in Rust; it also confines files, processes and more system calls than connect, and keeps no record.
- *guard, actor ring* and *call ring*: that one destination granted, no budget. Every connect is decided, counted and
  recorded on disk before it is made, and its record completed with the exact bytes at its end.

All share the machine, and its loopback: while the guard's supervisor runs the kernel also tells it the ends of the
others' sockets. That was looked at: the C supervisor takes as long alone.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent / "contestants"
BASES = ("plain", "C supervisor", "sandlock")
THREADS = 8
BACKLOG = 4096
"""Connections wait here unaccepted while a contestant is timed: the server takes no part in the race for the cores."""


class Server:
    """A port that accepts everything, and takes it off when told to."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def drain(self) -> int:
        """Accepts and resets what has come, so that no port stays in TIME_WAIT; how many."""
        count = 0
        while True:
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return count
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            count += 1


class Client(harness.Driven):
    """The client program under some confinement."""

    def __init__(self, name: str, command: Sequence[str | Path], server: Server, environment: dict[str, str]) -> None:
        super().__init__(name, command, environment)
        self._server = server

    def connect(self, count: int, threads: int) -> tuple[int, list[int], list[int]]:
        """Nanoseconds of the whole, of each turn, of each connect alone."""
        (whole,), turns, alone = self.ask(f"connect {self._server.port} {count} {threads}", 3)
        arrived = self._server.drain()
        if arrived != count * threads:
            raise SystemExit(f"{self.name}: {arrived} of {count * threads} connections arrived")
        return whole, turns, alone


def commands(client: Sequence[str | Path], port: int, supervisor: Path, peers: str) -> dict[str, list[str | Path]]:
    """Each contestant's way to run ``client``."""
    guard: list[str | Path] = [sys.executable, HERE / "guarded.py"]
    found: dict[str, list[str | Path]] = {
        "plain": [*client],
        "C supervisor": [supervisor, str(port), *client],
        "Python supervisor": [sys.executable, HERE / "notify.py", str(port), *client],
        "sandlock": [peers, HERE / "sandboxed.py", str(port), *client],
        "guard, actor ring": [*guard, "actor", str(port), *client],
        "guard, call ring": [*guard, "call", str(port), *client],
    }
    if len(client) > 1:  # a Python script: it can also run in the confined process itself
        found["guard, actor itself"] = [*guard, "inside", str(port), client[-1]]
        found["guard, actor in a tool call"] = [*guard, "tool", str(port), client[-1]]
    return found


class Measured:
    """One client's rounds at one number of threads: what :func:`harness.compare` does not keep."""

    def __init__(self, client: Client, connects: int, threads: int) -> None:
        self._client = client
        self._connects = connects
        self._threads = threads
        self.alone = harness.Outcome(client.name)
        self.rates: list[float] = []

    def round(self) -> list[float]:
        """Microseconds of each turn."""
        whole, turns, alone = self._client.connect(self._connects, self._threads)
        self.alone.rounds.append([each / 1e3 for each in alone])
        self.rates.append(self._connects * self._threads / (whole / 1e9))
        return [turn / 1e3 for turn in turns]


def measure(report: harness.Report, clients: Sequence[Client], language: str, rounds: int, connects: int) -> None:
    for threads in (1, THREADS):
        measured = {each.name: Measured(each, connects, threads) for each in clients}
        contestants = [harness.Contestant(name, each.round) for name, each in measured.items()]
        # The pause: what a supervisor still has to write belongs to nobody else's turn.
        outcomes = harness.compare(contestants, rounds, pause_s=0.02)
        about = f"{language} client, {threads} thread{'s' * (threads > 1)}"
        report.add(f"socket + connect + close, {about}", "µs", outcomes, BASES)
        report.add(f"of this connect alone, {about}", "µs", [each.alone for each in measured.values()], BASES)
        rates = {name: round(statistics.median(each.rates)) for name, each in measured.items()}
        report.add_facts(f"connects per second, {about}", rates)
        by_name = {each.name: each for each in outcomes}
        for ring in ("guard, actor ring", "guard, call ring"):
            for base, limit in (("sandlock", 1.0), ("C supervisor", 2.0)):
                ratio = harness.ratios(by_name[ring], by_name[base])[0]
                report.goal(f"p50 of {ring} / {base}, {about}", ratio, limit)


def main() -> None:
    parser = harness.arguments(__doc__ or "", rounds=20, connects=200)
    parser.add_argument("--client", choices=("c", "python", "both"), default="both")
    options = parser.parse_args()
    report = harness.Report(options)
    peers = harness.require_peers()
    with harness.scratch() as folder, ExitStack() as stack:
        supervisor = harness.compiled("contestants/notify.c", folder)
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        server, other = Server(), Server()
        chosen: dict[str, list[str | Path]] = {}
        if options.client in ("c", "both"):
            chosen["C"] = [harness.compiled("contestants/client.c", folder)]
        if options.client in ("python", "both"):
            chosen["Python"] = [sys.executable, HERE / "client.py"]
        for language, client in chosen.items():
            clients = []
            for name, command in commands(client, server.port, supervisor, peers).items():
                each = Client(name, command, server, environment)
                stack.callback(each.close)
                each.check(server.port, other.port, confined=name != "plain")
                clients.append(each)
            server.drain()
            measure(report, clients, language, options.rounds, options.connects)
    report.close()


if __name__ == "__main__":
    main()

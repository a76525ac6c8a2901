"""What starting a tool costs: from run(["true"]) to its result, beside subprocess and sandlock's library.

    python benchmarks/start.py [--rounds 20] [--starts 10] [--json OUT]

*Warm* is inside a long-lived process, as in a rollout: ``ray_guard.run`` in a confined one, ``subprocess.run`` in a
plain one, ``Sandbox.run`` of sandlock 0.9.0; each contestant must first reach the allowed port from bash and be refused
at another. *Cold* is a whole command from a shell: ``ray-guard run -- /usr/bin/true``, beside a Python that starts
sandlock's; with no supervisor there, which the command then starts, and with that of the command before.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent / "contestants"
TRUE = "/usr/bin/true"


def warm(client: harness.Driven, starts: int, threads: int) -> list[float]:
    """Milliseconds of each start."""
    return [each / 1e6 for each in client.ask(f"start {starts} {threads}")[0]]


def cold(command: list[str], environment: dict[str, str]) -> list[float]:
    """Milliseconds of one whole command."""
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    return [(time.perf_counter() - began) * 1e3]


def colder(command: list[str], environment: dict[str, str]) -> list[float]:
    """The same where there is no supervisor: one that nobody needs leaves after 2 s."""
    time.sleep(2.5)
    return cold(command, environment)


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=20, starts=10).parse_args()
    report = harness.Report(options)
    peers = harness.require_peers()
    with harness.scratch() as folder, ExitStack() as stack:
        listener, other = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        port = listener.getsockname()[1]
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled, as sandlock's is

        policy = folder / "policy.json"  # YAML's parser alone would take longer to load than a tool to start
        policy.write_text('{"version": 1, "egress": {"allow": []}}\n')
        command = str(Path(sys.executable).with_name("ray-guard"))
        sandlock = f"from sandlock import Sandbox; Sandbox(fs_readable=['/']).run(['{TRUE}'])"
        commands = {
            "Python that does nothing": [sys.executable, "-c", "pass"],
            "ray-guard run": [command, "run", "--policy", str(policy), "--", TRUE],
            "Python with sandlock": [peers, "-c", sandlock],
        }
        # First, before any supervisor runs for the warm ones: it lingers 2 s after its last target.
        for title, measure in (("no supervisor there", colder), ("supervisor there from the one before", cold)):
            runs = [
                harness.Contestant(name, functools.partial(measure, words, environment))
                for name, words in commands.items()
            ]
            outcomes = harness.compare(runs, max(5, options.rounds // 2), pause_s=0.05)
            report.add(f"cold: a whole command, {title}", "ms", outcomes, ("Python with sandlock",))

        clients = []
        for kind, python in (("plain", sys.executable), ("guard", sys.executable), ("sandlock", peers)):
            each = harness.Driven(kind, [python, HERE / "starter.py", kind, str(port)], environment)
            stack.callback(each.close)
            each.check(port, other.getsockname()[1], confined=kind != "plain")
            clients.append(each)
        for threads in (1, 8):
            starts = max(1, options.starts // threads)
            runs = [harness.Contestant(each.name, functools.partial(warm, each, starts, threads)) for each in clients]
            outcomes = harness.compare(runs, options.rounds, pause_s=0.02)
            title = f"warm: run(['{TRUE}']), {threads} thread{'s' * (threads > 1)}"
            report.add(title, "ms", outcomes, ("plain", "sandlock"), digits=2)
    report.close()


if __name__ == "__main__":
    main()

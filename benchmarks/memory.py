"""What the guard's own processes weigh with 50 guarded processes behind them.

    python benchmarks/memory.py [--processes 50] [--ray-actors 0] [--json OUT]

The supervisor, its zygote and, with Ray, the process that reads the cluster's tables (directory) are named apart. RSS
counts shared pages in full, PSS shares them out; PSS needs the right to look (the supervisor is not dumpable). Each
guarded process has made one granted connection in an episode; with ``--ray-actors N`` they are Ray actors.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import harness

IDLER = Path(__file__).resolve().parent / "contestants" / "idler.py"
LIMIT_MIB = 60


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def namespaces(pid: int | str) -> list[int]:
    try:
        return [os.stat(f"/proc/{pid}/ns/{name}").st_ino for name in ("net", "pid", "mnt", "user")]
    except OSError:
        return []


def guards() -> dict[str, int]:
    """pid by role, of the supervisor of these namespaces and what it started."""
    here = namespaces("self")
    ours = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and "ray_guard.supervisor" in command_line(int(name)) and namespaces(name) == here
    ]
    found: dict[str, int] = {}
    for pid in sorted(ours):
        if parent(pid) in ours:
            found.setdefault("zygote", pid)
        else:
            found["supervisor"] = pid
    if "supervisor" not in found:
        raise SystemExit("no supervisor runs here: nothing to weigh")
    for name in os.listdir("/proc"):
        if name.isdigit() and parent(int(name)) == found["supervisor"] and "directory" in command_line(int(name)):
            found["directory"] = int(name)
    return found


def weigh(pid: int) -> dict[str, float]:
    """MiB, by kind."""
    weights = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("VmRSS:", "VmHWM:")):
            weights["RSS" if line.startswith("VmRSS") else "RSS, highest"] = int(line.split()[1]) / 1024
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                weights["PSS"] = int(line.split()[1]) / 1024
    except OSError:
        pass  # not ours to look into
    return weights


@contextmanager
def processes(count: int, port: int) -> Iterator[None]:
    """``count`` plain processes under confine."""
    command = [sys.executable, str(IDLER), str(count), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        for _ in range(count):
            if not started.stdout.readline():
                raise SystemExit("a guarded process did not start")
        yield
        started.stdin.close()


@contextmanager
def actors(count: int, port: int) -> Iterator[None]:
    """``count`` guarded Ray actors."""
    import ray

    import ray_guard

    @ray_guard.guard(allow=[f"127.0.0.1:{port}"])
    @ray.remote(num_cpus=0)
    class Idler:
        def begin(self, port: int) -> bool:
            with ray_guard.episode(id=f"bench-{os.getpid()}", group="g", iteration=1):
                socket.create_connection(("127.0.0.1", port)).close()
            return True

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        started = []
        for _ in range(count):  # one by one: the processes of all at once would not fit two cores
            actor = Idler.remote()
            ray.get(actor.begin.remote(port), timeout=120)
            started.append(actor)
        yield
    finally:
        ray.shutdown()


def main() -> None:
    options = harness.arguments(__doc__ or "", processes=50, ray_actors=0).parse_args()
    report = harness.Report(options)
    with harness.scratch() as folder, ExitStack() as stack:
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        port = listener.getsockname()[1]
        os.environ["RAY_GUARD_EVIDENCE"] = str(folder / "evidence")
        count = options.ray_actors or options.processes
        what = f"{count} guarded {'Ray actors' if options.ray_actors else 'processes'}"
        if options.ray_actors:
            stack.enter_context(actors(count, port))
        else:
            stack.enter_context(processes(count, port))
        time.sleep(1.0)
        found = guards()
        weights = {role: weigh(pid) for role, pid in found.items()}
        facts = {f"{role}, {kind}": value for role, kinds in weights.items() for kind, value in kinds.items()}
        report.add_facts(f"MiB with {what}", facts)
        report.goal(f"supervisor's RSS in MiB with {what}", weights["supervisor"]["RSS"], LIMIT_MIB)
    report.close()


if __name__ == "__main__":
    main()

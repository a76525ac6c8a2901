"""Jobs under a fault: started in namespaces of their own, told what to do, and watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from harness import PYTHON, Namespace, grants, hang_up, wait
from judge import Ledger, read_ledger
from otlp import Traces, by_http

from ray_guard.evidence.verify.check import check

FOLDER = Path(__file__).parent
EXPORT = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
"""Ours and the batch processor alike give an endpoint one second, so that an outage of seconds is one of minutes."""


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except ProcessLookupError:  # it is about to go
        return []


_SUPERVISOR = b"ray_guard.supervisor.__main__"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def name_of(pid: int) -> str:
    """Its command's name; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def supervisor_beside(pid: int) -> int:
    """The supervisor in the mount namespace of process ``pid``. Its zygote and leaders have its command line too."""
    where = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    with_children = {
        each: children(each)
        for each in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _SUPERVISOR in _command(each) and os.stat(f"/proc/{each}/ns/mnt").st_ino == where
    }
    below = {child for found in with_children.values() for child in found}
    (supervisor,) = with_children.keys() - below
    return supervisor


def resident(pid: int) -> int:
    """Bytes of memory; 0: it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return 0


def kill_together(pids: Iterable[int]) -> float:
    """Kills all at the same moment (each is stopped first, so that none sees another die); when that was."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    return time.monotonic()


def dead_after(began: float, pids: Iterable[int], seconds: float = 5.0) -> float:
    """Seconds from ``began`` until all of ``pids`` were dead."""
    pids = list(pids)
    wait(lambda: not any(map(lives, pids)), f"{[pid for pid in pids if lives(pid)]} live on", seconds)
    return time.monotonic() - began


class Sink:
    """A loopback port that takes connections, counts and closes them."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._server.getsockname()[1]
        self.taken = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._server.accept()[0].close()
                self.taken += 1

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()


class FullPort:
    """A loopback port at which a connect waits until :meth:`hear` is called."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port: int = self._server.getsockname()[1]
        self._filling = socket.create_connection(("127.0.0.1", self.port))  # as many as the kernel takes in beforehand

    def asked_by(self, pid: int) -> bool:
        """Whether a connect to it is under way (SYN_SENT); ``pid`` says in whose network namespace."""
        wanted = f":{self.port:04X} 02 "
        return wanted in Path(f"/proc/{pid}/net/tcp").read_text()

    def hear(self) -> bytes:
        """Lets in who waits; what it says."""
        self._server.settimeout(20)
        self._server.accept()[0].close()
        with self._server.accept()[0] as sock:
            sock.settimeout(20)
            return sock.recv(100)

    def close(self) -> None:
        self._filling.close()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Job:
    """One job.py. ``evidence``: where it writes; None: it has a batch processor instead."""

    def __init__(
        self,
        folder: Path,
        evidence: Path | None,
        *,
        namespace: Namespace | None = None,
        endpoint: str = "",
        allow: Iterable[str] = (),
        environment: dict[str, str] | None = None,
        python: tuple[str, ...] = (PYTHON,),
        role: str = "env",
        budgets: dict[str, Any] | None = None,
        observes: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._ledger = folder / f"ledger-{time.monotonic_ns()}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "RAY_GUARD_"))}
        if evidence is None:
            argv = ["batch", str(self._ledger), endpoint]
        else:
            policy = {"egress": {"allow": list(allow)}, "files": grants(folder), "role": role}
            if budgets is not None:
                policy["budgets"] = budgets
            argv = ["observe" if observes else "guard", str(self._ledger), json.dumps(policy)]
            clean["RAY_GUARD_EVIDENCE"] = str(evidence)
            if endpoint:
                clean["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
        prefix = [] if namespace is None else namespace.prefix
        self._process = subprocess.Popen(
            [*prefix, *python, str(FOLDER / "job.py"), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**clean, **EXPORT, "PYTHONWARNINGS": "ignore", **(environment or {})},
            text=True,
            bufsize=1,
        )
        about = self._answer(30.0)
        self.pid: int = about["pid"]
        self.supervisor = 0 if evidence is None else supervisor_beside(self.pid)

    @property
    def zygote(self) -> int:
        def found() -> list[int]:
            return [pid for pid in children(self.supervisor) if _SUPERVISOR in _command(pid)]

        # A supervisor that has only just begun tries what it may do on children of its own.
        wait(lambda: len(found()) == 1, "there is no zygote, or more than one")
        return found()[0]

    def await_witness(self) -> None:
        """Waits until three processes hold what is needed should two of them be killed."""
        zygote = self.zygote
        wait(lambda: "witness" in map(name_of, children(zygote)), "there is no witness")

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({name: arguments}) + "\n")
        return self._answer(60.0)["result"]

    def _answer(self, seconds: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        assert select.select([stdout], [], [], seconds)[0], "the job does not answer"
        line = stdout.readline()
        assert line, f"the job has died: {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill_supervisor(self, seconds: float) -> float:
        """SIGKILL for the supervisor alone; waits for the next, in whose hands the job is then; when that was."""
        before, zygote = self.supervisor, self.zygote
        began = time.monotonic()
        os.kill(before, signal.SIGKILL)

        def handed_over() -> bool:
            if lives(before) or lives(zygote):  # it ends when it has handed the job over
                return False
            self.supervisor = supervisor_beside(self.pid)
            return True

        wait(handed_over, "there is no other supervisor", seconds)
        return began

    def ledger(self) -> Ledger:
        return read_ledger(self._ledger)

    def calls_on(self) -> None:
        """Waits until calls are flowing."""
        before = self._ledger.stat().st_size
        wait(lambda: self._ledger.stat().st_size > before + 5000, "no calls are made")

    def kill(self) -> float:
        """SIGKILL; when that was."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        return began

    def close(self) -> None:
        hang_up(self._process, 15)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restarted(folder: Path, evidence: Path, namespace: Namespace) -> None:
    """Another job on the same evidence, as Ray starts an actor anew: its supervisor recovers what was left."""
    with Job(folder, evidence, namespace=namespace) as again:
        assert again.ask("calls", 1) == 1
        wait(lambda: list(evidence.glob("*.vouched")), "nothing was recovered", 15)


def unproven(evidence: Path, seconds: float = 15.0) -> list[str]:
    """What ``ray-guard verify`` has to say against the evidence, once its last log has ended."""
    deadline = time.monotonic() + seconds
    while True:
        found = [f"{report.log}: {finding}" for report in check(evidence) for finding in report.findings]
        if time.monotonic() > deadline or (not found and all(r.state != "live" for r in check(evidence))):
            return found
        time.sleep(0.2)


def batch_lost(folder: Path, calls: int = 300) -> str:
    """A job with a batch processor that is killed right after ``calls`` calls: how many of them never arrived."""
    receiver = Traces()
    with by_http(receiver) as endpoint, Job(folder, None, endpoint=endpoint) as job:
        job.ask("calls", calls)
        job.kill()
        finished = job.ledger().finished
        return f"{len(receiver.await_all(finished, 1.0))} of {len(finished)}"


def interpreter(folder: Path, preloaded: Path) -> Path:
    """A Python that has ``preloaded`` loaded before all else."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nLD_PRELOAD={preloaded} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path

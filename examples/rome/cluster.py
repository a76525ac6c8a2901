"""A Ray cluster of one node on loopback, ended whole, whatever happens."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.parameter import RayParams
from ray.job_submission import JobStatus, JobSubmissionClient

from rome.model import ENVIRONMENT

_NODE = "127.0.0.2"  # on loopback, but not 127.0.0.1, for which Ray takes the machine's outer address instead
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")


def prepare_environment(evidence: Path | None) -> None:
    """What Ray, its workers and the tools inherit: this Python first on PATH, no proxy, no usage reports."""
    for name in list(os.environ):
        if name.lower() in _PROXIES:
            del os.environ[name]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ.update(ENVIRONMENT)
    if evidence is not None:
        os.environ["RAY_GUARD_EVIDENCE"] = str(evidence)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A local Ray cluster with its dashboard. Everything it has started is gone afterwards."""
    port = _free_port(8265)
    before = set(psutil.Process().children())
    try:
        with _beside_other_clusters():
            context = ray.init(
                num_cpus=4,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=port,
                _node_ip_address=_NODE,
                log_to_driver=False,
                logging_level="ERROR",
            )
        yield Cluster(f"127.0.0.1:{port}", Path(context.address_info["session_dir"]))
    finally:
        with _to_the_end():
            started = [process for process in psutil.Process().children(recursive=True) if process not in before]
            ray.shutdown()
            # The engine's processes and submitted jobs are not Ray's children: what has not ended with it is ended
            # here, by pid. psutil compares start times, so a pid that was used again is left alone.
            _, alive = psutil.wait_procs(started, timeout=5)
            _end(alive)


class Cluster:
    """The running cluster: ``dashboard`` is host:port of its dashboard, ``session`` its folder."""

    def __init__(self, dashboard: str, session: Path) -> None:
        self.dashboard = dashboard
        self.session = session
        self.gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._jobs = JobSubmissionClient(f"http://{dashboard}")

    def submitted_jobs(self, patience_s: float) -> dict[str, str]:
        """Submission id and status of all jobs that came in through the dashboard, once they have ended."""
        deadline = time.monotonic() + patience_s
        while True:
            jobs: dict[str, JobStatus] = {
                job.submission_id: job.status for job in self._jobs.list_jobs() if job.submission_id
            }
            if all(status.is_terminal() for status in jobs.values()) or time.monotonic() > deadline:
                return {name: status.value for name, status in jobs.items()}
            time.sleep(0.5)


@contextmanager
def _beside_other_clusters() -> Iterator[None]:
    """Gives Ray's agent a free port. Where its usual one is taken, by another cluster on this machine say, it would go
    without, and no job would ever be accepted. ray.init has no argument for that."""
    usual = RayParams.__init__
    RayParams.__init__ = functools.partialmethod(usual, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        RayParams.__init__ = usual


@contextmanager
def _to_the_end() -> Iterator[None]:
    """Puts Ctrl-C off until the block is done: a clean-up that was begun is finished."""
    missed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: missed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if missed:
        raise KeyboardInterrupt


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen: int = probe.getsockname()[1]
            return chosen
    raise OSError("no free port for the dashboard")


def _end(processes: list[Any]) -> None:
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, stubborn = psutil.wait_procs(processes, timeout=3)
    for process in stubborn:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue

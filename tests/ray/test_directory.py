"""The directory names every peer of a worker and nothing that takes jobs."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import pytest
import ray

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def context() -> Any:
    """With a dashboard and agents: those are what must stay out."""
    before = dict(os.environ)
    yield ray.init("local", num_cpus=4, log_to_driver=False)
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


class Directory:
    def __init__(self, *arguments: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "PATH", "HOME"))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ray_guard.actors.directory", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=kept,
        )

    def ask(self, line: str = '{"op": "read"}') -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(10)
        self.process.stdout.close()
        return status


def busy_workers(**variables: str) -> list[int]:
    """Workers that have spoken to each other, to the driver and to Ray, by their pids."""

    class Worker:
        def take(self, array: Any) -> int:
            return os.getpid()

        def call(self, other: Any) -> int:
            return ray.get(other.take.remote(np.zeros(4 << 20, dtype=np.uint8)))

        def submit(self) -> int:
            return ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())  # noqa: PLW0108 - Ray wants a function

    actor = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(Worker)
    one, two = actor.remote(), actor.remote()
    pids = [ray.get(one.take.remote(None)), ray.get(one.call.remote(two)), ray.get(one.submit.remote())]
    busy_workers.keep = (one, two)  # type: ignore[attr-defined]
    return pids


def peers(pids: list[int]) -> set[tuple[str, int]]:
    found = set()
    for pid in pids:
        connections = psutil.Process(pid).net_connections("tcp")
        own = {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
        for each in connections:
            if each.raddr and each.laddr.port not in own:
                found.add((each.raddr.ip.removeprefix("::ffff:"), each.raddr.port))
    return found


def test_it_names_all_peers_of_workers_and_no_way_to_submit_jobs(context: Any) -> None:
    info = context.address_info
    pids = busy_workers()
    directory = Directory(info["gcs_address"], info["node_id"])
    try:
        deadline = time.monotonic() + 30
        while True:  # agents come up seconds after the cluster, and workers speak to them then
            found = peers(pids)
            answer = directory.ask()
            endpoints = {tuple(each) for each in answer["endpoints"]}
            agents = [peer for peer in found if peer[0] == "127.0.0.1"]
            if agents or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert agents, "no worker has spoken to its node's agent"
        assert found <= endpoints, f"not in the directory: {found - endpoints}"
        assert answer["nodes"] == [info["node_id"]]

        control = {tuple(each) for each in answer["control"]}
        host, port = info["webui_url"].rsplit(":", 1)
        dashboard = (host, int(port))
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/api/version")
        assert connection.getresponse().status, "the control for what follows: jobs are taken here"
        connection.close()
        agent_http = (info["node_ip_address"], int(info["dashboard_agent_listen_port"]))
        has_http = agent_http[1] > 0  # -1 where another cluster of this host holds the port
        if has_http:
            socket.create_connection(agent_http, timeout=5).close()
        assert {dashboard, (info["node_ip_address"], 10001)} <= control
        assert not {*control, agent_http} & endpoints
        serving = {pid for pid in psutil.pids() if is_runtime_env_agent(pid)}
        assert serving, "Ray's runtime environment agent is not found, so nothing is known of its port"
        for pid in serving:
            for each in psutil.Process(pid).net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    assert (info["node_ip_address"], each.laddr.port) not in endpoints
    finally:
        assert directory.close() == 0
    if not has_http:
        pytest.skip("missing: an agent's HTTP port, which another Ray cluster of this host holds; the rest held")


def is_runtime_env_agent(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    # Not "in": the raylet's own command line quotes the agent's.
    return any(word.startswith("ray::RuntimeEnvAgent") or word.endswith("runtime_env/agent/main.py") for word in words)


def test_it_follows_the_cluster_and_survives_nonsense(context: Any) -> None:
    info = context.address_info
    directory = Directory(info["gcs_address"], info["node_id"])
    try:
        assert "error" in directory.ask("nonsense")
        assert "error" in directory.ask('{"op": "write"}')
        before = {tuple(each) for each in directory.ask()["endpoints"]}
        pid = busy_workers(NEW="1")[0]  # not one that Ray had started beforehand
        port = next(each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.status == "LISTEN")
        assert (info["node_ip_address"], port) not in before
        assert [info["node_ip_address"], port] in directory.ask()["endpoints"]
    finally:
        assert directory.close() == 0


@pytest.mark.slow  # the GCS client tries for a quarter of a minute
def test_a_cluster_that_is_not_there_is_an_error_not_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    directory = Directory(f"127.0.0.1:{port}")
    try:
        answer = directory.ask()
        assert "error" in answer
        assert "endpoints" not in answer
    finally:
        directory.process.kill()
        directory.process.communicate()

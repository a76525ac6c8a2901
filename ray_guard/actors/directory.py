"""supervisor's helper: says which addresses are this Ray cluster, from the GCS's own tables.

``python -m ray_guard.actors.directory GCS_ADDRESS [NODE_ID]`` answers one line of JSON for each on stdin, until stdin
closes. ``{"op": "read"}`` gives::

    {"endpoints": [["10.0.0.5", 6379], …], "control": [["10.0.0.5", 8265], …], "nodes": ["4f07…", …]}

``endpoints`` is what an actor's own process talks to: the GCS, and of each live node the raylet, the object manager,
the agent's gRPC port and the ports of workers and drivers; for this node (``NODE_ID``) on loopback too. Never among
them, and listed as ``control`` where Ray says where they are: the job API (8265), the agent's HTTP port (it takes jobs
as well), the client server (10001), the runtime environment agent (it installs packages for whoever asks) and metrics.
``claim``, ``began`` and ``forget`` are about limits that hold over several nodes (:mod:`ray_guard.actors.job_budget`).
A failed reading is ``{"error": …}``: the supervisor then keeps what it knew, and what it did not know stays refused.

It is a process of its own because ray is too large for the supervisor. Measured: 77 MB resident, 39 of them its own,
0.9 s to the first answer, 5 ms for each after that.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ray_guard.actors import job_budget

Endpoint = tuple[str, int]

LOOPBACK: Final = "127.0.0.1"
CLIENT_SERVER_PORT: Final = 10001
_AGENT_KEY: Final = "DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:"


def endpoints_of(
    gcs_address: str,
    nodes: Iterable[Mapping[str, Any]],
    workers: Iterable[Endpoint],
    agent_ports: Callable[[str], tuple[int, int]],
    here: str | None,
) -> tuple[set[Endpoint], set[Endpoint]]:
    """The cluster's endpoints, and the control plane's that must not be among them.

    Args:
        gcs_address: ``host:port``.
        nodes: rows of Ray's node table.
        workers: (address, port) of each live worker and driver.
        agent_ports: the agent's gRPC and HTTP port by node id, where the node table does not tell; 0: unknown.
        here: id of the node whose loopback counts.
    """
    host, _, port = gcs_address.rpartition(":")
    found: set[Endpoint] = {(host.strip("[]"), int(port)), *workers}
    control: set[Endpoint] = set()
    for node in nodes:
        if not node.get("Alive"):
            continue
        address, node_id = str(node["NodeManagerAddress"]), str(node["NodeID"])
        addresses = (address, LOOPBACK) if node_id == here else (address,)
        agent, agent_http = int(node.get("MetricsAgentPort") or 0), int(node.get("DashboardAgentListenPort") or 0)
        if not agent:
            agent, agent_http = agent_ports(node_id)
        found.add((address, int(node.get("ObjectManagerPort") or 0)))
        for each in addresses:
            found |= {(each, int(node.get("NodeManagerPort") or 0)), (each, agent)}
            control |= {(each, int(node.get(name) or 0)) for name in ("RuntimeEnvAgentPort", "MetricsExportPort")}
            control |= {(each, agent_http), (each, CLIENT_SERVER_PORT)}
    control = {endpoint for endpoint in control if endpoint[1] > 0}
    return {endpoint for endpoint in found if endpoint[1] > 0} - control, control


class Tables:
    """The GCS's tables. Logs in as Ray itself does (token, TLS)."""

    def __init__(self, gcs_address: str, here: str | None) -> None:
        from ray import _raylet
        from ray.core.generated import gcs_pb2

        core: Any = _raylet
        rows: Any = gcs_pb2
        self._row: Any = rows.WorkerTableData
        options = core.GcsClientOptions.create(
            gcs_address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
        )
        self._accessor: Any = core.GlobalStateAccessor(options)
        if not self._accessor.connect():
            raise ConnectionError(f"the GCS at {gcs_address} does not answer")
        self._address = gcs_address
        self._here = here
        self.nodes = 0
        """That were alive at the last reading."""

    def read(self) -> dict[str, Any]:
        nodes = self._accessor.get_node_table()
        found, control = endpoints_of(self._address, nodes, self._workers(), self._agent_ports, self._here)
        dashboard = self._look_up("dashboard", "dashboard")
        if dashboard:
            host, _, port = dashboard.rpartition(":")
            control.add((host.strip("[]"), int(port)))
        alive = sorted(str(node["NodeID"]) for node in nodes if node.get("Alive"))
        self.nodes = len(alive)
        return {"endpoints": sorted(found - control), "control": sorted(control), "nodes": alive}

    def _workers(self) -> Iterable[Endpoint]:
        for text in self._accessor.get_worker_table():
            row = self._row.FromString(text)
            if row.is_alive:
                yield str(row.worker_address.ip_address), int(row.worker_address.port)

    def _agent_ports(self, node_id: str) -> tuple[int, int]:
        """Where Ray 2.48 keeps them: address, HTTP port, gRPC port."""
        told = self._look_up("dashboard", f"{_AGENT_KEY}{node_id}")
        if not told:
            return 0, 0
        _address, http, grpc = json.loads(told)
        return int(grpc), int(http)

    def _look_up(self, namespace: str, key: str) -> str | None:
        value: bytes | None = self._accessor.get_internal_kv(namespace.encode(), key.encode())
        return None if value is None else value.decode()


Operation = Callable[[dict[str, Any]], dict[str, Any]]


def answer(line: str, operations: Mapping[str, Operation]) -> dict[str, Any]:
    """The answer to one line; whatever goes wrong is told, never raised."""
    try:
        question = json.loads(line)
        operation = operations.get(str(question.get("op"))) if isinstance(question, dict) else None
        if operation is None:
            return {"error": f"ask {' or '.join(operations)}, as an object with op"}
        return operation(question)
    except Exception as error:  # noqa: BLE001 - the supervisor outlives whatever ails the cluster
        return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python -m ray_guard.actors.directory GCS_ADDRESS [NODE_ID]\n")
        return 2
    tables: Tables | None = None
    parts: job_budget.Store | None = None

    def read(_question: dict[str, Any]) -> dict[str, Any]:
        nonlocal tables
        tables = tables or Tables(arguments[0], arguments[1] if len(arguments) > 1 else None)
        return tables.read()

    def store() -> job_budget.Store:
        nonlocal parts
        parts = parts or job_budget.Gcs(arguments[0])
        return parts

    def claim(question: dict[str, Any]) -> dict[str, Any]:
        return job_budget.claim(store(), question, 1 if tables is None else tables.nodes)

    operations = {
        "read": read,
        "claim": claim,
        "began": lambda question: job_budget.began(store(), question),
        "forget": lambda question: job_budget.forget(store(), question),
    }

    for line in sys.stdin:
        found = json.dumps(answer(line, operations))
        with contextlib.suppress(BrokenPipeError):  # who asked has gone: what it gives back is still to be done
            sys.stdout.write(found + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

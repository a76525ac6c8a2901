"""target: what this Ray worker is confined under, and how it came to be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable

import psutil

from ray_guard.actors import environment, internals
from ray_guard.actors.documents import Wired
from ray_guard.client import channel, confine
from ray_guard.client.identity import Identity, named_service

_HELPERS_ENVIRONMENT = ("RAY_", "PATH", "PYTHONPATH", "HOME", "LANG", "LC_", "LD_LIBRARY_PATH", "SSL_CERT_")


class Confinement:
    """The policies that hold in this process; only ever more of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._ids: tuple[str, ...] = ()
        self._identified = False

    @property
    def ids(self) -> tuple[str, ...]:
        return self._ids

    def lacks(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Those of `ids` that this process is not under."""
        return tuple(each for each in ids if each not in self._ids)

    def enter(self, policy_id: str, policy: Wired) -> None:
        """Confines this process under `policy` too, for good.

        Raises:
            NotEnforced: this host or process cannot hold it.
        """
        with self._lock:
            if policy_id in self._ids:
                return
            confine.enter(policy, identity(), cluster=None if self._ids else cluster())
            self._ids = (*self._ids, policy_id)

    def identify(self, class_name: str) -> None:
        """Tells the supervisor which actor this is: nobody knows while the worker is being set up."""
        actor = internals.actor_id()
        line = channel.current()
        if self._identified or actor is None or line is None:
            return
        self._identified = True
        name = internals.actor_name() or class_name
        line.send({"op": "identify", "actor_id": actor, "actor_name": name})


confinement = Confinement()


def submitter() -> str | None:
    """The guarded actor that this process's work is charged to: itself, or whoever submitted it."""
    if not confinement.ids:
        return None
    return internals.actor_id() or os.environ.get(environment.SUBMITTER)


def evidence_folder() -> str:
    return os.environ.get("RAY_GUARD_EVIDENCE") or os.path.join(internals.logs_folder(), "ray_guard")


def run_id() -> str:
    """The same in every process of a job, without asking anybody."""
    return os.environ.get("RAY_GUARD_RUN_ID") or f"{internals.session_name()}.{internals.job()}"


def identity() -> Identity:
    return Identity(
        run_id=run_id(),
        job_id=internals.job(),
        node_id=internals.node(),
        actor_id=internals.actor_id() or os.environ.get(environment.SUBMITTER, ""),
        actor_name=internals.actor_name(),
        service_name=named_service("ray_guard"),
        evidence=evidence_folder(),
    )


def cluster() -> confine.ClusterAccess:
    """How the supervisor learns the cluster's addresses; said before any of the user's code has run."""
    address = internals.gcs_address()
    listening, peers = _connections()
    return confine.ClusterAccess(
        gcs_address=address,
        directory=(sys.executable, "-P", "-m", "ray_guard.actors.directory", address, internals.node()),
        environment={name: value for name, value in os.environ.items() if name.startswith(_HELPERS_ENVIRONMENT)},
        endpoints=tuple({*internals.node_endpoints(), *peers}),
        unix=internals.session_sockets(),
        folders=(internals.session_folder(), os.path.expanduser("~/.ray")),
        listening=listening,
    )


def _connections() -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
    """Ports that this process listens on, and whom it has connected to: Ray's, for nobody else was here yet.

    Measured at this point, in 2.48 and 2.60: no children, the raylet's and the object store's unix sockets, one
    listener, connections to the GCS, the agent and the raylet, and one that the raylet made.
    """
    connections = psutil.Process().net_connections("tcp")
    listening = {int(each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}
    peers = {
        (str(each.raddr.ip), int(each.raddr.port))
        for each in connections
        if each.raddr and each.laddr.port not in listening  # whoever called us has a port that anybody may have next
    }
    return tuple(listening), tuple(peers)


_announced: set[str] = set()
"""Runs that this process has named; what else RAY_GUARD_RUN_ID says is the user's word."""


def announce_driver() -> None:
    """Lets an unguarded driver's own spans go where its actors' go, under the same run."""
    if not internals.connected() or internals.in_worker():
        return
    folder = os.path.join(internals.logs_folder(), "ray_guard")
    channel.observe(folder, job_id=internals.job(), node_id=internals.node())
    if os.environ.get("RAY_GUARD_RUN_ID") in (None, *_announced):
        os.environ.pop("RAY_GUARD_RUN_ID", None)  # of an earlier job of this process
        os.environ["RAY_GUARD_RUN_ID"] = run_id()
        _announced.add(os.environ["RAY_GUARD_RUN_ID"])

"""What all targets of one node share: meter, journals, cluster directories, announced ports. Runs in the supervisor."""

from __future__ import annotations

import functools
import math
import os
import select
import socket
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from ray_guard.errors import NotEnforced, PolicyError
from ray_guard.evidence.forwarder import forwarder_argv
from ray_guard.evidence.journal import Bounds, Journal
from ray_guard.kernel import borrowing, rtnetlink
from ray_guard.log import logger
from ray_guard.policy.budgets import KINDS, WALL, Account, Amount, Near, Scope
from ray_guard.policy.decide import CompiledPolicy, Surroundings
from ray_guard.policy.destination import canonical_address
from ray_guard.policy.values import parse_size
from ray_guard.records import Role
from ray_guard.supervisor.gpu_presence import Presence
from ray_guard.supervisor.leaders import Leaders
from ray_guard.supervisor.leases import Lease, Leases
from ray_guard.supervisor.limits import Census
from ray_guard.supervisor.loop import Loop
from ray_guard.supervisor.proxies import Proxies
from ray_guard.supervisor.quota import Quotas
from ray_guard.supervisor.resolver import Resolver
from ray_guard.supervisor.sealing import Sealer

if TYPE_CHECKING:
    import subprocess

    from ray_guard.egress.gate import Means
    from ray_guard.egress.meter import Meter
    from ray_guard.egress.relay.front import Relay
    from ray_guard.egress.relay.model.admission import Price
    from ray_guard.supervisor.care import Care
    from ray_guard.supervisor.ceilings import Ceilings
    from ray_guard.supervisor.cluster import Directory
    from ray_guard.supervisor.judging import Judging
    from ray_guard.supervisor.leaf import Leaf
    from ray_guard.supervisor.model_calls import Paid
    from ray_guard.supervisor.session import Session
    from ray_guard.supervisor.target import Target

log = logger("ray_guard.node")

Endpoint = tuple[str, int]
_FORWARD_AGAIN_S: Final = 1.0
"""Until a forwarder that was killed is started again."""


class Membership:
    """How one target stands in a cluster: told by the trusted start of its actor, before any user code ran."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.address = str(told["gcs_address"])
        self.argv = [str(word) for word in told["directory"]]
        self.endpoints = [list(entry) for entry in told.get("endpoints", ())]
        self.told = frozenset((canonical_address(str(host)), int(port)) for host, port in self.endpoints)
        self.unix = frozenset(str(path) for path in told.get("unix", ()))
        self.folders = tuple(str(path) for path in told.get("folders", ()))
        self.listening = frozenset(int(port) for port in told.get("listening", ()))
        self.control = frozenset((canonical_address(str(host)), int(port)) for host, port in told.get("control", ()))
        self.environment = {str(key): str(value) for key, value in told.get("environment", {}).items()}


class Node:
    """See the module."""

    def __init__(self, loop: Loop, own_folders: tuple[str, ...], leaders: Leaders) -> None:
        self.loop = loop
        self.leaders = leaders
        self.start_mover: Callable[[socket.socket], None] = lambda _line: None
        """Starts a mover of relayed bytes at the other end of a line; set by whoever has a zygote."""
        self.addresses = frozenset(canonical_address(address) for address in rtnetlink.addresses())
        self.hostname = socket.gethostname()
        self.paid: dict[str, Paid] = {}
        """Model calls that the relay has admitted and charges, by the word that each carries to the engine."""
        self.prices: dict[tuple[str, str], Price] = {}
        """What a model costs, by job and its name, as the policy actor that serves it has announced."""
        self.surroundings_changed: list[Callable[[], None]] = []
        self.zygote = os.getpid()
        """Its pid; set by whoever has one."""
        self.care: Care
        """Takes care of targets should this process die; set by whoever has a zygote."""
        self.admit: Callable[[socket.socket], Session]
        """Begins a session on a target's line that a former supervisor had; set by whoever accepts targets."""
        self.start_judge: Callable[[socket.socket], None] = lambda _line: None
        """Starts a judge of journals at the other end of a line; set likewise."""
        self.remove: Callable[[str], None] = lambda _path: None
        """Has the zygote take away a folder; set likewise."""
        self.end_adopted: Callable[[int], None] = lambda _leader: None
        """Has the zygote end what a lost leader has led; set likewise."""
        self.hold: Callable[[str], None] = lambda _path: None
        """Has the zygote hold a folder as long as this process lives; set likewise."""
        self.number = os.urandom(6).hex()
        """Tells this supervisor from all others."""
        self.gpus = Presence(loop)
        self.leases = Leases(loop)
        self.quotas = Quotas(self.leases, self.directory, self.paid, loop.later)
        self.census = Census(loop)
        self._own_folders = own_folders
        self._journals: dict[str, Journal] = {}
        self._evidence_folders: list[str] = []
        """The journals', resolved."""
        self.sealer = Sealer(loop)
        self._forwarders: list[subprocess.Popen[bytes]] = []
        self._jobs: dict[str, Account] = {}
        self._inherited: dict[str, dict[str, Amount]] = {}
        """By job, what it has been charged for what it used under former supervisors."""
        self._actors: dict[str, Account] = {}
        self._directories: dict[str, Directory] = {}
        self._memberships: dict[int, Membership] = {}
        self.proxies = Proxies(loop, self._changed)
        self._announced: dict[str, set[Endpoint]] = {}
        self.resolver = Resolver(loop, self._changed)
        self._wants_ceilings = os.environ.get("RAY_GUARD_NFTABLES", "") not in ("", "0")
        self._ceilings: Ceilings | None = None

    # -- what rings need: see supervisor.arming ------------------------------------------------------------------------

    @functools.cached_property
    def means(self) -> Means:
        """What all gates share."""
        from ray_guard.egress.gate import Means

        means = Means(self.loop)
        means.start_mover = self.start_mover
        means.relay_opened = self._changed
        return means

    @functools.cached_property
    def meter(self) -> Meter:
        """What counts the bytes of all direct flows."""
        from ray_guard.egress.meter import Meter
        from ray_guard.kernel.sock_diag import SockDiag

        return Meter(SockDiag(), self.loop, self._flush, borrows=borrowing.works())

    @functools.cached_property
    def judging(self) -> Judging:
        """What has the journals judged, where a policy asks for it."""
        from ray_guard.supervisor.judging import Judging

        return Judging(self.loop, self.start_judge)

    def _relay(self) -> Relay | None:
        """The relay, once anything has gone by it."""
        return self.means.relaying if "means" in self.__dict__ else None

    # -- evidence ------------------------------------------------------------------------------------------------------

    def journal(self, folder: str, environment: Mapping[str, str]) -> Journal:
        """The journal in that folder (absolute), one per supervisor.

        Args:
            environment: says whether and where its spans are exported (``OTEL_EXPORTER_OTLP_*``), and how large the
                folder may become (``RAY_GUARD_EVIDENCE_LIMIT``) and where checkpoints are taken to
                (``RAY_GUARD_EVIDENCE_CHECKPOINTS``); that of the first target which asks.

        Raises:
            NotEnforced: there can be none.
        """
        if folder not in self._journals:
            journal = Journal(folder, _bounds(environment))
            try:
                self.sealer.add(journal, environment)
            except NotEnforced:
                journal.close()
                raise
            self._journals[folder] = journal
            self._evidence_folders.append(os.path.realpath(folder))
            argv = forwarder_argv(folder, environment)
            if argv is not None:
                self._forward(argv, {**os.environ, **environment})
        return self._journals[folder]

    def _forward(self, argv: list[str], environment: dict[str, str]) -> None:
        """Starts a forwarder, and another where somebody kills it: it goes on where the one before was."""
        import subprocess  # most nodes export nothing, and every start would wait for it

        forwarder = subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd="/", env=environment)
        self._forwarders.append(forwarder)
        pidfd = os.pidfd_open(forwarder.pid)

        def ended(_events: int) -> None:
            self.loop.forget(pidfd)
            os.close(pidfd)
            self._forwarders.remove(forwarder)
            if forwarder.wait() < 0:
                log.warning("the forwarder was killed by signal %d", -forwarder.returncode)
                self.loop.later(_FORWARD_AGAIN_S, functools.partial(self._forward, argv, environment))

        self.loop.watch(pidfd, select.EPOLLIN, ended)

    def _flush(self) -> None:
        for journal in self._journals.values():
            try:
                journal.flush()
                journal.hash()
            except OSError as error:
                log.warning("%s: %s", journal.folder, error)

    def close(self, *, ended: bool) -> None:
        """``ended``: all targets have, so the logs do too."""
        self.gpus.close()
        if "means" in self.__dict__:
            self.means.impatience.end()
        if (relay := self._relay()) is not None:
            relay.close()
        if "judging" in self.__dict__:
            self.judging.close()
        self.sealer.close(ended=ended)
        for journal in self._journals.values():
            journal.close()
        for directory in self._directories.values():
            directory.close()
        self.resolver.close()
        for forwarder in self._forwarders:  # each flushes once this process is gone; none is waited for
            forwarder.returncode = 0

    # -- ceilings ------------------------------------------------------------------------------------------------------

    def put_ceiling(self, leaf: Leaf | None, policy: CompiledPolicy, *, exact: bool) -> None:
        """Holds a call to what its policy can ever need, where that was asked for. Raises OSError: it cannot be."""
        if not self._wants_ceilings:
            return
        if self._ceilings is None:
            from ray_guard.supervisor.ceilings import Ceilings  # here alone: few ask for it

            self._ceilings = Ceilings(self._own_ports)
            self.surroundings_changed.append(self._ceilings.changed)
            self.means.relay.led = self._ceilings.led
        self._ceilings.put(leaf, policy.wires, exact=exact)

    def lift_ceiling(self, leaf: Leaf | None) -> None:
        """The call has ended."""
        if self._ceilings is not None and leaf is not None:
            try:
                self._ceilings.lift(leaf)
            except OSError as error:
                log.warning("a ceiling stays: %s", error)

    def _own_ports(self) -> frozenset[int]:
        relay = self._relay()
        return (frozenset() if relay is None else relay.ports()) | {port for _, port in self.resolver.endpoints}

    # -- budgets -------------------------------------------------------------------------------------------------------

    def job(self, run_id: str, policy: CompiledPolicy) -> Account:
        """The account of a job, under the least of what its targets' policies say (a driver's says nothing)."""
        account = self._jobs.get(run_id)
        if account is None:
            account = self._jobs[run_id] = Account(Scope.JOB, run_id)
            account.near = self._job_is_near
            account.began = time.monotonic()
        account.tighten(policy.limits(Scope.JOB), policy.watched(Scope.JOB))
        return account

    def inherit_job(self, run_id: str, spent: Mapping[str, Amount]) -> None:
        """Books what a job had used here under a former supervisor; each of its targets that is taken over says so."""
        known = self._inherited.setdefault(run_id, {})
        more = {kind: amount - known.get(kind, 0) for kind, amount in spent.items() if amount > known.get(kind, 0)}
        known.update({kind: spent[kind] for kind in more})
        inherit(self._jobs[run_id], more, self.leases)

    def _job_is_near(self, near: Near) -> None:
        """A limit of a job is almost reached: journaled once, logged by all its targets."""
        targets = self.quotas.of_job(near.source)
        for target in targets[:1]:
            target.near(near)
        for target in targets[1:]:
            target.warn(near.text())

    def actor_started(self, actor_id: str, account: Account) -> None:
        """An actor has learnt its id: what it submits to Ray is charged to it from here on."""
        self._actors[actor_id] = account

    def charged(self, submitter: str, run_id: str, policy: CompiledPolicy) -> Account:
        """Whose account a new target's stands under: its submitter's on this node, else the job's."""
        job = self.job(run_id, policy)
        account = self._actors.get(submitter)
        if account is not None and account.closed:
            del self._actors[submitter]
            account = None
        return job if account is None else account

    # -- surroundings --------------------------------------------------------------------------------------------------

    def join(self, target: Target, membership: Membership) -> None:
        self._memberships[id(target)] = membership
        self._directory(membership).include(membership.endpoints)
        self._changed()

    def _directory(self, membership: Membership) -> Directory:
        directory = self._directories.get(membership.address)
        if directory is None:
            from ray_guard.supervisor.cluster import Directory  # nor do most calls belong to a cluster

            environment = {**membership.environment}
            directory = Directory(membership.argv, environment, self.loop, self._changed)
            self._directories[membership.address] = directory
        return directory

    def must_lease(
        self, run_id: str, job_id: str, policy: CompiledPolicy, membership: Membership
    ) -> list[tuple[Lease, Amount]]:
        """Leases of the job's limits of which nothing is known yet: to be waited for before a target's work begins."""
        account = self.job(run_id, policy)
        if not account.limits_any(KINDS):
            return []
        name, desk = f"{job_id}/{run_id}", self._directory(membership)
        if account.began is not None and account.limits_any((WALL,)):
            at = time.time() - (time.monotonic() - account.began)
            desk.ask({"op": "began", "name": name, "at": at}, functools.partial(_began_before, account))
        return self.leases.enter(account, name, desk)

    def leave(self, target: Target) -> None:
        self.quotas.leave(target)
        if target.run_id in self._jobs and not self.quotas.of_job(target.run_id):
            self.leases.leave(self._jobs[target.run_id])
        self.gpus.leave(target)
        if "judging" in self.__dict__:
            self.judging.leave(target)
        membership = self._memberships.pop(id(target), None)
        if membership is not None and all(m.address != membership.address for m in self._memberships.values()):
            directory = self._directories.pop(membership.address)
            self.leases.lose(directory)
            directory.close()

    def directory(self, target: Target) -> Directory | None:
        membership = self._memberships.get(id(target))
        return None if membership is None else self._directories.get(membership.address)

    def announce(self, target: Target, address: str, port: int) -> None:
        """A policy actor listens: its peers in the same job may connect to that port."""
        host = canonical_address(address)
        hosts = {host}
        if address in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            hosts = {*self.addresses, "127.0.0.1", "::1"}
        announced = self._announced.setdefault(target.run_id, set())
        announced |= {(each, port) for each in hosts}
        self._changed()

    def hidden(self) -> tuple[list[str], list[str]]:
        """What no tool may read or change: the guard's own folders, and Ray's."""
        ray = {folder for m in self._memberships.values() for folder in m.folders}
        own = [*self._own_folders, *self._journals]
        return [os.path.realpath(path) for path in own], [os.path.realpath(path) for path in sorted(ray)]

    def surroundings(self, target: Target) -> Surroundings:
        membership = self._memberships.get(id(target))
        directory = self.directory(target)
        announced = self._announced.get(target.run_id, set()) if target.policy.role is Role.POLICY else set()
        # Every cluster of this node is control plane to every tool, whichever job it belongs to.
        relay = self._relay()
        control = self.resolver.endpoints.union(
            *(d.endpoints | d.control for d in self._directories.values()),
            *(m.control for m in self._memberships.values()),
            frozenset() if relay is None else relay.endpoints(),
            self.proxies.endpoints(),
        )
        own = (*self._own_folders, *self._evidence_folders)
        folders = {folder for m in self._memberships.values() for folder in m.folders}
        return Surroundings(
            cluster=directory.endpoints if directory is not None else frozenset(),
            control=control,
            collectives=frozenset(announced),
            own_addresses=self.addresses,
            cluster_unix=membership.unix if membership is not None else frozenset(),
            control_folders=(*own, *sorted(folders)),
            guard_folders=own,
            ray_listen=membership.listening if membership is not None else frozenset(),
            cuts=borrowing.works(),
        )

    def _changed(self) -> None:
        for callback in list(self.surroundings_changed):
            callback()


def _began_before(account: Account, answer: Mapping[str, Any]) -> None:
    """Another node may have seen the job earlier. Without an answer its time counts from when it came here."""
    try:
        passed = time.time() - float(answer["began"])
    except (KeyError, TypeError, ValueError):
        log.warning("when job %s began on other nodes is not known: %.200r", account.source, answer)
        return
    account.began = min(time.monotonic() - max(0.0, passed), account.began or math.inf)


def inherit(account: Account, spent: Mapping[str, Amount], leases: Leases) -> None:
    """Books what ``account`` had used under a former supervisor.

    But of limits under leases: parts that were claimed by one that has died stay claimed, and so count already.
    """
    account.inherit({kind: amount for kind, amount in spent.items() if not leases.covers(account, kind)})


def _bounds(environment: Mapping[str, str]) -> Bounds:
    said = environment.get("RAY_GUARD_EVIDENCE_LIMIT", "").strip()
    try:
        bounds = Bounds(total=parse_size(said) if said else None)
    except PolicyError as error:
        raise NotEnforced(["evidence"], f"RAY_GUARD_EVIDENCE_LIMIT: {str(error).lstrip(': ')}") from error
    if bounds.total is not None and bounds.total < 2 * bounds.reserve:
        why = f"RAY_GUARD_EVIDENCE_LIMIT: {said} is less than the {2 * bounds.reserve >> 20}MiB it takes to begin a log"
        raise NotEnforced(["evidence"], why)
    return bounds


def _of_the_host(addresses: Collection[str]) -> tuple[str, ...]:
    """Without loopback, which every host has: it tells none from another. Alone, it is all that this one has."""
    own = [address for address in addresses if not address.startswith("127.") and address != "::1"]
    return tuple(sorted(own or addresses))


def resource_attributes(node: Node, identity: dict[str, Any]) -> dict[str, Any]:
    """The OTLP resource of a target, from what it told about itself and what this node knows."""
    attributes: dict[str, Any] = {
        "service.name": str(identity.get("service_name") or "ray_guard"),
        "host.name": node.hostname,
        "host.ip": _of_the_host(node.addresses),
        "rl.run.id": str(identity.get("run_id") or ""),
    }
    for name in ("job_id", "node_id", "actor_id", "actor_name"):
        if identity.get(name):
            attributes[f"ray.{name}"] = str(identity[name])
    return attributes

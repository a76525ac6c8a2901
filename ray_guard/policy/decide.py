"""One pure decision: may this request be done, and why.

Runs in the supervisor, between the gate that read the request and the account that reserves for it. Standard library
only; no I/O, no clock.

Precedence, first match wins. For connect and send:

    1.  invalid             address, port or path that cannot be a destination: deny
    2.  abstract_socket     an abstract unix socket: deny
    3.  control_plane       Ray's control plane, the engine, the supervisor, the evidence: deny for tools whatever is
                            listed; others need ``cluster`` or a rule that names this one address
    4.  model_endpoint      the engine's server that the policy names, by tcp: allow, for model calls alone. The same
                            port at another address of its node is control plane
    5.  own_socket          a unix socket that this call or actor bound itself: allow
    6.  rule                an address or path that is listed: allow
    7.  cluster             an endpoint of this Ray cluster, ``cluster`` is listed and the role grants it: allow
    8.  collectives         a peer's announced port, ``collectives`` is listed and the role grants it: allow
    9.  name                an address, none of those of 12, that the guard's resolver gave for a listed name: allow
    10. resolver            port 53, and names are listed: allow, answered by the guard
    11. role                ``cluster`` or ``collectives`` would grant it, but not to this role or process: deny
    12. metadata_address … transition_address
                            special addresses that only a rule lying within their range grants: deny
    13. not_listed          everything else: deny

For bind and listen:

    1.  invalid, abstract_socket                                       deny
    2.  unix_bind           a unix socket of one's own, by path        allow
    3.  ephemeral           bind to port 0, to send from               allow
    4.  listen              the port is in ``egress.listen``           allow
    5.  cluster             one of the ports Ray itself listens on     allow
    6.  collectives         role ``policy``: port 0 or 1024 and above  allow
    7.  listen_not_listed                                              deny

What was allowed to connect or send by tcp or udp then needs room in every budget, else ``budget``: deny.

A scope that was ended for a violation (``on_violation``) is granted nothing: ``ended``, whatever is listed.

Several policies (:meth:`CompiledPolicy.intersect`) must all allow. A policy in mode ``report`` never denies: what it
would have denied is allowed, with its reason and ``report_only``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum, StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, TypeVar

from ray_guard.errors import PolicyError
from ray_guard.named import NamedTuple
from ray_guard.policy import detection
from ray_guard.policy.budgets import (
    CONNECTIONS,
    EGRESS,
    NETWORK_KINDS,
    NO_LIMITS,
    RECEIVED,
    SENT,
    Account,
    Exceeded,
    Limits,
    Scope,
    limits_from_wire,
    tightest,
)
from ray_guard.policy.destination import (
    ANY_PORT,
    AddressRule,
    Group,
    GroupRule,
    NameRule,
    PortRange,
    Protocol,
    SpecialKind,
    Transport,
    UnixRule,
    canonical_address,
    is_address,
    is_loopback,
    parse_address,
    parse_endpoint,
    parse_ports,
    parse_rule,
    special_ranges,
)
from ray_guard.records import Mode, Role


class Operation(StrEnum):
    CONNECT = "connect"
    SEND = "send"
    BIND = "bind"
    LISTEN = "listen"


class Process(StrEnum):
    """Who asks, among the processes of the target."""

    OTHER = "other"
    OWN = "own"
    """The actor's own process."""
    ENGINE = "engine"
    """A registered engine process of a policy actor."""


class Verdict(IntEnum):
    """The zero value denies."""

    DENY = 0
    ALLOW = 1


class Route(IntEnum):
    """How the bytes travel. NONE: they do not, because it was denied or because nothing is sent.

    Where several policies grant the same, the greatest holds.
    """

    NONE = 0
    DIRECT = 1
    RELAY = 2
    RESOLVER = 3
    WATCHED_MODEL = 4
    """By relay, which reads along: calls of a model. What is none of them passes, and is said (mode ``report``)."""
    MODEL = 5
    """By relay, which lets calls of a model pass and nothing else."""


class Reason(StrEnum):
    """``ray_guard.egress.reason``; what each means and which wins is listed at the top of this module."""

    INVALID = "invalid"
    ABSTRACT_SOCKET = "abstract_socket"
    CONTROL_PLANE = "control_plane"
    MODEL_ENDPOINT = "model_endpoint"
    OWN_SOCKET = "own_socket"
    RULE = "rule"
    CLUSTER = "cluster"
    COLLECTIVES = "collectives"
    NAME = "name"
    RESOLVER = "resolver"
    ROLE = "role"
    METADATA_ADDRESS = "metadata_address"
    LINK_LOCAL_ADDRESS = "link_local_address"
    MULTICAST_ADDRESS = "multicast_address"
    BROADCAST_ADDRESS = "broadcast_address"
    RESERVED_ADDRESS = "reserved_address"
    TRANSITION_ADDRESS = "transition_address"
    NOT_LISTED = "not_listed"
    UNIX_BIND = "unix_bind"
    EPHEMERAL = "ephemeral"
    LISTEN = "listen"
    LISTEN_NOT_LISTED = "listen_not_listed"
    BUDGET = "budget"
    ENDED = "ended"


class Request(NamedTuple):
    """What a target wants to do.

    ``address`` is canonical text (:func:`~ray_guard.policy.destination.canonical_packed`) for tcp and udp. ``path`` is
    absolute and resolved in the target's root, or begins with NUL for an abstract socket. ``inode`` is (device, inode)
    of what ``path`` resolved to. For LISTEN ``port`` is the port the socket is bound to, 0 when it is not.
    """

    operation: Operation
    transport: Transport
    address: str = ""
    port: int = 0
    path: str = ""
    process: Process = Process.OTHER
    inode: tuple[int, int] | None = None


Endpoint = tuple[str, int]
Expected = tuple[tuple[Protocol, frozenset[str]], ...]


class Decision(NamedTuple):
    """What was decided and why.

    ``rule`` is the entry of ``egress.allow`` (or ``egress.listen``) that matched. ``report_only``: a policy in mode
    ``report`` would have denied this, for ``reason``. ``exceeded`` is set when ``reason`` is ``budget``. ``name``: the
    listed name that the address was told for, or that may be resolved. ``expected``: what must be spoken there, each
    protocol with the names that may be meant in it; ``tcp``: anything, unverified. ``proxy``: by way of which.
    ``model``: the model endpoint, as the policy names it, where ``route`` is one of a model's.
    """

    verdict: Verdict = Verdict.DENY
    reason: Reason = Reason.INVALID
    rule: str | None = None
    route: Route = Route.NONE
    report_only: bool = False
    exceeded: Exceeded | None = None
    name: str | None = None
    expected: Expected = ()
    proxy: Endpoint | None = None
    model: Endpoint | None = None

    @property
    def allowed(self) -> bool:
        return self.verdict is Verdict.ALLOW

    def __bool__(self) -> bool:
        """As :attr:`allowed`. A tuple with something in it is true, and ``if decision:`` must not let a denial pass."""
        return self.allowed

    def attributes(self) -> dict[str, str]:
        """The decision as span attributes. What was let through only because the mode is ``report`` reads ``allow``,
        which is what happened, with the reason ``report_only:`` and why it would have been denied."""
        reason = f"report_only:{self.reason.value}" if self.report_only else self.reason.value
        return {"ray_guard.egress.decision": self.verdict.name.lower(), "ray_guard.egress.reason": reason}


_NO_NAMES: Final[Mapping[str, Collection[str]]] = MappingProxyType({})
_NOTHING: Final[Mapping[Scope, Limits]] = MappingProxyType({})


class _Surroundings(NamedTuple):
    cluster: frozenset[Endpoint] = frozenset()
    """Endpoints of this Ray cluster: GCS, raylets, object managers, agents, workers (TCP)."""
    control: frozenset[Endpoint] = frozenset()
    """More that tools never reach: job API, client server, engine ports, the supervisor's own."""
    collectives: frozenset[Endpoint] = frozenset()
    """Ports that guarded peers of the same job announced (TCP)."""
    own_addresses: frozenset[str] = frozenset()
    """This node's addresses; loopback is understood. A control endpoint at one of them is meant at all of them, because
    most of these servers listen on every interface."""
    cluster_unix: frozenset[str] = frozenset()
    """Ray's session sockets (raylet, plasma) by resolved path."""
    control_folders: tuple[str, ...] = ()
    """Resolved folders whose sockets tools never reach: Ray's session, the evidence, the supervisor's."""
    guard_folders: tuple[str, ...] = ()
    """Resolved folders of the guard's own, where nobody binds a socket: it would be taken for the supervisor's."""
    own_unix: frozenset[tuple[int, int]] = frozenset()
    """(device, inode) of unix sockets that this call or actor bound. By inode, because a path can be made to mean
    another socket later; hold an O_PATH descriptor of each, because a freed inode number is given out again."""
    ray_listen: frozenset[int] = frozenset()
    """Ports that Ray itself listens on in this actor's process."""
    cuts: bool = True
    """A flow that went direct can be cut. Where it cannot, what may have to be cut goes by relay."""
    names: Mapping[str, Collection[str]] = _NO_NAMES
    """For each address the canonical names that the guard's resolver gave it for, to this target; the latest first."""


class Surroundings(_Surroundings):
    """What is true around a target right now. Replace it when that changes; everything is empty by default.

    Addresses are canonical text. ``control`` need not repeat ``cluster``.
    """

    @cached_property
    def _control(self) -> frozenset[Endpoint]:
        return self.control | self.cluster

    @cached_property
    def _local_control_ports(self) -> frozenset[int]:
        return frozenset(port for address, port in self._control if self.is_local(address))

    def is_local(self, address: str) -> bool:
        """Whether ``address`` is this node: one of its own, or loopback."""
        if address in self.own_addresses:
            return True
        try:
            return is_loopback(parse_address(address))
        except ValueError:
            return False

    def is_control(self, address: str, port: int) -> bool:
        """Whether it is an endpoint that tools never reach."""
        return (address, port) in self._control or (port in self._local_control_ports and self.is_local(address))

    def is_control_path(self, path: str) -> bool:
        return path in self.cluster_unix or any(path.startswith(folder + "/") for folder in self.control_folders)

    def is_guard_path(self, path: str) -> bool:
        return any(path.startswith(folder + "/") for folder in self.guard_folders)


class _Answer(NamedTuple):
    """What the static rules say of one (transport, address, port)."""

    address: str
    granted: Decision | None
    literal: bool
    denied: Decision


_INVALID: Final = Decision(Verdict.DENY, Reason.INVALID)
_ABSTRACT: Final = Decision(Verdict.DENY, Reason.ABSTRACT_SOCKET)
_CONTROL: Final = Decision(Verdict.DENY, Reason.CONTROL_PLANE)
_NOT_LISTED: Final = Decision(Verdict.DENY, Reason.NOT_LISTED)
_ENDED: Final = Decision(Verdict.DENY, Reason.ENDED)
_LISTEN_NOT_LISTED: Final = Decision(Verdict.DENY, Reason.LISTEN_NOT_LISTED)
_ROLE: Final = Decision(Verdict.DENY, Reason.ROLE)
_OWN_SOCKET: Final = Decision(Verdict.ALLOW, Reason.OWN_SOCKET, None, Route.DIRECT)
_CLUSTER: Final = Decision(Verdict.ALLOW, Reason.CLUSTER, "cluster", Route.DIRECT)
_COLLECTIVES: Final = Decision(Verdict.ALLOW, Reason.COLLECTIVES, "collectives", Route.DIRECT)
_UNIX_BIND: Final = Decision(Verdict.ALLOW, Reason.UNIX_BIND)
_EPHEMERAL: Final = Decision(Verdict.ALLOW, Reason.EPHEMERAL)
_RAY_LISTEN: Final = Decision(Verdict.ALLOW, Reason.CLUSTER, "cluster")
_COLLECTIVES_LISTEN: Final = Decision(Verdict.ALLOW, Reason.COLLECTIVES, "collectives")
_SPECIAL: Final = {kind: Decision(Verdict.DENY, Reason(kind.value)) for kind in SpecialKind}
_NEEDED: Final[Mapping[Operation, tuple[str, ...]]] = {
    Operation.CONNECT: NETWORK_KINDS,
    Operation.SEND: tuple(kind for kind in NETWORK_KINDS if kind != CONNECTIONS),
}
_OUTWARD: Final = frozenset(_NEEDED)
_INWARD: Final = frozenset({Operation.BIND, Operation.LISTEN})
# A target that sweeps addresses must not grow the supervisor: past this many the memory starts anew.
_REMEMBERED: Final = 4096
_FIRST_UNPRIVILEGED_PORT: Final = 1024
_DNS_PORT: Final = 53


class _Layer(NamedTuple):
    mode: Mode
    groups: frozenset[Group]
    addresses: Mapping[tuple[Transport, int], tuple[AddressRule, ...]]
    """Rules for one single port, by transport and port."""
    ranges: Mapping[Transport, tuple[AddressRule, ...]]
    """Rules for several ports, by transport."""
    names: tuple[NameRule, ...]
    unix: Mapping[str, UnixRule]
    listen: tuple[PortRange, ...]
    verify_names: bool
    proxy: Endpoint | None = None
    """Host (a name or an address) and port of the proxy that names are reached through."""
    model: Endpoint | None = None
    """Host (a name or an address) and port of the engine's server."""


class Layer(_Layer):
    """One policy, made ready for deciding."""

    @cached_property
    def _memory(self) -> dict[tuple[str, str, int], _Answer]:
        return {}

    def decide(self, role: Role, surroundings: Surroundings, request: Request) -> Decision:
        operation = request.operation
        if operation in _OUTWARD:
            if request.transport is Transport.UNIX:
                return self._unix(role, surroundings, request)
            return self._inet(role, surroundings, request)
        if operation in _INWARD:
            return self._listen(role, surroundings, request)
        return _INVALID

    def _inet(self, role: Role, surroundings: Surroundings, request: Request) -> Decision:
        key = (request.transport, request.address, request.port)
        answer = self._memory.get(key)
        if answer is None:
            answer = self._ask(request.transport, request.address, request.port)
            if len(self._memory) >= _REMEMBERED:
                self._memory.clear()
            self._memory[key] = answer
        address, port = answer.address, request.port
        control = surroundings.is_control(address, port)
        if self.model is not None and port == self.model[1] and not control and request.transport is Transport.TCP:
            if self._is_model(surroundings, answer):
                return self._model_granted(self.model)
            # Servers that listen on every interface are met at all of their node's addresses.
            control = surroundings.is_local(address) and self._model_is_local(surroundings)
        if control and role is Role.TOOL:
            return _CONTROL
        if answer.granted is not None and (answer.literal or not control):
            return answer.granted
        if answer.denied is _INVALID:
            return _INVALID
        tcp = request.transport is Transport.TCP
        cluster = tcp and Group.CLUSTER in self.groups and (address, port) in surroundings.cluster
        if cluster and _may_use_cluster(role, request.process):
            return _CLUSTER
        collectives = tcp and Group.COLLECTIVES in self.groups and (address, port) in surroundings.collectives
        if collectives and role is Role.POLICY:
            return _COLLECTIVES
        if control:
            return _ROLE if cluster else _CONTROL
        if self.names or self.model_name is not None:
            # A listed name must not lead to a special address: its owner chooses what it resolves to.
            named = self._named(surroundings, address, port) if tcp and answer.denied is _NOT_LISTED else None
            if named is not None:
                return named
            if port == _DNS_PORT:
                return Decision(Verdict.ALLOW, Reason.RESOLVER, None, Route.RESOLVER)
        return _ROLE if collectives else answer.denied

    def _is_model(self, surroundings: Surroundings, answer: _Answer) -> bool:
        """Whether the address is the model endpoint's. A name of it must not lead to a special address."""
        host = "" if self.model is None else self.model[0]
        if answer.address == host:
            return answer.denied is not _INVALID
        return answer.denied is _NOT_LISTED and host in surroundings.names.get(answer.address, ())

    def _model_is_local(self, surroundings: Surroundings) -> bool:
        host = "" if self.model is None else self.model[0]
        told = (address for address, names in surroundings.names.items() if host in names)
        return surroundings.is_local(host) or any(map(surroundings.is_local, told))

    def _model_granted(self, model: Endpoint) -> Decision:
        route = Route.MODEL if self.mode is Mode.ENFORCE else Route.WATCHED_MODEL
        name = None if is_address(model[0]) else model[0]
        return Decision(Verdict.ALLOW, Reason.MODEL_ENDPOINT, "model_endpoint", route, name=name, model=model)

    @property
    def model_name(self) -> str | None:
        """The model endpoint's host, where it is a name."""
        return None if self.model is None or is_address(self.model[0]) else self.model[0]

    def _named(self, surroundings: Surroundings, address: str, port: int) -> Decision | None:
        told = surroundings.names.get(address)
        if not told:
            return None
        first: tuple[str, str] | None = None
        expected: dict[Protocol, frozenset[str]] = {}
        verified = self.verify_names and self.mode is Mode.ENFORCE
        for rule in self.names:
            names = [name for name in told if rule.matches(name)] if port in rule.ports else []
            if names:
                first = first or (rule.text, names[0])
                protocol = rule.protocol if verified else Protocol.TCP
                expected[protocol] = expected.get(protocol, frozenset()).union(names)
        if first is None:
            return None
        text, name = first
        known = Decision(Verdict.ALLOW, Reason.NAME, text, Route.RELAY, name=name, proxy=self.proxy)
        return known._replace(expected=tuple(expected.items()))

    def _ask(self, transport: Transport, text: str, port: int) -> _Answer:
        try:
            address = parse_address(text)
            canonical = canonical_address(text)
        except ValueError:
            return _Answer(text, None, literal=False, denied=_INVALID)
        if not 0 < port <= ANY_PORT.last or transport not in (Transport.TCP, Transport.UDP):
            return _Answer(canonical, None, literal=False, denied=_INVALID)
        specials = special_ranges(address)
        granting = [rule for rule in self.addresses.get((transport, port), ()) if rule.grants(address, specials)]
        granting += [
            rule for rule in self.ranges.get(transport, ()) if port in rule.ports and rule.grants(address, specials)
        ]
        denied = _SPECIAL[specials[-1].kind] if specials else _NOT_LISTED
        if not granting:
            return _Answer(canonical, None, literal=False, denied=denied)
        # The narrowest rule is the one a reader of the span wants to see, and it decides what counts as literal.
        rule = min(granting, key=lambda rule: rule.range.high - rule.range.low)
        granted = Decision(Verdict.ALLOW, Reason.RULE, rule.text, Route.DIRECT)
        return _Answer(canonical, granted, literal=rule.literal, denied=denied)

    def _unix(self, role: Role, surroundings: Surroundings, request: Request) -> Decision:
        refused = _unusable_path(request.path)
        if refused is not None:
            return refused
        control = surroundings.is_control_path(request.path)
        if control and role is Role.TOOL:
            return _CONTROL
        if request.inode is not None and request.inode in surroundings.own_unix and not control:
            return _OWN_SOCKET
        rule = self.unix.get(request.path)
        if rule is not None:
            return Decision(Verdict.ALLOW, Reason.RULE, rule.text, Route.DIRECT)
        if Group.CLUSTER in self.groups and request.path in surroundings.cluster_unix:
            return _CLUSTER if _may_use_cluster(role, request.process) else _ROLE
        return _CONTROL if control else _NOT_LISTED

    def _listen(self, role: Role, surroundings: Surroundings, request: Request) -> Decision:
        if request.transport is Transport.UNIX:
            if request.operation is Operation.LISTEN:
                return _UNIX_BIND  # its address was decided when it was bound
            refused = _unusable_path(request.path)
            if refused is None and surroundings.is_guard_path(request.path):
                refused = _CONTROL
            return _UNIX_BIND if refused is None else refused
        port = request.port
        if request.transport not in (Transport.TCP, Transport.UDP) or not 0 <= port <= ANY_PORT.last:
            return _INVALID
        if port == 0 and request.operation is Operation.BIND:
            return _EPHEMERAL
        for ports in self.listen:
            if port in ports:
                return Decision(Verdict.ALLOW, Reason.LISTEN, str(ports))
        ray = Group.CLUSTER in self.groups and port in surroundings.ray_listen
        if ray and _may_use_cluster(role, request.process):
            return _RAY_LISTEN
        free = port == 0 or port >= _FIRST_UNPRIVILEGED_PORT
        if Group.COLLECTIVES in self.groups and role is Role.POLICY and free:
            return _COLLECTIVES_LISTEN
        return _LISTEN_NOT_LISTED


def _may_use_cluster(role: Role, process: Process) -> bool:
    if role is Role.ENV:
        return process is Process.OWN
    return role is Role.POLICY and process in (Process.OWN, Process.ENGINE)


def _unusable_path(path: str) -> Decision | None:
    if path.startswith("\0"):
        return _ABSTRACT
    if not path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in path[1:].split("/")):
        return _INVALID
    return None


_STRICTER_ROLE: Final = (Role.TOOL, Role.ENV, Role.POLICY)
_STRICTER_GPU: Final = ("none", "engine", "any")
_STRICTER_SUBPROCESS: Final = ("confine", "plain")
_STRICTER_SURVIVORS: Final = ("kill", "keep")
_STRICTER_VIOLATION: Final = ("kill_actor", "end_episode", "kill_call", "deny")
_T = TypeVar("_T")


class CompiledPolicy(NamedTuple):
    """One or several policies, all of which must allow. The zero value, without any, denies everything."""

    layers: tuple[Layer, ...] = ()
    role: Role = Role.TOOL
    gpu: str = "none"
    subprocess: str = "confine"
    survivors: str = "kill"
    on_violation: str = "deny"
    detect: detection.Actions = detection.NOTHING
    """What follows a finding, by its kind."""
    rules: tuple[str, ...] = ()
    """Paths of Sigma rules that findings are made by, too."""
    require: frozenset[str] = frozenset()
    wires: tuple[Mapping[str, Any], ...] = ()
    """What each was built from (:meth:`ray_guard.Policy.to_wire`), for what is enforced elsewhere."""
    limits_enforced: Mapping[Scope, Limits] = _NOTHING
    limits_watched: Mapping[Scope, Limits] = _NOTHING

    @property
    def mode(self) -> Mode:
        """REPORT only when every policy is in that mode."""
        reports = self.layers and all(layer.mode is Mode.REPORT for layer in self.layers)
        return Mode.REPORT if reports else Mode.ENFORCE

    @property
    def ends_scopes(self) -> bool:
        """Whether a violation, or what is found out, ends more than the call that was refused."""
        return self.on_violation != "deny" or detection.acts(self.detect)

    @property
    def names(self) -> bool:
        """Whether any name is listed; if not there is no DNS."""
        return any(layer.names or layer.model_name is not None for layer in self.layers)

    def is_model_name(self, name: str) -> bool:
        """Whether ``name`` (canonical) is a model endpoint's: no proxy leads there."""
        return any(layer.model_name == name for layer in self.layers)

    @property
    def datagrams(self) -> bool:
        """Whether any destination is granted by UDP."""
        return any(
            transport is Transport.UDP
            for layer in self.layers
            for transport in (*layer.ranges, *(key[0] for key in layer.addresses))
        )

    def limits(self, scope: Scope) -> Limits:
        """The limits of that scope that are enforced."""
        return self.limits_enforced.get(scope, NO_LIMITS)

    def watched(self, scope: Scope) -> Limits:
        """The limits of that scope that only report."""
        return self.limits_watched.get(scope, NO_LIMITS)

    def allows_name(self, name: str) -> bool:
        """Whether the resolver answers for ``name`` (canonical): every enforcing policy lists it."""
        return self.decide_name(name).allowed

    def decide_name(self, name: str) -> Decision:
        """Whether the resolver looks ``name`` (canonical) up: every enforcing policy lists it, at whatever port."""
        granted: Decision | None = None
        noticed = False
        for layer in self.layers:
            text = next((rule.text for rule in layer.names if rule.matches(name)), None)
            if text is None and layer.model_name == name:
                text = "model_endpoint"
            if text is not None:
                granted = granted or Decision(Verdict.ALLOW, Reason.RESOLVER, text, Route.RESOLVER, name=name)
            elif layer.mode is Mode.ENFORCE:
                return _NOT_LISTED
            else:
                noticed = True
        if noticed:
            return Decision(Verdict.ALLOW, Reason.NOT_LISTED, None, Route.RESOLVER, report_only=True, name=name)
        return granted or _NOT_LISTED

    def with_role(self, role: Role) -> CompiledPolicy:
        """The same policy for the processes of another role: a call's tools get ``tool``."""
        return self._replace(role=role)

    def intersect(self, other: CompiledPolicy) -> CompiledPolicy:
        """What both allow, with the smaller limit of each and the stricter of every setting.

        A policy in mode ``report`` keeps reporting and does not make one that enforces stricter.
        """
        ours, theirs = self, other
        if self.mode is not other.mode:
            ours = theirs = self if self.mode is Mode.ENFORCE else other
        return CompiledPolicy(
            layers=self.layers + other.layers if self.layers and other.layers else (),
            role=_stricter(_STRICTER_ROLE, self.role, other.role),
            gpu=_stricter(_STRICTER_GPU, ours.gpu, theirs.gpu),
            subprocess=_stricter(_STRICTER_SUBPROCESS, ours.subprocess, theirs.subprocess),
            survivors=_stricter(_STRICTER_SURVIVORS, ours.survivors, theirs.survivors),
            on_violation=_stricter(_STRICTER_VIOLATION, ours.on_violation, theirs.on_violation),
            detect=detection.stricter(self.detect, other.detect),
            rules=tuple(dict.fromkeys(self.rules + other.rules)),
            require=self.require | other.require,
            wires=self.wires + other.wires,
            limits_enforced={scope: tightest(self.limits(scope), other.limits(scope)) for scope in Scope},
            limits_watched={scope: tightest(self.watched(scope), other.watched(scope)) for scope in Scope},
        )

    @classmethod
    def from_wire(cls, wire: object, *, role: Role | None = None) -> CompiledPolicy:
        """The policy that :meth:`ray_guard.Policy.to_wire` described.

        Args:
            wire: what came in a message; nothing in it is trusted to be well formed.
            role: applies where the policy does not say one itself; if neither does it is ``tool``, the strictest.

        Raises:
            PolicyError: something is missing, unknown or malformed. What is missing is never "no limit".
        """
        if isinstance(wire, dict) and set(wire) == {"all"}:
            wires = wire["all"]
            if not isinstance(wires, list) or not wires:
                raise PolicyError("policy", wires, "an intersection lists at least one policy")
            compiled = cls.from_wire(wires[0], role=role)
            for each in wires[1:]:
                compiled = compiled.intersect(cls.from_wire(each, role=role))
            return compiled
        return _compile(_Wire("", wire), role)


def intersect(*wires: Mapping[str, Any]) -> dict[str, Any]:
    """Several wire policies as one, all of which must allow; :meth:`CompiledPolicy.from_wire` takes it.

    Raises ValueError when there is none: that would not be a policy that denies but no policy at all.
    """
    flat: list[Mapping[str, Any]] = []
    for wire in wires:
        flat += wire["all"] if set(wire) == {"all"} else [wire]
    if not flat:
        raise ValueError("no policy to intersect")
    return {"all": flat}


class _Wire:
    """A mapping from a message, read key by key; each complaint is a PolicyError that names the key."""

    def __init__(self, path: str, value: object) -> None:
        if not isinstance(value, dict):
            raise PolicyError(path or "policy", value, "a mapping")
        self.path = path
        self.value: dict[object, object] = value

    def key(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> object:
        if name not in self.value:
            raise PolicyError(self.key(name), None, "a policy in a message states every key")
        return self.value[name]

    def only(self, *names: str) -> None:
        """Refuses what this release does not know: it may be what makes the policy strict."""
        for name in self.value:
            if name not in names:
                raise PolicyError(self.key(str(name)), self.value[name], "this release knows no such key")

    def child(self, name: str) -> _Wire:
        return _Wire(self.key(name), self.get(name))

    def word(self, name: str, words: tuple[_T, ...]) -> _T:
        value = self.get(name)
        for word in words:
            if isinstance(value, str) and word == value:
                return word
        raise PolicyError(self.key(name), value, "one of " + ", ".join(str(word) for word in words))

    def texts(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise PolicyError(self.key(name), value, "a list of text")
        return list(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise PolicyError(self.key(name), value, "true or false")
        return value


_KEYS: Final = (
    *("version", "mode", "role", "egress", "model_endpoint", "gpu", "files", "budgets"),
    *("subprocess", "survivors", "on_violation", "detect", "require", "set"),
)


def _compile(wire: _Wire, role: Role | None) -> CompiledPolicy:
    wire.only(*_KEYS)
    if wire.get("version") != 1 or isinstance(wire.get("version"), bool):
        raise PolicyError("version", wire.get("version"), "this release reads version 1")
    mode = wire.word("mode", tuple(Mode))
    said = None if wire.get("role") is None else wire.word("role", tuple(Role))
    budgets = wire.child("budgets")
    budgets.only(*Scope)
    limits = {scope: limits_from_wire(scope, budgets.get(scope.value), key=budgets.key(scope.value)) for scope in Scope}
    layer = _layer(wire.child("egress"), mode, _endpoint(wire.key("model_endpoint"), wire.get("model_endpoint")))
    return CompiledPolicy(
        layers=(layer,),
        role=said or role or Role.TOOL,
        gpu=wire.word("gpu", _STRICTER_GPU),
        subprocess=wire.word("subprocess", _STRICTER_SUBPROCESS),
        survivors=wire.word("survivors", _STRICTER_SURVIVORS),
        on_violation=wire.word("on_violation", _STRICTER_VIOLATION),
        detect=_detect(wire.child("detect"), mode),
        rules=tuple(detection.rules(each) for each in wire.child("detect").texts("rules")),
        require=frozenset(wire.texts("require")),
        wires=(MappingProxyType({str(key): value for key, value in wire.value.items()}),),
        limits_enforced=limits if mode is Mode.ENFORCE else {},
        limits_watched=limits if mode is Mode.REPORT else {},
    )


def _detect(wire: _Wire, mode: Mode) -> detection.Actions:
    wire.only(*detection.ACTIONS, "rules")
    said = {action: [detection.word(each) for each in wire.texts(action)] for action in detection.ACTIONS}
    return detection.actions(said, enforced=mode is Mode.ENFORCE)


def _layer(egress: _Wire, mode: Mode, model: Endpoint | None) -> Layer:
    single: dict[tuple[Transport, int], tuple[AddressRule, ...]] = {}
    ranges: dict[Transport, tuple[AddressRule, ...]] = {}
    names: list[NameRule] = []
    unix: dict[str, UnixRule] = {}
    groups: set[Group] = set()
    egress.only("allow", "proxy", "listen", "verify_names")
    for index, text in enumerate(egress.texts("allow")):
        rule = parse_rule(text, key=f"{egress.key('allow')}[{index}]")
        match rule:
            case AddressRule(ports=ports) if ports.first == ports.last:
                key = (rule.transport, ports.first)
                single[key] = (*single.get(key, ()), rule)
            case AddressRule():
                ranges[rule.transport] = (*ranges.get(rule.transport, ()), rule)
            case NameRule():
                names.append(rule)
            case UnixRule():
                unix[rule.path] = rule
            case GroupRule():
                groups.add(rule.group)
    listen: list[PortRange] = []
    for text in egress.texts("listen"):
        try:
            listen.append(parse_ports(text))
        except ValueError as error:
            raise PolicyError(egress.key("listen"), text, str(error)) from None
    return Layer(
        mode=mode,
        groups=frozenset(groups),
        addresses=single,
        ranges=ranges,
        names=tuple(names),
        unix=unix,
        listen=tuple(listen),
        verify_names=egress.flag("verify_names"),
        proxy=_proxy(egress),
        model=model,
    )


def _proxy(egress: _Wire) -> Endpoint | None:
    text = egress.get("proxy")
    if isinstance(text, str) and not text.startswith("http://"):
        raise PolicyError(egress.key("proxy"), text, "a proxy is http://host:port")
    return _endpoint(egress.key("proxy"), text.removeprefix("http://") if isinstance(text, str) else text)


def _endpoint(key: str, text: object) -> Endpoint | None:
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise ValueError("host:port")
        return parse_endpoint(text)
    except ValueError as error:
        raise PolicyError(key, text, str(error)) from None


def _stricter(order: tuple[_T, ...], first: _T, second: _T) -> _T:
    return order[min(order.index(first), order.index(second))]


def decide(policy: CompiledPolicy, surroundings: Surroundings, usage: Account, request: Request) -> Decision:
    """Whether ``request`` is granted, why, by which rule, and how its bytes travel.

    Pure: what it grants is reserved by the caller afterwards, and may then still be refused.

    Args:
        policy: see :meth:`CompiledPolicy.from_wire`.
        surroundings: what is true around the target now.
        usage: the account of the scope that asks (its call, else its actor); an account without limits where there is
            none.
        request: what the gate read.
    """
    if usage.barred:
        return _ENDED
    granted: Decision | None = None
    noticed: Decision | None = None
    named: Decision | None = None
    for layer in policy.layers:
        decision = layer.decide(policy.role, surroundings, request)
        if decision.verdict is Verdict.ALLOW:
            if decision.reason is Reason.NAME:
                named = decision if named is None else _agreed(named, decision)
                if named is None:
                    return _NOT_LISTED
            if granted is None or decision.route > granted.route:
                granted = decision
        elif layer.mode is Mode.ENFORCE:
            return decision
        elif noticed is None:
            noticed = decision
    if granted is None and noticed is None:
        return _NOT_LISTED
    if request.operation in _OUTWARD and request.transport is not Transport.UNIX:
        exceeded = usage.exhausted(_NEEDED[request.operation])
        if exceeded is not None:
            if not exceeded.report_only:
                return Decision(Verdict.DENY, Reason.BUDGET, exceeded=exceeded)
            if noticed is None:
                noticed = Decision(Verdict.DENY, Reason.BUDGET, exceeded=exceeded)
        by_rule = granted is not None and granted.reason is Reason.RULE and request.transport is Transport.TCP
        if granted is not None and by_rule and (usage.exact or (not surroundings.cuts and _may_be_cut(policy, usage))):
            granted = Decision(Verdict.ALLOW, Reason.RULE, granted.rule, Route.RELAY)
    return _concluded(granted if named is None or (granted is not None and granted.model) else named, noticed)


def _may_be_cut(policy: CompiledPolicy, usage: Account) -> bool:
    """Whether a flow may have to end before its time: at a byte cap, or with a scope that is ended for a violation."""
    return usage.limits_any((EGRESS, SENT, RECEIVED)) or policy.ends_scopes


def _concluded(granted: Decision | None, noticed: Decision | None) -> Decision:
    if noticed is None:
        return _NOT_LISTED if granted is None else granted
    allowed = Decision(Verdict.ALLOW, route=Route.DIRECT) if granted is None else granted
    return allowed._replace(reason=noticed.reason, rule=None, report_only=True, exceeded=noticed.exceeded)


def _agreed(first: Decision, second: Decision) -> Decision | None:
    """What two policies that list names both grant; None: nothing."""
    expected = _both(first.expected, second.expected)
    if not expected or (first.proxy and second.proxy and first.proxy != second.proxy):
        return None
    names = frozenset[str]().union(*(names for _, names in expected))
    name = next((name for name in (first.name, second.name) if name in names), min(names))
    return first._replace(expected=expected, name=name, proxy=first.proxy or second.proxy)


def _both(first: Expected, second: Expected) -> Expected:
    """What both expect; empty: they cannot agree."""
    agreed: dict[Protocol, frozenset[str]] = {}
    for protocol, names in first:
        for other, others in second:
            if protocol is other or Protocol.TCP in (protocol, other):
                common = names & others
                stricter = other if protocol is Protocol.TCP else protocol
                if common:
                    agreed[stricter] = agreed.get(stricter, frozenset()) | common
    return tuple(agreed.items())

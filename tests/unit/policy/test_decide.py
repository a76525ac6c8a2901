"""The decision: tables of a request, the expected verdict **and reason**."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.budgets import Account, Scope
from ray_guard.policy.decide import (
    CompiledPolicy,
    Decision,
    Operation,
    Process,
    Reason,
    Request,
    Route,
    Surroundings,
    Verdict,
    decide,
    intersect,
)
from ray_guard.policy.destination import Transport
from ray_guard.policy.model import Policy
from ray_guard.records import Mode, Role

TCP, UDP, UNIX = Transport.TCP, Transport.UDP, Transport.UNIX
CONNECT, SEND, BIND, LISTEN = Operation.CONNECT, Operation.SEND, Operation.BIND, Operation.LISTEN
FREE = Account(Scope.CALL, "no limits")


def compiled(allow: Sequence[str] = (), role: Role = Role.TOOL, **settings: Any) -> CompiledPolicy:
    return CompiledPolicy.from_wire(Policy.from_shorthand(allow=list(allow), **settings).to_wire(), role=role)


def connect(address: str, port: int, transport: Transport = TCP, process: Process = Process.OTHER) -> Request:
    return Request(CONNECT, transport, address, port, process=process)


def outcome(
    policy: CompiledPolicy, request: Request, surroundings: Surroundings | None = None, usage: Account = FREE
) -> tuple[bool, str]:
    decision = decide(policy, surroundings or Surroundings(), usage, request)
    return decision.allowed, decision.reason.value


# Nothing means nothing ----------------------------------------------------------------------------------------------


def test_the_zero_values_deny() -> None:
    assert Verdict(0) is Verdict.DENY
    assert Decision().verdict is Verdict.DENY
    assert not Decision()
    assert not decide(CompiledPolicy(), Surroundings(), FREE, connect("10.0.0.1", 80))


_requests = st.builds(
    Request,
    st.sampled_from([CONNECT, SEND, LISTEN]),
    st.sampled_from(list(Transport)),
    st.one_of(st.ip_addresses().map(str), st.text(max_size=20)),
    st.integers(-1, 65537),
    st.one_of(st.just(""), st.text(max_size=20), st.text(max_size=20).map("/".__add__)),
    st.sampled_from(list(Process)),
    st.one_of(st.none(), st.tuples(st.integers(), st.integers())),
)
_crowded = Surroundings(
    cluster=frozenset({("10.0.0.5", 6379)}),
    collectives=frozenset({("10.0.0.6", 40000)}),
    cluster_unix=frozenset({"/tmp/ray/session/sockets/raylet"}),
    ray_listen=frozenset({10002}),
    names={"10.0.0.7": frozenset({"index.example.org"})},
)


@given(_requests, st.sampled_from(list(Role)))
def test_an_empty_list_allows_nothing(request: Request, role: Role) -> None:
    """Whatever is around, whoever asks. (Listening on a unix path of one's own reaches nobody.)"""
    if request.operation is LISTEN and request.transport is UNIX:
        return
    assert not decide(compiled(role=role), _crowded, FREE, request)


@given(_requests, st.sampled_from(list(Role)))
def test_no_request_raises(request: Request, role: Role) -> None:
    decide(
        compiled(["cluster", "collectives", "[::/0]:*", "unix:///a", "a.example:443"], role), _crowded, FREE, request
    )


# Addresses ----------------------------------------------------------------------------------------------------------

ALLOW = ["10.20.0.0/16:6379", "10.0.0.0/8:6000-6010", "0.0.0.0/0:80", "udp://192.0.2.7:123", "[2001:db8::/32]:443"]


@pytest.mark.parametrize(
    ("request_", "allowed", "reason"),
    [
        (connect("10.20.3.4", 6379), True, "rule"),
        (connect("::ffff:10.20.3.4", 6379), True, "rule"),
        (connect("10.21.0.1", 6379), False, "not_listed"),
        (connect("10.20.3.4", 6380), False, "not_listed"),
        (connect("10.9.9.9", 6000), True, "rule"),
        (connect("10.9.9.9", 6010), True, "rule"),
        (connect("10.9.9.9", 5999), False, "not_listed"),
        (connect("10.9.9.9", 6011), False, "not_listed"),
        (connect("2001:db8::9", 443), True, "rule"),
        (connect("2001:db9::9", 443), False, "not_listed"),
        # the transport is part of the rule
        (connect("192.0.2.7", 123, UDP), True, "rule"),
        (Request(SEND, UDP, "192.0.2.7", 123), True, "rule"),
        (connect("192.0.2.7", 123, TCP), False, "not_listed"),
        (connect("10.20.3.4", 6379, UDP), False, "not_listed"),
        # 0.0.0.0/0:80 is not everything
        (connect("8.8.8.8", 80), True, "rule"),
        (connect("169.254.169.254", 80), False, "metadata_address"),
        (connect("::ffff:169.254.169.254", 80), False, "metadata_address"),
        (connect("100.100.100.200", 80), False, "metadata_address"),
        (connect("169.254.7.7", 80), False, "link_local_address"),
        (connect("224.0.0.251", 80), False, "multicast_address"),
        (connect("255.255.255.255", 80), False, "broadcast_address"),
        (connect("240.0.0.1", 80), False, "reserved_address"),
        (connect("64:ff9b::8.8.8.8", 80), False, "transition_address"),
        (connect("64:ff9b::169.254.169.254", 80), False, "metadata_address"),
        # no destination at all
        (connect("10.20.3.4", 0), False, "invalid"),
        (connect("10.20.3.4", 65536), False, "invalid"),
        (connect("10.20.3.4", -1), False, "invalid"),
        (connect("", 80), False, "invalid"),
        (connect("127.1", 80), False, "invalid"),
        (connect("index.example.org", 80), False, "invalid"),
    ],
)
def test_addresses(request_: Request, allowed: bool, reason: str) -> None:
    assert outcome(compiled(ALLOW), request_) == (allowed, reason)


def test_the_narrowest_rule_is_named() -> None:
    decision = decide(
        compiled(["0.0.0.0/0:80", "10.0.0.0/8:*", "10.1.2.3:80"]), Surroundings(), FREE, connect("10.1.2.3", 80)
    )
    assert decision == Decision(Verdict.ALLOW, Reason.RULE, "10.1.2.3:80", Route.DIRECT)


def test_a_sweep_does_not_grow_the_memory_without_bound() -> None:
    policy = compiled(["10.0.0.0/8:*"])
    for port in range(1, 5000):
        decide(policy, Surroundings(), FREE, connect("10.0.0.1", port))
    (layer,) = policy.layers
    assert len(layer._memory) <= 4096
    assert outcome(policy, connect("10.0.0.1", 1)) == (True, "rule")


# Roles --------------------------------------------------------------------------------------------------------------

RAY = Surroundings(
    cluster=frozenset({("10.0.0.5", 6379), ("127.0.0.1", 41000)}),
    control=frozenset({("10.0.0.5", 8265), ("10.0.0.5", 8000)}),
    collectives=frozenset({("10.0.0.6", 40000)}),
    own_addresses=frozenset({"10.0.0.5"}),
    cluster_unix=frozenset({"/tmp/ray/session/sockets/raylet"}),
    control_folders=("/tmp/ray/session", "/run/ray_guard"),
    own_unix=frozenset({(8, 77)}),
    ray_listen=frozenset({10002}),
)
EVERYTHING = ["cluster", "collectives", "0.0.0.0/0:*", "unix:///tmp/ray/session/sockets/raylet", "10.0.0.5:8000"]


@pytest.mark.parametrize(
    ("role", "process", "port", "allowed", "reason"),
    [
        # cluster: the actor's own process, and a policy actor's engine
        (Role.TOOL, Process.OTHER, 6379, False, "control_plane"),
        (Role.TOOL, Process.OWN, 6379, False, "control_plane"),
        (Role.ENV, Process.OTHER, 6379, False, "role"),
        (Role.ENV, Process.ENGINE, 6379, False, "role"),
        (Role.ENV, Process.OWN, 6379, True, "cluster"),
        (Role.POLICY, Process.OTHER, 6379, False, "role"),
        (Role.POLICY, Process.OWN, 6379, True, "cluster"),
        (Role.POLICY, Process.ENGINE, 6379, True, "cluster"),
        # the job API is never in it, not even by a wide rule …
        (Role.TOOL, Process.OTHER, 8265, False, "control_plane"),
        (Role.ENV, Process.OWN, 8265, False, "control_plane"),
        (Role.POLICY, Process.OWN, 8265, False, "control_plane"),
        # … but an actor may be given one such address by name; a tool may not
        (Role.TOOL, Process.OTHER, 8000, False, "control_plane"),
        (Role.ENV, Process.OTHER, 8000, True, "rule"),
        # anything else is an ordinary rule's business
        (Role.TOOL, Process.OTHER, 7777, True, "rule"),
    ],
)
def test_ray_is_reached_by_role(role: Role, process: Process, port: int, allowed: bool, reason: str) -> None:
    assert outcome(compiled(EVERYTHING, role), connect("10.0.0.5", port, process=process), RAY) == (allowed, reason)


@pytest.mark.parametrize("alias", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "10.0.0.5"])
def test_a_tool_does_not_reach_rays_servers_under_another_of_the_nodes_addresses(alias: str) -> None:
    policy = compiled(["127.0.0.0/8:*", "[::1]:*", "10.0.0.5:8265"])
    assert outcome(policy, connect(alias, 8265), RAY) == (False, "control_plane")
    assert outcome(policy, connect("127.0.0.1", 8266), RAY) == (True, "rule")


@pytest.mark.parametrize(("role", "allowed"), [(Role.TOOL, False), (Role.ENV, False), (Role.POLICY, True)])
def test_collectives_are_for_policy_actors(role: Role, allowed: bool) -> None:
    expected = (True, "collectives") if allowed else (False, "role")
    assert outcome(compiled(["collectives"], role), connect("10.0.0.6", 40000), RAY) == expected
    assert outcome(compiled(["collectives"], role), connect("10.0.0.6", 40001), RAY) == (False, "not_listed")
    assert outcome(compiled([], role), connect("10.0.0.6", 40000), RAY) == (False, "not_listed")


def test_with_role_is_what_a_call_gets() -> None:
    env = compiled(["cluster"], Role.ENV)
    request = connect("10.0.0.5", 6379, process=Process.OWN)
    assert outcome(env, request, RAY) == (True, "cluster")
    assert outcome(env.with_role(Role.TOOL), request, RAY) == (False, "control_plane")


def test_the_file_says_the_role_else_the_caller_else_the_strictest() -> None:
    said = Policy(role=Role.POLICY).to_wire()
    unsaid = Policy().to_wire()
    assert CompiledPolicy.from_wire(said, role=Role.ENV).role is Role.POLICY
    assert CompiledPolicy.from_wire(unsaid, role=Role.ENV).role is Role.ENV
    assert CompiledPolicy.from_wire(unsaid).role is Role.TOOL


# Unix sockets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "path", "inode", "allowed", "reason"),
    [
        (Role.TOOL, "/run/some.sock", None, True, "rule"),
        (Role.TOOL, "/run/other.sock", None, False, "not_listed"),
        (Role.TOOL, "/var/run/docker.sock", (8, 1), False, "not_listed"),
        (Role.TOOL, "\0/tmp/.X11-unix/X0", None, False, "abstract_socket"),
        (Role.TOOL, "\0", None, False, "abstract_socket"),
        # the path is resolved before it is judged; what is not resolved is no destination
        (Role.TOOL, "run/some.sock", None, False, "invalid"),
        (Role.TOOL, "/run/x/../some.sock", None, False, "invalid"),
        (Role.TOOL, "/run//some.sock", None, False, "invalid"),
        (Role.TOOL, "/run/some.sock\0x", None, False, "invalid"),
        (Role.TOOL, "", None, False, "invalid"),
        # a socket of one's own, by inode: its path may mean another one by now
        (Role.TOOL, "/tmp/mine.sock", (8, 77), True, "own_socket"),
        (Role.TOOL, "/tmp/mine.sock", (9, 77), False, "not_listed"),
        # Ray's and the guard's own
        (Role.TOOL, "/tmp/ray/session/sockets/raylet", None, False, "control_plane"),
        (Role.TOOL, "/run/ray_guard/supervisor", (8, 77), False, "control_plane"),
        (Role.TOOL, "/run/ray_guarded", None, False, "not_listed"),
        (Role.ENV, "/tmp/ray/session/sockets/raylet", None, False, "role"),
        (Role.ENV, "/run/ray_guard/supervisor", None, False, "control_plane"),
        (Role.ENV, "/run/ray_guard/supervisor", (8, 77), False, "control_plane"),
    ],
)
def test_unix_sockets(role: Role, path: str, inode: tuple[int, int] | None, allowed: bool, reason: str) -> None:
    policy = compiled(["unix:///run/some.sock", "cluster"], role)
    assert outcome(policy, Request(CONNECT, UNIX, path=path, inode=inode), RAY) == (allowed, reason)
    assert outcome(policy, Request(SEND, UNIX, path=path, inode=inode), RAY) == (allowed, reason)


def test_the_actors_own_process_speaks_to_its_raylet() -> None:
    request = Request(CONNECT, UNIX, path="/tmp/ray/session/sockets/raylet", process=Process.OWN)
    assert outcome(compiled(["cluster"], Role.ENV), request, RAY) == (True, "cluster")
    assert outcome(compiled([], Role.ENV), request, RAY) == (False, "control_plane")


def test_a_listed_control_socket_is_still_none_of_a_tools_business() -> None:
    request = Request(CONNECT, UNIX, path="/tmp/ray/session/sockets/raylet")
    assert outcome(compiled(EVERYTHING), request, RAY) == (False, "control_plane")


# Bind and listen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "request_", "allowed", "reason"),
    [
        (Role.TOOL, Request(BIND, TCP, "0.0.0.0", 0), True, "ephemeral"),
        (Role.TOOL, Request(BIND, UDP, "0.0.0.0", 0), True, "ephemeral"),
        (Role.TOOL, Request(LISTEN, TCP, "0.0.0.0", 0), False, "listen_not_listed"),  # listen without bind
        (Role.TOOL, Request(LISTEN, TCP, "0.0.0.0", 45123), False, "listen_not_listed"),  # bound to port 0 before
        (Role.TOOL, Request(BIND, TCP, "0.0.0.0", 8080), True, "listen"),
        (Role.TOOL, Request(LISTEN, TCP, "0.0.0.0", 8080), True, "listen"),
        (Role.TOOL, Request(BIND, UDP, "0.0.0.0", 9005), True, "listen"),
        (Role.TOOL, Request(BIND, UDP, "0.0.0.0", 9011), False, "listen_not_listed"),
        (Role.TOOL, Request(BIND, TCP, "0.0.0.0", 65536), False, "invalid"),
        (Role.TOOL, Request(BIND, TCP, "0.0.0.0", -1), False, "invalid"),
        (Role.TOOL, Request(BIND, TCP, "0.0.0.0", 10002), False, "listen_not_listed"),
        # collectives bind where they like, above the privileged ports
        (Role.ENV, Request(LISTEN, TCP, "0.0.0.0", 45123), False, "listen_not_listed"),
        (Role.POLICY, Request(LISTEN, TCP, "0.0.0.0", 45123), True, "collectives"),
        (Role.POLICY, Request(LISTEN, TCP, "0.0.0.0", 0), True, "collectives"),
        (Role.POLICY, Request(BIND, TCP, "0.0.0.0", 1023), False, "listen_not_listed"),
    ],
)
def test_ports(role: Role, request_: Request, allowed: bool, reason: str) -> None:
    policy = compiled(["cluster", "collectives"], role, listen=[8080, "9000-9010"])
    assert outcome(policy, request_, RAY) == (allowed, reason)


def test_ray_listens_in_the_actors_own_process() -> None:
    policy = compiled(["cluster"], Role.ENV)
    assert outcome(policy, Request(BIND, TCP, "0.0.0.0", 10002, process=Process.OWN), RAY) == (True, "cluster")
    assert outcome(policy, Request(BIND, TCP, "0.0.0.0", 10002), RAY) == (False, "listen_not_listed")


def test_unix_sockets_may_be_bound_by_path() -> None:
    policy = compiled()
    assert outcome(policy, Request(BIND, UNIX, path="/tmp/mine.sock")) == (True, "unix_bind")
    assert outcome(policy, Request(LISTEN, UNIX, path="/tmp/mine.sock")) == (True, "unix_bind")
    assert outcome(policy, Request(BIND, UNIX, path="\0mine")) == (False, "abstract_socket")
    assert outcome(policy, Request(BIND, UNIX, path="")) == (False, "invalid")


@pytest.mark.parametrize("role", list(Role))
def test_nobody_binds_where_the_guards_own_sockets_are(role: Role) -> None:
    around = Surroundings(guard_folders=("/run/ray_guard",), control_folders=("/run/ray_guard", "/tmp/ray/session"))
    policy = compiled(role=role)
    assert outcome(policy, Request(BIND, UNIX, path="/run/ray_guard/x.sock"), around) == (False, "control_plane")
    assert outcome(policy, Request(BIND, UNIX, path="/run/ray_guard_not/x.sock"), around) == (True, "unix_bind")
    # An actor's working folder lies within Ray's session.
    assert outcome(policy, Request(BIND, UNIX, path="/tmp/ray/session/x.sock"), around) == (True, "unix_bind")


# Names --------------------------------------------------------------------------------------------------------------

TOLD = Surroundings(
    names={
        "203.0.113.9": frozenset({"a.files.example.org", "cdn.example.net"}),
        "169.254.169.254": frozenset({"rebound.files.example.org"}),
        "64:ff9b::a9fe:a9fe": frozenset({"rebound.files.example.org"}),
        "10.0.0.5": frozenset({"rebound.files.example.org"}),
    },
    control=frozenset({("10.0.0.5", 443)}),
)


@pytest.mark.parametrize(
    ("request_", "allowed", "reason", "route"),
    [
        (connect("203.0.113.9", 443), True, "name", Route.RELAY),
        (connect("203.0.113.9", 80), False, "not_listed", Route.NONE),
        (connect("203.0.113.10", 443), False, "not_listed", Route.NONE),  # no allowed name gave it
        (connect("203.0.113.9", 443, UDP), False, "not_listed", Route.NONE),
        # whoever owns a listed name chooses what it resolves to
        (connect("169.254.169.254", 443), False, "metadata_address", Route.NONE),
        (connect("64:ff9b::a9fe:a9fe", 443), False, "metadata_address", Route.NONE),
        (connect("10.0.0.5", 443), False, "control_plane", Route.NONE),
        (connect("127.0.0.53", 53, UDP), True, "resolver", Route.RESOLVER),
        (connect("8.8.8.8", 53), True, "resolver", Route.RESOLVER),
    ],
)
def test_names_are_reached_through_the_addresses_that_were_told_for_them(
    request_: Request, allowed: bool, reason: str, route: Route
) -> None:
    policy = compiled(["*.files.example.org:443", "index.example.org:443"])
    assert outcome(policy, request_, TOLD) == (allowed, reason)
    assert decide(policy, TOLD, FREE, request_).route is route


def test_without_a_name_rule_there_is_no_resolver() -> None:
    assert outcome(compiled(["10.0.0.0/8:443"]), connect("127.0.0.53", 53, UDP)) == (False, "not_listed")
    assert not compiled(["10.0.0.0/8:443"]).allows_name("index.example.org")
    assert compiled(["index.example.org:443"]).allows_name("index.example.org")
    assert not compiled(["index.example.org:443"]).allows_name("example.org")
    assert not CompiledPolicy().allows_name("index.example.org")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("index.example.org", "index.example.org:443"),
        ("a.files.example.org", "*.files.example.org:443"),
        ("a.b.files.example.org", "*.files.example.org:443"),
        ("files.example.org", None),
        ("xfiles.example.org", None),
        ("index.example.org.evil.com", None),
        ("example.org", None),
        ("localhost", None),
    ],
)
def test_names_that_may_be_asked_for(name: str, rule: str | None) -> None:
    decision = compiled(["*.files.example.org:443", "index.example.org:443"]).decide_name(name)
    if rule is None:
        assert (decision.allowed, decision.reason, decision.route) == (False, Reason.NOT_LISTED, Route.NONE)
    else:
        assert decision == Decision(Verdict.ALLOW, Reason.RESOLVER, rule, Route.RESOLVER, name=name)


def test_several_policies_must_all_list_a_name_and_one_that_reports_refuses_none() -> None:
    one, two = compiled(["a.example.org:443", "b.example.org:443"]), compiled(["b.example.org:22"])
    assert not one.intersect(two).decide_name("a.example.org").allowed
    assert one.intersect(two).decide_name("b.example.org").allowed
    reports = compiled(["b.example.org:443"], mode="report")
    assert reports.decide_name("b.example.org").report_only is False
    noticed = reports.decide_name("a.example.org")
    assert (noticed.allowed, noticed.report_only, noticed.reason) == (True, True, Reason.NOT_LISTED)
    assert reports.intersect(one).decide_name("a.example.org").report_only
    assert not reports.intersect(two).decide_name("a.example.org").allowed


# Budgets ------------------------------------------------------------------------------------------------------------


def test_what_is_listed_still_needs_room() -> None:
    policy = compiled(["10.0.0.0/8:*"], call={"connections": 1, "egress_bytes": 100})
    call = Account(Scope.CALL, "c7", policy.limits(Scope.CALL))
    assert outcome(policy, connect("10.0.0.1", 80), usage=call) == (True, "rule")
    assert call.reserve("connections", 1) is None
    decision = decide(policy, Surroundings(), call, connect("10.0.0.1", 80))
    assert (decision.verdict, decision.reason) == (Verdict.DENY, Reason.BUDGET)
    assert decision.exceeded is not None
    assert decision.exceeded.error().args == ("connections", 2, 1, "call", "c7")
    # sending on is no new connection, but bytes; binding is neither
    assert outcome(policy, Request(SEND, TCP, "10.0.0.1", 80), usage=call) == (True, "rule")
    call.charge("egress_received_bytes", 100)
    assert outcome(policy, Request(SEND, TCP, "10.0.0.1", 80), usage=call) == (False, "budget")
    assert outcome(policy, Request(BIND, TCP, "0.0.0.0", 0), usage=call) == (True, "ephemeral")


def test_a_destination_that_is_not_listed_is_no_matter_of_budget() -> None:
    call = Account(Scope.CALL, "c", {"connections": 0})
    assert outcome(compiled(), connect("10.0.0.1", 80), usage=call) == (False, "not_listed")


@pytest.mark.parametrize(
    ("scope", "limits", "route"),
    [
        (Scope.CALL, {"egress_bytes": 5}, Route.RELAY),
        (Scope.EPISODE, {"egress_sent_bytes": 5}, Route.RELAY),
        (Scope.CALL, {"connections": 5}, Route.DIRECT),
        (Scope.ACTOR, {"egress_bytes": 5}, Route.DIRECT),
        (Scope.JOB, {"egress_bytes": 5}, Route.DIRECT),
    ],
)
def test_a_byte_cap_of_a_call_or_episode_asks_for_the_relay(scope: Scope, limits: dict[str, int], route: Route) -> None:
    usage = Account(Scope.CALL, "c", parent=Account(scope, "x", limits))
    policy = compiled(["10.0.0.0/8:*", "cluster"], Role.ENV)
    assert decide(policy, Surroundings(), usage, connect("10.0.0.1", 80)).route is route
    own = connect("10.0.0.5", 6379, process=Process.OWN)
    assert decide(compiled(["cluster"], Role.ENV), RAY, usage, own).route is Route.DIRECT


@pytest.mark.parametrize(
    ("limits", "on_violation", "route"),
    [
        ({"egress_bytes": 5}, "deny", Route.RELAY),
        ({"egress_received_bytes": 5}, "deny", Route.RELAY),
        ({"connections": 5}, "deny", Route.DIRECT),
        ({}, "end_episode", Route.RELAY),
        ({}, "deny", Route.DIRECT),
    ],
)
def test_where_no_flow_can_be_cut_what_may_have_to_be_is_relayed(
    limits: dict[str, int], on_violation: str, route: Route
) -> None:
    usage = Account(Scope.CALL, "c", parent=Account(Scope.ACTOR, "a", limits))
    policy = compiled(["10.0.0.0/8:*"], Role.ENV, on_violation=on_violation)
    assert decide(policy, Surroundings(cuts=False), usage, connect("10.0.0.1", 80)).route is route
    assert decide(policy, Surroundings(), usage, connect("10.0.0.1", 80)).route is Route.DIRECT


# Report -------------------------------------------------------------------------------------------------------------


def test_report_lets_through_and_says_what_it_would_have_denied() -> None:
    policy = compiled(["10.0.0.1:80"], mode="report")
    assert policy.mode is Mode.REPORT
    denied = decide(policy, Surroundings(), FREE, connect("169.254.169.254", 80))
    assert (denied.verdict, denied.reason, denied.report_only) == (Verdict.ALLOW, Reason.METADATA_ADDRESS, True)
    assert denied.route is Route.DIRECT
    assert denied.attributes() == {
        "ray_guard.egress.decision": "allow",
        "ray_guard.egress.reason": "report_only:metadata_address",
    }
    listed = decide(policy, Surroundings(), FREE, connect("10.0.0.1", 80))
    assert (listed.reason, listed.report_only) == (Reason.RULE, False)
    assert listed.attributes() == {"ray_guard.egress.decision": "allow", "ray_guard.egress.reason": "rule"}


def test_report_watches_budgets() -> None:
    policy = compiled(["10.0.0.1:80"], mode="report", call={"connections": 0})
    assert policy.limits(Scope.CALL) == {}
    call = Account(Scope.CALL, "c", policy.limits(Scope.CALL), watched=policy.watched(Scope.CALL))
    decision = decide(policy, Surroundings(), call, connect("10.0.0.1", 80))
    assert (decision.verdict, decision.reason, decision.report_only) == (Verdict.ALLOW, Reason.BUDGET, True)


# Intersection -------------------------------------------------------------------------------------------------------


def test_both_must_allow() -> None:
    both = compiled(["10.0.0.0/8:*"]).intersect(compiled(["10.0.0.1:80", "192.0.2.1:80"]))
    assert outcome(both, connect("10.0.0.1", 80)) == (True, "rule")
    assert outcome(both, connect("10.0.0.2", 80)) == (False, "not_listed")
    assert outcome(both, connect("192.0.2.1", 80)) == (False, "not_listed")


def test_the_more_careful_route_is_taken() -> None:
    """One policy lists the address, the other the name: the name must still be verified."""
    address, name = compiled(["203.0.113.9:443"]), compiled(["cdn.example.net:443"])
    for both in (address.intersect(name), name.intersect(address)):
        decision = decide(both, TOLD, FREE, connect("203.0.113.9", 443))
        assert (decision.reason, decision.route) == (Reason.NAME, Route.RELAY)


def test_nothing_and_something_is_nothing() -> None:
    assert outcome(CompiledPolicy().intersect(compiled(["10.0.0.1:80"])), connect("10.0.0.1", 80)) == (
        False,
        "not_listed",
    )


def test_the_stricter_of_every_setting_and_the_smaller_of_every_limit() -> None:
    loose = compiled(
        role=Role.POLICY, gpu="any", subprocess="plain", survivors="keep", call={"connections": 9, "egress_bytes": 5}
    )
    strict = compiled(role=Role.ENV, gpu="engine", on_violation="kill_call", require=["gpu"], call={"connections": 3})
    for both in (loose.intersect(strict), strict.intersect(loose)):
        assert (both.role, both.gpu, both.subprocess, both.survivors) == (Role.ENV, "engine", "confine", "kill")
        assert both.on_violation == "kill_call"
        assert both.require == {"egress", "processes", "files", "gpu"}
        assert both.limits(Scope.CALL) == {"connections": 3, "egress_bytes": 5}


def test_a_reporting_policy_neither_weakens_nor_tightens_an_enforcing_one() -> None:
    enforcing = compiled(["10.0.0.1:80", "10.0.0.2:80"], survivors="keep", call={"connections": 9})
    reporting = compiled(["10.0.0.1:80"], mode="report", call={"connections": 3})
    for both in (enforcing.intersect(reporting), reporting.intersect(enforcing)):
        assert both.mode is Mode.ENFORCE
        assert both.survivors == "keep"
        assert (both.limits(Scope.CALL), both.watched(Scope.CALL)) == ({"connections": 9}, {"connections": 3})
        assert outcome(both, connect("10.0.0.1", 80)) == (True, "rule")
        noticed = decide(both, Surroundings(), FREE, connect("10.0.0.2", 80))
        assert (noticed.verdict, noticed.reason, noticed.report_only) == (Verdict.ALLOW, Reason.NOT_LISTED, True)
        assert outcome(both, connect("10.0.0.3", 80)) == (False, "not_listed")


_entries = st.lists(
    st.sampled_from(
        ["10.0.0.0/8:*", "10.0.0.1:80", "0.0.0.0/0:80", "[::/0]:*", "cluster", "collectives", "192.0.2.1:443"]
    ),
    max_size=3,
)
_destinations = st.sampled_from(
    [
        connect(address, port, process=process)
        for address, port, process in itertools.product(
            ["10.0.0.1", "10.0.0.5", "10.0.0.6", "192.0.2.1", "2001:db8::1"], [80, 443, 6379, 40000], list(Process)
        )
    ]
)


@given(_entries, _entries, st.sampled_from(list(Role)), _destinations)
def test_an_intersection_allows_exactly_what_both_allow(
    first: list[str], second: list[str], role: Role, request: Request
) -> None:
    one, two = Policy(egress={"allow": first}), Policy(egress={"allow": second})  # type: ignore[arg-type]
    both = CompiledPolicy.from_wire(intersect(one.to_wire(), two.to_wire()), role=role)
    expected = all(decide(CompiledPolicy.from_wire(p.to_wire(), role=role), RAY, FREE, request) for p in (one, two))
    assert bool(decide(both, RAY, FREE, request)) == expected


def test_intersections_flatten() -> None:
    one, two, three = (Policy(version=1).to_wire() for _ in range(3))
    assert intersect(intersect(one, two), three) == {"all": [one, two, three]}
    with pytest.raises(ValueError, match="no policy"):
        intersect()


# The message --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("mode",), "maybe", "mode"),
        (("mode",), True, "mode"),
        (("role",), "root", "role"),
        (("version",), 2, "version"),
        (("version",), True, "version"),
        (("egress",), None, "egress"),
        (("egress", "allow"), "cluster", "egress.allow"),
        (("egress", "allow"), ["127.1:80"], "egress.allow[0]"),
        (("egress", "listen"), ["*"], "egress.listen"),
        (("egress", "verify_names"), 1, "egress.verify_names"),
        (("egress", "deny"), [], "egress.deny"),
        (("budgets", "call"), None, "budgets.call"),
        (("budgets", "call"), {"egress_bytes": -1}, "budgets.call.egress_bytes"),
        (("budgets", "call"), {"egress_bytes": True}, "budgets.call.egress_bytes"),
        (("budgets", "call"), {"egress_bytes": 1.5}, "budgets.call.egress_bytes"),
        (("budgets", "call"), {"flops": float("nan")}, "budgets.call.flops"),
        (("budgets", "call"), {"egress": 1}, "budgets.call.egress"),
        (("budgets", "job"), {"memories": 1}, "budgets.job.memories"),
        (("budgets", "week"), {}, "budgets.week"),
        (("subprocess",), "free", "subprocess"),
        (("require",), "egress", "require"),
        (("unheard_of",), 1, "unheard_of"),
    ],
)
def test_a_malformed_message_is_refused_and_says_where(path: tuple[str, ...], value: object, key: str) -> None:
    wire = Policy().to_wire()
    part = wire
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    with pytest.raises(PolicyError) as caught:
        CompiledPolicy.from_wire(wire)
    assert caught.value.key == key


@pytest.mark.parametrize("key", ["mode", "egress", "budgets", "subprocess", "gpu", "require"])
def test_what_is_missing_is_not_taken_for_unlimited(key: str) -> None:
    wire = Policy().to_wire()
    del wire[key]
    with pytest.raises(PolicyError) as caught:
        CompiledPolicy.from_wire(wire)
    assert caught.value.key == key


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@given(_json, st.sampled_from([None, "mode", "role", "version", "egress", "budgets", "gpu", "require", "set", "all"]))
def test_garbage_raises_nothing_but_a_policy_error(garbage: Any, key: str | None) -> None:
    wire: Any = garbage if key is None else {"all": garbage} if key == "all" else {**Policy().to_wire(), key: garbage}
    try:
        CompiledPolicy.from_wire(wire)
    except PolicyError:
        return
    assert key in ("set", "version", "role", "require", "egress", "budgets", "mode", "gpu")


# The model endpoint --------------------------------------------------------------------------------------------------

ENGINE = "10.0.0.5:8000"


def engine(
    endpoint: str = ENGINE, allow: Sequence[str] = (), role: Role = Role.TOOL, **settings: Any
) -> CompiledPolicy:
    return compiled(allow, role, model_endpoint=endpoint, **settings)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("endpoint", "address", "port", "allowed", "reason"),
    [
        (ENGINE, "10.0.0.5", 8000, True, "model_endpoint"),
        (ENGINE, "::ffff:10.0.0.5", 8000, True, "model_endpoint"),
        (ENGINE, "10.0.0.5", 8001, False, "not_listed"),
        (ENGINE, "10.0.0.6", 8000, False, "not_listed"),
        (ENGINE, "127.0.0.1", 8000, False, "control_plane"),  # 10.0.0.5 is this node's own
        ("10.0.0.9:8000", "127.0.0.1", 8000, False, "not_listed"),
        ("[2001:db8::5]:8000", "2001:db8::5", 8000, True, "model_endpoint"),
        ("0.0.0.0:8000", "127.0.0.1", 8000, True, "model_endpoint"),
        ("127.0.0.1:8000", "127.0.0.1", 8000, True, "model_endpoint"),
        ("127.0.0.1:8000", "127.0.0.2", 8000, False, "control_plane"),
        ("engine.example:8000", "10.1.0.1", 8000, True, "model_endpoint"),
        ("engine.example:8000", "10.1.0.2", 8000, False, "not_listed"),
        ("engine.example:8000", "169.254.169.254", 8000, False, "metadata_address"),
        ("169.254.169.254:80", "169.254.169.254", 80, True, "model_endpoint"),
        ("10.0.0.5:6379", "10.0.0.5", 6379, False, "control_plane"),  # Ray's own
    ],
)
def test_where_a_model_endpoint_is(
    *, endpoint: str, address: str, port: int, allowed: bool, reason: str, role: Role
) -> None:
    around = Surroundings(
        own_addresses=frozenset({"10.0.0.5"}),
        control=frozenset({("10.0.0.5", 6379)}),
        names={"10.1.0.1": ("engine.example",), "169.254.169.254": ("engine.example",)},
    )
    decision = decide(engine(endpoint, role=role), around, FREE, connect(address, port))
    assert (decision.allowed, decision.reason.value) == (allowed, reason)
    assert (decision.route is Route.MODEL) == (decision.model is not None) == allowed


def test_no_rule_widens_it() -> None:
    """What is listed beside it goes by relay too, and its other addresses stay shut to tools."""
    around = Surroundings(own_addresses=frozenset({"10.0.0.5"}))
    for allow in ([ENGINE], ["10.0.0.0/8:*"], ["0.0.0.0/0:*"]):
        policy = engine(allow=[*allow, "127.0.0.1:8000"])
        assert decide(policy, around, FREE, connect("10.0.0.5", 8000)).route is Route.MODEL
        assert outcome(policy, connect("127.0.0.1", 8000), around) == (False, "control_plane")
        literal = outcome(engine(allow=["127.0.0.1:8000"], role=Role.ENV), connect("127.0.0.1", 8000), around)
        assert literal == (True, "rule")
    assert not decide(engine(), around, FREE, connect("10.0.0.5", 8000, UDP))


def test_of_several_policies_all_must_agree_and_the_relay_stays() -> None:
    request = connect("10.0.0.5", 8000)
    for other in (compiled([ENGINE]), compiled(["10.0.0.0/8:*"]), engine()):
        for both in (engine().intersect(other), other.intersect(engine())):
            assert decide(both, Surroundings(), FREE, request).route is Route.MODEL
    for other in (compiled([]), engine("10.0.0.6:8000")):
        assert outcome(engine().intersect(other), request) == (False, "not_listed")
    watching = engine(mode="report")
    assert decide(watching, Surroundings(), FREE, request).route is Route.WATCHED_MODEL
    assert decide(watching.intersect(engine()), Surroundings(), FREE, request).route is Route.MODEL
    assert decide(watching.intersect(compiled([ENGINE])), Surroundings(), FREE, request).route is Route.WATCHED_MODEL


def test_an_endpoint_that_is_a_name_is_resolved_and_nothing_else_is() -> None:
    policy = engine("Engine.Example:8000", egress={"proxy": "http://p:3128"})
    assert policy.names
    assert policy.allows_name("engine.example")
    assert policy.is_model_name("engine.example")
    assert not policy.allows_name("other.example")
    assert outcome(policy, connect("10.0.0.1", 53, UDP)) == (True, "resolver")
    named = Surroundings(names={"10.1.0.1": ("engine.example",)})
    assert outcome(policy, connect("10.1.0.1", 443), named) == (False, "not_listed")
    listed = compiled(["http://engine.example:8000"]).intersect(policy)
    assert decide(listed, named, FREE, connect("10.1.0.1", 8000)).route is Route.MODEL
    assert not engine().names


@pytest.mark.parametrize(
    "endpoint", ["engine", "engine:0", "engine:70000", "engine:8000-8001", ":8000", 8000, "http://e:80", "e:80/v1"]
)
def test_an_endpoint_that_is_none(endpoint: object) -> None:
    with pytest.raises(PolicyError) as refused:
        compiled(model_endpoint=endpoint)
    assert refused.value.key == "model_endpoint"
    wire = {**Policy.from_shorthand().to_wire(), "model_endpoint": endpoint}
    with pytest.raises(PolicyError) as refused:
        CompiledPolicy.from_wire(wire)
    assert refused.value.key == "model_endpoint"

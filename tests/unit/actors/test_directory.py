from __future__ import annotations

from typing import Any

from ray_guard.actors.directory import answer, endpoints_of

HERE = {
    "NodeID": "a",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.5",
    "NodeManagerPort": 4001,
    "ObjectManagerPort": 4002,
    "MetricsAgentPort": 4003,
    "DashboardAgentListenPort": 52365,
    "RuntimeEnvAgentPort": 4004,
    "MetricsExportPort": 4005,
}


def known(node_id: str) -> tuple[int, int]:
    raise AssertionError(f"the table tells of {node_id} itself")


def test_a_node_is_its_raylet_object_manager_and_agent() -> None:
    found, control = endpoints_of("10.0.0.5:6379", [HERE], [("10.0.0.5", 7001)], known, None)
    assert found == {("10.0.0.5", port) for port in (6379, 4001, 4002, 4003, 7001)}
    assert control == {("10.0.0.5", port) for port in (52365, 4004, 4005, 10001)}


def test_loopback_counts_for_the_node_asked_about_alone() -> None:
    there = {**HERE, "NodeID": "b", "NodeManagerAddress": "10.0.0.6"}
    found, control = endpoints_of("10.0.0.5:6379", [HERE, there], [], known, "b")
    assert ("10.0.0.6", 4003) in found
    assert {port for address, port in found if address == "127.0.0.1"} == {4001, 4003}
    assert ("127.0.0.1", 52365) in control


def test_dead_nodes_and_missing_ports_are_left_out() -> None:
    dead = {**HERE, "Alive": False}
    bare = {"NodeID": "c", "Alive": True, "NodeManagerAddress": "10.0.0.7", "NodeManagerPort": 4001}
    found, _ = endpoints_of("10.0.0.5:6379", [dead, bare], [("10.0.0.7", 0)], lambda _node: (0, 0), None)
    assert found == {("10.0.0.5", 6379), ("10.0.0.7", 4001)}


def test_older_rays_keep_the_agents_ports_elsewhere() -> None:
    old = {name: value for name, value in HERE.items() if name not in ("MetricsAgentPort", "DashboardAgentListenPort")}
    found, control = endpoints_of("10.0.0.5:6379", [old], [], lambda node: {"a": (4003, 52365)}[node], None)
    assert ("10.0.0.5", 4003) in found
    assert ("10.0.0.5", 52365) in control


def test_what_takes_jobs_is_never_granted_even_where_tables_claim_so() -> None:
    claimed = [("10.0.0.5", 10001), ("10.0.0.5", 52365), ("10.0.0.5", 7001)]
    found, _ = endpoints_of("10.0.0.5:6379", [HERE], claimed, known, None)
    assert ("10.0.0.5", 7001) in found
    assert not {("10.0.0.5", 10001), ("10.0.0.5", 52365)} & found


def test_ipv6_clusters() -> None:
    found, _ = endpoints_of("[2001:db8::5]:6379", [], [], known, None)
    assert found == {("2001:db8::5", 6379)}


def test_every_line_has_an_answer() -> None:
    def fails(_question: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionError("no GCS")

    assert answer('{"op": "read"}', {"read": lambda _: {"endpoints": []}}) == {"endpoints": []}
    for line in ("", "nonsense", "[]", '{"op": "write"}', '{"op": ["read"]}'):
        assert "error" in answer(line, {"read": fails})
    assert answer('{"op": "read"}', {"read": fails}) == {"error": "ConnectionError: no GCS"}

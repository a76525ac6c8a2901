"""What a guarded actor submits is under its policy, whatever it asks for (invariant 10); policies only ever add up."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import ray

from ray_guard import NotEnforced, guard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def reach(port: int, text: str) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
    except OSError as error:
        return type(error).__name__
    return "sent"


@ray.remote(num_cpus=0)
def task(port: int, text: str) -> str:
    return reach(port, text)


@ray.remote(num_cpus=0)
def task_of_task(port: int, text: str) -> str:
    return ray.get(task.remote(port, text))


@ray.remote(num_cpus=0)
class Nested:
    def reach(self, port: int, text: str) -> str:
        return reach(port, text)


class Submitter:
    def directly(self, port: int, text: str) -> str:
        return reach(port, text)

    def by_task(self, port: int, text: str, **options: Any) -> str:
        return ray.get(task.options(**options).remote(port, text))

    def by_two_tasks(self, port: int, text: str) -> str:
        return ray.get(task_of_task.remote(port, text))

    def by_actor(self, port: int, text: str, **options: Any) -> str:
        return ray.get(Nested.options(**options).remote().reach.remote(port, text))

    def by_closure(self, port: int, text: str, actor: Any) -> str:
        return ray.get(actor.__ray_call__.remote(lambda _self: reach(port, text)))

    def by_closure_in_child(self, port: int, text: str) -> str:
        return ray.get(Nested.remote().__ray_call__.remote(lambda _self: reach(port, text)))


WEAKER = {
    "no_policy": {"RAY_GUARD_POLICY_ID": ""},
    "no_hook": {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": ""},
    "another_hook": {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "os.getpid", "RAY_GUARD_POLICY_ID": ""},
    "harmless": {"ANYTHING": "1"},
}


@pytest.fixture(scope="module")
def guarded(cluster: Any) -> Any:
    return guard(allow=["10.0.0.1:443"])(ray.remote(num_cpus=0)(Submitter)).remote()


@pytest.fixture(scope="module")
def unguarded(cluster: Any) -> Any:
    class Free(Submitter):
        """The same, under no policy: ``guard`` marks a class in place."""

    free = type("Free", (), {name: value for name, value in vars(Submitter).items() if not name.startswith("__")})
    return ray.remote(num_cpus=0)(free).remote()


def ways(actor: Any, port: int, text: str) -> dict[str, Any]:
    found = {
        "task": actor.by_task.remote(port, text),
        "task of a task": actor.by_two_tasks.remote(port, text),
        "actor": actor.by_actor.remote(port, text),
        "closure in a child": actor.by_closure_in_child.remote(port, text),
    }
    return {name: ray.get(ref) for name, ref in found.items()}


def weaker_ways(actor: Any, port: int, text: str) -> dict[str, Any]:
    found = {
        name: actor.by_task.remote(port, text, runtime_env={"env_vars": variables})
        for name, variables in WEAKER.items()
    }
    found["actor"] = actor.by_actor.remote(port, text, runtime_env={"env_vars": WEAKER["no_policy"]})
    found["empty"] = actor.by_actor.remote(port, text, runtime_env={})
    return {name: ray.get(ref) for name, ref in found.items()}


def test_no_way_of_submitting_leads_out(guarded: Any, unguarded: Any, sink: Any) -> None:
    results = ways(unguarded, sink.port, "free")
    assert set(results.values()) == {"sent"}
    assert sink.saw("free")
    before = sink.accepted
    assert before == len(results)
    assert ray.get(guarded.directly.remote(sink.port, "direct")) == "PermissionError"
    assert set(ways(guarded, sink.port, "escaped").values()) == {"PermissionError"}
    assert set(weaker_ways(guarded, sink.port, "escaped").values()) == {"PermissionError"}
    assert not sink.saw("escaped", within=0.3)
    assert sink.accepted == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pip", ["something"]),
        ("py_executable", "/bin/sh -c evil"),
        ("working_dir", "https://example.org/evil.zip"),
        ("env_vars", {"LD_PRELOAD": "/tmp/evil.so"}),
        ("env_vars", {"PYTHONPATH": "/tmp/evil"}),
        ("env_vars", {"BASH_ENV": "/tmp/evil.sh"}),
    ],
)
def test_what_acts_outside_of_the_guard_is_refused(guarded: Any, field: str, value: Any) -> None:
    with pytest.raises(NotEnforced, match="runtime_env"):
        ray.get(guarded.by_task.remote(1, "", runtime_env={field: value}))


def test_no_closure_runs_in_an_unguarded_actor(guarded: Any, unguarded: Any, sink: Any) -> None:
    bystander = Nested.remote()
    assert ray.get(unguarded.by_closure.remote(sink.port, "free closure", bystander)) == "sent"
    assert sink.saw("free closure")
    with pytest.raises(NotEnforced, match="__ray_call__"):
        ray.get(guarded.by_closure.remote(sink.port, "closure escaped", bystander))
    assert sink.accepted == 1


def test_policies_of_base_and_subclass_intersect(sink: Any) -> None:
    here, there = f"127.0.0.1:{sink.port}", f"127.0.0.1:{sink.port + 1}"

    @guard(allow=[here, there])
    class Base:
        def __init__(self) -> None:
            self.built = True

        def reach(self, port: int, text: str) -> str:
            return reach(port, text)

    class Tight(Base):
        def __init__(self, text: str) -> None:  # does not call Base's: guarded all the same
            self.text = text

    class Same(Base): ...

    guard(allow=[there])(Tight)
    assert ray.get(ray.remote(num_cpus=0)(Same).remote().reach.remote(sink.port, "both")) == "sent"
    assert sink.saw("both")
    tight = ray.remote(num_cpus=0)(Tight).remote("x")
    assert ray.get(tight.reach.remote(sink.port, "tight")) == "PermissionError"
    assert sink.accepted == 1


def test_a_guarded_child_is_under_both_policies(sink: Any) -> None:
    here = f"127.0.0.1:{sink.port}"

    class Loose:
        def reach(self, port: int, text: str) -> str:
            return reach(port, text)

    loose = guard(allow=[here])(ray.remote(num_cpus=0)(Loose))

    class Parent:
        def child(self, port: int, text: str) -> str:
            return ray.get(loose.remote().reach.remote(port, text))

    assert ray.get(loose.remote().reach.remote(sink.port, "on its own")) == "sent"
    assert sink.saw("on its own")
    assert (
        ray.get(guard(allow=[])(ray.remote(num_cpus=0)(Parent)).remote().child.remote(sink.port, "x"))
        == "PermissionError"
    )
    assert sink.accepted == 1


def test_what_a_submitted_task_sends_is_charged_to_its_submitter(cluster: Any, sink: Any) -> None:
    part = "x" * 700_000
    actor = guard(allow=[f"127.0.0.1:{sink.port}"], egress_sent_bytes="1MiB")(
        ray.remote(num_cpus=0)(Submitter)
    ).remote()
    assert ray.get(actor.directly.remote(sink.port, "small")) == "sent"
    assert ray.get(actor.by_task.remote(sink.port, part)) == "sent"
    ray.get(actor.by_task.remote(sink.port, part))  # passes the limit, and may be cut while it does
    deadline = time.monotonic() + 10
    while (answer := ray.get(actor.directly.remote(sink.port, "more"))) == "sent" and time.monotonic() < deadline:
        time.sleep(0.2)  # a flow is settled a moment after it has ended
    assert answer == "PermissionError"

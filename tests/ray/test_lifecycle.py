"""Restarts, detached actors, and workers that cannot be confined: nothing ever runs outside of its policy."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_guard import NotEnforced, guard
from ray_guard.actors import documents
from ray_guard.policy import enforcement

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def reach(port: int, text: str) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(text.encode())
    except OSError as error:
        return type(error).__name__
    return "sent"


class Worker:
    def __init__(self, argument: Any = None) -> None:
        self.argument = argument

    def reach(self, port: int, text: str) -> str:
        return reach(port, text)

    def pid(self) -> int:
        return os.getpid()

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def die(self) -> None:
        os._exit(1)


class Traced:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (self.path,)


def touch(path: str) -> str:
    Path(path).touch()
    return path


def test_a_restarted_actor_is_confined_again(sink: Any) -> None:
    actor = guard(allow=[])(ray.remote(num_cpus=0, max_restarts=1, max_task_retries=2)(Worker)).remote()
    first = ray.get(actor.pid.remote())
    assert ray.get(actor.reach.remote(sink.port, "before")) == "PermissionError"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.die.options(max_task_retries=0).remote())
    assert ray.get(actor.pid.remote()) != first
    assert ray.get(actor.reach.remote(sink.port, "after")) == "PermissionError"
    assert reach(sink.port, "control") == "sent"
    assert sink.saw("control")
    assert sink.accepted == 1


def test_a_detached_actor_is_confined_for_whoever_finds_it(sink: Any) -> None:
    guarded = guard(allow=[])(ray.remote(num_cpus=0)(Worker))
    guarded.options(name="found", lifetime="detached", get_if_exists=True).remote()
    found = ray.get_actor("found")
    try:
        assert ray.get(found.reach.remote(sink.port, "detached")) == "PermissionError"
        assert not sink.saw("detached", within=0.2)
    finally:
        ray.kill(found)


def test_a_worker_without_its_policy_refuses_all_work(sink: Any, tmp_path: Path) -> None:
    unknown = {"env_vars": {"RAY_GUARD_POLICY_ID": "0" * 64, "RAY_GUARD_REGISTRY_WAIT": "0.1"}}
    mark = str(tmp_path / "unpickled")
    guarded = guard(allow=[f"127.0.0.1:{sink.port}"])(ray.remote(num_cpus=0)(Worker))

    @guard(allow=[f"127.0.0.1:{sink.port}"])
    @ray.remote(num_cpus=0)
    def work(argument: Any) -> str:
        return reach(sink_port, "task")

    sink_port = sink.port
    assert ray.get(work.remote(Traced(mark))) == "sent"
    assert sink.saw("task")
    os.unlink(mark)
    actor = guarded.options(runtime_env=unknown).remote(Traced(mark))
    with pytest.raises(ray.exceptions.ActorDiedError, match="the job's registry has no policy 000"):
        ray.get(actor.reach.remote(sink.port, "actor"))
    with pytest.raises(NotEnforced, match="the job's registry has no policy 000"):
        ray.get(work.options(runtime_env=unknown).remote(Traced(mark)))
    assert not os.path.exists(mark), "arguments were unpickled in a worker that is not confined"
    assert sink.accepted == 1


def test_a_policy_that_cannot_be_held_is_refused_by_name(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # This version holds every key: a driver of one that does not yet.
    monkeypatch.setattr(
        documents, "unenforced", lambda wire: enforcement.unenforced(wire, enforcement.SUPPORTED - {"model_endpoint"})
    )
    asks_too_much = guard(allow=[], model_endpoint="127.0.0.1:8000")(ray.remote(num_cpus=0)(Worker))
    with pytest.raises(NotEnforced, match="not enforced: model_endpoint"):
        asks_too_much.remote()
    # A report-only policy enforces nothing that it could fail to.
    reports = guard(allow=[], model_endpoint="127.0.0.1:8000", mode="report")(ray.remote(num_cpus=0)(Worker)).remote()
    assert ray.get(reports.pid.remote()) > 0


def test_a_guarded_class_cannot_be_built_where_nothing_guards_it(cluster: Any) -> None:
    plain = guard(allow=[])(type("Plain", (Worker,), {}))
    with pytest.raises(NotEnforced, match="Plain is guarded, and this process is not confined"):
        plain()

    class Later(plain):  # type: ignore[misc, valid-type]
        def __init__(self) -> None: ...

    with pytest.raises(NotEnforced, match="Later is guarded"):
        Later()

    @ray.remote(num_cpus=0)
    def build() -> str:
        try:
            plain()
        except NotEnforced as error:
            return str(error)
        return "built"

    assert "is guarded, and this process is not confined" in ray.get(build.remote())

    @guard(allow=[])
    def function() -> int:
        return 1

    with pytest.raises(NotEnforced, match="function is guarded"):
        function()


def test_an_actor_that_was_submitted_around_the_hook_is_confined_in_its_constructor(sink: Any) -> None:
    """As by a driver whose Ray was not told of the guard: the class alone knows."""
    from ray_guard.actors import internals

    actor_class = guard(allow=[])(ray.remote(num_cpus=0)(type("Around", (Worker,), {})))
    submit = internals.CREATE_ACTOR
    wrapped = submit.owner._remote
    submit.owner._remote = wrapped.__wrapped__
    try:
        actor = actor_class.remote()
        assert ray.get(actor.reach.remote(sink.port, "around")) == "PermissionError"
        assert ray.get(actor.variable.remote("RAY_GUARD_POLICY_ID")) is None, "the hook was there after all"
    finally:
        submit.owner._remote = wrapped
    assert not sink.saw("around", within=0.2)


def test_a_report_only_policy_blocks_nothing(sink: Any) -> None:
    watched = guard(allow=[], mode="report")(ray.remote(num_cpus=0)(Worker)).remote()
    assert ray.get(watched.reach.remote(sink.port, "report")) == "sent"
    assert sink.saw("report")


def test_the_end_of_an_actor_is_prompt(cluster: Any) -> None:
    actor = guard(allow=[])(ray.remote(num_cpus=0)(Worker)).remote()
    pid = ray.get(actor.pid.remote())
    ray.kill(actor)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""CONTRACT.md section 4, sentence by sentence: a real job's spans as a strict OTLP receiver takes them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))

from otlp import Traces, by_http, plain

from ray_guard import chat, episode, guard, iteration, run, tool, turn
from ray_guard.client.spans import arguments_digest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("told", "cluster")]

JOB = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ROLL = "00-1bf7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"
INTERNAL, CLIENT = 1, 3
EVERYWHERE = {
    "rl.run.id": "run-of-the-model",
    "rl.iteration": 3,
    "rl.rollout.id": "r1",
    "rl.group.id": "g1",
    "rl.policy.version": "v7",
}
SECRET = "hunter2"


@pytest.fixture(scope="module")
def told() -> Iterator[Traces]:
    """What the forwarder of this module's supervisor has sent. The whole job stands below a span of others."""
    received = Traces()
    before = dict(os.environ)
    with by_http(received) as endpoint:
        os.environ.update(
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            OTEL_METRICS_EXPORTER="none",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=lab",
            OTEL_SERVICE_NAME="trainer",
            TRACEPARENT=JOB,
            RAY_GUARD_RUN_ID="run-of-the-model",
        )
        yield received
    os.environ.clear()
    os.environ.update(before)


class DataProto:
    """What ROLL's workers are handed, as far as its context goes."""

    def __init__(self, meta_info: dict[str, Any]) -> None:
        self.meta_info = meta_info


class Env:
    @tool
    def bash(self, command: str) -> str:
        return str(run(["bash", "-c", command], capture_output=True, text=True).stdout)

    @tool
    async def later(self, password: str) -> None:
        await asyncio.sleep(0.05)

    @tool
    def stream(self, count: int) -> Iterator[int]:
        for n in range(count):
            time.sleep(0.05)
            yield n

    @tool
    async def astream(self, count: int) -> AsyncIterator[int]:
        for n in range(count):
            await asyncio.sleep(0.05)
            yield n

    @tool(name="endless")
    async def endless(self) -> None:
        await asyncio.sleep(600)

    @tool(name="lone")
    def lone(self) -> None: ...

    async def rollout(self, port: int) -> str:
        with episode(id="r1", group="g1", policy_version="v7", agent="coder") as scope:
            with turn(4):
                with chat("qwen3") as asked:
                    asked.usage(10, 5)
                said = self.bash(
                    f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; echo $TRACEPARENT; "
                    "(exec 4<>/dev/tcp/127.0.0.1/9) 2>/dev/null; exit 3"
                )
                await self.later(SECRET)
                assert list(self.stream(3)) == [0, 1, 2]
                assert [n async for n in self.astream(3)] == [0, 1, 2]
            scope.reward(0.5)
        return said

    async def outside(self) -> None:
        self.lone()

    async def step(self, data: DataProto) -> None:
        self.lone()

    async def wait(self) -> None:
        with episode(id="killed"), turn(1):
            await self.endless()


class Told:
    """The spans that arrived, by name."""

    def __init__(self, received: Traces) -> None:
        self.all = [(about, span, plain(span.attributes)) for about, _, span in received.spans]
        self.ids = {(span.trace_id, span.span_id): (about, span, found) for about, span, found in self.all}

    def named(self, name: str, **wanted: object) -> list[tuple[dict[str, Any], Any, dict[str, Any]]]:
        return [each for each in self.all if each[1].name == name and wanted.items() <= each[2].items()]

    def one(self, name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        (found,) = self.named(name)
        return found

    def parent(self, span: Any) -> Any:
        return self.ids[span.trace_id, span.parent_span_id][1]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Takes connections, and what is sent over them."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as peer:
                    peer.recv(64)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def job(told: Traces, cluster: Any, port: int) -> tuple[Told, str]:
    """One rollout, a call outside of any, one from ROLL, and an actor that is killed within a call."""
    policy: Any = guard(allow=[f"127.0.0.1:{port}"])
    guarded = policy(ray.remote(num_cpus=0)(Env))
    env, victim = guarded.options(name="env-0").remote(), guarded.options(name="victim").remote()
    with iteration(3):
        said = ray.get(env.rollout.remote(port))
    # From no scope: the driver's own spans stand below the job's, and so do these calls.
    ray.get(env.outside.remote())
    ray.get(env.step.remote(DataProto({"_otel_ctx": {"traceparent": ROLL}})))
    pending = victim.wait.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(pending, timeout=1)
    ray.kill(victim)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pending)
    names = {"rl.iteration", "invoke_agent coder", "execute_tool lone", "execute_tool endless", "invoke_agent agent"}
    told.wait(lambda r: {span.name for _, _, span in r.spans} >= names, 60)
    assert not told.errors
    return Told(told), said


def test_one_trace_per_rollout_and_the_iteration_is_its_own(job: tuple[Told, str]) -> None:
    spans, _ = job
    _, rollout, about = spans.one("invoke_agent coder")
    _, step, of_step = spans.one("rl.iteration")
    assert not rollout.parent_span_id
    assert not step.parent_span_id
    assert rollout.trace_id != step.trace_id
    assert (step.trace_id, step.span_id) in {(link.trace_id, link.span_id) for link in rollout.links}
    assert of_step["rl.iteration"] == 3
    inside = [each for each in spans.all if each[1].trace_id == rollout.trace_id]
    assert {span.span_id for _, span, _ in inside if not span.parent_span_id} == {rollout.span_id}
    for _, span, found in inside:
        assert EVERYWHERE.items() <= found.items(), f"{span.name} lacks identity"
        assert not span.parent_span_id or (span.trace_id, span.parent_span_id) in spans.ids, f"{span.name} is an orphan"
    assert about["gen_ai.operation.name"] == "invoke_agent"
    assert about["rl.reward.score"] == 0.5
    assert about["ray_guard.violation_count"] == 1


def test_each_row_of_the_table(job: tuple[Told, str], port: int) -> None:
    spans, _ = job
    rows: list[tuple[str, int, str, set[str]]] = [
        ("rl.turn", INTERNAL, "invoke_agent coder", {"rl.turn"}),
        (
            "chat qwen3",
            CLIENT,
            "rl.turn",
            {"gen_ai.request.model", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"},
        ),
        *(
            (
                f"execute_tool {name}",
                INTERNAL,
                "rl.turn",
                {"gen_ai.operation.name", "gen_ai.tool.name", "gen_ai.tool.call.id", "ray_guard.arguments.sha256"},
            )
            for name in ("bash", "later", "stream", "astream")
        ),
        (
            "process bash",
            INTERNAL,
            "execute_tool bash",
            {"process.pid", "process.parent_pid", "process.executable.path", "process.command_args"},
        ),
        (
            "egress connect",
            CLIENT,
            "process bash",
            {
                "network.transport",
                "network.peer.address",
                "network.peer.port",
                "server.address",
                "ray_guard.egress.decision",
                "ray_guard.egress.reason",
                "ray_guard.egress.scope",
            },
        ),
        ("ray_guard.violation", INTERNAL, "egress connect", {"ray_guard.violation.kind", "error.type"}),
    ]
    _, rollout, _ = spans.one("invoke_agent coder")
    for name, kind, parent, attributes in rows:
        found = [each for each in spans.named(name) if each[1].trace_id == rollout.trace_id]
        assert found, name
        for _, span, about in found:
            assert span.kind == kind, name
            assert spans.parent(span).name == parent, name
            assert attributes <= set(about), f"{name} lacks {attributes - set(about)}"
            assert about["rl.turn"] == 4
    _, _, about = spans.one("chat qwen3")
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (10, 5)
    (_, _, granted), *more = spans.named("egress connect", **{"ray_guard.egress.decision": "allow", "rl.turn": 4})
    assert not more
    assert granted["network.peer.port"] == port
    assert granted["ray_guard.egress.bytes_sent"] == len("hello\n")
    assert {"network.local.address", "network.local.port", "ray_guard.egress.bytes_received"} <= set(granted)
    assert granted["ray_guard.egress.scope"] == "exact"
    first = min((each for each in spans.named("process bash")), key=lambda each: each[1].start_time_unix_nano)
    assert first[2]["process.exit.code"] == 3


def test_the_four_kinds_of_function_last_as_long_as_they_run(job: tuple[Told, str]) -> None:
    spans, _ = job
    for name, least in (("later", 0.03), ("stream", 0.1), ("astream", 0.1)):
        _, span, _ = spans.one(f"execute_tool {name}")
        assert span.end_time_unix_nano - span.start_time_unix_nano >= least * 1e9
    now = time.time_ns()
    for _, span, _ in spans.all:
        assert now - 600 * 10**9 < span.start_time_unix_nano <= span.end_time_unix_nano <= now, "Unix nanoseconds"


def test_a_violation_stands_thrice(job: tuple[Told, str]) -> None:
    spans, _ = job
    ((_, span, about),) = [
        each for each in spans.named("egress connect", **{"ray_guard.egress.decision": "deny"}) if "rl.turn" in each[2]
    ]
    assert span.status.code == 2
    assert about["ray_guard.violation.kind"] == "egress"
    ((name, details),) = [(event.name, plain(event.attributes)) for event in span.events]
    assert name == "ray_guard.violation"
    assert details["ray_guard.violation.destination"] == "tcp://127.0.0.1:9"
    ((_, child, told),) = [
        each for each in spans.named("ray_guard.violation") if each[1].parent_span_id == span.span_id
    ]
    assert child.start_time_unix_nano == child.end_time_unix_nano
    assert child.status.code == 2
    assert (told["ray_guard.violation.kind"], told["error.type"]) == ("egress", "not_listed")


def test_resource(job: tuple[Told, str], cluster: Any) -> None:
    spans, _ = job
    about, _, _ = spans.one("execute_tool bash")
    assert about["service.name"] == "trainer"
    assert about["host.name"] == socket.gethostname()
    own = {address for address in about["host.ip"] if address != "::1" and not address.startswith("127.")}
    assert own == set(about["host.ip"]) or not own, "loopback is no address of a host, but where it is all there is"
    assert about["host.ip"]
    assert about["ray.actor_name"] == "env-0"
    assert re.fullmatch(r"[0-9a-f]{32}", about["ray.actor_id"])
    assert re.fullmatch(r"[0-9a-f]{8}", about["ray.job_id"])
    assert re.fullmatch(r"[0-9a-f]{56}", about["ray.node_id"])
    assert about["rl.run.id"] == "run-of-the-model"
    assert about["deployment.environment.name"] == "lab"


def test_who_says_so_is_on_every_span_and_ids_are_in_no_name(job: tuple[Told, str]) -> None:
    spans, _ = job
    for _, span, about in spans.all:
        proof = span.name in ("egress connect", "ray_guard.violation") or span.name.startswith("process ")
        assert about["ray_guard.source"] == ("supervisor" if proof else "target")
        assert not re.search(r"[0-9a-f]{16}|r1|g1|\bcall_|\d{4}", span.name)


def test_a_dead_actors_spans_are_closed_by_the_supervisor(job: tuple[Told, str]) -> None:
    spans, _ = job
    for name in ("execute_tool endless", "rl.turn", "invoke_agent agent"):
        found = [each for each in spans.named(name) if each[2].get("rl.rollout.id") == "killed"]
        assert len(found) == 1, name
        _, span, about = found[0]
        assert about["ray_guard.ended_by"] == "supervisor"
        assert span.status.code == 2


def test_content_is_off_unless_asked_for(job: tuple[Told, str]) -> None:
    spans, _ = job
    _, _, about = spans.one("execute_tool later")
    assert about["ray_guard.arguments.sha256"] == arguments_digest({"password": SECRET})
    for _, span, found in spans.all:
        assert SECRET not in str(span)
        assert not any(key.startswith(("gen_ai.tool.call.arguments", "gen_ai.tool.call.result")) for key in found)


def test_the_jobs_own_parent_rolls_and_the_tools(job: tuple[Told, str]) -> None:
    spans, said = job
    _, bash, _ = spans.one("execute_tool bash")
    version, trace, span, flags = said.strip().split("-")
    assert (version, flags) == ("00", "01")
    assert (trace, span) == (bash.trace_id.hex(), bash.span_id.hex()), "a tool is told its call"
    _, step, _ = spans.one("rl.iteration")
    assert (JOB[3:35], JOB[36:52]) in {(link.trace_id.hex(), link.span_id.hex()) for link in step.links}
    lone = {(span.trace_id.hex(), span.parent_span_id.hex()) for _, span, _ in spans.named("execute_tool lone")}
    assert lone == {(JOB[3:35], JOB[36:52]), (ROLL[3:35], ROLL[36:52])}

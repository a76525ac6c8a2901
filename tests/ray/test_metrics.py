"""Metrics by ``ray.util.metrics``: what Ray's own agent serves to Prometheus about a guarded job."""

from __future__ import annotations

import re
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

import ray_guard
from ray_guard.actors.metrics import export_metrics
from ray_guard.evidence.otlp import encode
from ray_guard.records import Resource, SpanKind, SpanRecord

pytestmark = pytest.mark.ray


@ray_guard.guard({"version": 1, "egress": {"allow": ["cluster"]}})
@ray.remote
class Worker:
    def attempt(self, port: int) -> int:
        with ray_guard.tool_call("attempt", {"port": port}), socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port))


def another_job(folder: Path) -> None:
    """Its denials, in the same folder: those of a cluster's jobs lie together."""
    about = {"ray_guard.source": "supervisor", "rl.run.id": "another", "network.transport": "tcp"}
    refused = {"ray_guard.egress.decision": "deny", "ray_guard.egress.reason": "not_listed"}
    span = SpanRecord("1" * 32, "2" * 16, None, "egress connect", SpanKind.CLIENT, 1, 2, {**about, **refused})
    (folder / "another-000001.otlp.jsonl").write_bytes(encode(span, Resource({})) * 5)


def test_a_denial_is_scraped_from_the_node(cluster: Any, evidence: Path, sink: Any) -> None:
    another_job(evidence)
    with socket.create_connection(("127.0.0.1", sink.port)):
        pass  # unconfined it is reached
    meters = export_metrics()
    assert len(meters) == 1
    assert export_metrics()[0] == meters[0]  # not a second one
    worker = Worker.remote()
    assert ray.get(worker.attempt.remote(sink.port), timeout=120) == 13
    (node,) = ray.nodes()
    denials = r"ray_ray_guard_egress_denials_total\{[^}]*ray_guard_egress_reason=\"not_listed\"[^}]*\} 1\.0"
    tools = r"ray_gen_ai_execute_tool_duration_count\{[^}]*gen_ai_tool_name=\"attempt\"[^}]*\} 1\.0"
    served = _scraped(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", denials, tools)
    assert str(sink.port) not in "".join(line for line in served.splitlines() if "ray_guard_egress" in line)
    assert ray.get(meters[0].counted.remote(), timeout=60) > 0


def _scraped(url: str, *patterns: str) -> str:
    deadline = time.monotonic() + 60
    served = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                served = answer.read().decode()
        except OSError:
            pass  # the agent is still starting
        if all(re.search(pattern, served) for pattern in patterns):
            return served
        time.sleep(0.5)
    ours = [line for line in served.splitlines() if "ray_guard" in line or "gen_ai" in line]
    raise AssertionError(f"not all of {patterns} in {ours or served[:500]}")

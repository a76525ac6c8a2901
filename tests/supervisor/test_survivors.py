"""What a call leaves running: dead soon after its end, or kept, and then still that call's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, has_own_supervisors, host_in, wait

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]


class Sink:
    """A granted port that counts."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(10)
        self.port: int = self._server.getsockname()[1]

    def take(self) -> bytes:
        accepted, _ = self._server.accept()
        with accepted:
            accepted.settimeout(10)
            return accepted.recv(100)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def spans(host: Host, name: str) -> list[dict[str, Any]]:
    return [span for span in host.journal() if span["name"] == name]


SERVE = """
import socket, sys, time
port, mark = int(sys.argv[1]), sys.argv[2]
while True:
    try:
        open(mark)
        break
    except OSError: time.sleep(0.01)
burn = time.process_time() + 0.2
while time.process_time() < burn: pass
with socket.create_connection(('127.0.0.1', port)) as sock: sock.sendall(b'kept')
time.sleep(600)
"""


def survivor(mark: str) -> int:
    """The process that was left with ``mark`` in its arguments."""
    for name in os.listdir("/proc"):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes() if name.isdigit() else b""
        except OSError:
            continue
        if mark.encode() in arguments.split(b"\0"):
            return int(name)
    return 0


def leave(host: Host, sink: Sink, mark: Path) -> int:
    """A call that starts a server and returns; the server's pid."""
    began = time.monotonic()
    script = 'exec >/dev/null 2>&1; setsid -f "$0" -I -S -c "$1" "$2" "$3"; sleep 0.3'
    argv = ["sh", "-c", script, PYTHON, SERVE, str(sink.port), str(mark)]
    assert host.run("call", argv, tool="starts").status == 0
    assert time.monotonic() - began < 5
    return survivor(str(mark))


def test_a_kept_process_lives_on_and_is_still_its_calls(tmp_path: Path, namespace: Namespace, sink: Sink) -> None:
    policy = {"survivors": "keep", "egress": {"allow": [f"127.0.0.1:{sink.port}"]}}
    host = host_in(tmp_path, policy, namespace)
    try:
        pid = leave(host, sink, tmp_path / "mark")
        assert lives(pid)
        assert host.run("call", ["true"], tool="another").status == 0
        (call,) = spans(host, "execute_tool starts")
        assert call["ended"], "the call itself is over"
        (tmp_path / "mark").touch()
        assert sink.take() == b"kept"
        (flow,) = wait(lambda: spans(host, "egress connect"), "the flow is not recorded")
        (served,) = [s for s in host.journal() if s["attributes"].get("process.pid") == pid and "python" in s["name"]]
        assert flow["parent"] == served["id"]
        (first,) = [s for s in host.journal() if s["parent"] == call["id"]]
        assert first["ended"]
        assert first["attributes"]["process.exit.code"] == 0
    finally:
        host.close()  # its program ends
    wait(lambda: not lives(pid), "it outlived its program", 2.0)
    (first,) = wait(
        lambda: [s for s in host.journal() if s["attributes"].get("ray_guard.process.cpu_seconds", 0) > 0.15
                 and s["parent"] == call["id"]],
        "its CPU time is not the call's",
    )  # fmt: skip
    assert first["attributes"]["process.exit.code"] == 0


def test_limits_of_the_call_go_on_for_what_it_left(tmp_path: Path, namespace: Namespace, sink: Sink) -> None:
    limits = {"cpu_seconds": 0.15, "connections": 0}
    policy = {"survivors": "keep", "egress": {"allow": [f"127.0.0.1:{sink.port}"]}, "budgets": {"call": limits}}
    host = host_in(tmp_path, policy, namespace)
    try:
        pid = leave(host, sink, tmp_path / "mark")
        assert lives(pid)
        (tmp_path / "mark").touch()
        wait(lambda: not lives(pid), "it went on past the limit")
        (violation,) = wait(lambda: spans(host, "ray_guard.violation"), "no violation")
        assert violation["attributes"]["ray_guard.violation.kind"] == "cpu_seconds"
    finally:
        host.close()


def test_without_keep_it_ends_with_the_call(tmp_path: Path, namespace: Namespace, sink: Sink) -> None:
    host = host_in(tmp_path, {"egress": {"allow": [f"127.0.0.1:{sink.port}"]}}, namespace)
    try:
        leave(host, sink, tmp_path / "mark")
        assert survivor(str(tmp_path / "mark")) == 0
    finally:
        host.close()


def test_a_popen_that_is_left_is_kept_too(tmp_path: Path, namespace: Namespace) -> None:
    code = """
with ray_guard.tool_call('starts', {}):
    tool = ray_guard.Popen(['sleep', '600'])
result = tool.pid
"""
    host = host_in(tmp_path, {"survivors": "keep", "egress": {"allow": []}}, namespace)
    try:
        pid = host.inside(code)
        time.sleep(0.3)
        assert lives(pid)
        os.kill(pid, signal.SIGTERM)
        wait(lambda: not lives(pid), "it does not end")
    finally:
        host.close()


# ---------------------------------------------------------------------------------------------------------------------
# how soon everything is dead

SWARM = """
import os, time  # MARK
for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork(): os._exit(0)
            time.sleep(0.002)
time.sleep(0.3)
"""
LEFT = {
    "background": "sleep 1001 & sleep 0.2",
    "setsid": "setsid -f sleep 1001; sleep 0.2",
    "double fork": "(sleep 1001 &) ; sleep 0.2",
    "TERM-ignoring": "(trap '' TERM HUP INT; sleep 1001) & sleep 0.2",
    "stopped": "sleep 1001 & kill -STOP $!; sleep 0.2",
    "fifty": "for i in 1 2 3 4 5; do for j in 1 2 3 4 5 6 7 8 9 10; do sleep 1001 & done; done; sleep 0.3",
}


def marked(mark: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and lives(int(name)):
                found.append(int(name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("kind", [*LEFT, "swarm"])
def test_everything_is_dead_when_the_call_has_ended(tmp_path: Path, namespace: Namespace, kind: str) -> None:
    """The tool's end is told only when all it left is dead; how long that took is the time past its own exit."""
    host = host_in(tmp_path, {"egress": {"allow": []}}, namespace)
    mark = "sleep\0" + "1001" if kind != "swarm" else f"swarm-{os.getpid()}"
    argv = [PYTHON, "-I", "-S", "-c", SWARM.replace("MARK", mark)] if kind == "swarm" else ["sh", "-c", LEFT[kind]]
    wrapped = ["sh", "-c", 'exec >/dev/null 2>&1; "$@"; date +%s.%N > ' + str(tmp_path / "ended"), "sh", *argv]
    try:
        host.run("call", ["true"])
        took = []
        for _ in range(3):
            outcome = host.run("call", wrapped)
            over = time.time()
            assert outcome.status == 0
            assert marked(mark) == []
            took.append(1e3 * (over - float((tmp_path / "ended").read_text())))
        print(f"{kind}: all dead {min(took):.0f} to {max(took):.0f} ms after the tool's end")
        assert min(took) < 1000
    finally:
        host.close()

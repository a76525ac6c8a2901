"""A violation is a span of its own, an event on the span that offended, and that span's status and attributes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, grants, has_own_supervisors, wait

from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.records import SpanRecord, StatusCode

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]


@contextlib.contextmanager
def confined(folder: Path, **policy: Any) -> Iterator[Host]:
    namespace = Namespace()
    host = Host({"egress": {"allow": []}, "files": grants(folder), **policy}, folder / "evidence", namespace)
    try:
        yield host
    finally:
        host.close()
        namespace.close()


def python(program: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", program]


def check(folder: Path, offender: str, kind: str) -> SpanRecord:
    """The offending span; its violation of that kind is told three times."""

    def ended() -> list[SpanRecord]:
        spans = [entry.span for entry in merge(read([folder / "evidence"], Quarantine())).values()]
        return [] if any(span.end_ns is None and span.name.startswith(offender) for span in spans) else spans

    spans = wait(ended, "its end was not journaled")
    told = [each for each in spans if each.name == "ray_guard.violation"]
    told = [each for each in told if each.attributes["ray_guard.violation.kind"] == kind]
    (place,) = {(each.trace_id, each.parent_id) for each in told}
    (found,) = [each for each in spans if (each.trace_id, each.span_id) == place]
    assert found.name.startswith(offender)
    assert found.status is StatusCode.ERROR
    assert found.status_message
    assert "error.type" in found.attributes
    events = [each for each in found.events if each.name == "ray_guard.violation"]
    assert len(events) == len(told)
    for violation, event in zip(sorted(told, key=lambda each: each.start_ns), events, strict=True):
        assert violation.start_ns == violation.end_ns == event.time_ns
        assert violation.status is StatusCode.ERROR
        assert event.attributes.items() <= violation.attributes.items()
    for key in ("ray_guard.violation.kind", "ray_guard.violation.limit", "ray_guard.violation.value"):
        assert found.attributes.get(key) == events[0].attributes.get(key)
    return found


def test_a_destination_that_is_refused(tmp_path: Path) -> None:
    with confined(tmp_path) as host:
        host.run("call", python("import socket; socket.socket().connect_ex(('127.0.0.1', 9))"))
    assert check(tmp_path, "egress connect", "egress").attributes["error.type"] == "EACCES"


def test_a_port_that_may_not_be_listened_on(tmp_path: Path) -> None:
    """No span of its own: the process has offended."""
    with confined(tmp_path) as host:
        host.run("call", python("import socket\ntry: socket.create_server(('127.0.0.1', 4711))\nexcept OSError: pass"))
    check(tmp_path, "process", "bind")


@pytest.mark.parametrize(
    ("budget", "program", "kind"),
    [
        ({"wall_seconds": 1}, "import time; time.sleep(30)", "wall_seconds"),
        ({"cpu_seconds": 0.5}, "while True: pass", "cpu_seconds"),
    ],
)
def test_a_limit_that_ends_a_call(tmp_path: Path, budget: dict[str, float], program: str, kind: str) -> None:
    with confined(tmp_path, budgets={"call": budget}) as host:
        host.run("call", python(program))
    check(tmp_path, "process", kind)


@pytest.mark.parametrize("relayed", [True, False], ids=["exact", "direct"])
def test_a_byte_limit_that_cuts_a_connection(tmp_path: Path, relayed: bool) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as peer:
                    while peer.recv(1 << 16):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        scope = "call" if relayed else "actor"
        policy = {"egress": {"allow": [f"127.0.0.1:{port}"]}, "budgets": {scope: {"egress_bytes": 100_000}}}
        send = f"""
import socket
with socket.create_connection(('127.0.0.1', {port})) as sock:
    try:
        for _ in range(10_000): sock.sendall(b'x' * 4096)
    except OSError: pass
"""
        with confined(tmp_path, **policy) as host:
            host.run("call", python(send))
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    found = check(tmp_path, "egress connect", "egress_bytes")
    assert found.status_message == "cut: a budget was reached"
    assert found.attributes["error.type"] == "budget"


def test_an_episode_whose_limit_is_reached_and_which_counts_them(tmp_path: Path) -> None:
    code = """
from ray_guard import BudgetExceeded, chat, episode
with episode(budget={'tokens': 10}) as scope:
    with chat('m') as asked: asked.usage(20, 5)
    try:
        with chat('m'): pass
    except BudgetExceeded: pass
result = None
"""
    with confined(tmp_path) as host:
        host.inside(code)
    found = check(tmp_path, "invoke_agent", "tokens")
    assert found.attributes["ray_guard.violation_count"] == len(found.events) == 2, (
        "what the first used beyond it, and the second that was refused"
    )

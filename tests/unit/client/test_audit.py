"""The hook cannot be taken off again, so each of these has an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PRELUDE = """
import asyncio, json, socket, sys, threading
from concurrent.futures import ThreadPoolExecutor
from ray_guard.client import audit, carry, channel, scope
from ray_guard.testing import RecordingChannel

wire = RecordingChannel()
channel.current = lambda: wire
added = []
real = sys.addaudithook
sys.addaudithook = lambda hook: (added.append(hook), real(hook))
audit.install_audit()
audit.install_audit()
carry.install_carriers()
sink = socket.create_server(("127.0.0.1", 0))
address = sink.getsockname()
"""


def run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_connection_is_announced_by_the_thread_that_makes_it() -> None:
    intents, spans, tids, hooks = run("""
def go():
    with socket.socket() as s:
        s.connect(address)
    with socket.socket() as s:
        s.connect_ex(address)
    return threading.get_native_id()
with ThreadPoolExecutor(1) as pool, scope.episode(), scope.turn(1):
    with scope.tool_call("a") as a:
        t1 = go()
    with scope.tool_call("b") as b:
        t2 = pool.submit(go).result()
        with scope.chat("m"):
            go()
print(json.dumps([wire.sent("intent"), [a.span, b.span], [t1, t2], len(added)]))
""")
    assert [(m["span"], m["tid"]) for m in intents] == [
        (spans[0], tids[0]),
        (spans[0], tids[0]),
        (spans[1], tids[1]),
        (spans[1], tids[1]),
        (spans[1], tids[0]),
        (spans[1], tids[0]),
    ], "a model call within a tool is the tool's"
    assert {m["event"] for m in intents} == {"socket.connect"}
    assert all(m["fd"] > 2 for m in intents)
    assert hooks == 1


def test_outside_of_any_scope_nothing_is_said() -> None:
    outside, in_episode, span = run("""
def go():
    with socket.socket() as s:
        s.connect(address)
go()
outside = len(wire.sent("intent"))
with scope.episode() as e, scope.turn(1) as t:
    go()
go()
print(json.dumps([outside, wire.sent("intent"), t.span]))
""")
    assert outside == 0
    assert [m["span"] for m in in_episode] == [span], "outside of a call it is the innermost scope's"


def test_every_event_that_sends_somewhere_is_announced_and_none_that_does_not() -> None:
    events = run("""
with scope.tool_call("x"):
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        s.sendto(b"x", s.getsockname())
        s.sendmsg([b"x"], [], 0, s.getsockname())
        s.connect(s.getsockname())
        s.sendmsg([b"x"])                       # connected: decided already
        s.send(b"x")
    socket.getaddrinfo("127.0.0.1", 80)
    id(object()); import decimal; open("/dev/null").close()
print(json.dumps([m["event"] for m in wire.sent("intent")]))
""")
    assert events == ["socket.bind", "socket.sendto", "socket.sendmsg", "socket.connect", "socket.getaddrinfo"]


def test_tasks_of_one_thread_announce_their_own_call() -> None:
    intents, spans = run("""
async def go(n):
    with scope.tool_call(f"t{n}") as call:
        await asyncio.sleep(0.01)
        r, w = await asyncio.open_connection(*address)
        w.close()
        return call.span
async def main():
    return await asyncio.gather(*(go(n) for n in range(5)))
spans = asyncio.run(main())
print(json.dumps([[m["span"] for m in wire.sent("intent", event="socket.connect")], spans]))
""")
    assert sorted(intents) == sorted(spans)
    assert len(set(spans)) == 5


def test_a_hook_that_fails_forbids_nothing() -> None:
    connected, warned = run("""
import logging
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("ray_guard").addHandler(Keep())
with scope.tool_call("x"):
    wire.lost = True
    for _ in range(3):
        with socket.socket() as s:
            s.connect(address)
    connected = 1
    wire.lost = False
print(json.dumps([connected, records]))
""")
    assert connected == 1
    assert len(warned) == 1


def test_sending_the_intent_is_not_announced_itself() -> None:
    sent = run("""
class Chatty(RecordingChannel):
    def send_packet(self, packet):
        with socket.socket(type=socket.SOCK_DGRAM) as s:
            s.sendto(b"x", address)
        super().send_packet(packet)
wire = Chatty()
with scope.tool_call("x"):
    wire.messages.clear()
    with socket.socket() as s:
        s.connect(address)
    sent = [m["event"] for m in wire.sent("intent")]
print(json.dumps(sent))
""")
    assert sent == ["socket.connect"]

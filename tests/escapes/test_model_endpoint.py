"""The model endpoint as a way out: to the rest of the engine, by its port or by what is smuggled to it.

Judged by the engine's server, which does whatever reaches it: none of the confined attacks may get there.
"""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace

sys.path.insert(0, str(Path(__file__).parents[1] / "supervisor"))

from model_server import MODEL, ModelServer

pytestmark = pytest.mark.kernel

_PRELUDE = """
import json, socket, struct, sys, time
PORT, TOKEN, MODEL = int(sys.argv[1]), sys.argv[2], sys.argv[3]
CALL = json.dumps({"model": MODEL, "messages": [], "max_tokens": 1})
def head(start, *more, host=None): return "\\r\\n".join([start, f"Host: {host or f'127.0.0.1:{PORT}'}", *more, "", ""])
def call(*more, body=CALL): return head("POST /v1/chat/completions HTTP/1.1", *more) + body
def evil(*more, path="/update_weights", method="POST"):
    return head(f"{method} {path} HTTP/1.1", f"X-Token: {TOKEN}", "Content-Length: 0", "Connection: close", *more)
def say(data, address=("127.0.0.1", PORT), family=socket.AF_INET, parts=1, pause=0.0):
    with socket.socket(family) as sock:
        sock.settimeout(0.7)
        sock.connect(address)
        data = data.encode("latin-1")
        size = -(-len(data) // parts)
        try:
            for at in range(0, len(data), size):
                sock.sendall(data[at : at + size])
                time.sleep(pause)
            while sock.recv(65536): pass
        except OSError: pass
LENGTH = f"Content-Length: {len(CALL)}"
"""


@dataclass(frozen=True)
class Attack:
    """``proves``: it reaches the server unconfined; else the server of these tests is too strict for it, others are not."""

    name: str
    program: str
    proves: bool = True


PORT = [
    Attack("its port", "say(evil())"),
    Attack("its port, IPv4-mapped", "say(evil(), ('::ffff:127.0.0.1', PORT), socket.AF_INET6)"),
    Attack("its port, by 0.0.0.0", "say(evil(), ('0.0.0.0', PORT))"),
    Attack("its port, at another loopback address", "say(evil(), ('127.8.9.10', PORT))"),
    Attack("its port, bound to an address first", "s = socket.socket(); s.bind(('127.0.0.3', 0)); s.connect(('127.0.0.1', PORT)); s.sendall(evil().encode()); s.settimeout(2); s.recv(99)"),
    Attack(
        "MSG_FASTOPEN",
        "with socket.socket() as s: s.sendto(evil().encode(), 0x20000000, ('127.0.0.1', PORT)); s.settimeout(2); s.recv(99)",
    ),
    Attack(
        "half of a connection closed",
        "s = socket.create_connection(('127.0.0.1', PORT)); s.sendall(evil().encode()); s.shutdown(1); s.recv(99)",
    ),
    Attack("byte by byte", "say(evil(), parts=400)"),
    Attack("AF_UNSPEC, then again", """
s = socket.create_connection(("127.0.0.1", PORT))
import ctypes
ctypes.CDLL(None).connect(s.fileno(), struct.pack("=H", 0) + bytes(14), 16)
s.connect(("127.0.0.1", PORT))
s.sendall(evil().encode()); s.settimeout(2); s.recv(99)
"""),
]  # fmt: skip
SMUGGLED = [
    Attack("behind a call", "say(call(LENGTH) + evil())"),
    Attack("behind a call, later", "say(call(LENGTH) + evil(), parts=2, pause=0.3)"),
    Attack("behind two", "say(call(LENGTH) * 2 + evil())"),
    Attack("before a call", "say(evil().replace('Connection: close', 'A: b') + call(LENGTH))"),
    Attack("length and chunks", "say(call('Content-Length: 0', 'Transfer-Encoding: chunked', body='') + evil())"),
    Attack("chunks alone", "say(call('Transfer-Encoding: chunked', body='0\\r\\n\\r\\n') + evil())", proves=False),
    Attack("a chunk's extension", "say(call('Transfer-Encoding: chunked', body='0;a=\\n\\r\\n\\r\\n') + evil())", proves=False),
    Attack("a folded length", "say(call('X: a', ' Content-Length: 9', 'Content-Length: 0', body='') + evil())"),
    Attack("a length of its own spelling", "say(call('Content-Length : 0', LENGTH, body='') + evil())", proves=False),
    Attack("bare line feeds", "say(evil().replace('\\r\\n', '\\n'))"),
    Attack("a line feed within a header", "say(call('A: b\\n\\n' + evil(), 'Content-Length: 0', body=''))"),
    Attack("an absolute form", "say(evil(path=f'http://127.0.0.1:{PORT}/update_weights'))", proves=False),
    Attack("dots", "say(evil(path='/v1/completions/../../update_weights'))", proves=False),
    Attack("percent", "say(evil(path='/%75pdate_weights'))", proves=False),
    Attack("slashes", "say(evil(path='//update_weights'))"),
    Attack("a query", "say(evil(path='/update_weights?/v1/completions'))", proves=False),
    Attack("a fragment", "say(evil(path='/update_weights#/v1/completions'))", proves=False),
    Attack("another method", "say(evil(method='PATCH'))", proves=False),
    Attack("HTTP/1.0", "say(evil().replace('HTTP/1.1', 'HTTP/1.0'))"),
    Attack("HTTP/0.9", "say(f'GET /update_weights?{TOKEN}\\r\\n')", proves=False),
    Attack("an upgrade", "say(call('Upgrade: h2c', 'Connection: Upgrade', LENGTH) + evil())"),
    Attack("HTTP/2", "say('PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + evil())", proves=False),
    Attack("CONNECT", "say(head('CONNECT 127.0.0.1:1 HTTP/1.1') + evil())", proves=False),
    Attack("within a key", "say(call(f'Authorization: Bearer a\\r{evil()}', 'Content-Length: 0', body=''))", proves=False),
    Attack("within a model's name", """
body = json.dumps({"model": MODEL + "\\r\\n\\r\\n" + evil(), "messages": []})
say(call(f"Content-Length: {len(body)}", body=body))
""", proves=False),
]  # fmt: skip


class Stage:
    def __init__(self, folder: Path) -> None:
        self.server = ModelServer("0.0.0.0")
        self.namespace = Namespace()
        policy = {"model_endpoint": f"127.0.0.1:{self.server.port}", "egress": {"allow": ["0.0.0.0/0:*", "[::]/0:*"]}}
        self.host = Host(policy, folder / "evidence", self.namespace)

    def reached(self, token: str) -> list[Any]:
        return [seen for seen in self.server.seen if token in json.dumps(seen)]

    def argv(self, attack: Attack, token: str) -> list[str]:
        return [PYTHON, "-I", "-S", "-c", _PRELUDE + attack.program, str(self.server.port), token, MODEL]

    def close(self) -> None:
        self.host.close()
        self.namespace.close()
        self.server.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.closing(Stage(tmp_path_factory.mktemp("model_endpoint"))) as made:
        yield made


@pytest.mark.parametrize("attack", [pytest.param(each, id=each.name) for each in (*PORT, *SMUGGLED)])
def test_the_rest_of_the_engine_stays_out_of_reach(stage: Stage, attack: Attack) -> None:
    """Everything is listed in ``allow``, and still."""
    if attack.proves:
        token = secrets.token_hex(8)
        argv = [*stage.namespace.prefix, *stage.argv(attack, token)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        assert stage.reached(token), f"the attack does not even work: {done.stderr}"
    for ring in ("call", "actor"):
        token = secrets.token_hex(8)
        outcome = stage.host.run(ring, stage.argv(attack, token))
        assert not stage.reached(token), f"ESCAPED from the {ring} ring: {outcome}"

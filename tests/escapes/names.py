"""The stage on which names are tried: a name server, a rogue one, a sink, and hosts whose resolv.conf is ours."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PRELUDE, PYTHON, ROOT, Host, Namespace, Outcome
from nameserver import NameServer, use

UPSTREAM, ROGUE = "127.77.0.53", "127.77.0.66"

DNS = r"""
import struct
def labels(name):
    if isinstance(name, str): name = name.encode()
    return b"".join(bytes([len(part)]) + part for part in name.split(b".") if part) + b"\0"
def query(name, kind=1, number=0x1234, cls=1, raw=None):
    return struct.pack(">6H", number, 0x100, 1, 0, 0, 0) + (raw or labels(name)) + struct.pack(">HH", kind, cls)
def told(reply):
    "rcode, then the addresses: the question is as long as it was asked"
    count, rcode = struct.unpack(">H", reply[6:8])[0], reply[3] & 15
    at = 12
    while reply[at]: at += 1 + reply[at]
    at += 5
    found = []
    for _ in range(count):
        at += 2 if reply[at] & 0xC0 else len(labels(""))
        kind, _, ttl, size = struct.unpack(">HHIH", reply[at : at + 10])
        at += 10
        found.append(socket.inet_ntop(AF_INET if kind == 1 else AF_INET6, reply[at : at + size]))
        at += size
    return [rcode, found]
def datagram(server, message, family=AF_INET, connected=True):
    with socket.socket(family, DGRAM) as sock:
        sock.settimeout(A.get('patience', 3))
        if connected:
            sock.connect((server, 53))
            sock.send(message)
        else:
            sock.sendto(message, (server, 53))
        return sock.recv(4096)
def stream(server, message):
    with socket.create_connection((server, 53), A.get('patience', 3)) as sock:
        sock.sendall(struct.pack(">H", len(message)) + message)
        size, = struct.unpack(">H", sock.recv(2, socket.MSG_WAITALL))
        return sock.recv(size, socket.MSG_WAITALL)
"""

EPILOGUE = """
try:
    say(result=main())
except OSError as error:
    say(errno=errno.errorcode.get(error.errno, str(error.errno)), text=str(error), kind=type(error).__name__)
"""


class Sink:
    """A TCP server that greets and counts."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        self.port: int = self._sock.getsockname()[1]
        self.accepted = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self._sock.accept()
            except OSError:
                return
            self.accepted += 1
            with accepted, contextlib.suppress(OSError):
                accepted.sendall(b"hello")

    def close(self) -> None:
        self._sock.close()


class Names:
    """The stage. ``hosts``: confined hosts by name, see :meth:`host`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sink = Sink()
        self.namespace = Namespace()
        many = tuple(f"192.0.2.{i}" for i in range(1, 200))
        self.upstream = NameServer(
            UPSTREAM,
            {
                ("index.example.org", "A"): ("127.0.0.1",),
                ("index.example.org", "TXT"): ('"secret"',),
                ("both.example.org", "A"): ("127.0.0.1", "127.0.0.3"),
                ("both.example.org", "AAAA"): ("::1",),
                ("four.example.org", "A"): ("127.0.0.4",),
                ("brief.example.org", "A"): ("127.0.0.8",),
                ("alias.example.org", "CNAME"): ("behind.example.net",),
                ("behind.example.net", "A"): ("127.0.0.5",),
                ("many.example.org", "A"): many,
                ("rebound.example.org", "A"): ("169.254.169.254", "224.0.0.1"),
                ("evil.example.com", "A"): ("127.0.0.6",),
            },
        )
        self.rogue = NameServer(ROGUE, {("index.example.org", "A"): ("127.0.0.66",)})
        use(
            self.namespace.outside,
            folder,
            resolv_conf=f"nameserver {UPSTREAM}\nsearch corp.example lab.example\noptions timeout:2\n",
            hosts="127.0.0.1 localhost\n127.0.0.9 hosted.example.org\n127.0.0.10 hosted.example.com\n",
        )
        self._hosts: dict[str, Host] = {}

    def policy(self, **egress: Any) -> dict[str, Any]:
        return {"egress": {"allow": [f"tcp://*.example.org:{self.sink.port}"], **egress}}

    def host(self, name: str = "plain") -> Host:
        """``plain``: names below example.org at the sink's port; ``udp``: a UDP destination beside it."""
        if name not in self._hosts:
            policy = self.policy()
            if name == "udp":
                policy["egress"]["allow"].append("udp://127.0.0.1:9")
            self._hosts[name] = Host(policy, self.folder / f"evidence_{name}", self.namespace)
        return self._hosts[name]

    def another(self, name: str, policy: dict[str, Any]) -> Host:
        """A host of its own, under ``policy``."""
        self._hosts[name] = Host(policy, self.folder / f"evidence_{name}", self.namespace)
        return self._hosts[name]

    def argv(self, program: str, **arguments: Any) -> list[str]:
        told = {"token": "t", "port": self.sink.port, "upstream": UPSTREAM, "rogue": ROGUE, **arguments}
        return [PYTHON, "-I", "-S", "-c", PRELUDE + DNS + program + EPILOGUE, json.dumps(told)]

    def run(self, ring: str, program: str, **arguments: Any) -> Outcome:
        """``program`` (defines ``main``) in ``ring``: ``call``, ``actor``, ``actor_udp`` or ``unconfined``."""
        argv = self.argv(program, **arguments)
        if ring == "unconfined":
            done = subprocess.run([*self.namespace.prefix, *argv], capture_output=True, text=True, timeout=30)
            return Outcome.of({"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr, "seconds": 0.0})
        host = self.host("udp" if ring == "actor_udp" else "plain")
        return host.run("call" if ring == "call" else "actor", argv)

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
        self.namespace.close()
        for server in (self.upstream, self.rogue, self.sink):
            server.close()


@contextlib.contextmanager
def named(folder: Path) -> Iterator[Names]:
    if not ROOT:
        pytest.skip("missing: root, for a name server at port 53 and a resolv.conf of its own")
    stage = Names(folder)
    try:
        yield stage
    finally:
        stage.close()

"""Name rules over the relay: what was named must be what is spoken to, and a proxy is the relay's alone.

The judge is the server. Each attack is first run where it must succeed: unconfined, in the same namespace.
"""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from far_ends import Peer, swallow
from harness import PYTHON, ROOT, Host, Namespace, wait

from ray_guard.policy.enforcement import SUPPORTED

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not ROOT, reason="a hosts file of its own needs root"),
    pytest.mark.skipif("egress.allow.name" not in SUPPORTED, reason="names are not enforced in this version"),
]

Span = dict[str, Any]
NAMES = ("index.example.org", "other.example.org", "evil.example.net", "proxy.example.org")


class Stage:
    """A namespace in which the names mean loopback, and hosts confined there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = Namespace()
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {name}\n" for name in NAMES))
        subprocess.run([*self.namespace.outside, "mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.namespace.close)
        self._count = 0

    def host(self, allow: list[str], **egress: Any) -> Host:
        self._count += 1
        made = Host({"egress": {"allow": allow, **egress}}, self.folder / f"evidence{self._count}", self.namespace)
        self._stack.callback(made.close)
        return made

    def argv(self, program: str, *arguments: object) -> list[str]:
        text = "import errno, json, os, select, socket, ssl, struct, sys, time\n" + program
        return [PYTHON, "-I", "-S", "-c", text, *(str(each) for each in arguments)]

    def unconfined(self, program: str, *arguments: object) -> str:
        argv = [*self.namespace.prefix, *self.argv(program, *arguments)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("relay_names"))
    yield made
    made.close()


@contextlib.contextmanager
def served(serve: Callable[[Peer, socket.socket], None]) -> Iterator[Peer]:
    peer = Peer(serve)
    try:
        yield peer
    finally:
        peer.close()


@pytest.fixture
def sink() -> Iterator[Peer]:
    with served(swallow) as peer:
        yield peer


def flow(host: Host, port: int) -> Span:
    """The one ended flow to ``port``."""

    def find() -> Any:
        spans = [s for s in host.journal() if s["name"] == "egress connect" and s["ended"]]
        return [s for s in spans if s["attributes"].get("network.peer.port") == port]

    found: list[Span] = wait(find, "no flow has ended")
    assert len(found) == 1
    return found[0]


def reasons(host: Host) -> list[str]:
    return [s["attributes"]["error.type"] for s in host.journal() if s["name"] == "ray_guard.violation"]


# ---------------------------------------------------------------------------------------------------------------------
# names

_SEND = """
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
data = bytes.fromhex(sys.argv[3])
try:
    for at in range(0, len(data), int(sys.argv[4])): sock.sendall(data[at : at + int(sys.argv[4])])
    sock.shutdown(socket.SHUT_WR)
    print('answered' if len(sock.recv(32, socket.MSG_WAITALL)) == 32 else 'closed')
except OSError as error: print(errno.errorcode[error.errno])
"""


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def get(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


STRATUM = json.dumps({"id": 1, "method": "mining.subscribe", "params": []}).encode() + b"\n"
BANNER = b"SSH-2.0-OpenSSH_9.6\r\n"


@pytest.mark.parametrize(
    ("scheme", "data", "attributes"),
    [
        ("tls", hello("index.example.org"), {"protocol": "tls", "verified": True, "server_name": "index.example.org"}),
        ("http", get("index.example.org:PORT"), {"protocol": "http", "verified": True}),
        ("tcp", STRATUM, {"protocol": "stratum", "verified": False}),
        ("tcp", BANNER, {"protocol": "ssh", "verified": False}),
    ],
)
@pytest.mark.parametrize("portion", [1, 1000])
def test_what_agrees_reaches_the_name(
    stage: Stage, sink: Peer, *, scheme: str, data: bytes, attributes: dict[str, Any], portion: int
) -> None:
    data = data.replace(b"PORT", str(sink.port).encode())
    host = stage.host([f"{scheme}://index.example.org:{sink.port}"])
    outcome = host.run("call", stage.argv(_SEND, "index.example.org", sink.port, data.hex(), portion))
    assert outcome.stdout == "answered\n", outcome
    assert sink.received == len(data)
    found = flow(host, sink.port)["attributes"]
    assert found["server.address"] == "index.example.org"
    assert found["ray_guard.egress.reason"] == "name"
    assert found["ray_guard.egress.bytes_sent"] == len(data)
    for key, value in attributes.items():
        assert found[f"ray_guard.egress.{key}"] == value


@pytest.mark.parametrize(
    ("scheme", "data", "reason"),
    [
        ("tls", hello(None), "sni_absent"),
        ("tls", hello("evil.example.net"), "sni_mismatch"),
        ("tls", hello("other.example.org"), "sni_mismatch"),
        ("tls", BANNER, "not_tls"),
        ("tls", STRATUM, "not_tls"),
        ("tls", get("index.example.org"), "not_tls"),
        ("http", get("evil.example.net"), "host_mismatch"),
        ("http", b"CONNECT evil.example.net:443 HTTP/1.1\r\nHost: evil.example.net\r\n\r\n", "http_upgrade"),
        ("http", STRATUM + b"\r\n\r\n", "malformed_http"),
        ("ssh", STRATUM, "not_ssh"),
        ("ssh", hello("index.example.org"), "not_ssh"),
    ],
)
@pytest.mark.parametrize("portion", [1, 1000])
def test_what_does_not_agree_sends_nothing(
    stage: Stage, sink: Peer, *, scheme: str, data: bytes, reason: str, portion: int
) -> None:
    arguments = ("index.example.org", sink.port, data.hex(), portion)
    assert stage.unconfined(_SEND, *arguments) == "answered\n"
    assert sink.received == len(data), "the attack does not even work unconfined"
    sink.received = 0
    host = stage.host([f"{scheme}://index.example.org:{sink.port}"])
    outcome = host.run("call", stage.argv(_SEND, *arguments))
    assert outcome.stdout.strip() in ("ECONNRESET", "EPIPE", "ENOTCONN"), outcome
    found = flow(host, sink.port)["attributes"]
    assert sink.received == found["ray_guard.egress.bytes_sent"] == 0
    assert (found["error.type"], found["ray_guard.egress.verified"]) == (reason, False)
    assert reason in reasons(host)


def test_a_request_smuggled_behind_one_that_may_goes_nowhere(stage: Stage, sink: Peer) -> None:
    good = get(f"index.example.org:{sink.port}")
    data = good + get("evil.example.net")
    host = stage.host([f"http://index.example.org:{sink.port}"])
    host.run("call", stage.argv(_SEND, "index.example.org", sink.port, data.hex(), 1))
    found = flow(host, sink.port)["attributes"]
    assert found["error.type"] == "host_mismatch"
    assert sink.received == found["ray_guard.egress.bytes_sent"] <= len(good)


def test_an_address_that_was_told_for_no_name_is_refused(stage: Stage, sink: Peer) -> None:
    host = stage.host([f"tls://index.example.org:{sink.port}"])
    outcome = host.run("call", stage.argv(_SEND, "127.0.0.2", sink.port, hello("index.example.org").hex(), 1000))
    assert "PermissionError" in outcome.stderr
    assert sink.connections == 0


def test_without_verify_names_the_span_says_so(stage: Stage, sink: Peer) -> None:
    host = stage.host([f"tls://index.example.org:{sink.port}"], verify_names=False)
    host.run("call", stage.argv(_SEND, "index.example.org", sink.port, b"anything".hex(), 1000))
    found = flow(host, sink.port)["attributes"]
    assert (found["ray_guard.egress.verified"], found["ray_guard.egress.bytes_sent"]) == (False, 8)


def _certified(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for index.example.org, and its certificate."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=index.example.org", "-addext", "subjectAltName=DNS:index.example.org",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


_TWO_HELLOS = """
def vector(size, data): return len(data).to_bytes(size, 'big') + data
random, session = os.urandom(32), os.urandom(32)
def hello(name, *shares):
    def extension(kind, data): return struct.pack('>H', kind) + vector(2, data)
    extensions = extension(0, vector(2, b'\\0' + vector(2, name.encode()))) + extension(43, b'\\2\\3\\4')
    extensions += extension(13, vector(2, bytes.fromhex('040308040401'))) + extension(10, b'\\0\\2\\0\\x1d')
    extensions += extension(51, vector(2, b''.join(b'\\0\\x1d' + vector(2, share) for share in shares)))
    body = b'\\3\\3' + random + vector(1, session) + b'\\0\\2\\x13\\1' + b'\\1\\0' + vector(2, extensions)
    return b'\\x16\\3\\1' + vector(2, b'\\1' + vector(3, body))
sock = socket.create_connection(('index.example.org', int(sys.argv[1])), timeout=5)
try:
    sock.sendall(hello('index.example.org'))  # no key at all: the server asks for another hello
    if sys.argv[3] == 'waits': sock.recv(1 << 16)
    sock.sendall(hello(sys.argv[2], os.urandom(32)))
    while sock.recv(1 << 16): pass
except OSError as error: print(errno.errorcode.get(error.errno, error))
"""


# CPython 3.11 leaves one open whose peer has hung up before the handshake.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
@pytest.mark.parametrize("when", ["waits", "at once"])
def test_a_second_hello_that_a_server_asks_for_names_the_same(stage: Stage, tmp_path: Path, when: str) -> None:
    """HelloRetryRequest: OpenSSL serves the name of the second hello."""
    context, _ = _certified(tmp_path)
    named: list[str | None] = []
    context.sni_callback = lambda _tls, name, _context: named.append(name)

    def serve(peer: Peer, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            context.wrap_socket(sock, server_side=True).close()

    with served(serve) as peer:
        stage.unconfined(_TWO_HELLOS, peer.port, "evil.example.net", when)
        assert named == ["index.example.org", "evil.example.net"], "the attack does not even work unconfined"
        host = stage.host([f"tls://index.example.org:{peer.port}"])
        named.clear()
        host.run("call", stage.argv(_TWO_HELLOS, peer.port, "evil.example.net", when))
        wait(lambda: reasons(host) == ["sni_mismatch"], f"it was not refused: {reasons(host)}")
        host.run("call", stage.argv(_TWO_HELLOS, peer.port, "index.example.org", when))
        wait(lambda: len(named) >= 2, "a second hello does not pass")
        assert set(named) == {"index.example.org"}


def test_tls_from_end_to_end(stage: Stage, tmp_path: Path) -> None:
    """A real handshake with a real certificate, and data both ways through it."""
    context, cert = _certified(tmp_path)

    def serve(peer: Peer, sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as tls:
            while data := tls.recv(1 << 16):
                peer.took(len(data))
                tls.sendall(data)

    program = """
context = ssl.create_default_context(cadata=sys.argv[2])
with context.wrap_socket(socket.create_connection(('index.example.org', int(sys.argv[1]))), server_hostname='index.example.org') as tls:
    mine = os.urandom(300_000); got = b''
    for at in range(0, len(mine), 10_000):
        tls.sendall(mine[at : at + 10_000])
        while len(got) < at + 10_000: got += tls.recv(1 << 16)
print(got == mine)
"""
    with served(serve) as peer:
        host = stage.host([f"tls://index.example.org:{peer.port}"])
        assert host.run("call", stage.argv(program, peer.port, cert.read_text())).stdout == "True\n"
        assert peer.received == 300_000


# ---------------------------------------------------------------------------------------------------------------------
# the proxy


class Proxy(Peer):
    """An HTTP proxy that knows CONNECT. ``answer``: what it says; a 2xx opens the way to the port on loopback."""

    def __init__(self) -> None:
        super().__init__(type(self).proxy)  # type: ignore[arg-type]
        self.answer = "200 OK"
        self.asked: list[str] = []

    def proxy(self, sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(1)
            if not data:
                return
            head += data
        request = head.split(b"\r\n")[0].decode()
        self.asked.append(request)
        if self.answer == "nothing":
            time.sleep(10)
            return
        sock.sendall(f"HTTP/1.1 {self.answer}\r\nX: y\r\n\r\n".encode())
        found = re.fullmatch(r"CONNECT [^:]+:(\d+) HTTP/1.1", request)
        if self.answer[0] != "2" or found is None:
            return
        with socket.create_connection(("127.0.0.1", int(found[1]))) as there:
            self._join(sock, there)

    @staticmethod
    def _join(one: socket.socket, other: socket.socket) -> None:
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(one, selectors.EVENT_READ, other)
            selector.register(other, selectors.EVENT_READ, one)
            while selector.get_map():
                for key, _ in selector.select():
                    source: Any = key.fileobj
                    data = source.recv(1 << 16)
                    if data:
                        key.data.sendall(data)
                    else:
                        key.data.shutdown(socket.SHUT_WR)
                        selector.unregister(source)


_CONNECT = """
sock = socket.socket()
if sys.argv[3] == 'nonblocking': sock.setblocking(False)
address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), socket.AF_INET)[0][4]
code = sock.connect_ex(address)
if code == errno.EINPROGRESS:
    poll = select.epoll(); poll.register(sock, select.EPOLLOUT); poll.poll(20)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
print(errno.errorcode.get(code, code))
if code == 0:
    sock.settimeout(5); sock.sendall(bytes.fromhex(sys.argv[4])); sock.shutdown(1)
    print(len(sock.recv(32, socket.MSG_WAITALL)))
"""


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
@pytest.mark.parametrize("where", ["proxy.example.org", "127.0.0.1"])
def test_a_name_is_reached_through_the_proxy(stage: Stage, sink: Peer, proxy: Proxy, how: str, where: str) -> None:
    host = stage.host([f"tls://*.example.org:{sink.port}"], proxy=f"http://{where}:{proxy.port}")
    data = hello("index.example.org")
    outcome = host.run("call", stage.argv(_CONNECT, "index.example.org", sink.port, how, data.hex()))
    assert outcome.stdout.split() == ["0", "32"], outcome
    assert proxy.asked == [f"CONNECT index.example.org:{sink.port} HTTP/1.1"]
    assert sink.received == len(data)
    assert flow(host, sink.port)["attributes"]["ray_guard.egress.bytes_sent"] == len(data)


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
def test_the_proxy_looks_names_up_where_nobody_else_can(stage: Stage, sink: Peer, proxy: Proxy, how: str) -> None:
    """Names without any address here: each gets one that stands for it, and the CONNECT carries the name."""
    allow = [f"tls://*.example.com:{sink.port}", f"http://*.example.com:{sink.port}"]
    host = stage.host(allow, proxy=f"http://127.0.0.1:{proxy.port}")
    for name in ("one.example.com", "two.example.com"):
        outcome = host.run("call", stage.argv(_CONNECT, name, sink.port, how, hello(name).hex()))
        assert outcome.stdout.split() == ["0", "32"], outcome
    assert proxy.asked == [f"CONNECT {name}.example.com:{sink.port} HTTP/1.1" for name in ("one", "two")]
    proxy.asked.clear()
    before = sink.received
    host.run("call", stage.argv(_CONNECT, "one.example.com", sink.port, how, hello("two.example.com").hex()))
    assert proxy.asked == [f"CONNECT one.example.com:{sink.port} HTTP/1.1"]
    assert sink.received == before, "another name than the proxy was asked for"
    outcome = host.run("call", stage.argv(_CONNECT, "one.example.net", sink.port, how, "00"))
    assert "gaierror" in outcome.stderr, "a name that is not listed"


@pytest.mark.parametrize("how", ["blocking", "nonblocking"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("403 Forbidden", "EACCES"),
        ("407 Proxy Authentication Required", "EACCES"),
        ("502 Bad Gateway", "ECONNREFUSED"),
        ("garbage", "ECONNREFUSED"),
    ],
)
def test_what_the_proxy_refuses(stage: Stage, sink: Peer, proxy: Proxy, *, how: str, answer: str, error: str) -> None:
    proxy.answer = answer
    host = stage.host([f"tls://index.example.org:{sink.port}"], proxy=f"http://127.0.0.1:{proxy.port}")
    outcome = host.run("call", stage.argv(_CONNECT, "index.example.org", sink.port, how, "00"))
    # A socket that was seen connecting can only be told that it was refused.
    assert outcome.stdout.strip() in (error, "ECONNREFUSED" if how == "nonblocking" else error), outcome
    assert sink.connections == 0


def test_a_proxy_that_is_not_there(stage: Stage, sink: Peer) -> None:
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    with closed:
        for where in ("127.0.0.1", "nowhere.invalid"):
            proxy = f"http://{where}:{closed.getsockname()[1]}"
            host = stage.host([f"tls://index.example.org:{sink.port}"], proxy=proxy)
            outcome = host.run("call", stage.argv(_CONNECT, "index.example.org", sink.port, "blocking", "00"))
            assert outcome.stdout.split() == ["ECONNREFUSED"], outcome
    assert sink.connections == 0


def test_a_proxy_that_says_nothing_holds_up_nobody_else(stage: Stage, sink: Peer, proxy: Proxy) -> None:
    proxy.answer = "nothing"
    program = """
import threading
allowed, port = int(sys.argv[1]), int(sys.argv[2])
threading.Thread(target=lambda: socket.create_connection(('index.example.org', allowed)), daemon=True).start()
time.sleep(0.3); began = time.monotonic()
for _ in range(20): socket.create_connection(('127.0.0.1', port)).close()
print(time.monotonic() - began < 2, flush=True); os._exit(0)
"""
    with served(swallow) as other:
        host = stage.host(
            [f"tls://index.example.org:{sink.port}", f"127.0.0.1:{other.port}"], proxy=f"http://127.0.0.1:{proxy.port}"
        )
        assert host.run("call", stage.argv(program, sink.port, other.port)).stdout == "True\n"


def test_nobody_but_the_relay_reaches_the_proxy(stage: Stage, proxy: Proxy) -> None:
    program = """
for host in ('127.0.0.1', 'proxy.example.org', '127.0.0.2'):
    try:
        sock = socket.create_connection((host, int(sys.argv[1])), timeout=5)
        sock.sendall(b'CONNECT evil.example.net:443 HTTP/1.1\\r\\n\\r\\n'); print('sent')
    except OSError as error: print(type(error).__name__)
"""
    sent = stage.unconfined(program, proxy.port).count("sent")
    assert sent, "the attack does not even work unconfined"
    wait(lambda: len(proxy.asked) == sent, "the proxy has not heard all")
    proxy.asked.clear()
    before = proxy.connections
    for where in ("127.0.0.1", "proxy.example.org"):
        host = stage.host(
            ["127.0.0.0/8:*", f"tcp://*.example.org:{proxy.port}", "index.example.org:443"],
            proxy=f"http://{where}:{proxy.port}",
        )
        assert set(host.run("call", stage.argv(program, proxy.port)).stdout.split()) == {"PermissionError"}
    assert (proxy.asked, proxy.connections) == ([], before)

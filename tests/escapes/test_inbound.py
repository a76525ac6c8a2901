"""Ways to be reached: bind, listen, listen without bind, and sending from a bound port, which is free."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel


def _listening(name: str, body: str, refused: tuple[str, ...]) -> Attack:
    """The harm is a socket that others can reach: the attack leaves its number where the judge finds it."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    program = f"""
def main():
{lines}
    with open(os.path.join(A['folder'], 'port'), 'w') as file:
        file.write(str(sock.getsockname()))
"""
    return Attack(
        name,
        program,
        sink="",
        refused=refused,
        judge=lambda told: "it listens" if Path(told["folder"], "port").exists() else "",
    )


_FREE_PORT = """
spare = socket.socket(); spare.bind(('127.0.0.1', 0)); port = spare.getsockname()[1]; spare.close()
"""

INBOUND = [
    _listening(
        "bind and listen",
        _FREE_PORT + "sock = socket.socket(); sock.bind(('127.0.0.1', port)); sock.listen()",
        ("EPERM",),
    ),
    _listening(
        "bind all and listen", _FREE_PORT + "sock = socket.socket(); sock.bind(('', port)); sock.listen()", ("EPERM",)
    ),
    _listening("listen without bind", "sock = socket.socket(); sock.listen()", ("EPERM",)),
    _listening("bind port 0 and listen", "sock = socket.socket(); sock.bind(('', 0)); sock.listen()", ("EPERM",)),
    _listening(
        "IPv6 bind port 0 and listen", "sock = socket.socket(AF_INET6); sock.bind(('::', 0)); sock.listen()", ("EPERM",)
    ),
    _listening("listen by raw system call", "sock = socket.socket(); call(50, sock.fileno(), 1)", ("EPERM",)),
    _listening(
        "UDP bind", _FREE_PORT + "sock = socket.socket(AF_INET, DGRAM); sock.bind(('127.0.0.1', port))", ("EPERM",)
    ),
    _listening("MPTCP listen", "sock = socket.socket(AF_INET, STREAM, 262); sock.listen()", ("EPROTONOSUPPORT",)),
    _listening(
        "abstract unix bind",
        "sock = socket.socket(AF_UNIX); sock.bind('\\0ray_guard_' + A['token']); sock.listen()\nsock = socket.socket(); "
        "sock.bind(('127.0.0.1', 0))",
        ("EACCES",),
    ),
    _listening(
        "autobound unix address",
        "sock = socket.socket(AF_UNIX); sock.bind(''); sock.listen()\nsock = socket.socket(); sock.bind(('127.0.0.1', 0))",
        ("EACCES",),
    ),
]


@cases(INBOUND)
def test_inbound(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_a_port_of_ones_own_to_send_from_is_free(stage: Stage, ring: str) -> None:
    from harness import PYTHON

    program = """
import socket, sys
sock = socket.socket()
sock.bind(('127.0.0.1', 0))
own = sock.getsockname()
sock.connect(('127.0.0.1', int(sys.argv[1])))
print(sock.getsockname() == own and own[1] > 0)
"""
    argv = [PYTHON, "-I", "-S", "-c", program, str(stage.sinks.address("granted"))]
    assert stage.host().run(ring, argv).stdout == "True\n"


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_own_unix_sockets_work(stage: Stage, ring: str) -> None:
    """What a call binds itself it may connect to: multiprocessing, ssh's ControlMaster, language servers."""
    import tempfile

    from harness import PYTHON

    program = """
import os, socket, sys
path = os.path.join(sys.argv[1], 's')
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    server = socket.socket(socket.AF_UNIX, kind); server.bind(path); server.listen()
    client = socket.socket(socket.AF_UNIX, kind); client.connect(path)
    server.accept()[0].send(b'hello'); print(client.recv(9).decode(), oct(os.stat(path).st_mode & 0o777))
    os.unlink(path)
os.chdir(sys.argv[1]); os.umask(0o077)
server = socket.socket(socket.AF_UNIX); server.bind('relative'); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect('./relative'); print(oct(os.stat('relative').st_mode & 0o777), server.getsockname())
"""
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        outcome = stage.host().run(ring, [PYTHON, "-I", "-S", "-c", "import os; os.umask(0o022)\n" + program, folder])
    assert outcome.stdout == "hello 0o755\nhello 0o755\n0o700 relative\n", outcome

"""Hostile arguments to notified calls: the target gets the error the kernel itself would give."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import PRELUDE, PYTHON, Stage, run_unconfined

pytestmark = pytest.mark.kernel

_PROGRAM = """
import socket as s
found = {}
def case(name, work):
    try:
        result = work()
        found[name] = 'ok' if result is None else result
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, error.errno)
granted = sockaddr('127.0.0.1', A['granted'])
path = lambda text: struct.pack('=H', AF_UNIX) + text.encode() + b'\\0'
tcp = lambda: s.socket()
unix = lambda: s.socket(AF_UNIX)
file = open('/dev/null')
BAD = 1
open(A['folder'] + '/plain', 'w').close()
pool = []
def fd(sock):
    pool.append(sock)
    return sock.fileno()

case('connect -1', lambda: call(42, -1, granted, 16))
case('connect 9999', lambda: call(42, 9999, granted, 16))
case('connect a file', lambda: call(42, file.fileno(), granted, 16))
case('connect -1, bad pointer', lambda: call(42, -1, BAD, 16))
case('connect a file, bad pointer', lambda: call(42, file.fileno(), BAD, 16))
case('connect NULL', lambda: call(42, fd(tcp()), 0, 16))
case('connect bad pointer', lambda: call(42, fd(tcp()), BAD, 16))
case('connect kernel pointer', lambda: call(42, fd(tcp()), -4096, 16))
case('connect length 0', lambda: call(42, fd(tcp()), granted, 0))
case('connect length 1', lambda: call(42, fd(tcp()), granted, 1))
case('connect length 8', lambda: call(42, fd(tcp()), granted, 8))
case('connect length -1', lambda: call(42, fd(tcp()), granted, -1))
case('connect length 129', lambda: call(42, fd(tcp()), granted + bytes(200), 129))
case('connect length 128', lambda: call(42, fd(tcp()), granted + bytes(200), 128))
case('connect length 1 << 40 | 16', lambda: call(42, fd(tcp()), granted, 1 << 40 | 16))
case('connect family 99', lambda: call(42, fd(tcp()), struct.pack('=H14x', 99), 16))
case('connect IPv6 length 20', lambda: call(42, fd(s.socket(AF_INET6)), sockaddr('::1', A['granted']), 20))
case('connect IPv4 address on IPv6 socket', lambda: call(42, fd(s.socket(AF_INET6)), granted, 16))
case('connect inet address on unix socket', lambda: call(42, fd(unix()), granted, 16))
case('connect unix address on TCP socket', lambda: call(42, fd(tcp()), path(A['unix_granted']).ljust(110, b'\\0'), 110))
def twice():
    sock = tcp()
    call(42, fd(sock), granted, 16)
    call(42, sock.fileno(), granted, 16)
case('connect twice', twice)
def unspecified():
    call(42, fd(tcp()), struct.pack('=H14x', 0), 16)
case('connect AF_UNSPEC, never connected', unspecified)
case('connect AF_UNSPEC, length 2', lambda: call(42, fd(tcp()), struct.pack('=H', 0), 2))
case('connect granted', lambda: call(42, fd(tcp()), granted, 16))
case('unix missing', lambda: call(42, fd(unix()), path(A['folder'] + '/none'), 90))
case('unix not a socket', lambda: call(42, fd(unix()), path(A['folder'] + '/plain'), 90))
case('unix a folder', lambda: call(42, fd(unix()), path('/tmp'), 90))
case('unix through a file', lambda: call(42, fd(unix()), path('/etc/passwd/x'), 90))
case('unix empty', lambda: call(42, fd(unix()), struct.pack('=H', AF_UNIX), 2))
case('unix 111 bytes', lambda: call(42, fd(unix()), path('/' + 'x' * 120), 111))
case('unix wrong type', lambda: call(42, fd(s.socket(AF_UNIX, SEQPACKET)), path(A['unix_granted']), 100))
case('unix granted', lambda: call(42, fd(unix()), path(A['unix_granted']), 100))
case('bind -1', lambda: call(49, -1, granted, 16))
case('bind a file', lambda: call(49, file.fileno(), granted, 16))
case('bind bad pointer', lambda: call(49, fd(tcp()), BAD, 16))
case('bind length 2', lambda: call(49, fd(tcp()), granted, 2))
case('bind length 200', lambda: call(49, fd(tcp()), granted + bytes(200), 200))
case('bind port 0', lambda: call(49, fd(tcp()), sockaddr('127.0.0.1', 0), 16))
case('bind foreign address', lambda: call(49, fd(tcp()), sockaddr('192.0.2.77', 0), 16))
def bind_twice():
    sock = tcp()
    call(49, fd(sock), sockaddr('127.0.0.1', 0), 16)
    call(49, sock.fileno(), sockaddr('127.0.0.1', 0), 16)
case('bind twice', bind_twice)
case('bind unix', lambda: call(49, fd(unix()), path(A['folder'] + '/own'), 2 + len(A['folder']) + 5))
case('bind unix again', lambda: call(49, fd(unix()), path(A['folder'] + '/own'), 2 + len(A['folder']) + 5))
case('bind unix nowhere', lambda: call(49, fd(unix()), path(A['folder'] + '/none/own'), 2 + len(A['folder']) + 10))
case('listen -1', lambda: call(50, -1, 5))
case('listen a file', lambda: call(50, file.fileno(), 5))
case('listen unbound unix', lambda: call(50, fd(unix()), 5))
case('sendto -1', lambda: call(44, -1, b'x', 1, 0, granted, 16))
case('sendto a file', lambda: call(44, file.fileno(), b'x', 1, 0, granted, 16))
case('sendto bad address', lambda: call(44, fd(tcp()), b'x', 1, 0, BAD, 16))
case('sendto bad length', lambda: call(44, fd(tcp()), b'x', 1, 0, granted, 500))
ours, theirs = s.socketpair()
case('sendto bad data', lambda: call(44, ours.fileno(), BAD, 10, 0, granted, 16))
case('sendmsg -1', lambda: call(46, -1, ctypes.byref(message(b'x')), 0))
case('sendmsg a file', lambda: call(46, file.fileno(), ctypes.byref(message(b'x')), 0))
case('sendmsg NULL', lambda: call(46, ours.fileno(), 0, 0))
case('sendmsg bad pointer', lambda: call(46, ours.fileno(), BAD, 0))
def header(**fields):
    made = message(b'x')
    for name, value in fields.items(): setattr(made, name, value)
    return ctypes.byref(made)
case('sendmsg bad vector', lambda: call(46, ours.fileno(), header(iov=ctypes.cast(8, ctypes.POINTER(IOVec))), 0))
case('sendmsg 2000 vectors', lambda: call(46, ours.fileno(), header(iovlen=2000), 0))
case('sendmsg no vectors', lambda: call(46, ours.fileno(), header(iovlen=0), 0))
case('sendmsg short control', lambda: call(46, ours.fileno(), header(control=b'x' * 16, controllen=16), 0))
case('sendmsg closed descriptor passed', lambda: ours.sendmsg([b'x'], [(1, 1, array.array('i', [9999]))]))
case('sendmsg 300 descriptors passed', lambda: ours.sendmsg([b'x'], [(1, 1, array.array('i', [0] * 300))]))
case('sendmsg unconnected TCP', lambda: tcp().sendmsg([b'x']))
case('sendmmsg none', lambda: call(307, ours.fileno(), 0, 0, 0))
case('sendmmsg bad pointer', lambda: call(307, ours.fileno(), BAD, 2, 0))
case('sendmmsg -1', lambda: call(307, -1, BAD, 2, 0))
def partly():
    entries = (MMsgHdr * 2)(MMsgHdr(message(b'abc'), 0), MMsgHdr(message(b'de'), 0))
    entries[1].header.iov = ctypes.cast(8, ctypes.POINTER(IOVec))
    return call(307, ours.fileno(), entries, 2, 0)
case('sendmmsg, second entry bad', partly)
def broken():
    a, b = s.socketpair()
    b.close()
    a.sendmsg([b'x'])
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
case('sendmsg to a closed peer', broken)
def full():
    a, b = s.socketpair()
    a.setblocking(False)
    while True: a.sendmsg([bytes(65536)])
case('sendmsg nonblocking, full', full)
def big():
    a, b = s.socketpair(AF_UNIX, SEQPACKET)
    size = 150_000
    a.sendmsg([bytes(size)])
    return len(b.recv(1 << 20))
case('a long packet arrives whole', big)
def too_big():
    a, b = s.socketpair(AF_UNIX, SEQPACKET)
    a.sendmsg([bytes(4 << 20)])
case('a packet too long', too_big)
print(json.dumps(found))
"""


_ACCEPTED = {  # several things are wrong at once, and another of them is said; or it is refused before it is wrong
    "connect -1, bad pointer": ("EBADF", "EFAULT"),
    "sendto bad data": ("EISCONN", "EFAULT"),
    "unix empty": ("EINVAL", "EACCES"),
}


@pytest.fixture(scope="module")
def unconfined(stage: Stage) -> dict[str, Any]:
    return _run(stage, "unconfined")


def _run(stage: Stage, ring: str) -> dict[str, Any]:
    argv = [PYTHON, "-I", "-S", "-c", PRELUDE + _PROGRAM, json.dumps(stage.arguments())]
    outcome = run_unconfined(argv) if ring == "unconfined" else stage.host().run(ring, argv)
    assert outcome.status == 0, outcome
    return outcome.said


@pytest.mark.parametrize("ring", ["actor", "call"])
def test_errors_are_the_kernels(stage: Stage, unconfined: dict[str, Any], ring: str) -> None:
    found = _run(stage, ring)
    assert found.keys() == unconfined.keys()
    assert len(found) > 60
    for name, (kernel, ours) in _ACCEPTED.items():
        assert unconfined[name] == kernel
        assert found.pop(name) in (kernel, ours)
    different = {name: (unconfined[name], found[name]) for name in found if found[name] != unconfined[name]}
    assert different == {}, "(kernel, guarded)"

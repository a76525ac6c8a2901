"""What a process holds from before it was confined: no way out either, and untouched where confining was refused."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import json
import os
import subprocess

import pytest
from harness import PYTHON, Stage

pytestmark = pytest.mark.kernel

_PROGRAM = """
import json, socket, sys
import ray_guard
sinks = json.loads(sys.argv[1])
held = {'udp': socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 'unix_dgram': socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)}
where = {'udp': ('127.0.0.1', sinks['udp']), 'unix_dgram': sinks['unix_dgram']}
said = {}
def send(step):
    for name, sock in held.items():
        try: sock.sendmsg([step.encode()], [], 0, where[name]); said[f'{step} {name}'] = 'sent'
        except OSError as error: said[f'{step} {name}'] = error.errno
send('before')
try: ray_guard.confine({'egress': {'allow': ['udp://192.0.2.7:9'], 'listen': [9]}, 'budgets': {'actor': {'egress_bytes': 9}}})
except ray_guard.NotEnforced: send('refused')
ray_guard.confine({'egress': {'allow': []}})
send('confined')
print(json.dumps(said))
"""


def test_datagram_sockets_from_before(stage: Stage) -> None:
    stage.sinks.clear()
    argv = [*stage.namespace.prefix, PYTHON, "-c", _PROGRAM, json.dumps(stage.sinks.addresses())]
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(stage.evidence("before"))}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    said = json.loads(done.stdout)
    for sink in ("udp", "unix_dgram"):
        stage.sinks.flush(sink)
        assert stage.sinks.seen(sink)[1] == b"beforerefused", said
        assert said[f"confined {sink}"] == 32


def test_a_listening_socket_from_before_is_refused(stage: Stage) -> None:
    program = """
import socket, ray_guard
listening = socket.create_server(('127.0.0.1', 0))
try: ray_guard.confine({'egress': {'allow': []}})
except ray_guard.NotEnforced as error: print('refused')
"""
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(stage.evidence("listening"))}
    argv = [*stage.namespace.prefix, PYTHON, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n"

"""nftables as a ceiling: a process in a call's group that no filter holds. The judge is the sink, beside it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, ROOT, Host, Namespace, wait

from ray_guard.supervisor import ceilings
from ray_guard.supervisor.leaf import place

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not ROOT, reason="missing: root, to have a network of its own")]

SINK = """
import json, selectors, socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tcp = socket.create_server(("127.0.0.1", 0))
udp.bind(tcp.getsockname())
print(tcp.getsockname()[1], flush=True)
ready = selectors.DefaultSelector()
for each in (udp, tcp, sys.stdin): ready.register(each, selectors.EVENT_READ)
seen = []
while True:
    for key, _ in ready.select():
        if key.fileobj is sys.stdin:
            if not sys.stdin.readline(): sys.exit()
            print(json.dumps(seen), flush=True)
            seen.clear()
        elif key.fileobj is tcp:
            accepted, _ = tcp.accept()
            seen.append("connection")
            ready.register(accepted, selectors.EVENT_READ)
        else:
            data = key.fileobj.recv(1000)
            if data: seen.append(data.decode())
            elif key.fileobj is not udp: ready.unregister(key.fileobj); key.fileobj.close()
"""
INTRUDER = """
import socket, sys
port = int(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
said = []
def attempt(what):
    try: what()
    except OSError as error: said.append(type(error).__name__)
def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"datagram", ("127.0.0.1", port))
def udp6():
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.sendto(b"mapped", ("::ffff:127.0.0.1", port))
def tcp(): socket.create_connection(("127.0.0.1", port), timeout=0.5).send(b"stream")
for each in (udp, udp6, tcp): attempt(each)
print(said, flush=True)
"""
ALL = ["connection", "datagram", "mapped", "stream"]
TABLES = """
import socket, struct
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
sock.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 1, 0x301, 1, 0, 1, 0, 0))
data = sock.recv(1 << 16)
print(data.count(b"ray_guard-"), data.count(b"somebody_elses"))
"""
FOREIGN = """
import sys
from ray_guard.kernel.nftables import Table
table = Table("somebody_elses")
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def _works() -> None:
    try:
        ceilings.probe()
    except OSError as error:
        pytest.skip(f"missing: nftables by control group ({error})")


class Network:
    """A network namespace with a sink on its loopback."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.namespace = Namespace(network=True)
        stack.callback(self.namespace.close)
        subprocess.run([*self.namespace.prefix, "ip", "link", "set", "lo", "up"], check=True)
        self._sink = self.start(SINK)
        assert self._sink.stdout is not None
        self.port = int(self._sink.stdout.readline())

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        argv = [*self.namespace.prefix, PYTHON, "-c", program, *arguments]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._stack.callback(process.communicate)
        return process

    def seen(self) -> list[str]:
        """What has arrived since this was asked last."""
        assert self._sink.stdin is not None
        assert self._sink.stdout is not None
        self._sink.stdin.write("\n")
        found: list[str] = json.loads(self._sink.stdout.readline())
        return found

    def host(self, **policy: Any) -> Host:
        host = Host({"egress": {"allow": []}, **policy}, self.folder / "evidence", self.namespace)
        self._stack.callback(host.close)
        return host


def intrude(network: Network, group: Path | None) -> list[str]:
    """What arrives of an unfiltered process that sends all it can, from within ``group``."""
    process = network.start(INTRUDER, str(network.port))
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if group is not None:
        (group / "cgroup.procs").write_text(str(process.pid))
    process.stdin.write("\n")
    process.stdout.readline()
    process.wait(10)
    return sorted(network.seen())


def group_of(pid: int) -> Path:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    return Path(place()) / Path(path).name


START = "import builtins; tool = builtins.tool = ray_guard.Popen(['sleep', '60']); result = tool.pid"
STOP = "tool.kill(); result = tool.wait()"


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    monkeypatch.setenv(ceilings.VARIABLE, "1")
    with contextlib.ExitStack() as stack:
        yield Network(tmp_path, stack)


def test_nothing_leaves_the_group_of_a_call_that_may_reach_nothing(network: Network) -> None:
    host = network.host()
    group = group_of(host.inside(START))
    assert intrude(network, None) == ALL, "positive control: beside the group all of it arrives"
    assert intrude(network, group) == []
    assert host.inside(STOP) == -signal.SIGKILL


def test_under_a_byte_cap_only_the_relay_is_reached(network: Network) -> None:
    host = network.host(egress={"allow": [f"127.0.0.1:{network.port}"]}, budgets={"call": {"egress_bytes": 1 << 20}})
    program = f"import socket; s = socket.create_connection(('127.0.0.1', {network.port})); s.send(b'granted')"
    assert host.run("call", [PYTHON, "-I", "-S", "-c", program]).status == 0
    wait(lambda: "granted" in network.seen(), "what is granted does not arrive")
    assert intrude(network, group_of(host.inside(START))) == []
    host.inside(STOP)


def test_a_call_with_a_direct_destination_has_none(network: Network) -> None:
    host = network.host(egress={"allow": [f"127.0.0.1:{network.port}"]})
    assert intrude(network, group_of(host.inside(START))) == ALL
    host.inside(STOP)


def test_the_next_call_of_the_same_group_has_its_own(network: Network) -> None:
    """Groups are used again: what was put over the last call must be gone, and what is over this one must hold."""
    first = network.host()
    group = group_of(first.inside(START))
    first.inside(STOP)
    wait(lambda: intrude(network, group) == ALL, "the ceiling stays behind its call")
    assert intrude(network, group_of(first.inside(START))) == []
    first.inside(STOP)


def test_others_tables_stay_and_ours_ends_with_its_supervisor(network: Network) -> None:
    def tables() -> list[int]:
        done = subprocess.run(
            [*network.namespace.prefix, sys.executable, "-c", TABLES], capture_output=True, text=True, check=True
        )
        return [int(word) for word in done.stdout.split()]

    foreign = network.start(FOREIGN)
    assert foreign.stdout is not None
    assert foreign.stdout.readline() == "made\n"
    host = network.host()
    assert tables() == [0, 1], "no call was started yet"
    assert host.run("call", ["true"]).status == 0
    assert tables() == [1, 1]
    os.kill(host.supervisor, signal.SIGKILL)
    wait(lambda: tables() == [0, 1], "the table is left")


def test_where_it_is_not_asked_for_there_is_no_table(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ceilings.VARIABLE)
    host = network.host()
    assert intrude(network, group_of(host.inside(START))) == ALL
    host.inside(STOP)


def test_what_is_asked_for_and_cannot_be_had_keeps_tools_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CAP_NET_ADMIN."""
    monkeypatch.setenv(ceilings.VARIABLE, "1")
    namespace = Namespace()
    namespace.prefix += ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    try:
        host = Host({"egress": {"allow": []}}, tmp_path, namespace)
        code = """
try: ray_guard.run(['true']); result = 'started'
except ray_guard.NotEnforced as error: result = str(error)
"""
        assert "RAY_GUARD_NFTABLES asks for it: [Errno 1]" in host.inside(code)
        host.close()
    finally:
        namespace.close()

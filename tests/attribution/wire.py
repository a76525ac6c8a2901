"""A network of this test's own: nodes behind a gateway that translates, and an outside that logs. Needs root.

Namespaces hold no names and no files: they end with the processes that were started in them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from harness import wait

GATEWAY = "192.0.2.1"
OUTSIDE = "192.0.2.9"
PORT = 9000
TOOLS = ("unshare", "nsenter", "ip", "nft", "ulogd", "conntrack")
_ULOGD = """
[global]
logfile="{folder}/ulogd.log"
loglevel=5
plugin="{plugins}/ulogd_inppkt_NFLOG.so"
plugin="{plugins}/ulogd_raw2packet_BASE.so"
plugin="{plugins}/ulogd_filter_IFINDEX.so"
plugin="{plugins}/ulogd_filter_IP2STR.so"
plugin="{plugins}/ulogd_filter_PRINTPKT.so"
plugin="{plugins}/ulogd_output_LOGEMU.so"
plugin="{plugins}/ulogd_output_JSON.so"
stack=log1:NFLOG,base1:BASE,ifi1:IFINDEX,ip2str1:IP2STR,print1:PRINTPKT,emu1:LOGEMU
stack=log2:NFLOG,base1:BASE,ifi1:IFINDEX,ip2str1:IP2STR,json1:JSON
[log1]
group=1
[log2]
group=2
[emu1]
file="{folder}/firewall.log"
sync=1
[json1]
file="{folder}/firewall.json"
sync=1
"""
_SINK = """
import json, socket, sys, threading
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)
print("ready", flush=True)
def serve(taken, peer):
    with taken:
        said = taken.makefile().readline().strip()
        taken.sendall(b"thanks\\n")
    print(json.dumps({"ip": peer[0], "port": peer[1], "said": said}), flush=True)
while True: threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
"""


def missing() -> str:
    """What this machine lacks for it; empty: nothing."""
    lacking = [name for name in TOOLS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: util-linux iproute2 nftables ulogd2 ulogd2-json conntrack)"
    if not plugin_folder():
        return "ulogd2 without its plug-ins (Debian: ulogd2 ulogd2-json)"
    made = subprocess.run(["unshare", "--net", "nft", "add", "table", "ip", "t"], capture_output=True, text=True)
    return f"a network namespace with nftables: {made.stderr.strip()}" if made.returncode else ""


def plugin_folder() -> str:
    found = next(Path("/usr/lib").glob("*/ulogd/ulogd_output_JSON.so"), None)
    return str(found.parent) if found else ""


class Space:
    """A network namespace, held by a process that does nothing."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        command = ["unshare", "--net", "sh", "-c", "ip link set lo up; echo ready; exec sleep 300"]
        self._holder = self._started(command)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def __call__(self, *command: str, **changed: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=60, **changed)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "--net", "--target", str(self.pid), "--", *command]

    def start(self, *command: str, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        return self._started(self.inside(*command), stdout)

    def _started(self, command: list[str], stdout: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=stdout, text=True)
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process


class Wire:
    """Nodes ``10.88.N.2`` behind :data:`GATEWAY`, which they all look like from :data:`OUTSIDE`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, nodes: int) -> None:
        self.folder = folder
        self._gateway, self._outside = Space(stack), Space(stack)
        self.nodes = [Space(stack) for _ in range(nodes)]
        _cable(self._gateway, "outside", f"{GATEWAY}/24", self._outside, "inside", f"{OUTSIDE}/24")
        for number, node in enumerate(self.nodes):
            _cable(self._gateway, f"node{number}", f"10.88.{number}.1/24", node, "uplink", f"10.88.{number}.2/24")
            node("ip", "route", "add", "default", "via", f"10.88.{number}.1")
        self._gateway("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self._gateway("nft", "add table ip nat; add chain ip nat out { type nat hook postrouting priority 100; };"
                      'add rule ip nat out oifname "outside" masquerade random')  # fmt: skip
        watch = 'add rule ip watch in tcp flags & (syn | ack) == syn log prefix "egress-watch: " group'
        self._outside("nft", "add table ip watch; add chain ip watch in { type filter hook input priority 0; };"
                      f"{watch} 1; {watch} 2")  # fmt: skip
        self._nat = stack.enter_context((folder / "nat.log").open("w"))
        self._gateway.start("conntrack", "-E", "-o", "timestamp", "-p", "tcp", stdout=self._nat)
        config = folder / "ulogd.conf"
        config.write_text(_ULOGD.format(folder=folder, plugins=plugin_folder()))
        self._outside.start("ulogd", "-c", str(config), stdout=subprocess.DEVNULL)
        self._heard = folder / "heard.jsonl"
        writer = stack.enter_context(self._heard.open("w"))
        self._outside.start(sys.executable, "-c", _SINK, OUTSIDE, str(PORT), stdout=writer)
        wait(lambda: "ready" in self._heard.read_text(), "the outside does not listen", 30)
        wait(lambda: self._attached() >= 2, "nobody reads the log", 30)

    def _attached(self) -> int:
        """How many groups of the log somebody listens to."""
        return len(self._outside("cat", "/proc/self/net/netfilter/nfnetlink_log").stdout.splitlines())

    def heard(self) -> list[dict[str, Any]]:
        """What the outside itself heard, of whom: the truth."""
        return [json.loads(line) for line in self._heard.read_text().splitlines()[1:]]

    def settled(self, connections: int) -> None:
        """Waits until every log holds that many connections."""
        logs = {"firewall.log": "egress-watch", "firewall.json": "egress-watch", "nat.log": "[NEW]"}
        for name, mark in logs.items():
            path = self.folder / name
            wait(lambda path=path, mark=mark: path.read_text().count(mark) >= connections, f"{name} is short", 30)  # type: ignore[misc]


def _cable(one: Space, name: str, address: str, other: Space, far: str, there: str) -> None:
    subprocess.run(
        [
            "ip",
            "link",
            "add",
            name,
            "netns",
            str(one.pid),
            "type",
            "veth",
            "peer",
            "name",
            far,
            "netns",
            str(other.pid),
        ],
        check=True,
    )
    for space, device, own in ((one, name, address), (other, far, there)):
        space("ip", "address", "add", own, "dev", device)
        space("ip", "link", "set", device, "up")


@contextlib.contextmanager
def wired(folder: Path, nodes: int) -> Iterator[Wire]:
    with contextlib.ExitStack() as stack:
        yield Wire(folder, stack, nodes)

"""nftables as a ceiling over calls: what a call's sockets may send, whatever got around seccomp. Runs in supervisor.

One table of family inet, owned by a netlink socket of this process: nobody else can change or flush it, and with the
supervisor it is gone, however that ends. Its one hook looks at the control group a packet's socket was made in, and
lets pass what is of no call. It sees every packet that leaves this network namespace, a hundred nanoseconds each, so it
is there only where it was asked for (``RAY_GUARD_NFTABLES=1`` in the environment of the first target), and then nothing
starts without it.

It does not cap bytes. A ``quota`` counts headers and what is sent again, so it would stop a call before its cap or far
behind it; under a byte cap a call's flows go by the relay, which stops on the byte, and here its own sockets reach
nothing but the relay. What AF_PACKET sends passes no such hook; that takes CAP_NET_RAW, which no tool has.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ray_guard.kernel import cgroup, libc, nftables
from ray_guard.kernel.nftables import Table
from ray_guard.policy.ceiling import Ceiling, ceiling
from ray_guard.records import Mode
from ray_guard.supervisor.leaf import Leaf, OwnLeaf, place

VARIABLE: Final = "RAY_GUARD_NFTABLES"
_SETS: Final = {Ceiling.NOTHING: "silent", Ceiling.GUARD: "guarded"}
_LED_S: Final = 150
"""Longer than the kernel tries to connect a socket."""
_OUTPUT, _GUARDED, _DOORS = "output", "guard_only", "doors"


def asked() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


class Ceilings:
    """Those of all calls.

    Args:
        ports: where the guard itself listens on loopback; asked when :meth:`changed` is called.

    Raises:
        OSError: nftables is not for this process, or not in this kernel.
    """

    def __init__(self, ports: Callable[[], Iterable[int]]) -> None:
        self._ports = ports
        self._open: frozenset[int] = frozenset()
        self._levels: set[int] = set()
        self._over: dict[str, Ceiling] = {}
        self._table = table = Table(f"ray_guard-{os.getpid()}-{os.urandom(3).hex()}")
        sets = [table.set_of(name, nftables.GROUP, number) for number, name in enumerate(_SETS.values(), 1)]
        chains = [table.chain(_OUTPUT, at_output=True), table.chain(_GUARDED, at_output=False)]
        accept, drop = nftables.accept(), nftables.drop()
        rules = [
            table.rule(_GUARDED, nftables.off_loopback(), drop),
            # What is connected to the guard was led there, maybe to a port that is somebody else's by now.
            table.rule(_GUARDED, nftables.in_connection(), accept),
            table.rule(_GUARDED, nftables.to_port(socket.IPPROTO_TCP, _DOORS), accept),
            table.rule(_GUARDED, nftables.to_port(socket.IPPROTO_UDP, _DOORS), accept),
            table.rule(_GUARDED, drop),
        ]
        table.commit([*sets, table.set_of(_DOORS, nftables.PORT, len(sets) + 1), *chains, *rules])

    def put(self, leaf: Leaf | None, wires: Iterable[Mapping[str, Any]], *, exact: bool) -> None:
        """Puts that of these policies over all that is in ``leaf``, before anything runs there.

        Args:
            wires, exact: see :func:`ray_guard.policy.ceiling.ceiling`.

        Raises:
            OSError: it cannot be there.
        """
        if leaf is None:
            raise OSError("the call has no control group")
        what = ceiling(wires, exact=exact)
        if what is Ceiling.OPEN:
            return
        self.changed()
        level = _level(leaf)
        messages = [self._table.add(_SETS[what], [_key(leaf)])]
        if level not in self._levels:
            for name, end in (("silent", nftables.drop()), ("guarded", nftables.go_to(_GUARDED))):
                messages.append(self._table.rule(_OUTPUT, nftables.in_group(level, name), end))
        self._table.commit(messages)
        self._levels.add(level)
        self._over[leaf.path] = what

    def lift(self, leaf: Leaf) -> None:
        """The call has ended. Raises OSError."""
        what = self._over.pop(leaf.path, None)
        if what is not None:
            self._table.commit([self._table.remove(_SETS[what], [_key(leaf)])])

    def changed(self) -> None:
        """The guard listens elsewhere, too. Raises OSError."""
        more = frozenset(self._ports()) - self._open
        if more:
            self._table.commit([self._table.add(_DOORS, [struct.pack(">H", port) for port in more])])
            self._open |= more

    def led(self, port: int) -> None:
        """A socket is about to be led to that port of the guard's, for once. Raises OSError."""
        self._table.commit([self._table.add(_DOORS, [struct.pack(">H", port)], seconds=_LED_S)])

    def close(self) -> None:
        self._table.close()


def _key(leaf: Leaf) -> bytes:
    return struct.pack("=Q", os.stat(leaf.path).st_ino)


def _level(leaf: Leaf) -> int:
    """How far below the root of the hierarchy, as this control group namespace sees it."""
    where, root = cgroup.mounts()[""]
    path = f"{root.rstrip('/')}/{leaf.path.removeprefix(where)}"
    return sum(bool(part) for part in path.split("/"))


# -- the trial ---------------------------------------------------------------------------------------------------------


def probe() -> str:
    """Tries it in a network namespace of its own: a process in a leaf reaches a socket there, and then no more.

    Raises:
        OSError: it cannot be had here.
        ValueError: it lets something pass, or stops what it should not.
    """
    if not place():
        raise OSError("no control group of version 2 can be made here")
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            signal.alarm(10)
            code = _trial()
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 254:
        raise ValueError("packets of a call are not told from others")
    if code:
        raise OSError(code, os.strerror(code) if 0 < code < 255 else "the trial ended early")
    switched = "on" if asked() else f"off: {VARIABLE}=1 in the environment of what starts first switches it on"
    return f"a call's own sockets send nothing past the guard; {switched}"


def _trial() -> int:
    libc.unshare(_CLONE_NEWNET)
    _raise_loopback()
    leaf = OwnLeaf(place())
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
            sink.bind(("127.0.0.1", 0))
            sink.setblocking(False)
            ceilings = Ceilings(tuple)
            seen = [_arrives(leaf, sink)]
            ceilings.put(leaf, [_trial_policy()], exact=False)
            seen.append(_arrives(leaf, sink))
            ceilings.lift(leaf)
            ceilings.put(leaf, [_trial_policy("name.invalid:443")], exact=False)
            seen.append(_arrives(leaf, sink))
            ceilings.close()
            seen.append(_arrives(leaf, sink))
    finally:
        leaf.close()
    return 0 if seen == [True, False, False, True] else 254


def _trial_policy(*allow: str) -> dict[str, Any]:
    return {"mode": Mode.ENFORCE.value, "egress": {"allow": allow, "listen": ()}}


_CLONE_NEWNET: Final = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        (flags,) = struct.unpack_from("=H", fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("=16s24x", b"lo")), 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("=16sH22x", b"lo", flags | 1))


def _arrives(leaf: OwnLeaf, sink: socket.socket) -> bool:
    """Whether a datagram does that a process in ``leaf`` sends."""
    pid = leaf.fork()
    if pid == 0:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", sink.getsockname())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if not leaf.joined:
        raise OSError("no process can be started in a control group here")
    try:
        return bool(sink.recv(1))
    except BlockingIOError:
        return False

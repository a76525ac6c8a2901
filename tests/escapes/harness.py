"""The escape suite's stage: sinks that count what arrives, confined hosts that attacks run in, and the verdict.

An attack is a small program. It is run unconfined first, where it must succeed (else the test proves nothing), then in
the actor ring (a child of a process that called ``confine``) and in the call ring (``ray_guard.run``), where it must
fail; with ``--peers`` in other sandboxes too, where whatever happens is only told. The judge stands outside: what the
sinks saw, whether the victim lives; the attacker's own word counts for nothing but the error it was given.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "hosts"))

sys.path.insert(0, str(FOLDER))

import launcher  # noqa: E402 - tests are no package
import peers  # noqa: E402
from table import PEERS, TABLE, Cell, Column, Verdict, column  # noqa: E402

PRELUDE = (FOLDER / "prelude.py").read_text()
ROOT = os.geteuid() == 0
PYTHON = sys.executable


# ---------------------------------------------------------------------------------------------------------------------
# sinks


class Sinks:
    """Everything an attack may try to reach, served by one thread that records what arrives.

    ``tcp``, ``udp``: never granted. ``granted``: TCP, granted. All listen on every loopback address, IPv4 and IPv6.
    ``unix``, ``unix_dgram``, ``unix_seq``: sockets by path, never granted; ``unix_granted``; ``abstract`` (stream) and
    ``abstract_dgram`` by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._events: list[tuple[str, bytes | None]] = []
        self._markers: deque[bytes] = deque(maxlen=4)  # the last ones: what comes late comes soon
        self._sockets: dict[str, socket.socket] = {}
        self._add("tcp", _inet(socket.SOCK_STREAM))
        self._add("granted", _inet(socket.SOCK_STREAM))
        self._add("udp", _inet(socket.SOCK_DGRAM))
        self._add("granted_udp", _inet(socket.SOCK_DGRAM))
        kinds = {"unix": socket.SOCK_STREAM, "unix_dgram": socket.SOCK_DGRAM, "unix_seq": socket.SOCK_SEQPACKET}
        for name, kind in {**kinds, "unix_granted": socket.SOCK_STREAM}.items():
            self._add(name, _unix(str(folder / name), kind))
        self._add("abstract", _unix(f"\0ray_guard_{secrets.token_hex(6)}", socket.SOCK_STREAM))
        self._add("abstract_dgram", _unix(f"\0ray_guard_{secrets.token_hex(6)}", socket.SOCK_DGRAM))
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _add(self, name: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sockets[name] = sock
        self._selector.register(sock, selectors.EVENT_READ, (name, sock))

    def address(self, name: str) -> Any:
        """A port, a path, or an abstract name (with its NUL as \\0)."""
        where = self._sockets[name].getsockname()
        if isinstance(where, tuple):
            return where[1]
        return where.decode() if isinstance(where, bytes) else where

    def addresses(self) -> dict[str, Any]:
        return {name: self.address(name) for name in self._sockets}

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                name, sock = key.data
                try:
                    if sock.type != socket.SOCK_DGRAM and sock is self._sockets[name]:
                        accepted, _ = sock.accept()
                        self._note(name, None)
                        accepted.setblocking(False)
                        self._selector.register(accepted, selectors.EVENT_READ, (name, accepted))
                        continue
                    data = sock.recv(1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if data:
                    self._note(name, data)
                elif sock is not self._sockets[name]:
                    self._selector.unregister(sock)
                    sock.close()

    def _note(self, name: str, data: bytes | None) -> None:
        with self._lock:
            if data is None or not any(marker in data for marker in self._markers):
                self._events.append((name, data))

    # -- asking --------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        with self._lock:
            self._events.clear()

    def seen(self, name: str) -> tuple[int, bytes]:
        """(connections, bytes) that have arrived at ``name`` since :meth:`clear`."""
        with self._lock:
            events = [data for at, data in self._events if at == name]
        return sum(data is None for data in events), b"".join(data for data in events if data is not None)

    def flush(self, name: str) -> None:
        """Returns once all that was sent to ``name`` before has been recorded: a marker of our own comes after it."""
        marker = secrets.token_bytes(16)
        listening = self._sockets[name]
        where = self.address(name)
        family = socket.AF_INET if isinstance(where, int) else socket.AF_UNIX
        with socket.socket(family, listening.type) as sock:
            sock.connect(("127.0.0.1", where) if isinstance(where, int) else where)
            sock.send(marker)

            def arrived() -> bool:
                if marker in self.seen(name)[1]:
                    return True
                if listening.type == socket.SOCK_DGRAM:  # one that comes while the queue is full is lost
                    sock.send(marker)
                return False

            wait(arrived, f"the marker did not reach {name}")
        with self._lock:  # neither the marker nor its own connection counts, nor what comes of it later
            self._markers.append(marker)
            self._events = [(at, data) for at, data in self._events if data is None or marker not in data]
            if listening.type != socket.SOCK_DGRAM:
                self._events.remove((name, None))

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._wake.close()


def _inet(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        sock.listen(512)
    return sock


def _unix(path: str, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if kind != socket.SOCK_DGRAM:
        sock.listen(64)
    return sock


def wait(condition: Callable[[], Any], what: str, seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(what)
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------------
# confined hosts


@functools.cache
def _may_have_namespaces() -> bool:
    """Whether an ordinary user gets a mount namespace, in a user namespace of its own."""
    if launcher.current() not in ("", "unprivileged"):  # what simulates a host does not reach into it
        return False
    command = ["unshare", "--user", "--map-current-user", "--mount", "true"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def has_own_supervisors() -> bool:
    """Whether each :class:`Namespace` has a supervisor that nobody else uses."""
    return ROOT or _may_have_namespaces()


class Namespace:
    """A mount namespace of our own: a supervisor belongs to a set of namespaces, and ours must be nobody else's.

    Where an ordinary user gets none the user's own supervisor is used: nobody else should use it then.
    """

    def __init__(self, *, network: bool = False) -> None:
        self.prefix: list[str] = []
        self.close: Callable[[], object] = lambda: None
        if has_own_supervisors():
            flags = ["-m", *(["-n"] if network else [])]
            made, entered = (
                (flags, flags)
                if ROOT
                else (["-U", "--map-current-user", *flags], ["-U", "--preserve-credentials", *flags])
            )
            within = launcher.prefix()  # in the mount namespace that it makes, if it makes one
            holder = subprocess.Popen(
                ["unshare", *made, "--propagation", "private", *within, "sh", "-c", "echo; exec sleep 1000"],
                stdout=subprocess.PIPE,
            )
            self.close = weakref.finalize(self, _end, holder)  # also where whoever made it has been skipped
            assert holder.stdout is not None
            holder.stdout.readline()
            self.prefix = ["nsenter", "-t", str(holder.pid), *entered, f"--wdns={os.getcwd()}"]
        self.outside = list(self.prefix)
        """The same, but not on the simulated host: that may refuse to mount what a test needs."""
        self.prefix += launcher.prefix()  # RAY_GUARD_TEST_HOST: all that is started here runs on a simulated host


def _end(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.communicate()


def for_somebody_else() -> bool:
    """Whether root has what it confines started as an ordinary user."""
    return ROOT and launcher.current() in launcher.UNPRIVILEGED


def open_up(folder: Path) -> None:
    """Lets everybody write in ``folder``, where root makes it for somebody else."""
    if not for_somebody_else():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for each in (folder, *folder.parents):
        status = each.stat()
        if status.st_uid == 0 and each != Path("/"):
            each.chmod(status.st_mode | (0o777 if each == folder else 0o011))


class Host:
    """A process confined under ``policy``, which runs what it is told: see host.py."""

    def __init__(
        self, policy: dict[str, Any], evidence: Path, namespace: Namespace, python: tuple[str, ...] = (PYTHON,)
    ) -> None:
        self.evidence = evidence
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(evidence), "PYTHONWARNINGS": "ignore"}
        if for_somebody_else():
            open_up(evidence.parent)
            environment |= {"HOME": str(evidence.parent), "XDG_STATE_HOME": str(evidence.parent)}
            environment.pop("XDG_RUNTIME_DIR", None)
        self._process = subprocess.Popen(
            [*namespace.prefix, *python, str(FOLDER / "host.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            bufsize=1,
        )
        about = self._ask({"policy": policy})
        if "error" in about:
            self.close()
            skip_refused(about["error"])
            raise RuntimeError(about["error"])
        self.pid: int = about["pid"]
        self.supervisor: int = about["supervisor"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question) + "\n")
        patience = float(question.get("timeout", 20.0)) + 10.0
        if not select.select([stdout], [], [], patience)[0]:
            self._process.kill()
            raise AssertionError(f"the confined host does not answer: {question}")
        line = stdout.readline()
        if not line:
            raise AssertionError(f"the confined host died (status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(
        self, ring: str, argv: list[str], *, timeout: float = 20.0, tool: str = "attack", folder: Path | None = None
    ) -> Outcome:
        """Runs ``argv`` in ``ring``: ``actor`` (a child of the confined process) or ``call`` (``ray_guard.run``).

        Args:
            folder: the working folder; the confined process's own where there is none.
        """
        where = None if folder is None else str(folder)
        return Outcome.of(self._ask({"ring": ring, "argv": argv, "timeout": timeout, "tool": tool, "folder": where}))

    def inside(self, code: str, **arguments: Any) -> Any:
        """Executes ``code`` within the confined process itself; what it leaves in ``result`` comes back."""
        answer = self._ask({"ring": "inside", "code": code, "arguments": arguments})
        if "error" in answer:
            skip_refused(answer["error"])
            raise AssertionError(answer["error"])
        return answer["result"]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def journal(self) -> list[dict[str, Any]]:
        """Every span in the evidence folder, flattened: name, ids, attributes, status, whether it has ended."""
        return read_journal(self.evidence)

    def close(self) -> None:
        hang_up(self._process, 10)


def hang_up(process: subprocess.Popen[Any], patience: float) -> None:
    """Ends a process that ends with its standard input, or kills it after so many seconds."""
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:
            pass
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def skip_refused(error: str) -> None:
    """On a simulated host the guard may refuse, by name, what it cannot hold there."""
    host = launcher.current()
    _, refused, said = error.rpartition("not enforced: ")
    if refused and any(word in said for word in launcher.missing(host)):
        pytest.skip(f"refused on {host}: {said.splitlines()[0]}")


UNREADABLE = "memory of an actor's children"
"""What Yama keeps from the supervisor: nothing that such a child asks for is granted."""


def lacks(what: str) -> bool:
    """Whether ``what`` (words of launcher.missing) is not there on the host that tests run on."""
    return what in launcher.missing(launcher.current())


def needs(what: str) -> pytest.MarkDecorator:
    """For a test of something that takes ``what``."""
    return pytest.mark.skipif(lacks(what), reason=f"{launcher.current()}: {what} missing")


def skip_without(what: str) -> None:
    """:func:`needs`, for a test of which only a part does."""
    if lacks(what):
        pytest.skip(f"{launcher.current()}: {what} missing")


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and the last JSON line it printed."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    said: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Outcome:
        if "error" in answer:
            skip_refused(answer["error"])
            raise AssertionError(answer["error"])
        said: dict[str, Any] = {}
        for line in answer["stdout"].splitlines():
            if line.startswith("{"):
                said.update(json.loads(line))
        return cls(answer["status"], answer["stdout"], answer["stderr"], answer["seconds"], said)


def run_unconfined(argv: list[str], timeout: float = 20.0, folder: str | None = None) -> Outcome:
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, cwd=folder)
    return Outcome.of(
        {
            "status": done.returncode,
            "stdout": done.stdout,
            "stderr": done.stderr,
            "seconds": time.monotonic() - began,
        }
    )


def read_journal(folder: Path) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.otlp.jsonl")):
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # the supervisor may be writing another at this moment
        for line in whole.splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    for span in scope["spans"]:
                        merged[span["traceId"], span["spanId"]] = {
                            "name": span["name"],
                            "id": span["spanId"],
                            "parent": span.get("parentSpanId") or None,
                            "ended": "endTimeUnixNano" in span,
                            "start": int(span["startTimeUnixNano"]),
                            "attributes": {a["key"]: _value(a["value"]) for a in span.get("attributes", ())},
                        }
    return list(merged.values())


def _value(value: dict[str, Any]) -> Any:
    ((kind, found),) = value.items()
    if kind == "arrayValue":
        return [_value(each) for each in found.get("values", ())]
    return int(found) if kind == "intValue" else found


# ---------------------------------------------------------------------------------------------------------------------
# attacks


@dataclass(frozen=True)
class Attack:
    """A named way out.

    Args:
        name: what it is called in the report.
        program: Python, after prelude.py; or C where it begins with ``#include``.
        sink: where the token would arrive; ``""``: ``judge`` tells.
        refused: the errors (by name) of which the confined program must report one; empty: whatever it says, the sink
            decides alone.
        rings: where it applies: ``actor``, ``call``; with ``_udp``, ``_wide`` or ``_nothing`` under another policy.
        judge: for what no sink can see: called with what the program was told, says what harm was done, or "".
        sends: whether data must arrive; False: that a connection was made is the harm.
        beside: what happens outside while it runs: called with what the program was told.
        surface: what is judged is that a mechanism is within reach, not that something got out by it.
        privileged: it needs root even unconfined.
        elsewhere: why it cannot be tried in other sandboxes; "": it can.
        flags: for the compiler, where the program is C.
        family: its part of the table; "": what :func:`cases` is told.
    """

    name: str
    program: str
    sink: str = "tcp"
    refused: tuple[str, ...] = ()
    rings: tuple[str, ...] = ("actor", "call", "actor_udp")
    judge: Callable[[dict[str, Any]], str] | None = None
    sends: bool = True
    beside: Callable[[dict[str, Any]], AbstractContextManager[object]] = nullcontext
    surface: bool = False
    privileged: bool = False
    elsewhere: str = ""
    flags: tuple[str, ...] = ()
    family: str = ""

    def __str__(self) -> str:
        return self.name


class CannotBuild(Exception):
    """A program in C that this host has no compiler, or no library, for."""


def grants(folder: Path) -> dict[str, list[str]]:
    """``files`` with its defaults, and ``folder``: for what an attack is given to work with."""
    return {"read": ["system", "env", "cwd", str(folder)], "write": ["cwd", "scratch", str(folder)]}


def host_in(folder: Path, policy: dict[str, Any], namespace: Namespace) -> Host:
    """A confined process whose tools may work in ``folder``, with its evidence beside it."""
    return Host({"files": grants(folder), **policy}, folder.with_name(f"{folder.name}_evidence"), namespace)


class Stage:
    """Sinks and hosts of one session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sinks = Sinks(folder)
        self.namespace = Namespace()
        self._hosts: dict[str, Host] = {}
        self._compiled: dict[str, str] = {}
        self._peers: dict[Column, str] = {}
        self.programs = folder / "programs"
        self.programs.mkdir()

    def policy(self, name: str = "plain") -> dict[str, Any]:
        """``plain``: TCP and a unix socket; ``udp``: UDP too; ``wide``: every address, TCP; ``nothing``."""
        if name == "nothing":
            return {"egress": {"allow": []}, "files": grants(self.folder)}
        port = self.sinks.address("granted")
        allow = [f"127.0.0.1:{port}", f"[::1]:{port}", f"unix://{self.sinks.address('unix_granted')}"]
        if name == "udp":
            allow.append(f"udp://127.0.0.1:{self.sinks.address('granted_udp')}")
        if name == "wide":
            allow += [f"{network}:{self.sinks.address('tcp')}" for network in ("0.0.0.0/0", "[::/0]")]
        return {"egress": {"allow": allow}, "files": grants(self.folder)}

    def evidence(self, name: str) -> Path:
        """Beside the stage's folder, not in it: what lies around evidence cannot be granted whole."""
        return self.folder.with_name(f"{self.folder.name}_evidence_{name}")

    def host(self, name: str = "plain") -> Host:
        """A confined process under the policy of that name (:meth:`policy`); a new one where the last has ended."""
        host = self._hosts.get(name)
        if host is not None and not host.alive:
            host.close()
            host = None
        if host is None:
            host = self._hosts[name] = Host(self.policy(name), self.evidence(name), self.namespace)
        return host

    def require_peer(self, peer: Column) -> None:
        """Skips where another sandbox is not there or does not work, and the table says so."""
        if peer not in self._peers:
            grant = peers.Grant(peers.programs(), [str(self.folder)], ["tcp://127.0.0.1:1"])
            self._peers[peer] = peers.missing(peer, grant)
        if self._peers[peer]:
            TABLE.missing[peer] = self._peers[peer]
            pytest.skip(f"{peer}: {self._peers[peer]}")

    def peer_command(self, peer: Column, attack: Attack, argv: list[str], arguments: dict[str, Any]) -> list[str]:
        """The attack as a command within another sandbox: see :meth:`require_peer`."""
        self.require_peer(peer)
        port = self.sinks.address("granted")
        destinations = [f"tcp://127.0.0.1:{port}", f"tcp://[::1]:{port}"]
        if all(ring.endswith("_nothing") for ring in attack.rings):
            destinations = []
        if any(ring.endswith("_udp") for ring in attack.rings):
            destinations.append(f"udp://127.0.0.1:{self.sinks.address('granted_udp')}")
        readable = [*peers.programs(), str(self.programs)]
        return peers.command(peer, argv, peers.Grant(readable, [str(arguments["folder"])], destinations))

    def argv(self, attack: Attack, arguments: dict[str, Any]) -> list[str]:
        """The attack as a command."""
        told = json.dumps(arguments)
        if attack.program.lstrip().startswith("#include"):
            return [self.compile(attack.name, attack.program, attack.flags), told, *_flat(arguments)]
        return [PYTHON, "-I", "-S", "-c", PRELUDE + attack.program + EPILOGUE, told]

    def compile(self, name: str, source: str, flags: tuple[str, ...] = ()) -> str:
        """The program's path. Raises CannotBuild where this host has not what is needed for it."""
        if name not in self._compiled:
            binary = self.programs / re.sub(r"\W+", "_", name)
            command = ["gcc", "-O1", "-D_GNU_SOURCE", "-pthread", *flags, "-x", "c", "-o", str(binary), "-"]
            try:
                done = subprocess.run(command, input=source, text=True, capture_output=True)
            except FileNotFoundError as error:
                raise CannotBuild("no gcc") from error
            if done.returncode != 0:
                if not flags:
                    raise AssertionError(done.stderr)
                raise CannotBuild(f"gcc {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
            self._compiled[name] = str(binary)
        return self._compiled[name]

    def arguments(self) -> dict[str, Any]:
        folder = self.folder / secrets.token_hex(4)
        folder.mkdir()
        return {"token": secrets.token_hex(8), "folder": str(folder), **self.sinks.addresses()}

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
        self.namespace.close()
        self.sinks.close()


EPILOGUE = "\nfinish(main)\n"


def _flat(arguments: dict[str, Any]) -> list[str]:
    """What C programs are told: token, folder, ports of tcp, udp and granted, paths of unix and unix_dgram."""
    return [str(arguments[name]) for name in ("token", "folder", "tcp", "udp", "granted", "unix", "unix_dgram")]


_POLICIES = ("udp", "wide", "nothing")
_RINGS = {ring: (ring, "plain") for ring in ("actor", "call")}
_RINGS |= {f"{ring}_{policy}": (ring, policy) for ring in ("actor", "call") for policy in _POLICIES}
"""Each ring as (where Host.run runs it, under which of the stage's policies)."""


def escape(stage: Stage, attack: Attack, ring: str) -> None:
    """Runs ``attack`` unconfined and in ``ring``, judges both, and notes them. The one assertion of the suite.

    ``ring`` may be another sandbox's name: what happens there is noted, and fails nothing.
    """
    where = column(ring)
    note = partial(TABLE.note, attack.family, attack.name)
    if attack.privileged and not ROOT:
        for each in (Column.UNCONFINED, where):
            note(each, Cell(Verdict.INAPPLICABLE, "needs root even unconfined"))
        pytest.skip(f"{attack.name}: needs root even unconfined")
    try:
        missing = _must_succeed(stage, attack)
    except AssertionError as error:
        note(Column.UNCONFINED, Cell(Verdict.INAPPLICABLE, f"does not work unconfined: {error}"))
        raise
    except CannotBuild as error:
        for each in (Column.UNCONFINED, where):
            note(each, Cell(Verdict.INAPPLICABLE, f"cannot be built here: {error}"))
        pytest.skip(f"{attack.name}: cannot be built here: {error}")
    unproved = Cell(Verdict.INAPPLICABLE, f"unconfined: {missing}")
    note(Column.UNCONFINED, unproved if missing else Cell(Verdict.WORKS))
    if where in PEERS and (missing or attack.elsewhere):
        note(where, unproved if missing else Cell(Verdict.INAPPLICABLE, attack.elsewhere))
        return
    outcome, harm = _attempt(stage, attack, ring)
    shown = f"{ring}: {outcome.said or outcome.stderr[-2000:] or outcome.status}"
    ran = bool(outcome.said) or outcome.status is None or _killed_by(outcome.status) > 0
    if harm:
        note(where, Cell(Verdict.OPEN if attack.surface else Verdict.ESCAPED, harm))
    elif missing:
        note(where, unproved)
    elif ran:
        note(where, Cell(Verdict.BLOCKED, _how(outcome)))
    else:
        note(where, Cell(Verdict.INAPPLICABLE, f"did not run in {where}: {outcome.stderr.strip()[-200:]}"))
    if where in PEERS:
        return
    assert not harm, f"ESCAPED: {harm}; {shown}"
    assert ran, f"the attack did not even start: {shown}"
    if attack.refused:
        # all that is said of a socket that is connected, where it cannot be taken
        otherwise = ["EISCONN"] if lacks("pidfd_getfd") else []
        if ring.startswith("actor") and lacks(UNREADABLE):
            otherwise.append("EPERM")
        assert outcome.said.get("errno") in (*attack.refused, *otherwise), f"not refused as it should be: {shown}"
    if missing:
        pytest.skip(f"{attack.name}: refused, but proves nothing here: unconfined it says {missing}")


def _attempt(stage: Stage, attack: Attack, ring: str) -> tuple[Outcome, str]:
    """How the attack ended in ``ring``, and what harm it did there; "": none."""
    arguments = stage.arguments()
    if attack.sink:  # what the unconfined run sent may still be queued
        stage.sinks.flush(attack.sink)
    stage.sinks.clear()
    argv = stage.argv(attack, arguments)
    inside, host = _RINGS.get(ring, ("", ""))
    confined = stage.host(host) if host else None
    if confined is None:
        argv = stage.peer_command(column(ring), attack, argv, arguments)
    with attack.beside(arguments):
        outcome = run_unconfined(argv, folder=arguments["folder"]) if confined is None else confined.run(inside, argv)
    if attack.sink:
        stage.sinks.flush(attack.sink)
        connections, data = stage.sinks.seen(attack.sink)
        if connections or data:
            return outcome, f"{attack.sink} saw {connections} connections, {data[:64]!r}"
    return outcome, attack.judge(arguments) if attack.judge is not None else ""


def _how(outcome: Outcome) -> str:
    """What the attack was told, in a word."""
    if "errno" in outcome.said:
        return str(outcome.said["errno"])
    if "killed" in outcome.said:
        return "killed"
    if outcome.status is None:
        return "waits for ever"
    number = _killed_by(outcome.status)
    return f"killed by signal {number}" if number else ""


def _killed_by(status: int) -> int:
    """The signal that ended a program, as subprocess or a shell says it; 0: none."""
    if status < 0:
        return -status
    return status - 128 if 128 < status < 128 + signal.NSIG else 0


_succeeded: dict[tuple[str, str], str] = {}


def _must_succeed(stage: Stage, attack: Attack) -> str:
    """The positive control. Says what this host lacks for it; raises where the attack just does not work."""
    key = (attack.family, attack.name)
    if key in _succeeded:
        return _succeeded[key]
    arguments = stage.arguments()
    stage.sinks.clear()
    with attack.beside(arguments):
        outcome = run_unconfined(stage.argv(attack, arguments))
    missing = str(outcome.said.get("missing", ""))
    # A 32-bit program, to which even exit is refused, runs into its trap.
    refused = outcome.said.get("errno") in ("EPERM", "ENOSYS") or outcome.status == -signal.SIGILL
    if launcher.within() and lacks("pidfd_getfd") and refused:
        missing = f"{launcher.within()} refuses it to everybody"  # a container's profile is over this process too
    if not missing:
        shown = f"unconfined: {outcome.said or outcome.stderr[-2000:] or outcome.status}"
        if attack.sink:
            token = arguments["token"].encode()

            def arrived() -> bool:
                connections, data = stage.sinks.seen(attack.sink)
                return token in data if attack.sends else connections > 0 or bool(data)

            wait(arrived, f"the attack does not even work {shown}")
        if attack.judge is not None:
            assert attack.judge(arguments), f"the attack does not even work {shown}"
    _succeeded[key] = missing
    return missing


def cases(attacks: list[Attack], family: str = "") -> pytest.MarkDecorator:
    """One test per attack and ring it applies to, and per other sandbox (left out but with ``--peers``).

    Args:
        family: the part of the table; by default the module's name.
    """
    family = family or str(sys._getframe(1).f_globals["__name__"]).rpartition(".")[2].removeprefix("test_").replace(
        "_", " "
    )
    return pytest.mark.parametrize(
        ("attack", "ring"),
        [
            pytest.param(replace(attack, family=attack.family or family), str(ring), id=f"{attack.name}-{ring}")
            for attack in attacks
            for ring in (*attack.rings, *PEERS)
        ],
    )


def row(family: str, name: str) -> pytest.MarkDecorator:
    """A test that is no :class:`Attack` as a row of the table, in the column of its ``ring``, by default the call's."""
    return pytest.mark.escape_row(family, name)


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.close()

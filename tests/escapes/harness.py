"""The escape suite's stage: sinks that count what arrives, confined hosts that attacks run in, and the verdict.

An attack is a small program. It is run three times: unconfined, where it must succeed (else the test proves nothing),
then in the actor ring (a child of a process that called ``confine``) and in the call ring (``ray_guard.run``), where
it must fail. The judge stands outside: what the sinks saw, whether the victim lives; the attacker's own word counts
for nothing but the error it was given.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "hosts"))

import launcher  # noqa: E402 - tests are no package

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
            wait(lambda: marker in self.seen(name)[1], f"the marker did not reach {name}")
        with self._lock:  # the marker's own connection does not count
            events = self._events
            events.remove((name, next(data for at, data in events if at == name and data and marker in data)))
            if listening.type != socket.SOCK_DGRAM:
                events.remove((name, None))

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


class Namespace:
    """A mount namespace of our own: a supervisor belongs to a set of namespaces, and ours must be nobody else's.

    Without the right to make one (unprivileged) the user's own supervisor is used: nobody else should use it then.
    """

    def __init__(self, *, network: bool = False) -> None:
        self.prefix: list[str] = []
        self._holder: subprocess.Popen[bytes] | None = None
        if ROOT:
            flags = ["-m", *(["-n"] if network else [])]
            self._holder = subprocess.Popen(
                ["unshare", *flags, "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"],
                stdout=subprocess.PIPE,
            )
            assert self._holder.stdout is not None
            self._holder.stdout.readline()
            self.prefix = ["nsenter", "-t", str(self._holder.pid), *flags, f"--wdns={os.getcwd()}"]
        self.prefix += launcher.prefix()  # RAY_GUARD_TEST_HOST: all that is started here runs on a simulated host

    def close(self) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()


class Host:
    """A process confined under ``policy``, which runs what it is told: see host.py."""

    def __init__(
        self, policy: dict[str, Any], evidence: Path, namespace: Namespace, python: tuple[str, ...] = (PYTHON,)
    ) -> None:
        self.evidence = evidence
        self._process = subprocess.Popen(
            [*namespace.prefix, *python, str(FOLDER / "host.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "RAY_GUARD_EVIDENCE": str(evidence), "PYTHONWARNINGS": "ignore"},
            text=True,
            bufsize=1,
        )
        about = self._ask({"policy": policy})
        if "error" in about:
            self.close()
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

    def run(self, ring: str, argv: list[str], *, timeout: float = 20.0, tool: str = "attack") -> Outcome:
        """Runs ``argv`` in ``ring``: ``actor`` (a child of the confined process) or ``call`` (``ray_guard.run``)."""
        return Outcome.of(self._ask({"ring": ring, "argv": argv, "timeout": timeout, "tool": tool}))

    def inside(self, code: str, **arguments: Any) -> Any:
        """Executes ``code`` within the confined process itself; what it leaves in ``result`` comes back."""
        answer = self._ask({"ring": "inside", "code": code, "arguments": arguments})
        if "error" in answer:
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
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


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
            raise AssertionError(answer["error"])
        said: dict[str, Any] = {}
        for line in answer["stdout"].splitlines():
            if line.startswith("{"):
                said.update(json.loads(line))
        return cls(answer["status"], answer["stdout"], answer["stderr"], answer["seconds"], said)


def run_unconfined(argv: list[str], timeout: float = 20.0) -> Outcome:
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
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
        for line in path.read_bytes().splitlines():
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
        rings: where it applies.
        judge: for what no sink can see: called with what the program was told, says what harm was done, or "".
        sends: whether data must arrive; False: that a connection was made is the harm.
    """

    name: str
    program: str
    sink: str = "tcp"
    refused: tuple[str, ...] = ()
    rings: tuple[str, ...] = ("actor", "call", "actor_udp")
    judge: Callable[[dict[str, Any]], str] | None = None
    sends: bool = True
    privileged: bool = False

    def __str__(self) -> str:
        return self.name


def grants(folder: Path) -> dict[str, list[str]]:
    """``files`` with its defaults, and ``folder``: for what an attack is given to work with."""
    return {"read": ["system", "env", "cwd", str(folder)], "write": ["cwd", "scratch", str(folder)]}


class Stage:
    """Sinks and hosts of one session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sinks = Sinks(folder)
        self.namespace = Namespace()
        self._hosts: dict[str, Host] = {}
        self._compiled: dict[str, str] = {}

    def policy(self, *, udp: bool = False) -> dict[str, Any]:
        port = self.sinks.address("granted")
        allow = [f"127.0.0.1:{port}", f"[::1]:{port}", f"unix://{self.sinks.address('unix_granted')}"]
        if udp:
            allow.append(f"udp://127.0.0.1:{self.sinks.address('granted_udp')}")
        return {"egress": {"allow": allow}, "files": grants(self.folder)}

    def evidence(self, name: str) -> Path:
        """Beside the stage's folder, not in it: what lies around evidence cannot be granted whole."""
        return self.folder.with_name(f"{self.folder.name}_evidence_{name}")

    def host(self, name: str = "plain") -> Host:
        """The confined process ``plain`` (no UDP granted) or ``udp``; a new one where an attack has ended the last."""
        host = self._hosts.get(name)
        if host is None or not host.alive:
            try:
                host = Host(self.policy(udp=name == "udp"), self.evidence(name), self.namespace)
            except RuntimeError as error:
                if not launcher.prefix() or "NotEnforced" not in str(error):
                    raise
                pytest.skip(f"refuses to start on this host: {error}")
            self._hosts[name] = host
        return host

    def argv(self, attack: Attack, arguments: dict[str, Any]) -> list[str]:
        """The attack as a command."""
        told = json.dumps(arguments)
        if attack.program.lstrip().startswith("#include"):
            return [self.compile(attack.name, attack.program), told, *_flat(arguments)]
        return [PYTHON, "-I", "-S", "-c", PRELUDE + attack.program + EPILOGUE, told]

    def compile(self, name: str, source: str) -> str:
        if name not in self._compiled:
            binary = self.folder / name.replace(" ", "_")
            command = ["gcc", "-O1", "-pthread", "-Wall", "-x", "c", "-o", str(binary), "-"]
            done = subprocess.run(command, input=source, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
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


def escape(stage: Stage, attack: Attack, ring: str) -> None:
    """Runs ``attack`` unconfined and in ``ring``, and judges both. The one assertion of the suite."""
    if attack.privileged and not ROOT:
        pytest.skip(f"{attack.name}: needs root even unconfined")
    if ring not in attack.rings:
        pytest.skip(f"{attack.name}: does not apply to the {ring} ring")
    missing = _must_succeed(stage, attack)
    arguments = stage.arguments()
    if attack.sink:  # what the unconfined run sent may still be queued
        stage.sinks.flush(attack.sink)
    stage.sinks.clear()
    host = stage.host("udp" if ring == "actor_udp" else "plain")
    outcome = host.run("call" if ring == "call" else "actor", stage.argv(attack, arguments))
    shown = f"{ring}: {outcome.said or outcome.stderr[-2000:] or outcome.status}"
    if attack.sink:
        stage.sinks.flush(attack.sink)
        connections, data = stage.sinks.seen(attack.sink)
        assert (connections, data) == (0, b""), (
            f"ESCAPED: {attack.sink} saw {connections} connections, {data!r}; {shown}"
        )
    if attack.judge is not None:
        harm = attack.judge(arguments)
        assert not harm, f"ESCAPED: {harm}; {shown}"
    if attack.refused:
        connected = ("EISCONN",) if launcher.prefix() else ()  # all that is said there of a socket that is connected
        assert outcome.said.get("errno") in (*attack.refused, *connected), f"not refused as it should be: {shown}"
    if missing:
        pytest.skip(f"{attack.name}: refused, but proves nothing here: unconfined it says {missing}")


_succeeded: dict[str, str] = {}


def _must_succeed(stage: Stage, attack: Attack) -> str:
    """The positive control. Says what this host lacks for it; raises where the attack just does not work."""
    if attack.name in _succeeded:
        return _succeeded[attack.name]
    arguments = stage.arguments()
    stage.sinks.clear()
    outcome = run_unconfined(stage.argv(attack, arguments))
    missing = str(outcome.said.get("missing", ""))
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
    _succeeded[attack.name] = missing
    return missing


def cases(attacks: list[Attack]) -> pytest.MarkDecorator:
    """One test per attack and ring it applies to."""
    return pytest.mark.parametrize(
        ("attack", "ring"),
        [pytest.param(attack, ring, id=f"{attack.name}-{ring}") for attack in attacks for ring in attack.rings],
    )


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.close()

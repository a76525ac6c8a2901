"""The target's end of the line to its supervisor. Runs in target and driver.

Messages go as packets (:mod:`ray_guard.kernel.seqpacket`); what needs an answer brings its own way back, a socketpair
end that travels with the question, so that threads never share an answer and no reader thread is needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray_guard import errors
from ray_guard.client import boot
from ray_guard.client.identity import named_service
from ray_guard.errors import NotEnforced, SupervisorLost
from ray_guard.kernel import rendezvous, seqpacket

ANSWER_TIMEOUT_S: Final = 30.0

_PATIENCE_S: Final = 10.0
"""How long a supervisor that neither lets in nor ends is waited for."""
_LOOK_S: Final = 0.002
_DYING_S: Final = 0.5
"""How long a supervisor that was killed may still seem to be there."""
_NO_BYTES: Final = bytes(4)
#: what says where spans and checkpoints are exported to: each target's own
_EXPORT_ENVIRONMENT: Final = (
    "RAY_GUARD_EVIDENCE_",
    "OTEL_",
    "SSL_CERT_",
    "REQUESTS_CA_BUNDLE",
    "NO_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
)


class Channel:
    """One connection to the supervisor, for all threads of this process.

    Args:
        sock: connected SOCK_SEQPACKET socket.
        identity: attributes that every span of this process carries (``rl.run.id`` …).
    """

    def __init__(self, sock: socket.socket, identity: Mapping[str, str | int] | None = None) -> None:
        self._sock = sock
        self._unread = bytearray(_NO_BYTES)  # what is waiting, in bytes, as the kernel writes it
        self.lost = False
        self.acts = False
        """A violation ends more than the call that was refused (``on_violation``)."""
        self.account = ""
        """The id of this process's account, for other nodes."""
        self.quotas: dict[str, dict[str, float]] = {}
        """What the policy says of tokens and FLOPs, by scope."""
        self.leases = False
        """These limits hold on other nodes too."""
        self.identity: dict[str, str | int] = dict(identity or {})

    def take(self, answer: Mapping[str, Any]) -> None:
        """What the supervisor says of the policy that holds now."""
        self.acts = bool(answer["acts"])
        self.account, self.quotas = str(answer["account"]), dict(answer["quotas"])
        self.leases = bool(answer["leases"])

    def fileno(self) -> int:
        return self._sock.fileno()

    def send_packet(self, packet: bytes) -> None:
        """Sends one encoded message.

        Raises:
            SupervisorLost: nobody listens any more.
        """
        try:
            self._sock.send(packet, socket.MSG_NOSIGNAL)
        except OSError as error:
            self.lost = True
            raise SupervisorLost(f"the supervisor is gone: {error}") from error

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message that needs no answer."""
        self.send_packet(json.dumps(message, separators=(",", ":")).encode())

    def request(
        self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout: float | None = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        """Sends a question and waits for its answer (seconds; None: for ever).

        Raises:
            RayGuardError: whatever the supervisor refused it with.
            SupervisorLost: it is gone, or did not answer in time.
        """
        answer, passed = self.exchange(message, descriptors, timeout)
        seqpacket.close_all(passed)
        return answer

    def exchange(
        self, message: dict[str, Any], descriptors: Sequence[int] = (), timeout: float | None = ANSWER_TIMEOUT_S
    ) -> tuple[dict[str, Any], list[int]]:
        """:meth:`request`, with the descriptors that came with the answer."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                self.pass_on(message, [theirs.fileno(), *descriptors])
            ours.settimeout(timeout)
            return receive_answer(ours)

    def exchange_bare(self, message: dict[str, Any], timeout: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """:meth:`request` while sendmsg must not be used, because it may be notified with nobody there to answer.

        The answer comes on the line itself, so nothing else may be asked meanwhile: for the start of a target only.
        """
        self.send(message)
        self._sock.settimeout(timeout)
        try:
            answer, passed = receive_answer(self._sock)
        finally:
            self._sock.settimeout(None)
        seqpacket.close_all(passed)
        return answer

    def pass_on(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Sends a message with descriptors and waits for nothing."""
        try:
            seqpacket.send(self._sock, message, descriptors)
        except OSError as error:
            raise SupervisorLost(f"the supervisor is gone: {error}") from error

    def warnings(self) -> list[str]:
        """What the supervisor has to say unasked: limits that are almost reached. Never waits, never raises."""
        found: list[str] = []
        try:
            # Asked at the end of every call, and mostly in vain: a receive that fails costs ten times as much.
            while fcntl.ioctl(self._sock, termios.FIONREAD, self._unread) == 0 and self._unread != _NO_BYTES:
                received = seqpacket.receive(self._sock, socket.MSG_DONTWAIT)
                if received is None:
                    break
                found.append(str(received[0].get("warning")))
        except (OSError, seqpacket.BadPacket):
            pass  # another thread was quicker, or the supervisor is gone: the next message will say so
        return found

    def close(self) -> None:
        self._sock.close()


def receive_answer(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One answer from ``sock``, raising the error it names."""
    try:
        received = seqpacket.receive(sock)
    except TimeoutError as error:
        raise SupervisorLost("the supervisor did not answer in time") from error
    except (OSError, seqpacket.BadPacket) as error:
        raise SupervisorLost(f"the supervisor's answer is unusable: {error}") from error
    if received is None:
        raise SupervisorLost("the supervisor hung up")
    answer, passed = received
    if "error" in answer:
        seqpacket.close_all(passed)
        raise errors.from_wire(answer)
    return answer, passed


def export_environment() -> dict[str, str]:
    """The variables that say what is done with this process's evidence (``OTEL_EXPORTER_OTLP_*`` and around)."""
    return {key: value for key, value in os.environ.items() if key.upper().startswith(_EXPORT_ENVIRONMENT)}


def connect() -> Channel:
    """A channel to this node's supervisor, started if there is none yet.

    Raises:
        NotEnforced: it cannot be started here.
    """
    return Summons().connect()


class Summons:
    """A supervisor is there, or has been started: connecting waits for it, and much can be done meanwhile.

    Args:
        starts: how many tools are going to be started at once; a new supervisor prepares for them.
        supervise: the supervisor's ``main``, from a process that has only just begun: a copy of it can be the new one
            (:func:`ray_guard.client.boot.fork`).

    Raises:
        NotEnforced: it cannot be started here.
    """

    def __init__(self, *, starts: int = 0, supervise: boot.Main | None = None) -> None:
        self._starter: int | None = None
        deadline = time.monotonic() + _PATIENCE_S
        while (sock := rendezvous.connect()) is None:
            listener = rendezvous.bind()
            if listener is not None:
                with listener:
                    if supervise is not None and boot.may_fork():
                        self._starter = boot.fork(listener, starts, supervise)
                    else:
                        self._starter = boot.spawn(listener, starts)
                    sock = rendezvous.connect()
                break
            if time.monotonic() >= deadline:
                raise NotEnforced(["supervisor"], "one that lets nobody in does not end")
            time.sleep(_LOOK_S)  # one is leaving, or about to listen
        self._sock = sock

    def connect(self) -> Channel:
        """The channel. Call once. Raises NotEnforced: the supervisor could not be started."""
        sock = self._sock
        if self._starter is not None:
            try:
                _, status = os.waitpid(self._starter, 0)
            except ChildProcessError:
                # This process lets the kernel reap (as Ray's workers do where the raylet is a subreaper): how it ended
                # is not told, but a supervisor that is not there does not answer either.
                status = 0
            if status != 0:
                sock = None
        if sock is None:
            log = rendezvous.log_path()
            raise NotEnforced(["supervisor"], f"no supervisor can be started; its log is {log}")
        return Channel(sock)


class _Lines:
    """The lines of this process: its own, once it is confined, or that of an observer."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.own: Channel | None = None
        self.observer: Channel | None = None
        self.observed: tuple[str, str | None] | None = None
        """Where the observer's spans go, and of which run they are."""
        self.evidence: str | None = None
        self.about: dict[str, str] = {}

    def forked(self) -> None:
        # The child shares its parent's sockets. As an observer it is somebody else, and must say so on its own line.
        self.observer = None
        self.lock = threading.Lock()


_lines = _Lines()
os.register_at_fork(after_in_child=_lines.forked)


def current() -> Channel | None:
    """This process's channel; None: it is not guarded."""
    return _lines.own


def adopt(channel: Channel) -> None:
    """Makes ``channel`` this process's own, for good: called once, when it is confined."""
    _lines.own = channel
    # The interpreter's end closes the socket object while the process still runs, and a confined process that closes
    # its line is killed. This descriptor closes with the process itself, and stays over an exec.
    os.set_inheritable(os.dup(channel.fileno()), True)


def observe(evidence: str, *, job_id: str, node_id: str) -> None:
    """Says where the spans of this unguarded process (a driver) are journaled; ``RAY_GUARD_EVIDENCE`` comes first.

    ``job_id`` and ``node_id`` are Ray's, for its spans' resource.
    """
    _lines.evidence = evidence
    _lines.about = {"job_id": job_id, "node_id": node_id}


def observer() -> Channel | None:
    """A channel for an unguarded process whose spans should be journaled.

    None where neither ``RAY_GUARD_EVIDENCE`` nor :func:`observe` names a folder to write them to.
    """
    evidence = os.environ.get("RAY_GUARD_EVIDENCE") or _lines.evidence
    if not evidence:
        return None
    job = evidence, os.environ.get("RAY_GUARD_RUN_ID")  # a driver may have one after the other
    with _lines.lock:
        if _lines.observer is None or _lines.observer.lost or _lines.observed != job:
            if _lines.observer is not None:
                _lines.observer.close()  # what of the job before is still open is ended by the supervisor
                _lines.observer = None
            run = job[1] or f"run-{os.urandom(4).hex()}"
            identity = {"run_id": run, "service_name": named_service("driver"), **_lines.about}
            channel = _observe(
                {
                    "op": "hello",
                    "kind": "observer",
                    "pid": os.getpid(),
                    "identity": identity,
                    "evidence": os.path.abspath(evidence),
                    "export": export_environment(),
                }
            )
            channel.identity = {"rl.run.id": run}
            _lines.observer, _lines.observed = channel, job
        return _lines.observer


def _observe(hello: dict[str, Any]) -> Channel:
    """A channel on which ``hello`` was answered. One supervisor may have been killed, and not be gone yet."""
    deadline = time.monotonic() + _DYING_S
    while True:
        channel = connect()
        try:
            channel.request(hello)
        except BaseException as error:
            channel.close()
            if not isinstance(error, SupervisorLost) or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)
        else:
            return channel

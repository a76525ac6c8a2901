"""Confining the current process, all its threads and all it will start, for good. Runs in target.

Order matters: what cannot be confined is refused first (:func:`_obstacles`), then the supervisor agrees to the policy,
then the filter goes over all threads, and the listener is the supervisor's alone before any other code runs.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import platform
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from ray_guard.client import channel as channels
from ray_guard.client import places
from ray_guard.client.audit import install_audit
from ray_guard.client.carry import install_carriers
from ray_guard.client.channel import Channel
from ray_guard.client.identity import Identity, from_environment
from ray_guard.client.takeover import install_takeover
from ray_guard.egress import rings
from ray_guard.errors import NotEnforced
from ray_guard.kernel import libc, procfs, seccomp, syscalls
from ray_guard.records import Role

if TYPE_CHECKING:
    from ray_guard.policy.model import Policy

_INET = (socket.AF_INET, socket.AF_INET6)
_FREE_FAMILIES = (socket.AF_UNIX, socket.AF_NETLINK)


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """How the supervisor learns what belongs to this Ray cluster; told before any user code runs.

    Args:
        gcs_address: names the cluster.
        directory: command of the helper that reads its tables.
        environment: of that helper.
        endpoints: what is known already, (address, port).
        unix: Ray's session sockets.
        folders: folders whose sockets and files belong to Ray's control plane.
        listening: ports this process listens on for Ray.
        control: endpoints that no guarded process may reach (job API, client server …).
    """

    gcs_address: str
    directory: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    endpoints: tuple[tuple[str, int], ...] = ()
    unix: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    listening: tuple[int, ...] = ()
    control: tuple[tuple[str, int], ...] = ()

    def as_message(self) -> dict[str, Any]:
        return {
            "gcs_address": self.gcs_address,
            "directory": self.directory,
            "environment": self.environment,
            "endpoints": self.endpoints,
            "unix": self.unix,
            "folders": self.folders,
            "listening": self.listening,
            "control": self.control,
        }


class Wired(Protocol):
    """A policy, however it came: what matters here is its form in a message."""

    def to_wire(self) -> dict[str, Any]: ...


_INTEGRATIONS: Final = ("ray_guard.integrations.vllm.watch", "ray_guard.integrations.rock")
"""What waits in every confined process for a library that it hooks. By name: they stand above this layer."""

_lock = threading.Lock()
_policies: list[dict[str, Any]] = []


def confine(policy: Policy | Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Confines this process, its threads and everything it will ever start, for good.

    Inside a confined process the policy is intersected with the one that holds already.

    Args:
        policy: a :class:`Policy`, a mapping of its keys, or the path of a file.

    Raises:
        PolicyError: the policy cannot be meant.
        NotEnforced: something it asks for cannot be enforced here; nothing has changed.
    """
    # Loaded only here: a worker that takes its policy from the job's registry starts without its reader.
    from ray_guard.policy.plain import wire_of

    _enter_as(wire_of(policy), from_environment("ray_guard"), None)


def policies() -> tuple[dict[str, Any], ...]:
    """The policies this process is confined under, as messages; none: it is not confined."""
    return tuple(_policies)


def enter(policy: Wired, identity: Identity, *, cluster: ClusterAccess | None = None) -> Channel:
    """:func:`confine` for an actor: says who it is and how its cluster is found.

    Raises:
        NotEnforced: see :func:`confine`.
    """
    return _enter_as(policy.to_wire(), identity, cluster)


def _enter_as(wire: dict[str, Any], identity: Identity, cluster: ClusterAccess | None) -> Channel:
    with _lock:
        known = channels.current()
        if known is not None:
            known.take(known.request({"op": "tighten", "policy": wire}))
            _policies.append(wire)
            _take_over(wire)
            _hook_libraries()
            return known
        channel = _enter(wire, identity, cluster)
        _policies.append(wire)
        channels.adopt(channel)
    install_carriers()
    install_audit()
    _take_over(wire)
    _hook_libraries()
    return channel


def _hook_libraries() -> None:
    for name in _INTEGRATIONS:
        importlib.import_module(name).install()


def _take_over(wire: Mapping[str, Any]) -> None:
    install_takeover(confine_plain=wire.get("subprocess") == "confine")


def _enter(wire: dict[str, Any], identity: Identity, cluster: ClusterAccess | None) -> Channel:
    if syscalls.MACHINE not in syscalls.TABLES:
        raise NotEnforced(["seccomp.architecture"], f"{syscalls.MACHINE} is not supported: x86_64 or aarch64 is")
    obstacles = _obstacles()
    if obstacles:
        raise NotEnforced(obstacles, "a process in this state cannot be confined completely")
    channel = channels.connect()
    try:
        _let_judge(_ANYBODY)  # until it is known who: the supervisor tries beforehand whether it may
        hello = {
            "op": "hello",
            "kind": "actor" if cluster is not None else "program",
            "pid": os.getpid(),
            "policy": wire,
            "identity": identity.as_message(),
            "evidence": os.path.abspath(identity.evidence),
            "export": channels.export_environment(),
            "sockets": _connections(),
            "listening": _listening(),
            "descriptor": channel.fileno(),
            "places": places.told(),
            "cluster": None if cluster is None else cluster.as_message(),
        }
        answer, passed = channel.exchange(hello)
        channel.take(answer)
        channel.identity = {"rl.run.id": identity.run_id} if identity.run_id else {}
        _let_judge(int(answer["supervisor"]))
        if not answer["datagrams"]:  # only now: a refused confine has changed nothing
            _mute_datagram_sockets()
        program = rings.actor_ring(
            Role(answer["role"]),
            platform.machine(),
            datagrams=bool(answer["datagrams"]),
            borrows=bool(answer["borrows"]),
            keepers=[int(pid) for pid in answer["keepers"]],
        )
        if answer["names"]:
            _ask_names_by_stream()
        stops, kills = passed
    except BaseException:
        channel.close()
        raise
    try:
        listener = seccomp.install_on_process(program)
    except OSError as error:
        channel.close()
        os.close(stops)
        os.close(kills)
        key = "seccomp.listener" if error.errno == errno.EBUSY else "seccomp.user_notification"
        raise NotEnforced([key], _why(error)) from error
    # From here on there is no way back: whatever fails leaves a process whose notified calls fail.
    libc.give_up(libc.CAP_SYS_PTRACE)  # with it the supervisor's memory could be written through /proc
    try:
        _hand_over(channel, listener, borrows=bool(answer["borrows"]))
    finally:
        os.close(listener)
    _tie(stops, signal.SIGSTOP)
    _tie(kills, signal.SIGKILL)
    return channel


def _hand_over(channel: Channel, listener: int, *, borrows: bool) -> None:
    """Gives the listener to the supervisor, which alone may have it.

    By number where it can take it, for sendmsg may be notified with nobody there to answer. Where it cannot, this ring
    notifies no sendmsg (see rings.actor_ring), so the listener travels in a message.
    """
    if borrows:
        channel.exchange_bare({"op": "armed", "listener": listener})
    else:
        channel.exchange({"op": "armed", "listener": listener}, [listener])


def _why(error: OSError) -> str:
    return {
        errno.EBUSY: "a filter with a listener of its own is present already (another sandbox)",
        errno.EINVAL: "this kernel offers no user notification with thread synchronisation (Linux 5.7 is needed)",
        errno.ENOSYS: "this kernel has no seccomp",
        errno.ESRCH: "a thread carries a filter of its own",
        errno.EACCES: "no_new_privs could not be set",
    }.get(error.errno or 0, str(error))


_ANYBODY: Final = (1 << 64) - 1
"""PR_SET_PTRACER_ANY."""


def _let_judge(supervisor: int) -> None:
    """Where Yama restricts who may look into a process: the supervisor may."""
    try:
        libc.prctl(libc.PR_SET_PTRACER, supervisor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: no Yama here
            raise


def _tie(line: int, number: signal.Signals) -> None:
    """Lets the kernel send this process a signal when the other end of ``line`` closes, also after an exec.

    No thread and no handler is needed, so no code of the target can be late. The supervisor's end stops the target, so
    that its tree still hangs together when the zygote ends it; the zygote's end kills it.
    """
    os.set_inheritable(line, True)
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETSIG, number)
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have closed in between: then no signal comes any more.
    with socket.socket(fileno=os.dup(line)) as probe:
        try:
            if probe.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b"":
                os.kill(os.getpid(), signal.SIGKILL)
        except BlockingIOError:
            return


# ---------------------------------------------------------------------------------------------------------------------
# what stands in the way


def _obstacles() -> list[str]:
    found = []
    children = [pid for pid in procfs.descendants(os.getpid()) if not procfs.is_zombie(pid)]
    if children:
        names = ", ".join(f"{pid} ({' '.join(procfs.command_line(pid))[:60]})" for pid in children[:5])
        found.append(f"live child processes: {names}")
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if link == "anon_inode:[io_uring]":
            found.append(f"io_uring (descriptor {name})")
        elif link == "anon_inode:seccomp notify":
            found.append(f"a seccomp listener (descriptor {name})")
    for sock in _own_sockets():
        with sock:
            if sock.family in _INET and sock.type == socket.SOCK_RAW:
                found.append(f"raw socket (descriptor {sock.fileno()})")
            elif sock.family not in (*_INET, *_FREE_FAMILIES):
                found.append(f"socket of family {int(sock.family)}")
    return found


def _own_sockets() -> list[socket.socket]:
    """A duplicate of every socket of this process."""
    found = []
    for number in procfs.sockets_of(os.getpid()).values():
        try:
            found.append(socket.socket(fileno=os.dup(number)))
        except OSError:
            continue  # closed by another thread meanwhile
    return found


def _mute_datagram_sockets() -> None:
    """Those from before can never send again (see ``egress.gate.mute_datagram_socket``), unix ones neither.

    Their sendmsg may name any destination, and this ring does not look at it.
    """
    for sock in _own_sockets():
        with sock:
            if sock.family in (*_INET, socket.AF_UNIX) and sock.type == socket.SOCK_DGRAM:
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError as error:
                    if error.errno != errno.ENOTCONN:  # said of an unconnected socket, but it is shut all the same
                        raise


def _ask_names_by_stream() -> None:
    """Resolvers that read RES_OPTIONS (glibc, c-ares) ask by TCP from now on, here and in what is started.

    The guard answers datagrams too, but from an address of its own, which some take for a forgery (c-ares does).
    """
    options = os.environ.get("RES_OPTIONS", "").split()
    if "use-vc" not in options:
        os.environ["RES_OPTIONS"] = " ".join([*options, "use-vc"])


def _listening() -> list[tuple[str, int]]:
    """Addresses at which TCP connections are accepted already."""
    found = []
    for sock in _own_sockets():
        with sock:
            if sock.family in _INET and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                host, port = sock.getsockname()[:2]
                found.append((host, port))
    return found


def _connections() -> list[tuple[str, int, int]]:
    """The TCP connections that are open already: peer's address and port, own port."""
    peers = []
    for sock in _own_sockets():
        with sock:
            if sock.family in _INET and sock.type == socket.SOCK_STREAM:
                try:
                    host, port = sock.getpeername()[:2]
                    own = sock.getsockname()[1]
                except OSError:
                    continue  # not connected: it can only connect through the gate
                peers.append((host, port, own))
    return peers

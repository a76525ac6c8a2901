"""What the supervisor asks of its zygote. Runs in the supervisor.

Apart from the zygote itself, which loads what it does while the supervisor loads its service.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from ray_guard.kernel import seqpacket

if TYPE_CHECKING:
    from ray_guard.supervisor.mounts import Covers


def fork(close: list[int]) -> tuple[socket.socket, int]:
    """Forks the zygote; in the supervisor returns the socket that starts are sent on, and the zygote's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            for descriptor in close:
                os.close(descriptor)
            from ray_guard.supervisor import zygote  # here alone: the supervisor loads its service meanwhile

            zygote.run(theirs)
        except BaseException:  # noqa: BLE001 - nothing may return into the supervisor's start
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    return ours, pid


def end_adopted(starts: socket.socket, leader: int) -> None:
    """A leader was lost: ends what it has led."""
    seqpacket.send(starts, {"op": "end_adopted", "leader": leader})


def remove(starts: socket.socket, path: str) -> None:
    """Takes away a call's temporary folder."""
    with contextlib.suppress(OSError):  # the zygote is gone, and the supervisor about to end: the next one sweeps
        seqpacket.send(starts, {"op": "remove", "path": path})


def hold(starts: socket.socket, path: str) -> None:
    """Makes the folder of this supervisor's calls and holds it, while this process lives."""
    seqpacket.send(starts, {"op": "hold", "path": path})


def sweep_place(starts: socket.socket, place: str) -> None:
    """Takes away what lost supervisors have left there."""
    seqpacket.send(starts, {"op": "sweep", "path": place})


def start_mover(starts: socket.socket, line: socket.socket) -> None:
    """Starts a mover of relayed bytes at this end of its line."""
    seqpacket.send(starts, {"op": "mover"}, [line.fileno()])


def start_signer(starts: socket.socket, line: socket.socket) -> None:
    """Starts the signer of the logs at this end of its line."""
    seqpacket.send(starts, {"op": "signer"}, [line.fileno()])


def start_judge(starts: socket.socket, line: socket.socket) -> None:
    """Starts the judge of what is recorded at this end of its line."""
    seqpacket.send(starts, {"op": "judge"}, [line.fileno()])


def start_witness(starts: socket.socket, line: socket.socket) -> None:
    """Starts the witness at this end of its line."""
    seqpacket.send(starts, {"op": "witness"}, [line.fileno()])


def start_recoverer(starts: socket.socket, line: socket.socket) -> None:
    """Starts the recoverer of former logs at this end of its line."""
    seqpacket.send(starts, {"op": "recoverer"}, [line.fileno()])


def ask_for_leader(starts: socket.socket, covers: Covers = (), *, gpu: bool = False) -> socket.socket:
    """The line to a new leader. Where it cannot be forked the line ends at once.

    Args:
        covers, gpu: see :class:`ray_guard.supervisor.leaders.Fit`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            seqpacket.send(starts, {"op": "leader", "covers": covers, "gpu": gpu}, [theirs.fileno()])
        except OSError:
            pass  # the zygote is gone, and the supervisor about to end
    return ours

"""The signer's process: what it signs, and that nobody of its own user can look into it."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ray_guard.evidence import signer
from ray_guard.kernel import libc, seqpacket

NOBODY = 65534


def forked(work: Callable[[], object], *, user: int | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None:
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            libc.prctl(libc.PR_SET_DUMPABLE, 1)  # changing the user has taken that away
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.fixture
def user() -> int | None:
    """Whom both processes belong to: root may look into everything."""
    return NOBODY if os.geteuid() == 0 else None


@contextlib.contextmanager
def running(work: Callable[[socket.socket], object], user: int | None) -> Iterator[tuple[int, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)

    def child() -> None:
        ours.close()
        work(theirs)

    pid = forked(child, user=user)
    theirs.close()
    try:
        yield pid, ours
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_it_signs_what_it_is_given_and_ends_with_its_line() -> None:
    with running(signer.run, None) as (pid, line):
        ready, _ = seqpacket.receive(line) or ({}, [])
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(ready["public"]))
        for number in range(3):
            seqpacket.send(line, {"op": "sign", "id": number, "text": f"text {number}\n"})
            signed, _ = seqpacket.receive(line) or ({}, [])
            assert signed["id"] == number
            key.verify(base64.b64decode(signed["signature"]), f"text {number}\n".encode())
        line.close()
        deadline = time.monotonic() + 10
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline


def idle(line: socket.socket) -> None:
    seqpacket.send(line, {"op": "ready"})
    line.recv(1)


@pytest.mark.parametrize("what", ["mem", "environ", "maps", "fd/0"])
def test_nobody_of_the_same_user_can_look_into_it(user: int | None, what: str) -> None:
    def look(pid: int) -> int:
        def attempt() -> None:
            try:
                os.close(os.open(f"/proc/{pid}/{what}", os.O_RDONLY))
            except OSError as error:
                os._exit(error.errno or 255)

        return os.waitstatus_to_exitcode(os.waitpid(forked(attempt, user=user), 0)[1])

    with running(idle, user) as (pid, line):
        assert seqpacket.receive(line)
        if (found := look(pid)) != 0:
            pytest.skip(f"even a plain process cannot be looked into here: {errno.errorcode.get(found)}")
    with running(signer.run, user) as (pid, line):
        assert seqpacket.receive(line)
        assert look(pid) in (errno.EACCES, errno.EPERM)

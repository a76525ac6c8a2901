"""The least that a supervisor in Python does: notify.c's work, with the calls that an exact ledger needs, nothing else.

    python notify.py PORT COMMAND [ARGUMENT ...]

It decides by one comparison and writes one prefabricated line; it keeps no account and tells nobody anything. What it
costs is what Python itself costs, so nothing written in Python can be expected to cost less. Only 127.0.0.1:PORT is
granted.
"""

from __future__ import annotations

import errno
import os
import platform
import select
import socket
import sys

from ray_guard.kernel import libc, seccomp
from ray_guard.kernel.sock_diag import SO_COOKIE

LINE = b"x" * 900 + b"\n"
"""About as long as the guard's record of a connect."""


def start(command: list[str]) -> tuple[int, seccomp.Listener]:
    """Runs the command behind a filter that puts every connect to this process."""
    program = seccomp.assemble([seccomp.Rule("connect", seccomp.NOTIFY)], platform.machine())
    read, write = os.pipe()
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        listener = seccomp.install_on_thread(program)
        os.write(write, b"%d" % listener)
        os.read(go_read, 1)
        os.close(listener)
        os.execvp(command[0], command)
    listener = libc.pidfd_getfd(os.pidfd_open(pid), int(os.read(read, 16)))
    os.write(go_write, b"x")
    return pid, seccomp.Listener(listener)


def supervise(listener: seccomp.Listener, granted: bytes, journal: int) -> None:
    """Answers until the last filtered process is gone."""
    poll = select.epoll()
    poll.register(listener.fd, select.EPOLLIN)
    threads: dict[int, tuple[int, int]] = {}
    while True:
        ((_, events),) = poll.poll()
        if not events & select.EPOLLIN:
            return
        notification = listener.receive()
        if notification is None:
            continue
        tid = notification.pid
        if tid not in threads:
            threads[tid] = (os.pidfd_open(tid, libc.PIDFD_THREAD), os.open(f"/proc/{tid}/mem", os.O_RDONLY))
        pidfd, memory = threads[tid]
        address = os.pread(memory, notification.arg2, notification.arg1)
        if not listener.is_valid(notification.id):
            continue
        if address[:8] != granted:
            listener.answer(notification.id, error=errno.EACCES)
            continue
        duplicate = libc.pidfd_getfd(pidfd, notification.arg0)
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, duplicate)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        os.write(journal, LINE)
        result = libc.connect(duplicate, address)
        sock.close()
        listener.answer(notification.id, error=-result)


def main() -> int:
    port, *command = sys.argv[1:]
    granted = socket.AF_INET.to_bytes(2, sys.byteorder) + int(port).to_bytes(2, "big") + socket.inet_aton("127.0.0.1")
    journal = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_APPEND)
    pid, listener = start(command)
    supervise(listener, granted, journal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())

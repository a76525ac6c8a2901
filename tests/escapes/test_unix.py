"""Unix sockets: by path, by another path to it, by abstract name, by datagram, through passed descriptors."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def _daemon(told: dict[str, Any]) -> Iterator[None]:
    """Outside: a service of the same user that runs what it is told."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(told["folder"] + "/daemon")
        listening.listen()
        listening.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    sock, _ = listening.accept()
                    with sock:
                        subprocess.run(["sh", "-c", sock.recv(4096).decode()])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(5)


UNIX = [
    Attack("unix stream", "def main(): connect(AF_UNIX, STREAM, A['unix'])", sink="unix", refused=("EACCES",)),
    Attack(
        "unix seqpacket", "def main(): connect(AF_UNIX, SEQPACKET, A['unix_seq'])", sink="unix_seq", refused=("EACCES",)
    ),
    Attack(
        "unix symlink",
        """
def main():
    link = os.path.join(A['folder'], 'link')
    os.symlink(A['unix'], link)
    connect(AF_UNIX, STREAM, link)
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix hard link",
        """
def main():
    link = os.path.join(A['folder'], 'link')
    os.link(A['unix'], link)
    connect(AF_UNIX, STREAM, link)
""",
        sink="unix",
        refused=("EACCES", "EXDEV"),  # Landlock's first version refuses any link to another folder
    ),
    Attack(
        "unix relative path",
        """
def main():
    os.chdir(os.path.dirname(A['unix']))
    connect(AF_UNIX, STREAM, './' + os.path.basename(A['unix']))
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix through /proc/self/root",
        "def main(): connect(AF_UNIX, STREAM, '/proc/self/root' + A['unix'])",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix through /proc/self/fd",
        """
def main():
    pinned = os.open(A['unix'], os.O_PATH)
    connect(AF_UNIX, STREAM, '/proc/self/fd/%d' % pinned)
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix through another process's root",
        "def main(): connect(AF_UNIX, STREAM, '/proc/%d/root' % os.getppid() + A['unix'])",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix through /proc/self/cwd",
        """
def main():
    os.chdir(os.path.dirname(A['unix']))
    connect(AF_UNIX, STREAM, '/proc/self/cwd/' + os.path.basename(A['unix']))
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix through a folder of a thread's own",
        """
def main():
    # A thread whose working folder is not its process's: the name must be looked up as the thread means it.
    home, failed = A['folder'] + '/home', []
    os.mkdir(home); os.chdir(home)
    own = socket.socket(AF_UNIX, STREAM); own.bind(os.path.basename(A['unix'])); own.listen()
    def work():
        libc.unshare(0x200)
        os.chdir(os.path.dirname(A['unix']))
        try: connect(AF_UNIX, STREAM, os.path.basename(A['unix']))
        except OSError as error: failed.append(error)
    thread = threading.Thread(target=work); thread.start(); thread.join()
    if failed: raise failed[0]
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix path with dots and slashes",
        """
def main():
    folder, name = os.path.split(A['unix'])
    connect(AF_UNIX, STREAM, f'/{folder}//./../{os.path.basename(folder)}/{name}')
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix path behind a zero byte",
        """
def main():
    # The granted name, a zero, the victim's: which part counts?
    sock = socket.socket(AF_UNIX, STREAM)
    raw = struct.pack('=H', AF_UNIX) + A['unix'].encode() + b'\\0' + A['unix_granted'].encode()
    call(42, sock.fileno(), raw, min(len(raw), 110))
    os.write(sock.fileno(), TOKEN)
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix path flipped by a second thread",
        """
def main():
    good, bad = (struct.pack('=H', AF_UNIX) + A[name].encode().ljust(108, b'\\0') for name in ('unix_granted', 'unix'))
    memory = ctypes.create_string_buffer(good, 110)
    over = time.monotonic() + 0.6
    def flip():
        while time.monotonic() < over:
            for _ in range(200):
                ctypes.memmove(memory, bad, 110)
                ctypes.memmove(memory, good, 110)
    sys.setswitchinterval(1e-6)
    threading.Thread(target=flip, daemon=True).start()
    while time.monotonic() < over:
        with socket.socket(AF_UNIX, STREAM) as sock:
            try:
                call(42, sock.fileno(), memory, 110)
                sock.sendall(TOKEN)
            except OSError: pass
""",
        sink="unix",
    ),
    Attack(
        "job handed to a daemon by its socket",  # docker, systemd-run, at, dbus: what they start is nobody's child
        """
def main():
    sock = socket.socket(AF_UNIX, STREAM)
    sock.connect(A['folder'] + '/daemon')
    sock.send(f"touch {A['folder']}/done".encode())
    sock.recv(1)
""",
        sink="",
        refused=("EACCES",),
        judge=lambda told: "a daemon did what it was told" if Path(told["folder"], "done").exists() else "",
        beside=_daemon,
    ),
    Attack(
        "unix renamed to the granted path",  # a rule grants a name; whoever may rename may be granted, so: another name
        """
def main():
    own = os.path.join(A['folder'], 'own')
    socket.socket(AF_UNIX, STREAM).bind(own)
    os.unlink(own)
    os.symlink(A['unix'], own)
    connect(AF_UNIX, STREAM, own)
""",
        sink="unix",
        refused=("EACCES",),
    ),
    Attack(
        "unix symlink swapped during the call",
        """
def main():
    # Own socket and victim take turns behind one name.
    own = os.path.join(A['folder'], 'own')
    listening = socket.socket(AF_UNIX, STREAM); listening.bind(own); listening.listen(100)
    name, spare = (os.path.join(A['folder'], each) for each in ('name', 'spare'))
    os.symlink(own, name)
    over = time.monotonic() + 0.8
    def swap():
        while time.monotonic() < over:
            for target in (A['unix'], own):
                os.symlink(target, spare)
                os.rename(spare, name)
    threading.Thread(target=swap, daemon=True).start()
    while time.monotonic() < over:
        with socket.socket(AF_UNIX, STREAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(name)
                sock.send(TOKEN)
            except OSError: pass
        try:
            listening.setblocking(False)
            listening.accept()[0].close()
        except OSError: pass
""",
        sink="unix",
    ),
    Attack(
        "victim's socket claimed by a folder swapped during bind",
        """
def main():
    # bind() into a folder of one's own, which is the victim's by the time somebody looks what was bound.
    home = os.path.join(A['folder'], 'home')
    os.mkdir(home)
    name, spare = (os.path.join(A['folder'], each) for each in ('name', 'spare'))
    os.symlink(home, name)
    base = os.path.basename(A['unix'])
    victim = os.path.dirname(A['unix'])
    over = time.monotonic() + 1.5
    def swap():
        while time.monotonic() < over:
            for target in (victim, home):
                try:
                    os.symlink(target, spare)
                    os.rename(spare, name)
                except OSError: pass
    threading.Thread(target=swap, daemon=True).start()
    while time.monotonic() < over:
        with socket.socket(AF_UNIX, STREAM) as sock:
            try: sock.bind(name + '/' + base)
            except OSError: pass
        try: os.unlink(home + '/' + base)
        except OSError: pass
        with socket.socket(AF_UNIX, STREAM) as sock:
            try:
                sock.connect(A['unix'])
                sock.send(TOKEN)
                return
            except OSError: pass
""",
        sink="unix",
    ),
    Attack(
        "victim's socket moved over the name during bind",
        """
def main():
    # The same with the victim's own socket file, where one may link it: the name bound is the victim's afterwards.
    name, spare, link = (os.path.join(A['folder'], each) for each in ('name', 'spare', 'link'))
    os.link(A['unix'], link)
    over = time.monotonic() + 1.0
    def swap():
        while time.monotonic() < over:
            try:
                os.link(link, spare)
                os.rename(spare, name)
                os.unlink(name)
            except OSError: pass
    threading.Thread(target=swap, daemon=True).start()
    while time.monotonic() < over:
        with socket.socket(AF_UNIX, STREAM) as sock:
            try: sock.bind(name)
            except OSError: pass
        with socket.socket(AF_UNIX, STREAM) as sock:
            try:
                sock.connect(link)
                sock.send(TOKEN)
                return
            except OSError: pass
""",
        sink="unix",
    ),
    Attack(
        "abstract stream", "def main(): connect(AF_UNIX, STREAM, A['abstract'])", sink="abstract", refused=("EACCES",)
    ),
    Attack(
        "abstract datagram",
        "def main(): socket.socket(AF_UNIX, DGRAM).sendto(TOKEN, A['abstract_dgram'])",
        sink="abstract_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    Attack(
        "unix datagram sendto",
        "def main(): socket.socket(AF_UNIX, DGRAM).sendto(TOKEN, A['unix_dgram'])",
        sink="unix_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    Attack(
        "unix datagram connected",
        "def main(): connect(AF_UNIX, DGRAM, A['unix_dgram'])",
        sink="unix_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    Attack(
        "datagram socketpair sendto",
        """
def main():
    ours, theirs = socket.socketpair(AF_UNIX, DGRAM)
    ours.sendto(TOKEN, A['unix_dgram'])
""",
        sink="unix_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    Attack(
        "datagram socketpair sendmsg",
        """
def main():
    ours, theirs = socket.socketpair(AF_UNIX, DGRAM)
    ours.sendmsg([TOKEN], [], 0, A['unix_dgram'])
""",
        sink="unix_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    Attack(
        "datagram socketpair reconnected",
        """
def main():
    ours, theirs = socket.socketpair(AF_UNIX, DGRAM)
    ours.connect(A['unix_dgram'])
    ours.send(TOKEN)
""",
        sink="unix_dgram",
        refused=("EACCES", "EAFNOSUPPORT"),
    ),
    *[
        Attack(
            f"unix datagram sendmmsg, entry {at} of 3",
            f"""
def main():
    ours, theirs = socket.socketpair(AF_UNIX, DGRAM)
    raw = struct.pack('=H', AF_UNIX) + A['unix_dgram'].encode() + b'\\0'
    entries = (MMsgHdr * 3)(*[MMsgHdr(message(TOKEN, raw if n == {at} else b''), 0) for n in range(3)])
    call(307, ours.fileno(), entries, 3, 0)
""",
            sink="unix_dgram",
        )
        for at in range(3)
    ],
]


@cases(UNIX, "unix sockets")
def test_unix(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)

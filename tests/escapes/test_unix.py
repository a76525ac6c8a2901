"""Unix sockets: by path, by another path to it, by abstract name, by datagram, through passed descriptors."""

from __future__ import annotations

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

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
        refused=("EACCES",),
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

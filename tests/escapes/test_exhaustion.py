"""Wearing the guard down: floods, storms of signals, callers that die, descriptors and names by the thousand."""

from __future__ import annotations

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

FLOODS = [
    Attack(
        "flood of connects",
        """
def main():
    over = time.monotonic() + 1
    def work():
        while time.monotonic() < over:
            for name in ('granted', 'tcp'):
                with socket.socket() as sock:
                    try:
                        sock.connect(('127.0.0.1', A[name]))
                        if name == 'tcp': sock.send(TOKEN)
                    except OSError: pass
    threads = [threading.Thread(target=work) for _ in range(100)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
""",
    ),
    Attack(
        "connects interrupted by a storm of signals",
        """
def main():
    # A call that is interrupted after it was judged is made again.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    me, over = threading.get_native_id(), time.monotonic() + 1
    def storm():
        while time.monotonic() < over: libc.tgkill(os.getpid(), me, 10)
    threading.Thread(target=storm, daemon=True).start()
    while time.monotonic() < over:
        for name in ('granted', 'tcp'):
            with socket.socket() as sock:
                try:
                    sock.connect(('127.0.0.1', A[name]))
                    if name == 'tcp': sock.send(TOKEN)
                except OSError: pass
""",
    ),
    Attack(
        "callers that die during their call",
        """
def main():
    # Their thread ids are given out again: a decision must never meet another's call.
    over = time.monotonic() + 1
    while time.monotonic() < over:
        children = []
        for name in ('granted', 'tcp', 'granted', 'tcp'):
            child = os.fork()
            if child == 0:
                try:
                    sock = socket.create_connection(('127.0.0.1', A[name]))
                    if name == 'tcp': sock.send(TOKEN)
                except OSError: pass
                os._exit(0)
            children.append(child)
        for at, child in enumerate(children):
            if at % 2 == 0: os.kill(child, 9)
        for child in children: os.waitpid(child, 0)
""",
    ),
    Attack(
        "sockets by name, by the thousand",
        """
def main():
    held = []
    for n in range(1500):
        sock = socket.socket(AF_UNIX)
        try: sock.bind(A['folder'] + '/%d' % n)
        except OSError: pass
        if len(held) < 500: held.append(sock)
        else: sock.close()
    for n in range(1500):
        if os.path.exists(A['folder'] + '/%d' % n): os.unlink(A['folder'] + '/%d' % n)
    connect(AF_INET, STREAM, ('127.0.0.1', A['tcp']))
""",
        refused=("EACCES",),
    ),
    Attack(
        "no descriptor left",
        """
def main():
    import resource
    sock = socket.socket()
    resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, sock.fileno() + 1))
    sock.connect(('127.0.0.1', A['tcp']))
    sock.send(TOKEN)
""",
        refused=("EACCES",),
    ),
    Attack(
        "descriptors passed in circles",
        """
def main():
    # Sockets that only a message holds, which holds itself: nobody's, and collected late.
    for _ in range(200):
        ours, theirs = socket.socketpair()
        sock = socket.socket()
        socket.send_fds(ours, [b'x'], [ours.fileno(), theirs.fileno(), sock.fileno()])
        ours.close(); theirs.close(); sock.close()
    ours, theirs = socket.socketpair()
    sock = socket.socket()
    socket.send_fds(ours, [b'x'], [sock.fileno()])
    sock.close()
    _, (descriptor,), _, _ = socket.recv_fds(theirs, 1, 1)
    again = socket.socket(fileno=descriptor)
    again.connect(('127.0.0.1', A['tcp']))
    again.send(TOKEN)
""",
        refused=("EACCES",),
    ),
]


@cases(FLOODS, "wearing the guard down")
def test_flood(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)

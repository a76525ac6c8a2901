"""Ways to name or reach a destination that no rule grants: system calls, spellings, families."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

TCP = [
    Attack("connect", "def main(): connect(AF_INET, STREAM, ('127.0.0.1', A['tcp']))", refused=("EACCES",)),
    Attack("connect IPv6", "def main(): connect(AF_INET6, STREAM, ('::1', A['tcp']))", refused=("EACCES",)),
    Attack(
        "connect IPv4-mapped",
        "def main(): connect(AF_INET6, STREAM, ('::ffff:127.0.0.1', A['tcp']))",
        refused=("EACCES",),
    ),
    Attack("connect 0.0.0.0", "def main(): connect(AF_INET, STREAM, ('0.0.0.0', A['tcp']))", refused=("EACCES",)),
    Attack("connect ::", "def main(): connect(AF_INET6, STREAM, ('::', A['tcp']))", refused=("EACCES",)),
    Attack(
        "connect ::ffff:0", "def main(): connect(AF_INET6, STREAM, ('::ffff:0.0.0.0', A['tcp']))", refused=("EACCES",)
    ),
    Attack("connect 127.99.1.2", "def main(): connect(AF_INET, STREAM, ('127.99.1.2', A['tcp']))", refused=("EACCES",)),
    Attack("hex address", "def main(): connect(AF_INET, STREAM, ('0x7f000001', A['tcp']))", refused=("EACCES",)),
    Attack("decimal address", "def main(): connect(AF_INET, STREAM, ('2130706433', A['tcp']))", refused=("EACCES",)),
    Attack("octal address", "def main(): connect(AF_INET, STREAM, ('0177.0.0.1', A['tcp']))", refused=("EACCES",)),
    Attack("short address", "def main(): connect(AF_INET, STREAM, ('127.1', A['tcp']))", refused=("EACCES",)),
    Attack(
        "nonblocking connect",
        """
def main():
    sock = socket.socket()
    sock.setblocking(False)
    try:
        sock.connect(('127.0.0.1', A['tcp']))
    except BlockingIOError:
        pass
    time.sleep(0.05)
    sock.send(TOKEN)
""",
        refused=("EACCES", "EPIPE", "ENOTCONN"),
    ),
    Attack(
        "connect by raw system call",
        """
def main():
    sock = socket.socket()
    raw = sockaddr('127.0.0.1', A['tcp'])
    call(42, sock.fileno(), raw, len(raw))
    os.write(sock.fileno(), TOKEN)
""",
        refused=("EACCES",),
    ),
    Attack(
        "MSG_FASTOPEN sendto",
        "def main(): socket.socket().sendto(TOKEN, 0x20000000, ('127.0.0.1', A['tcp']))",
        refused=("ENOTSUP", "EACCES"),
    ),
    Attack(
        "MSG_FASTOPEN sendmsg",
        "def main(): socket.socket().sendmsg([TOKEN], [], 0x20000000, ('127.0.0.1', A['tcp']))",
        refused=("ENOTSUP", "EACCES"),
    ),
    Attack(
        "MSG_FASTOPEN sendmmsg",
        """
def main():
    sock = socket.socket()
    entry = MMsgHdr(message(TOKEN, sockaddr('127.0.0.1', A['tcp'])), 0)
    call(307, sock.fileno(), ctypes.byref(entry), 1, 0x20000000)
""",
        refused=("ENOTSUP", "EACCES"),
    ),
    Attack(
        "TCP_FASTOPEN_CONNECT",
        """
def main():
    sock = socket.socket()
    try:
        sock.setsockopt(socket.IPPROTO_TCP, 30, 1)
    except OSError as error:
        say(option=error.errno)
    sock.connect(('127.0.0.1', A['tcp']))
    sock.send(TOKEN)
""",
        refused=("EACCES",),
    ),
    Attack("MPTCP", "def main(): connect(AF_INET, STREAM, ('127.0.0.1', A['tcp']), 262)", refused=("EPROTONOSUPPORT",)),
    Attack(
        "AF_UNSPEC then reconnect",
        """
def main():
    sock = socket.socket()
    sock.connect(('127.0.0.1', A['granted']))
    call(42, sock.fileno(), struct.pack('=H14x', 0), 16)
    sock.connect(('127.0.0.1', A['tcp']))
    sock.sendall(TOKEN)
""",
        refused=("EACCES",),
    ),
    Attack(
        "address flipped by a second thread",
        """
def main():
    good, bad = (sockaddr('127.0.0.1', A[name]) for name in ('granted', 'tcp'))
    memory = ctypes.create_string_buffer(good, 16)
    over = time.monotonic() + 0.6
    def flip():
        while time.monotonic() < over:
            for _ in range(500):
                ctypes.memmove(memory, bad, 16)
                ctypes.memmove(memory, good, 16)
    sys.setswitchinterval(1e-6)
    threading.Thread(target=flip, daemon=True).start()
    while time.monotonic() < over:
        with socket.socket() as sock:
            try:
                call(42, sock.fileno(), memory, 16)
                sock.sendall(TOKEN)
            except OSError:
                pass
""",
    ),
    Attack(
        "socket swapped by dup2 during the call",
        """
def main():
    # What is connected must be what was judged: a swap moves the name, never the decision.
    over = time.monotonic() + 0.5
    good, bad = (sockaddr('127.0.0.1', A[name]) for name in ('granted', 'tcp'))
    pair = [socket.socket(), socket.socket()]
    number = os.dup(pair[0].fileno())
    def swap():
        while time.monotonic() < over:
            for sock in pair:
                os.dup2(sock.fileno(), number)
    threading.Thread(target=swap, daemon=True).start()
    while time.monotonic() < over:
        for raw in (bad, good):
            try: call(42, number, raw, 16)
            except OSError: pass
        for at, sock in enumerate(pair):
            try:
                if sock.getpeername()[1] == A['tcp']: sock.send(TOKEN)
            except OSError: pass
            pair[at] = socket.socket()
            sock.close()
""",
    ),
    Attack(
        "descriptor table of a thread's own",
        """
def main():
    # A thread whose descriptor 100 is another socket than the process's: the supervisor must take the thread's.
    decoy = socket.socket(); decoy.connect(('127.0.0.1', A['granted']))
    os.dup2(decoy.fileno(), 100)
    failed = []
    def work():
        libc.unshare(0x400)
        sock = socket.socket()
        os.dup2(sock.fileno(), 100)
        raw = sockaddr('127.0.0.1', A['tcp'])
        try:
            call(42, 100, raw, 16)
            os.write(100, TOKEN)
        except OSError as error:
            failed.append(error)
    thread = threading.Thread(target=work); thread.start(); thread.join()
    if failed:
        raise failed[0]
""",
        refused=("EACCES",),
    ),
    Attack(
        "connect after granted connect on a duplicate",
        """
def main():
    sock = socket.socket()
    sock.setblocking(False)
    try: sock.connect(('127.0.0.1', A['granted']))
    except BlockingIOError: pass
    time.sleep(0.05)
    other = sock.dup()
    call(42, other.fileno(), struct.pack('=H14x', 0), 16)
    other.setblocking(True)
    other.connect(('127.0.0.1', A['tcp']))
    other.send(TOKEN)
""",
        refused=("EACCES",),
    ),
]

UDP = [
    Attack(
        "UDP sendto",
        "def main(): socket.socket(AF_INET, DGRAM).sendto(TOKEN, ('127.0.0.1', A['udp']))",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP connected send",
        "def main(): connect(AF_INET, DGRAM, ('127.0.0.1', A['udp']))",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP sendmsg with a name",
        "def main(): socket.socket(AF_INET, DGRAM).sendmsg([TOKEN], [], 0, ('127.0.0.1', A['udp']))",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP sendmsg to a mapped address",
        "def main(): socket.socket(AF_INET6, DGRAM).sendmsg([TOKEN], [], 0, ('::ffff:127.0.0.1', A['udp']))",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP IPv4 name on an IPv6 socket",
        """
def main():
    sock = socket.socket(AF_INET6, DGRAM)
    call(46, sock.fileno(), ctypes.byref(message(TOKEN, sockaddr('127.0.0.1', A['udp']))), 0)
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP name with family AF_UNSPEC",  # which IPv4 UDP takes for AF_INET
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    raw = struct.pack('=H', 0) + sockaddr('127.0.0.1', A['udp'])[2:]
    call(44, sock.fileno(), TOKEN, len(TOKEN), 0, raw, 16)
""",
        sink="udp",
        refused=("EACCES", "EPIPE", "EAFNOSUPPORT"),
    ),
    Attack(
        "UDP IP_PKTINFO",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    info = struct.pack('=I4s4s', 1, socket.inet_aton('127.0.0.1'), bytes(4))
    sock.sendmsg([TOKEN], [(socket.IPPROTO_IP, 8, info)], 0, ('127.0.0.1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    *[
        Attack(
            f"UDP sendmmsg, entry {at} of 3",
            f"""
def main():
    sock = socket.socket(AF_INET, DGRAM)
    ports = [A['granted_udp']] * 3
    ports[{at}] = A['udp']
    entries = (MMsgHdr * 3)(*[MMsgHdr(message(TOKEN, sockaddr('127.0.0.1', port)), 0) for port in ports])
    sent = call(307, sock.fileno(), entries, 3, 0)
    say(sent=sent)
""",
            sink="udp",
        )
        for at in range(3)
    ],
    Attack(
        "UDP name flipped by a second thread",
        """
def main():
    good, bad = (sockaddr('127.0.0.1', A[name]) for name in ('granted_udp', 'udp'))
    memory = ctypes.create_string_buffer(good, 16)
    over = time.monotonic() + 0.6
    def flip():
        while time.monotonic() < over:
            for _ in range(500):
                ctypes.memmove(memory, bad, 16)
                ctypes.memmove(memory, good, 16)
    sys.setswitchinterval(1e-6)
    threading.Thread(target=flip, daemon=True).start()
    sock = socket.socket(AF_INET, DGRAM)
    while time.monotonic() < over:
        try: call(44, sock.fileno(), TOKEN, len(TOKEN), 0, memory, 16)
        except OSError: pass
""",
        sink="udp",
    ),
    Attack(
        "UDP granted connect, then a name",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    try: sock.connect(('127.0.0.1', A['granted_udp']))
    except OSError: pass
    sock.sendmsg([TOKEN], [], 0, ('127.0.0.1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
]


UDP += [
    Attack(
        "UDP IPV6_ADDRFORM",
        """
def main():
    # A socket that becomes another family's after it was looked at.
    sock = socket.socket(AF_INET6, DGRAM)
    try: sock.connect(('::ffff:127.0.0.1', A['granted_udp']))
    except OSError: sock.connect(('::ffff:127.0.0.1', 9))
    sock.setsockopt(41, 1, AF_INET)
    call(46, sock.fileno(), ctypes.byref(message(TOKEN, sockaddr('127.0.0.1', A['udp']))), 0)
""",
        sink="udp",
    ),
    Attack(
        "UDP corked, then sent elsewhere",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    sock.setsockopt(17, 1, 1)
    for port in (A['granted_udp'], A['udp']):
        try: sock.sendto(TOKEN, ('127.0.0.1', port))
        except OSError: pass
    sock.setsockopt(17, 1, 0)
    sock = socket.socket(AF_INET, DGRAM)
    sock.setsockopt(17, 1, 1)
    sock.sendto(TOKEN, ('127.0.0.1', A['udp']))
    sock.setsockopt(17, 1, 0)
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP MSG_MORE, then a plain write",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    sock.sendto(TOKEN, 0x8000, ('127.0.0.1', A['udp']))
    os.write(sock.fileno(), b'')
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP splice after connect",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    try: sock.connect(('127.0.0.1', A['udp']))
    except OSError as error: say(connect=error.errno)
    read, write = os.pipe()
    os.write(write, TOKEN)
    os.splice(read, sock.fileno(), len(TOKEN))
""",
        sink="udp",
        refused=("EPIPE", "EDESTADDRREQ", "ENOTCONN"),
    ),
    Attack(
        "UDP sendfile after connect",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    try: sock.connect(('127.0.0.1', A['udp']))
    except OSError as error: say(connect=error.errno)
    with open(A['folder'] + '/data', 'wb') as file: file.write(TOKEN)
    with open(A['folder'] + '/data', 'rb') as file: os.sendfile(sock.fileno(), file.fileno(), 0, len(TOKEN))
""",
        sink="udp",
        refused=("EPIPE", "EDESTADDRREQ", "ENOTCONN"),
    ),
    Attack(
        "UDP IPV6_PKTINFO",
        """
def main():
    sock = socket.socket(AF_INET6, DGRAM)
    info = socket.inet_pton(AF_INET6, '::1') + struct.pack('=I', 1)
    sock.sendmsg([TOKEN], [(41, 50, info)], 0, ('::1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP segments",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    sock.sendmsg([TOKEN * 4], [(17, 103, struct.pack('=H', len(TOKEN)))], 0, ('127.0.0.1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP MSG_ZEROCOPY",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    sock.setsockopt(1, 60, 1)
    sock.sendmsg([TOKEN], [], 0x4000000, ('127.0.0.1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE", "ENOPROTOOPT"),
    ),
    Attack(
        "UDP broadcast",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    sock.setsockopt(1, 6, 1)
    sock.sendto(TOKEN, ('127.255.255.255', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
    Attack(
        "UDP dissolved, then a name",
        """
def main():
    sock = socket.socket(AF_INET, DGRAM)
    try: sock.connect(('127.0.0.1', A['granted_udp']))
    except OSError: pass
    try: call(42, sock.fileno(), struct.pack('=H14x', 0), 16)
    except OSError: pass
    sock.sendmsg([TOKEN], [], 0, ('127.0.0.1', A['udp']))
""",
        sink="udp",
        refused=("EACCES", "EPIPE"),
    ),
]
UDP = [replace(attack, rings=("actor", "call", "actor_udp", "call_udp")) for attack in UDP]


def _elsewhere(name: str, address: str) -> Attack:
    """An address that needs its own rule, where a rule grants all there are."""
    program = f"""
def main():
    family = AF_INET6 if ':' in '{address}' else AF_INET
    try: connect(family, STREAM, ('{address}', A['tcp']))
    except OSError as error:
        say(missing='this host has no such address: %s' % error)
        raise
"""
    return Attack(
        name,
        program,
        refused=("EACCES",),
        rings=("actor_wide", "call_wide"),
        elsewhere="a rule for all addresses means these too there",
    )


SPECIAL = [
    _elsewhere("cloud metadata (169.254.169.254)", "169.254.169.254"),
    _elsewhere("cloud metadata by IPv6 (fd00:ec2::254)", "fd00:ec2::254"),
    _elsewhere("cloud metadata, IPv4-mapped", "::ffff:169.254.169.254"),
    _elsewhere("link-local", "169.254.7.7"),
    _elsewhere("IPv4-compatible (::127.0.0.1)", "::127.0.0.1"),
    _elsewhere("NAT64 (64:ff9b::/96)", "64:ff9b::7f00:1"),
    _elsewhere("6to4 (2002::/16)", "2002:7f00:1::1"),
    _elsewhere("Teredo (2001::/32)", "2001:0:7f00:1::1"),
]


@pytest.fixture(scope="module")
def special_addresses() -> Iterator[None]:
    """Gives loopback the special addresses, where this process may: what is refused must be reachable otherwise."""
    found = [attack.program.split("('", 1)[1].split("'", 1)[0] for attack in SPECIAL]
    made = [address for address in found if "ffff" not in address and _ip("add", address)]
    yield
    for address in made:
        _ip("del", address)


def _ip(verb: str, address: str) -> bool:
    try:
        command = ["ip", "address", verb, f"{address}/{128 if ':' in address else 32}", "dev", "lo"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


NOTHING = [
    Attack(
        "an empty list of destinations",  # which means everything in some
        "def main(): connect(AF_INET, STREAM, ('127.0.0.1', A['granted']))",
        sink="granted",
        refused=("EACCES",),
        rings=("actor_nothing", "call_nothing"),
    ),
    Attack(
        "an empty list of destinations, unix socket",
        "def main(): connect(AF_UNIX, STREAM, A['unix_granted'])",
        sink="unix_granted",
        refused=("EACCES",),
        rings=("actor_nothing", "call_nothing"),
    ),
]


def _family(name: str, body: str, error: str = "EAFNOSUPPORT", *, privileged: bool = False) -> Attack:
    """A socket that must not even come into being: judged by a file the attack leaves once it has it."""
    program = f"""
def main():
    try:
        sock = {body}
    except OSError as error:
        say(missing=str(error))  # what this kernel, or a sysctl, refuses by itself
        raise
    open(os.path.join(A['folder'], 'made'), 'w').close()
"""
    return Attack(
        name,
        program,
        sink="",
        refused=(error,),
        judge=lambda told: f"a {name}" if Path(told["folder"], "made").exists() else "",
        privileged=privileged,
        surface=True,
        rings=("actor", "actor_udp", "call"),
    )


FAMILIES = [
    _family("raw IPv4 socket", "socket.socket(AF_INET, RAW, 255)", "EPERM", privileged=True),
    _family("raw IPv6 socket", "socket.socket(AF_INET6, RAW, 255)", "EPERM", privileged=True),
    _family("packet socket", "socket.socket(socket.AF_PACKET, RAW, 0x300)", privileged=True),
    _family("UDP-Lite socket", "socket.socket(AF_INET, DGRAM, 136)", "EPROTONOSUPPORT"),
    _family("ping socket", "socket.socket(AF_INET, DGRAM, 1)", "EPROTONOSUPPORT"),
    _family("SCTP socket", "socket.socket(AF_INET, STREAM, 132)", "EPROTONOSUPPORT"),
    _family("SCTP seqpacket socket", "socket.socket(AF_INET, SEQPACKET, 132)", "EPROTONOSUPPORT"),
    _family("DCCP socket", "socket.socket(AF_INET, 6, 33)", "EPROTONOSUPPORT"),
    _family("MPTCP over IPv6 socket", "socket.socket(AF_INET6, STREAM, 262)", "EPROTONOSUPPORT"),
    _family("vsock socket", "socket.socket(40, STREAM)"),
    _family("alg socket", "socket.socket(38, SEQPACKET)"),
    _family("SMC socket", "socket.socket(43, STREAM)"),
    _family("RDS socket", "socket.socket(21, SEQPACKET)"),
    _family("TIPC socket", "socket.socket(30, STREAM)"),
    _family("XDP socket", "socket.socket(44, RAW)", privileged=True),
    _family("bluetooth socket", "socket.socket(31, RAW, 1)"),
    _family("CAN socket", "socket.socket(29, RAW, 1)"),
    _family("KCM socket", "socket.socket(41, DGRAM)"),
    _family("key management socket", "socket.socket(15, RAW, 2)", privileged=True),
    _family("netlink audit socket", "socket.socket(16, RAW, 9)"),
    _family("netlink netfilter socket", "socket.socket(16, RAW, 12)"),
    _family("netlink generic socket", "socket.socket(16, RAW, 16)"),
    _family("netlink connector socket", "socket.socket(16, DGRAM, 11)"),
    _family("netlink sock_diag socket", "socket.socket(16, RAW, 4)"),
]


@cases(TCP, "TCP: addresses and calls")
def test_tcp(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@cases(SPECIAL, "TCP: addresses and calls")
@pytest.mark.usefixtures("special_addresses")
def test_special(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@cases(NOTHING, "configuration")
def test_nothing(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@cases(UDP, "UDP")
def test_udp(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


@cases(FAMILIES, "socket families and protocols")
def test_family(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)

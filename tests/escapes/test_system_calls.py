"""Ways around the filter itself: other system call tables, io_uring, namespaces, privileges, socket options, netlink."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

_I386 = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <arpa/inet.h>
#include <netinet/in.h>
static long call32(long number, long a, long b, long c) {
    long result;
    __asm__ volatile ("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory", "r8","r9","r10","r11");
    return result;
}
int main(int argc, char **argv) {
    char *low = mmap(0, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_32BIT, -1, 0);
    struct sockaddr_in *to = (struct sockaddr_in *)low;
    to->sin_family = AF_INET; to->sin_port = htons(atoi(argv[4])); to->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    long fd = call32(359, AF_INET, SOCK_STREAM, 0);
    if (fd == -38) { printf("{\\"errno\\": \\"ENOSYS\\", \\"missing\\": \\"i386 system calls\\"}\\n"); return 0; }
    long result = fd < 0 ? fd : call32(362, fd, (long)to, sizeof *to);
    strcpy(low + 64, argv[2]);
    if (result == 0) result = call32(4, fd, (long)(low + 64), strlen(argv[2]));
    printf("{\\"result\\": %ld}\\n", result);
    return 0;
}
"""

_X32 = """
#include <stdio.h>
#include <unistd.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[4]))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    long fd = syscall(0x40000000 | 41, AF_INET, SOCK_STREAM, 0);
    if (fd < 0 && errno == ENOSYS) { printf("{\\"errno\\": \\"ENOSYS\\", \\"missing\\": \\"x32\\"}\\n"); return 0; }
    long result = syscall(0x40000000 | 42, fd, &to, sizeof to);
    if (result == 0) result = write(fd, argv[2], strlen(argv[2]));
    printf("{\\"result\\": %ld}\\n", result);
    return 0;
}
"""

_IO_URING = """
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/io_uring.h>
#include <arpa/inet.h>
static int ring; static struct io_uring_params p; static char *sq, *cq; static struct io_uring_sqe *sqes;
static int submit(struct io_uring_sqe *one) {
    unsigned tail = *(unsigned *)(sq + p.sq_off.tail), mask = *(unsigned *)(sq + p.sq_off.ring_mask), at = tail & mask;
    sqes[at] = *one;
    ((unsigned *)(sq + p.sq_off.array))[at] = at;
    __atomic_store_n((unsigned *)(sq + p.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
    if (syscall(426, ring, 1, 1, 1, 0, 0) < 0) return -errno;
    unsigned head = *(unsigned *)(cq + p.cq_off.head);
    struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + p.cq_off.cqes) + (head & *(unsigned *)(cq + p.cq_off.ring_mask));
    int result = done->res;
    __atomic_store_n((unsigned *)(cq + p.cq_off.head), head + 1, __ATOMIC_RELEASE);
    return result;
}
int main(int argc, char **argv) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[4]))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ring = syscall(425, 4, &p);
    if (ring < 0) {
        printf("{\\"errno\\": \\"%s\\"}\\n", errno == ENOSYS ? "ENOSYS" : errno == EPERM ? "EPERM" : "other");
        return 0;
    }
    sq = mmap(0, p.sq_off.array + p.sq_entries * 4, PROT_READ|PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    cq = mmap(0, p.cq_off.cqes + p.cq_entries * 16, PROT_READ|PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
    sqes = mmap(0, p.sq_entries * sizeof *sqes, PROT_READ|PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    struct io_uring_sqe one = {.opcode = 45, .fd = AF_INET, .off = SOCK_STREAM};
    int fd = submit(&one);
    one = (struct io_uring_sqe){.opcode = IORING_OP_CONNECT, .fd = fd, .addr = (long)&to, .off = sizeof to};
    int result = submit(&one);
    one = (struct io_uring_sqe){.opcode = IORING_OP_SEND, .fd = fd, .addr = (long)argv[2], .len = strlen(argv[2])};
    if (result == 0) result = submit(&one);
    printf("{\\"result\\": %d}\\n", result);
    return 0;
}
"""


def _made(what: str) -> object:
    return lambda told: what if Path(told["folder"], "made").exists() else ""


def _doing(
    name: str,
    body: str,
    error: str = "EPERM",
    *,
    privileged: bool = False,
    rings: tuple[str, ...] = ("actor", "call"),
) -> Attack:
    """Something that must fail as such, with one of ``error``: the attack leaves a file behind once it got it."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    program = f"""
def main():
{lines}
    open(os.path.join(A['folder'], 'made'), 'w').close()
"""
    return Attack(
        name,
        program,
        sink="",
        refused=tuple(error.split()),
        judge=_made(name),
        surface=True,
        privileged=privileged,
        rings=rings,
    )


def _option(name: str, family: str, level: int, number: int, value: str, *, privileged: bool = False) -> Attack:
    body = f"""
try: socket.socket({family}, STREAM).setsockopt({level}, {number}, {value})
except OSError as error:
    if error.errno == errno.EINVAL: say(missing='this routing header, which other kernels take')
    raise
"""
    return _doing(f"setsockopt {name}", body, "ENOPROTOOPT", privileged=privileged)


_RTHDR = "bytes([6, 2, 4, 0, 0, 0, 0, 0]) + socket.inet_pton(AF_INET6, '::1')"  # segment routing: where to go first
_CMSG = "struct.pack('=Qii', 16 + 24, 41, 57) + " + _RTHDR  # the same as sticky ancillary data

CALLS = [
    Attack("i386 system calls", _I386),
    Attack("x32 system calls", _X32),
    Attack("io_uring", _IO_URING, refused=("ENOSYS",)),
    _doing(
        "unshare network", "if libc.unshare(0x40000000): raise OSError(ctypes.get_errno(), 'unshare')", privileged=True
    ),
    _doing("unshare user", "if libc.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')"),
    _doing(
        "unshare mount", "if libc.unshare(0x00020000): raise OSError(ctypes.get_errno(), 'unshare')", privileged=True
    ),
    _doing(
        "clone into a user namespace",
        """
child = call(56, 0x10000000 | 17, 0, 0, 0, 0)
if child == 0: os._exit(0)
os.waitpid(child, 0)
""",
    ),
    _doing(
        "clone3 into a user namespace",
        """
arguments = struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
child = call(435, arguments, len(arguments))
if child == 0: os._exit(0)
os.waitpid(child, 0)
""",
        "ENOSYS",
    ),
    _doing(
        "setns",
        "descriptor = os.open('/proc/self/ns/uts', os.O_RDONLY)\n"
        "if libc.setns(descriptor, 0): raise OSError(ctypes.get_errno(), 'setns')",
        privileged=True,
    ),
    _doing(
        "mount",
        """
target = A['folder'].encode() + b'/target'
os.mkdir(target)
if libc.mount(b'none', target, b'tmpfs', 0, None): raise OSError(ctypes.get_errno(), 'mount')
libc.umount2(target, 2)
""",
        privileged=True,
    ),
    _doing("bpf", "os.close(call(321, 0, struct.pack('=IIII', 2, 4, 8, 1) + bytes(56), 72))", privileged=True),
    _doing("userfaultfd", "os.close(call(323, 1))"),
    _doing(
        "perf_event_open",
        "attr = struct.pack('=IIQ', 1, 112, 0) + bytes(24) + struct.pack('=Q', 0x61) + bytes(64)\n"
        "os.close(call(298, attr, 0, -1, -1, 0))",
    ),
    _doing("keyctl", "call(250, 0, -3, 0)"),
    _doing(
        "tun device",
        "descriptor = os.open('/dev/net/tun', os.O_RDWR)\n"
        "import fcntl\n"
        "fcntl.ioctl(descriptor, 0x400454ca, struct.pack('16sH22x', b'rg%d', 0x1001))",
        "EPERM EACCES",
        privileged=True,
    ),
    _doing(
        "interface taken down by ioctl",
        "import fcntl\nsock = socket.socket()\n"
        "flags = fcntl.ioctl(sock, 0x8913, struct.pack('16sH22x', b'lo', 0))\n"
        "fcntl.ioctl(sock, 0x8914, flags)",
        privileged=True,
    ),
    _doing(
        "route changed by netlink",
        # an address on lo: RTM_NEWADDR, answered with NLMSG_ERROR 0 where it was done
        """
sock = socket.socket(socket.AF_NETLINK, RAW, 0)
sock.bind((0, 0))
address = b'\\x08\\x00\\x02\\x00' + socket.inet_aton('127.77.%d.1' % (os.getpid() % 250))
body = struct.pack('=BBBBI', 2, 32, 0, 254, 1) + address
sock.send(struct.pack('=IHHII', 16 + len(body), 20, 0x605, 1, 0) + body)
(code,) = struct.unpack_from('=i', sock.recv(4096), 16)
if code: raise OSError(-code, os.strerror(-code))
body = struct.pack('=BBBBI', 2, 32, 0, 254, 1) + address
sock.send(struct.pack('=IHHII', 16 + len(body), 21, 0x5, 2, 0) + body)
""",
        privileged=True,
    ),
    _doing(
        "chroot",
        """
child = os.fork()
if child == 0:
    try: os.chroot(A['folder'])
    except OSError as error: os._exit(error.errno)
    os._exit(0)
number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if number: raise OSError(number, 'refused')
""",
        privileged=True,
    ),
    _doing(
        "open_by_handle_at",
        "handle = ctypes.create_string_buffer(struct.pack('=Ii', 120, 0) + bytes(120))\n"
        "call(303, -100, b'/', handle, ctypes.create_string_buffer(8), 0)\n"
        "os.close(call(304, os.open('/', os.O_RDONLY), handle, 0))",
        "EPERM EACCES",
        privileged=True,
    ),
    _doing("fanotify_init", "os.close(call(300, 0, 0))", privileged=True),
    _doing("kcmp", "call(312, os.getpid(), os.getpid(), 0, 0, 0)"),
    _doing("process_madvise", "call(440, os.pidfd_open(os.getpid()), struct.pack('=QQ', 0, 0), 1, 20, 0)"),
    _doing(
        "device node of a disk",
        "os.mknod(A['folder'] + '/disk', 0o60600, os.makedev(8, 0))",
        "EPERM EACCES",
        privileged=True,
        rings=("call",),
    ),
    _doing(
        "device node of a GPU",
        "os.mknod(A['folder'] + '/gpu', 0o20600, os.makedev(195, 0))",
        "EPERM EACCES",
        privileged=True,
        rings=("call",),
    ),
    replace(
        _doing(
            "RDMA device",
            "try: os.close(os.open('/dev/infiniband/uverbs0', os.O_RDWR))\n"
            "except FileNotFoundError as error:\n"
            "    say(missing='no RDMA device')\n"
            "    raise",
            rings=("call",),
        ),
        refused=(),
    ),
    _doing(
        "TIOCSTI",
        "import fcntl, pty, termios\n"
        "os.setsid()\n"
        "leader, follower = os.openpty()\n"
        "fcntl.ioctl(follower, termios.TIOCSCTTY, 0)\n"
        "try: fcntl.ioctl(follower, termios.TIOCSTI, b'x')\n"
        "except OSError as error:\n"
        "    if error.errno == errno.EIO: say(missing='this host has no TIOCSTI for those without rights')\n"
        "    raise",
    ),
    _doing(
        "capabilities by exec",  # of root, whose every exec would bring them back
        "status = subprocess.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout\n"
        "mask = int(status.split('CapEff:')[1].split()[0], 16)\n"
        "if not mask: raise OSError(errno.EPERM, 'none')",
        privileged=True,
        rings=("call",),
    ),
    *[
        _doing(
            f"{name} reaches the kernel",
            f"""
try: call({number}, {arguments})
except OSError as error:
    if error.errno in (errno.EPERM, errno.ENOSYS):
        say(missing='not in this kernel, or not for this user')
        raise
""",
            privileged=True,
        )
        for name, number, arguments in (
            ("kexec_load", 246, "0, 17, 0, 0xffff0000"),
            ("init_module", 175, "b'x', 1, b''"),
            ("finit_module", 313, "-1, b'', 0"),
            ("delete_module", 176, "b'no_such_module', 0x800"),
            ("swapon", 167, "b'/no/such', 0"),
            ("acct", 163, "b'/no/such'"),
            ("reboot", 169, "0, 0, 0, 0"),
            ("sethostname", 170, "b'', -1"),
            ("settimeofday", 164, "1, 0"),
            ("syslog", 103, "3, 0, -1"),
            ("ioperm", 173, "0xffffff, 1, 1"),
            ("pivot_root", 155, "b'/no/such', b'/no/such'"),
            ("move_mount", 429, "-1, b'', -1, b'', 0"),
            ("fsopen", 430, "b'no_such_file_system', 0"),
        )
    ],
    _option("TCP_REPAIR", "AF_INET", 6, 19, "1", privileged=True),
    _option("TCP_FASTOPEN_CONNECT", "AF_INET", 6, 30, "1"),
    _option("IP_OPTIONS", "AF_INET", 0, 4, "bytes([131, 7, 4, 127, 0, 0, 2, 0])", privileged=True),
    _option("IP_TRANSPARENT", "AF_INET", 0, 19, "1", privileged=True),
    _option("SO_MARK", "AF_INET", 1, 36, "7", privileged=True),
    _option("SO_BINDTODEVICE", "AF_INET", 1, 25, "b'lo'"),
    _option("SO_BINDTOIFINDEX", "AF_INET", 1, 62, "1"),
    _option("SO_MAX_PACING_RATE", "AF_INET", 1, 47, "1 << 30"),
    _option("IPV6_RTHDR", "AF_INET6", 41, 57, _RTHDR),
    _option("IPV6_HOPOPTS", "AF_INET6", 41, 54, "bytes([0, 0, 1, 4, 0, 0, 0, 0])", privileged=True),
    _option("IPV6_2292PKTOPTIONS", "AF_INET6", 41, 6, _CMSG),
]


@cases(CALLS, "around the filter")
def test_system_call(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


def test_set_user_id_is_without_effect(stage: Stage) -> None:
    """no_new_privs is on, and a tool has no capability left."""
    argv = ["sh", "-c", "grep -E '^(NoNewPrivs|CapEff|CapPrm|CapBnd|Seccomp):' /proc/self/status"]
    said = dict(line.split(":\t") for line in stage.host().run("call", argv).stdout.splitlines())
    assert said["NoNewPrivs"] == "1"
    assert said["Seccomp"] == "2"
    assert int(said["CapEff"], 16) == int(said["CapPrm"], 16) == 0
    if os.geteuid() == 0:
        assert int(said["CapBnd"], 16) == 0
    actor = dict(line.split(":\t") for line in stage.host().run("actor", argv).stdout.splitlines())
    assert (actor["NoNewPrivs"], actor["Seccomp"]) == ("1", "2")

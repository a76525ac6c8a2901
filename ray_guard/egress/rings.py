"""The two rings: which system calls run freely, are refused on the spot, or are put to the supervisor. Pure.

Runs in target (actor ring) and zygote (call ring), just before the filter is installed.

Anything that carries a destination in memory is *notified*: the supervisor reads it once, decides, and acts on its own
copy. Anything that would make such a call avoidable (io_uring, other architectures, namespaces, foreign processes,
socket families nobody granted) is *refused*. The rest runs at full speed: the kernel caches those verdicts in a bitmap.

Why the actor ring does not notify sendmsg: gRPC writes with it, and notifying it costs every Ray call 15 %. On a
stream socket an address in ``msghdr`` is ignored, so it matters for datagram sockets alone. The supervisor therefore
creates an actor's datagram sockets itself, shut down for writing before they are handed over
(:mod:`ray_guard.egress.gate`): such a socket can be connected, which is how Ray and vLLM learn their own address, but
can never send.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ray_guard.kernel.landlock import DEVICE_ABI, SIGNAL_SCOPE_ABI, TRUNCATE_ABI
from ray_guard.kernel.seccomp import ALLOW as RUN
from ray_guard.kernel.seccomp import (
    NOTIFY,
    Instruction,
    Rule,
    When,
    assemble,
    differs,
    equals,
    pointer_given,
    refuse,
)

if TYPE_CHECKING:
    from ray_guard.records import Role

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
_TYPE = 0xF  # without SOCK_NONBLOCK and SOCK_CLOEXEC
MSG_FASTOPEN: Final = 0x20000000

_REFUSE = refuse(errno.EPERM)
_ABSENT = refuse(errno.ENOSYS)  # callers fall back to an older call that can be judged
_NO_FAMILY = refuse(errno.EAFNOSUPPORT)
_NO_PROTOCOL = refuse(errno.EPROTONOSUPPORT)
_NO_IOCTL = refuse(errno.ENOTTY)
_NO_OPTION = refuse(errno.ENOPROTOOPT)
_NO_ACCESS = refuse(errno.EACCES)

_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}
_CLONE_NAMESPACES = 0x7E020000  # in clone(2) the bit of NEWTIME belongs to the exit signal
_CLONE_FILES, _CLONE_THREAD = 0x400, 0x10000

#: never needed by a workload, each a way around the gate, into another process or into the kernel
_PRIVILEGED = """
mount umount2 pivot_root chroot move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr setns
swapon swapoff reboot acct quotactl quotactl_fd sethostname setdomainname iopl ioperm
init_module finit_module delete_module kexec_load kexec_file_load bpf perf_event_open userfaultfd fanotify_init
add_key request_key keyctl open_by_handle_at kcmp process_madvise process_mrelease
settimeofday clock_settime vhangup syslog migrate_pages move_pages
""".split()

#: reading, writing or borrowing from another process; a policy actor may, within its own tree (torch, NCCL)
_FOREIGN_PROCESS = ("pidfd_getfd", "process_vm_readv", "process_vm_writev")


#: System V IPC and message queues reach every process of the user
_SHARED_IPC = """
shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink
""".split()


def _protocol(family: int, kind: int, protocol: int) -> tuple[When, When, When]:
    return equals(0, family), equals(1, kind, mask=_TYPE), equals(2, protocol)


def _sockets(*, stream: int, datagram: int, netlink: int) -> list[Rule]:
    """socket(2) by exact (family, type, protocol): whatever is not listed cannot be created."""
    rules = []
    for family in (AF_INET, AF_INET6):
        for protocol in (0, socket.IPPROTO_TCP):
            rules.append(Rule("socket", stream, _protocol(family, STREAM, protocol)))
        for protocol in (0, socket.IPPROTO_UDP):
            rules.append(Rule("socket", datagram, _protocol(family, DGRAM, protocol)))
        # MPTCP, SCTP, UDP-Lite …: the answer of a kernel built without them, on which programs fall back to TCP
        rules.append(Rule("socket", refuse(errno.EPERM), (equals(0, family), equals(1, RAW, mask=_TYPE))))
        rules.append(Rule("socket", _NO_PROTOCOL, (equals(0, family),)))
    for kind in (STREAM, SEQPACKET):
        rules.append(Rule("socket", stream, (equals(0, AF_UNIX), equals(1, kind, mask=_TYPE), equals(2, 0))))
    for kind in (RAW, DGRAM):  # routing tables, by a socket that cannot change them: getifaddrs, NCCL, Gloo
        rules.append(Rule("socket", netlink, _protocol(AF_NETLINK, kind, 0)))
    rules.append(Rule("socket", _NO_FAMILY))
    return rules


def _socket_pairs(kinds: tuple[int, ...]) -> list[Rule]:
    free = [Rule("socketpair", RUN, (equals(0, AF_UNIX), equals(1, kind, mask=_TYPE))) for kind in kinds]
    return [*free, Rule("socketpair", _NO_FAMILY)]


def _options() -> list[Rule]:
    """Options that change where a connected socket sends, or undo a limit."""
    option, level = 2, 1
    refused = [
        (socket.IPPROTO_TCP, (19, 23, 30, 31)),  # REPAIR, FASTOPEN, FASTOPEN_CONNECT, ULP (smc)
        (socket.IPPROTO_IP, (4, 16, 17, 19)),  # OPTIONS (source routes), IPSEC_POLICY, XFRM_POLICY, TRANSPARENT
        # 2292PKTOPTIONS (what follows as one), both POLICYs, HOPOPTS, RTHDRDSTOPTS, RTHDR, DSTOPTS, TRANSPARENT
        (socket.IPPROTO_IPV6, (6, 34, 35, 54, 55, 57, 59, 75)),
        # BINDTODEVICE, MARK, LOCK_FILTER (a locked one is the gate's own), MAX_PACING_RATE, BINDTOIFINDEX
        (socket.SOL_SOCKET, (25, 36, 44, 47, 62)),
    ]
    return [
        Rule("setsockopt", _NO_OPTION, (equals(level, at), equals(option, number)))
        for at, numbers in refused
        for number in numbers
    ]


_READING_SIOC = [
    int(number, 16)
    for number in """
8903 8904 8905 8906 8907 8910 8912 8913 8915 8917 8919 891b 891d 8921 8927 8933 8942 8970
""".split()
]
"""SIOCG*: owner, time stamps, names, flags, addresses, metric, MTU, index, queue length, map."""


def _ioctls() -> list[Rule]:
    request = 1
    rules = [Rule("ioctl", RUN, (equals(request, number),)) for number in _READING_SIOC]
    rules += [
        Rule("ioctl", _REFUSE, (equals(request, 0x8900, mask=0xFF00),)),  # SIOC*: interfaces, routes, tunnels
        Rule("ioctl", _REFUSE, (equals(request, 0x400454CA),)),  # TUNSETIFF
        Rule("ioctl", _REFUSE, (equals(request, 0x5412),)),  # TIOCSTI: typing into somebody's terminal
        Rule("ioctl", _REFUSE, (equals(request, 0x541C),)),  # TIOCLINUX
    ]
    return rules


#: changes of files that Landlock does not judge; those without a name here have an older form that is judged
_METADATA = """
chmod fchmod fchmodat chown lchown fchown fchownat utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
""".split()
_NEWER_METADATA = ("fchmodat2", "setxattrat", "removexattrat", "file_setattr")
_FLAG_IOCTLS = (0x40086602, 0x40046602, 0x401C5820, 0x40087602, 0x40047602, 0x40047211)
"""FS_IOC_SETFLAGS, its 32-bit form, FS_IOC_FSSETXATTR, FS_IOC_SETVERSION and its 32-bit form, FAT's attributes."""
_VOLUME_IOCTLS = (
    *(0x50009401, 0x5000940E, 0x5000940F, 0x50009417, 0x50009418, 0x5000943F, 0x4008941A, 0xC0C89425),
    *(0x40806685, 0x800C6613),
)
"""btrfs: subvolumes and snapshots made, removed, made read-only; FS_IOC_ENABLE_VERITY and SET_ENCRYPTION_POLICY. All
work on a descriptor that was opened for reading; a snapshot appears where no Landlock lets anything be made."""


def _files() -> list[Rule]:
    rules = [Rule(name, NOTIFY) for name in _METADATA]
    rules += [Rule(name, _ABSENT) for name in _NEWER_METADATA]
    return rules + [Rule("ioctl", _NO_IOCTL, (equals(1, number),)) for number in (*_FLAG_IOCTLS, *_VOLUME_IOCTLS)]


def _no_gpu() -> list[Rule]:
    """Unless GPUs are granted an inherited descriptor of one does nothing.

    By the number of the ioctl: NVIDIA's magic ``F``, its UVM_INITIALIZE and UVM_DEINITIALIZE, DRM's ``d``, KFD's ``K``
    (the console's calls have that magic too, but no size).
    """
    magic = 0xFF00
    return [
        Rule("ioctl", _REFUSE, (equals(1, 0x4600, mask=magic),)),
        Rule("ioctl", _REFUSE, (equals(1, 0x30000001),)),
        Rule("ioctl", _REFUSE, (equals(1, 0x30000002),)),
        Rule("ioctl", _REFUSE, (equals(1, 0x6400, mask=magic),)),
        Rule("ioctl", _REFUSE, (equals(1, 0x4B00, mask=magic), differs(1, 0, mask=0xFFFF0000))),
    ]


def _common() -> list[Rule]:
    rules = [Rule(name, _ABSENT) for name in ("io_uring_setup", "io_uring_enter", "io_uring_register", "clone3")]
    rules += [
        Rule("connect", NOTIFY),
        Rule("bind", NOTIFY),
        Rule("listen", NOTIFY),
        *pointer_given("sendto", NOTIFY, 4),
        Rule("sendto", refuse(errno.EOPNOTSUPP), (equals(3, MSG_FASTOPEN, mask=MSG_FASTOPEN),)),
        Rule("clone", _REFUSE, (differs(0, 0, mask=_CLONE_NAMESPACES),)),
        Rule("unshare", _REFUSE, (differs(0, 0, mask=_NEW_NAMESPACES | _CLONE_FILES),)),
        # a thread with descriptors of its own: /proc/PID/fd, which the GPU census reads, would not show them
        Rule("clone", _REFUSE, (equals(0, _CLONE_THREAD, mask=_CLONE_THREAD | _CLONE_FILES),)),
        Rule("close_range", refuse(errno.EINVAL), (equals(2, 2, mask=2),)),
        # ssh-agent and Chromium ask to be unreadable; the supervisor could then not judge them: agree, and do nothing
        Rule("prctl", refuse(0), (equals(0, 4), equals(1, 0))),
    ]
    rules += [Rule(name, _REFUSE) for name in _PRIVILEGED]
    return rules + _options() + _ioctls()


_SIGNALLING: Final = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_OPENING: Final = (("open", 1), ("openat", 2))
"""Calls that open by path, and which argument says how."""
_F_SETOWN, _F_SETOWN_EX = 8, 15
_F_SETLEASE, _F_SETDELEG = 1024, 1040
_PRIO_USER, _IOPRIO_WHO_USER = 2, 3


def _keepers(pids: Sequence[int]) -> list[Rule]:
    """Who judges and ends this ring can be neither signalled nor rescheduled nor limited from within it.

    A supervisor that is stopped counts nothing and cuts nothing, while what is connected already flows on. Landlock
    does the same for tools, but an actor has threads, and before its eighth version it applies to one at a time.
    """
    rules = [
        # by descriptor: of whom cannot be seen, and /proc/PID is as good as a pidfd. Callers fall back to kill
        Rule("pidfd_send_signal", _ABSENT),
        Rule("fcntl", refuse(errno.EINVAL), (equals(1, _F_SETOWN_EX),)),
        # all processes, or all of this user
        Rule("kill", _REFUSE, (equals(0, -1 & 0xFFFFFFFF),)),
        Rule("setpriority", _REFUSE, (equals(0, _PRIO_USER),)),
        Rule("ioprio_set", _REFUSE, (equals(0, _IOPRIO_WHO_USER),)),
    ]
    for pid in pids:
        for who in (pid, -pid & 0xFFFFFFFF):  # the process, its group
            rules.append(Rule("kill", _REFUSE, (equals(0, who),)))
            rules.append(Rule("fcntl", _REFUSE, (equals(1, _F_SETOWN), equals(2, who))))  # SIGIO, or what F_SETSIG says
        for name in ("tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            rules.append(Rule(name, _REFUSE, (equals(0, pid),)))
        rules += pointer_given("prlimit64", _REFUSE, 2, equals(0, pid))
        for name in ("sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr"):
            rules.append(Rule(name, _REFUSE, (equals(0, pid),)))
        for name in ("setpriority", "ioprio_set"):
            rules.append(Rule(name, _REFUSE, (equals(1, pid),)))
    return rules


def actor_ring(
    role: Role, machine: str, *, datagrams: bool, borrows: bool = True, keepers: Sequence[int] = ()
) -> tuple[Instruction, ...]:
    """The filter of a whole actor process (role ``env`` or ``policy``).

    Args:
        machine: ``platform.machine()``.
        datagrams: the policy grants ``udp://`` destinations. The actor then gets datagram sockets that can send, and
            sendmsg is notified, at the cost stated above.
        borrows: the supervisor can take descriptors of its targets; else it makes all their sockets itself
            (:mod:`ray_guard.egress.made`), and ``datagrams`` cannot be.
        keepers: the processes that judge and end this ring.

    Raises:
        ValueError: datagram sockets that can send are wanted where their messages could not be judged.
    """
    if datagrams and not borrows:
        raise ValueError("messages cannot be sent on behalf where no descriptor can be taken")
    foreign = NOTIFY if role == "policy" else _REFUSE
    rules = _common() + _sockets(
        stream=RUN if borrows else NOTIFY, datagram=RUN if datagrams else NOTIFY, netlink=NOTIFY
    )
    rules += _socket_pairs((STREAM, SEQPACKET))
    rules += [Rule(name, foreign) for name in _FOREIGN_PROCESS]
    rules.append(Rule("ptrace", _REFUSE, (differs(0, 0),)))
    rules += _keepers(keepers)
    if role == "policy":  # it may outlive them: the next ones are in no filter
        rules += [Rule("kill", RUN, (equals(0, 0),)), *(Rule(name, NOTIFY) for name in _SIGNALLING)]
        rules += [Rule("fcntl", NOTIFY, (equals(1, _F_SETOWN), differs(2, 0))), *_bystanders()]
    if datagrams:
        rules += [Rule("sendmsg", NOTIFY), Rule("sendmmsg", NOTIFY)]
    else:
        rules += _streams_only()
    return assemble(rules, machine)


def _streams_only() -> list[Rule]:
    """Where no datagram socket can send: on the others only this flag makes an address in msghdr count."""
    return [
        Rule(name, refuse(errno.EOPNOTSUPP), (equals(at, MSG_FASTOPEN, mask=MSG_FASTOPEN),))
        for name, at in (("sendmsg", 2), ("sendmmsg", 3))
    ]


def _bystanders() -> list[Rule]:
    """Who is rescheduled or limited is judged (supervisor/bystanders.py); most are about oneself, by number 0."""
    rules = [Rule("setpriority", _REFUSE, (equals(0, 2),)), Rule("ioprio_set", _REFUSE, (equals(0, 3),))]  # by user
    rules += [Rule(name, NOTIFY, (differs(1, 0),)) for name in ("setpriority", "ioprio_set")]
    rules += pointer_given("prlimit64", NOTIFY, 2, differs(0, 0))
    rules += [Rule(f"sched_set{what}", NOTIFY, (differs(0, 0),)) for what in ("affinity", "param", "scheduler", "attr")]
    # whoever opens a leased file waits, /etc/hosts too, and to read it is enough to lease it
    rules += [Rule("fcntl", refuse(errno.EINVAL), (equals(1, command),)) for command in (_F_SETLEASE, _F_SETDELEG)]
    return rules


_O_ACCMODE, _O_TRUNC = 3, 0o1000
_O_NEITHER = 3  # an access mode that asks for neither reading nor writing


def _missing_from_landlock(version: int) -> list[Rule]:
    """What the kernel's own Landlock does not judge yet. Who is signalled is judged by supervisor/signals.py."""
    rules: list[Rule] = []
    if version < SIGNAL_SCOPE_ABI:
        rules += [
            Rule("kill", RUN, (equals(0, 0),)),  # one's own group, which lies within the call
            Rule("kill", _REFUSE, (equals(0, -1 & 0xFFFFFFFF),)),
            *(Rule(name, NOTIFY) for name in _SIGNALLING),
            Rule("pidfd_send_signal", _ABSENT),  # callers fall back to kill
            Rule("fcntl", NOTIFY, (equals(1, _F_SETOWN), differs(2, 0))),
            Rule("fcntl", refuse(errno.EINVAL), (equals(1, _F_SETOWN_EX),)),
            # told to the leader, who ends a call by its process groups
            Rule("setsid", NOTIFY),
            Rule("setpgid", NOTIFY),
        ]
    if version < DEVICE_ABI:  # what is opened for neither needs no right before that, and takes ioctls
        for name, at in _OPENING:
            rules.append(Rule(name, _NO_ACCESS, (equals(at, _O_NEITHER, mask=_O_ACCMODE),)))
        rules.append(Rule("openat2", _ABSENT))  # callers fall back to openat
    if version < TRUNCATE_ABI:
        rules.append(Rule("truncate", NOTIFY))
        for name, at in _OPENING:  # opened for reading, and emptied all the same
            rules.append(Rule(name, _NO_ACCESS, (equals(at, _O_TRUNC, mask=_O_TRUNC | _O_ACCMODE),)))
    return rules


def call_ring(
    machine: str, *, landlock: int, borrows: bool = True, own_ipc: bool = True, gpu: bool = False
) -> tuple[Instruction, ...]:
    """The filter of a tool process and all it will ever start.

    Args:
        landlock: which version of it the process will be in; what that does not judge is refused or notified here.
        borrows: see :func:`actor_ring`.
        own_ipc: each has System V IPC and message queues of its own; else there are none.
        gpu: it may use GPUs.
    """
    if borrows:
        rules = _common() + _sockets(stream=RUN, datagram=RUN, netlink=NOTIFY)
        rules.insert(0, Rule("socket", RUN, (equals(0, AF_UNIX), equals(1, DGRAM, mask=_TYPE), equals(2, 0))))
        # a datagram pair's addresses are judged in sendto and sendmsg
        rules += _socket_pairs((STREAM, SEQPACKET, DGRAM))
        rules += [Rule("sendmsg", NOTIFY), Rule("sendmmsg", NOTIFY)]
    else:
        rules = _common() + _sockets(stream=NOTIFY, datagram=NOTIFY, netlink=NOTIFY)
        rules += _socket_pairs((STREAM, SEQPACKET)) + _streams_only()
    rules += [Rule(name, _REFUSE) for name in _FOREIGN_PROCESS]
    rules += _bystanders() + _missing_from_landlock(landlock)
    if not own_ipc:
        rules += [Rule(name, _ABSENT) for name in _SHARED_IPC]
    # Observed and let through: what is executed, and how it ends. Not fork: interrupted by a signal it would fail.
    rules += [Rule(name, NOTIFY) for name in ("execve", "execveat", "exit_group")]
    rules += _files()
    rules.append(Rule("ioctl", _REFUSE, (equals(1, 0x1B00, mask=0xFF00),)))  # RDMA verbs, by whatever descriptor
    # Who may use GPUs names threads (supervisor/thread_names.py); what else is opened to be written Landlock judges.
    writing = [Rule(name, NOTIFY, (equals(at, how, mask=_O_ACCMODE),)) for name, at in _OPENING for how in (1, 2)]
    rules += writing if gpu else _no_gpu()
    return assemble(rules, machine)

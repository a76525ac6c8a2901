"""Both rings as tables: what a system call with these arguments is answered, by running the assembled program."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.egress import rings
from ray_guard.kernel import seccomp
from ray_guard.kernel.seccomp import ALLOW, NOTIFY, Instruction, Rule, When, assemble, refuse
from ray_guard.kernel.syscalls import AUDIT_ARCH, LAST_KNOWN, TABLES
from ray_guard.records import Role

MACHINES = sorted(TABLES)
SOMEWHERE = 0x7F00_0000_1000
ABOVE_32_BITS = 0x7F00_0000_0000


def run(program: Sequence[Instruction], number: int, arguments: Sequence[int], arch: int) -> int:
    """What classic BPF returns for this ``struct seccomp_data``: written from the manual, not from the assembler."""
    words = [number, arch, 0, 0]
    for argument in (*arguments, *(0,) * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    accumulator = at = 0
    while True:
        code, jump_true, jump_false, constant = program[at]
        at += 1
        if code == 0x20:  # ld [constant]
            accumulator = words[constant // 4]
        elif code == 0x54:  # and #constant
            accumulator &= constant
        elif code == 0x15:  # jeq
            at += jump_true if accumulator == constant else jump_false
        elif code == 0x25:  # jgt
            at += jump_true if accumulator > constant else jump_false
        elif code == 0x35:  # jge
            at += jump_true if accumulator >= constant else jump_false
        elif code == 0x05:  # ja
            at += constant
        elif code == 0x06:  # ret
            return constant
        else:
            pytest.fail(f"instruction {code:#x} is not in the interpreter")


def answer(program: Sequence[Instruction], machine: str, name: str, *arguments: int) -> int:
    return run(program, TABLES[machine][name], arguments, AUDIT_ARCH[machine])


INET, INET6, UNIX, NETLINK = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK
STREAM, DGRAM, RAW, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET
FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
NO_FAMILY, NO_PROTOCOL = refuse(errno.EAFNOSUPPORT), refuse(errno.EPROTONOSUPPORT)
EPERM, ENOSYS, EOPNOTSUPP = refuse(errno.EPERM), refuse(errno.ENOSYS), refuse(errno.EOPNOTSUPP)
FASTOPEN = 0x20000000

# (call, arguments, answer in an env actor's ring, answer in the call ring)
TABLE = [
    ("connect", (3, SOMEWHERE, 16), NOTIFY, NOTIFY),
    ("bind", (3, SOMEWHERE, 16), NOTIFY, NOTIFY),
    ("listen", (3, 5), NOTIFY, NOTIFY),
    ("sendto", (3, SOMEWHERE, 1, 0, 0, 0), ALLOW, ALLOW),
    ("sendto", (3, SOMEWHERE, 1, 0, SOMEWHERE, 16), NOTIFY, NOTIFY),
    ("sendto", (3, SOMEWHERE, 1, 0, ABOVE_32_BITS, 16), NOTIFY, NOTIFY),
    ("sendto", (3, SOMEWHERE, 1, FASTOPEN, 0, 0), EOPNOTSUPP, EOPNOTSUPP),
    ("sendmsg", (3, SOMEWHERE, 0), ALLOW, NOTIFY),
    ("sendmsg", (3, SOMEWHERE, FASTOPEN), EOPNOTSUPP, NOTIFY),
    ("sendmmsg", (3, SOMEWHERE, 1, FASTOPEN), EOPNOTSUPP, NOTIFY),
    ("socket", (INET, STREAM, 0), ALLOW, ALLOW),
    ("socket", (INET6, STREAM | FLAGS, socket.IPPROTO_TCP), ALLOW, ALLOW),
    ("socket", (INET, STREAM, 262), NO_PROTOCOL, NO_PROTOCOL),  # MPTCP
    ("socket", (INET, DGRAM | FLAGS, socket.IPPROTO_UDP), NOTIFY, ALLOW),
    ("socket", (INET, DGRAM, socket.IPPROTO_ICMP), NO_PROTOCOL, NO_PROTOCOL),  # ping
    ("socket", (INET, RAW, socket.IPPROTO_ICMP), EPERM, EPERM),
    ("socket", (UNIX, STREAM, 0), ALLOW, ALLOW),
    ("socket", (UNIX, SEQPACKET | FLAGS, 0), ALLOW, ALLOW),
    ("socket", (UNIX, DGRAM, 0), NO_FAMILY, ALLOW),
    ("socket", (NETLINK, RAW, 0), NOTIFY, NOTIFY),
    ("socket", (NETLINK, RAW, 4), NO_FAMILY, NO_FAMILY),
    ("socket", (socket.AF_PACKET, RAW, 0), NO_FAMILY, NO_FAMILY),
    ("socket", (40, STREAM, 0), NO_FAMILY, NO_FAMILY),  # vsock
    ("socketpair", (UNIX, STREAM, 0), ALLOW, ALLOW),
    ("socketpair", (UNIX, DGRAM, 0), NO_FAMILY, ALLOW),
    ("io_uring_setup", (8, SOMEWHERE), ENOSYS, ENOSYS),
    ("clone3", (SOMEWHERE, 88), ENOSYS, ENOSYS),
    ("clone", (17,), ALLOW, ALLOW),
    ("execve", (SOMEWHERE, 0, 0), ALLOW, NOTIFY),
    ("execveat", (3, SOMEWHERE, 0, 0, 0x1000), ALLOW, NOTIFY),
    ("exit_group", (0,), ALLOW, NOTIFY),
    ("clone", (0x10000000 | 17,), EPERM, EPERM),
    ("unshare", (0x40000000,), EPERM, EPERM),
    ("unshare", (0x400,), EPERM, EPERM),  # descriptors of a thread's own
    ("clone", (0x10000 | 0x100 | 0x800,), EPERM, EPERM),
    ("clone", (0x10000 | 0x100 | 0x800 | 0x400,), ALLOW, ALLOW),
    ("close_range", (3, 9, 2), refuse(errno.EINVAL), refuse(errno.EINVAL)),
    ("close_range", (3, 9, 4), ALLOW, ALLOW),
    ("setns", (3, 0), EPERM, EPERM),
    ("pidfd_getfd", (3, 4, 0), EPERM, EPERM),
    ("process_vm_writev", (1, 0, 0, 0, 0, 0), EPERM, EPERM),
    ("bpf", (0, 0, 0), EPERM, EPERM),
    ("prctl", (4, 0), refuse(0), refuse(0)),  # PR_SET_DUMPABLE 0: agreed to, and not done
    ("prctl", (4, 1), ALLOW, ALLOW),
    ("setpriority", (0, 0, 5), ALLOW, ALLOW),
    ("setpriority", (0, 7, 5), ALLOW, NOTIFY),
    ("setpriority", (2, 0, 5), EPERM, EPERM),
    ("ioprio_set", (1, 7, 5), ALLOW, NOTIFY),
    ("ioprio_set", (3, 0, 5), EPERM, EPERM),
    ("sched_setaffinity", (0, 8, SOMEWHERE), ALLOW, ALLOW),
    ("sched_setaffinity", (7, 8, SOMEWHERE), ALLOW, NOTIFY),
    ("prlimit64", (0, 7, SOMEWHERE, 0), ALLOW, ALLOW),
    ("prlimit64", (7, 7, 0, SOMEWHERE), ALLOW, ALLOW),
    ("prlimit64", (7, 7, SOMEWHERE, 0), ALLOW, NOTIFY),
    ("msgget", (1, 0), ALLOW, ALLOW),
    ("ioctl", (3, 0x8912), ALLOW, ALLOW),  # SIOCGIFCONF
    ("ioctl", (3, 0x890B), EPERM, EPERM),  # SIOCADDRT
    ("ioctl", (3, 0xC0181B01), ALLOW, EPERM),  # RDMA verbs
    ("ioctl", (3, 0x50009401), ALLOW, refuse(errno.ENOTTY)),  # BTRFS_IOC_SNAP_CREATE
    ("ioctl", (3, 0x40806685), ALLOW, refuse(errno.ENOTTY)),  # FS_IOC_ENABLE_VERITY
    ("ioctl", (3, 0x40049409), ALLOW, ALLOW),  # FICLONE
    ("fcntl", (3, 1024, 1), ALLOW, refuse(errno.EINVAL)),  # F_SETLEASE
    ("setsockopt", (3, socket.IPPROTO_TCP, 30, SOMEWHERE, 4), refuse(errno.ENOPROTOOPT), refuse(errno.ENOPROTOOPT)),
    ("setsockopt", (3, socket.IPPROTO_TCP, socket.TCP_NODELAY, SOMEWHERE, 4), ALLOW, ALLOW),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "arguments", "in_actor", "in_call"), TABLE)
def test_what_a_call_is_answered(
    machine: str, name: str, arguments: tuple[int, ...], in_actor: int, in_call: int
) -> None:
    assert answer(rings.actor_ring(Role.ENV, machine, datagrams=False), machine, name, *arguments) == in_actor
    assert answer(rings.call_ring(machine, landlock=7), machine, name, *arguments) == in_call


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["shmget", "shmat", "shmctl", "semop", "semctl", "msgsnd", "msgctl", "mq_open"])
def test_what_would_be_shared_with_others_does_not_exist(machine: str, name: str) -> None:
    assert answer(rings.call_ring(machine, landlock=7, own_ipc=False), machine, name, 1) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["pidfd_getfd", "process_vm_readv", "process_vm_writev"])
def test_a_policy_actor_is_asked_about_other_processes(machine: str, name: str) -> None:
    assert answer(rings.actor_ring(Role.POLICY, machine, datagrams=False), machine, name, 1) == NOTIFY


# (call, arguments, the version of Landlock that does this itself, answer in a call ring before it)
OLDER = [
    ("kill", (42, 9), 6, NOTIFY),
    ("kill", (-42 & 0xFFFFFFFF, 9), 6, NOTIFY),
    ("kill", (-1 & 0xFFFFFFFF, 9), 6, EPERM),
    ("tkill", (42, 9), 6, NOTIFY),
    ("tgkill", (42, 42, 9), 6, NOTIFY),
    ("rt_sigqueueinfo", (42, 9, SOMEWHERE), 6, NOTIFY),
    ("rt_tgsigqueueinfo", (42, 42, 9, SOMEWHERE), 6, NOTIFY),
    ("pidfd_send_signal", (3, 9, 0, 0), 6, ENOSYS),
    ("fcntl", (3, 8, 42), 6, NOTIFY),  # F_SETOWN
    ("fcntl", (3, 15, SOMEWHERE), 6, refuse(errno.EINVAL)),  # F_SETOWN_EX
    ("setsid", (), 6, NOTIFY),
    ("setpgid", (0, 0), 6, NOTIFY),
    ("openat", (3, SOMEWHERE, 3), 5, refuse(errno.EACCES)),  # for neither reading nor writing
    ("openat2", (3, SOMEWHERE, SOMEWHERE, 24), 5, ENOSYS),
    ("truncate", (SOMEWHERE, 0), 3, NOTIFY),
    ("openat", (3, SOMEWHERE, 0o1000), 3, refuse(errno.EACCES)),  # O_RDONLY | O_TRUNC
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "arguments", "version", "before"), OLDER)
def test_a_filter_makes_up_for_an_older_landlock(
    machine: str, name: str, arguments: tuple[int, ...], version: int, before: int
) -> None:
    for landlock in range(1, 9):
        answered = answer(rings.call_ring(machine, landlock=landlock), machine, name, *arguments)
        assert answered == (before if landlock < version else ALLOW)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kill", (0, 15)),
        ("fcntl", (3, 8, 0)),
        ("fcntl", (3, 3)),
        ("openat", (3, SOMEWHERE, 0)),
        ("openat", (3, SOMEWHERE, 0o1001)),
        ("openat", (3, SOMEWHERE, 0o1102)),
    ],
)
def test_what_no_older_landlock_needs_judged(name: str, arguments: tuple[int, ...]) -> None:
    assert answer(rings.call_ring("x86_64", landlock=1), "x86_64", name, *arguments) == ALLOW


KEEPER, OTHER = 41, 42
GROUP = -KEEPER & 0xFFFFFFFF


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "arguments", "answered"),
    [
        ("kill", (KEEPER, 19), EPERM),
        ("kill", (GROUP, 19), EPERM),
        ("kill", (-1 & 0xFFFFFFFF, 19), EPERM),
        ("kill", (OTHER, 19), ALLOW),
        ("kill", (-OTHER & 0xFFFFFFFF, 19), ALLOW),
        ("kill", (0, 19), ALLOW),
        ("tkill", (KEEPER, 19), EPERM),
        ("tgkill", (KEEPER, KEEPER, 19), EPERM),
        ("tgkill", (OTHER, KEEPER, 19), ALLOW),  # ESRCH: it is no thread of that process
        ("rt_sigqueueinfo", (KEEPER, 19, SOMEWHERE), EPERM),
        ("rt_tgsigqueueinfo", (KEEPER, KEEPER, 19, SOMEWHERE), EPERM),
        ("pidfd_send_signal", (3, 19, 0, 0), ENOSYS),
        ("fcntl", (3, 8, KEEPER), EPERM),
        ("fcntl", (3, 8, GROUP), EPERM),
        ("fcntl", (3, 8, OTHER), ALLOW),
        ("fcntl", (3, 15, SOMEWHERE), refuse(errno.EINVAL)),
        ("fcntl", (KEEPER, 3), ALLOW),
        ("prlimit64", (KEEPER, 0, SOMEWHERE, 0), EPERM),
        ("prlimit64", (KEEPER, 0, 0, SOMEWHERE), ALLOW),
        ("sched_setaffinity", (KEEPER, 8, SOMEWHERE), EPERM),
        ("setpriority", (0, KEEPER, 19), EPERM),
        ("setpriority", (1, KEEPER, 19), EPERM),
        ("setpriority", (0, OTHER, 19), ALLOW),
    ],
)
def test_an_actor_cannot_hold_up_who_judges_it(
    machine: str, name: str, arguments: tuple[int, ...], answered: int
) -> None:
    program = rings.actor_ring(Role.ENV, machine, datagrams=False, keepers=(7, KEEPER))
    assert answer(program, machine, name, *arguments) == answered


@pytest.mark.parametrize("machine", MACHINES)
def test_an_actor_with_udp_destinations_has_its_messages_judged(machine: str) -> None:
    program = rings.actor_ring(Role.ENV, machine, datagrams=True)
    assert answer(program, machine, "socket", INET, DGRAM, 0) == ALLOW
    assert answer(program, machine, "sendmsg", 3, SOMEWHERE, 0) == NOTIFY
    assert answer(program, machine, "sendmmsg", 3, SOMEWHERE, 1, 0) == NOTIFY


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("number", [LAST_KNOWN + 1, 0x40000000 | 42, 0xFFFFFFFF])
def test_numbers_nobody_knows_and_x32_do_not_exist(machine: str, number: int) -> None:
    for program in (rings.actor_ring(Role.ENV, machine, datagrams=False), rings.call_ring(machine, landlock=7)):
        assert run(program, number, (), AUDIT_ARCH[machine]) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_does_not_exist(machine: str) -> None:
    i386 = 0x40000003
    assert run(rings.call_ring(machine, landlock=7), 102, (3,), i386) == ENOSYS  # socketcall


_CALLS = sorted(TABLES[MACHINES[0]].keys() & TABLES[MACHINES[-1]].keys())[:9]
_whens = st.builds(
    When,
    st.integers(0, 2),
    st.sampled_from(list(seccomp.Test)),
    st.integers(0, 3),
    st.sampled_from([0xFFFFFFFF, 1, 2]),
    st.booleans(),
)
_rules = st.builds(Rule, st.sampled_from(_CALLS), st.integers(1, 9), st.lists(_whens, max_size=3).map(tuple))


def holds(when: When, arguments: Sequence[int]) -> bool:
    word = arguments[when.argument] >> (32 if when.high else 0) & 0xFFFFFFFF
    return (word & when.mask == when.value) is (when.test is seccomp.Test.EQUAL)


@given(
    st.sampled_from(MACHINES),
    st.lists(_rules, max_size=40),
    st.sampled_from(_CALLS),
    st.lists(st.sampled_from([0, 1, 2, 3, 1 << 32, 3 << 32]), min_size=3, max_size=3),
)
def test_the_first_rule_that_holds_decides(machine: str, rules: list[Rule], name: str, arguments: list[int]) -> None:
    expected = next(
        (rule.action for rule in rules if rule.name == name and all(holds(w, arguments) for w in rule.conditions)), 7777
    )
    assert answer(assemble(rules, machine, default=7777), machine, name, *arguments) == expected

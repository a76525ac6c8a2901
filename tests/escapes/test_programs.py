"""Programs of another kind: static, 32-bit, between vfork and exec, sharing memory, rewritten by a tracer."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import pytest
from harness import Attack, Stage, cases, escape

pytestmark = pytest.mark.kernel

_HEAD = r"""#include <stddef.h>
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static struct sockaddr_in to(const char *port) {
    struct sockaddr_in found = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    found.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return found;
}
static void say(long result) {
    const char *name = errno == EACCES ? "EACCES" : errno == EPERM ? "EPERM" : errno == ENOSYS ? "ENOSYS" : errno == ECONNREFUSED ? "ECONNREFUSED" : "other";
    if (result < 0) printf("{\"errno\": \"%s\"}\n", name);
    else printf("{\"result\": %ld}\n", result);
    fflush(stdout);
}
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
"""

_STATIC = (
    _HEAD
    + r"""
int main(int argc, char **argv) {
    struct sockaddr_in there = to(argv[4]);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    long result = connect(fd, (void *)&there, sizeof there);
    if (result == 0) result = write(fd, argv[2], strlen(argv[2]));
    say(result);
    return 0;
}
"""
)

_32_BIT = r"""#include <stddef.h>
/* Without a C library: there is none for 32 bits on most machines. */
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile ("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
__attribute__((used)) void begin(long *stack) {
    char **argv = (char **)(stack + 1);
    const char *token = argv[2], *digits = argv[4];
    unsigned port = 0, length = 0;
    for (; *digits; digits++) port = port * 10 + *digits - '0';
    while (token[length]) length++;
    struct { unsigned short family; unsigned char port[2]; unsigned char address[4]; char rest[8]; } there =
        {2, {port >> 8, port & 255}, {127, 0, 0, 1}, {0}};
    call(4, 1, (long)"{\"started\": true}\n", 18);
    long fd = call(359, 2, 1, 0);
    long result = fd < 0 ? fd : call(362, fd, (long)&there, 16);
    if (result == 0) call(4, fd, (long)token, length);
    call(1, result != 0, 0, 0);
    __builtin_trap();  /* where not even exit is to be had */
}
__asm__ (".globl _start\n_start: mov %esp, %eax\n push %eax\n call begin\n");
"""

_VFORK = (
    _HEAD
    + r"""
int main(int argc, char **argv) {
    struct sockaddr_in there = to(argv[4]);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    volatile long result = 0;
    if (vfork() == 0) {  /* in the parent's memory, and before exec nobody's program */
        result = connect(fd, (void *)&there, sizeof there);
        _exit(0);
    }
    if (result == 0) result = write(fd, argv[2], strlen(argv[2]));
    say(result);
    return 0;
}
"""
)

_SHARED_MEMORY = (
    _HEAD
    + r"""
/* No thread but a process flips the address: one that shares memory and descriptors, and is in no thread list. */
static volatile struct sockaddr_in flipped;
static struct sockaddr_in good, bad;
static volatile int over;
static int flip(void *unused) {
    while (!over) { flipped.sin_port = bad.sin_port; flipped.sin_port = good.sin_port; }
    return 0;
}
int main(int argc, char **argv) {
    good = to(argv[6]), bad = to(argv[4]);
    memcpy((void *)&flipped, &good, sizeof good);
    char *stack = mmap(0, 65536, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0);
    clone(flip, stack + 65536, CLONE_VM|CLONE_FILES|CLONE_FS|SIGCHLD, 0);
    long tries = 0;
    for (double until = now() + 0.6; now() < until; tries++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)&flipped, sizeof good) == 0) write(fd, argv[2], strlen(argv[2]));
        close(fd);
    }
    over = 1;
    wait(0);
    say(tries);
    return 0;
}
"""
)

_SHARED_DESCRIPTORS = (
    _HEAD
    + r"""
/* A process that shares the descriptor table puts another socket under the number while the call is judged. */
static int number, first, second;
static volatile int over;
static int swap(void *unused) {
    while (!over) { dup2(first, number); dup2(second, number); }
    return 0;
}
int main(int argc, char **argv) {
    struct sockaddr_in good = to(argv[6]), bad = to(argv[4]);
    char *stack = mmap(0, 65536, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0);
    first = socket(AF_INET, SOCK_STREAM, 0), second = socket(AF_INET, SOCK_STREAM, 0), number = dup(first);
    clone(swap, stack + 65536, CLONE_VM|CLONE_FILES|CLONE_FS|SIGCHLD, 0);
    long tries = 0;
    for (double until = now() + 0.6; now() < until; tries++) {
        connect(number, (void *)(tries % 2 ? &good : &bad), sizeof good);
        struct sockaddr_in peer; socklen_t size = sizeof peer;
        int fds[] = {first, second};
        for (int i = 0; i < 2; i++)
            if (getpeername(fds[i], (void *)&peer, &size) == 0 && peer.sin_port == bad.sin_port)
                write(fds[i], argv[2], strlen(argv[2]));
        int a = socket(AF_INET, SOCK_STREAM, 0), b = socket(AF_INET, SOCK_STREAM, 0);
        dup2(a, first); dup2(b, second); close(a); close(b);
    }
    over = 1;
    wait(0);
    say(tries);
    return 0;
}
"""
)

_TRACER = (
    _HEAD
    + r"""
/* A harmless call of a traced child becomes connect() at its entry, after the caller's registers were looked at. */
int main(int argc, char **argv) {
    struct sockaddr_in *there = mmap(0, 4096, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0);
    *there = to(argv[4]);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0) < 0) _exit(9);
        raise(SIGSTOP);
        long result = syscall(SYS_getppid);
        if (result == 0) write(fd, argv[2], strlen(argv[2]));
        errno = -result;
        _exit(result == 0 ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    struct user_regs_struct registers;
    long traced = -1;
    for (int stops = 0; stops < 64 && !WIFEXITED(status) && !WIFSIGNALED(status); stops++) {
        if (ptrace(PTRACE_SYSCALL, child, 0, 0) < 0) { say(-1); kill(child, SIGKILL); return 0; }
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status)) break;
        ptrace(PTRACE_GETREGS, child, 0, &registers);
        if (registers.orig_rax == SYS_getppid && traced < 0) {
            registers.orig_rax = SYS_connect, registers.rdi = fd, registers.rsi = (long)there, registers.rdx = sizeof *there;
            traced = ptrace(PTRACE_SETREGS, child, 0, &registers);
        }
    }
    errno = EACCES;
    say(WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1);
    return 0;
}
"""
)

_OWN_FILTER_TRACER = (
    _HEAD
    + r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
/* The same by a filter of one's own that hands getppid to a tracer: the kernel has asked all filters by then. */
int main(int argc, char **argv) {
    struct sockaddr_in *there = mmap(0, 4096, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0);
    *there = to(argv[4]);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    pid_t child = fork();
    if (child == 0) {
        struct sock_filter code[] = {
            BPF_STMT(BPF_LD|BPF_W|BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP|BPF_JEQ|BPF_K, SYS_getppid, 0, 1),
            BPF_STMT(BPF_RET|BPF_K, SECCOMP_RET_TRACE),
            BPF_STMT(BPF_RET|BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {4, code};
        if (ptrace(PTRACE_TRACEME, 0, 0, 0) < 0) _exit(9);
        raise(SIGSTOP);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (syscall(SYS_seccomp, 1, 0, &program)) _exit(8);
        long result = syscall(SYS_getppid);
        if (result == 0) write(fd, argv[2], strlen(argv[2]));
        _exit(result == 0 ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    if (ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACESECCOMP) < 0) { say(-1); kill(child, SIGKILL); return 0; }
    ptrace(PTRACE_CONT, child, 0, 0);
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
        if (status >> 8 == (SIGTRAP | PTRACE_EVENT_SECCOMP << 8)) {
            struct user_regs_struct registers;
            ptrace(PTRACE_GETREGS, child, 0, &registers);
            registers.orig_rax = SYS_connect, registers.rdi = fd, registers.rsi = (long)there, registers.rdx = sizeof *there;
            ptrace(PTRACE_SETREGS, child, 0, &registers);
        }
        ptrace(PTRACE_CONT, child, 0, 0);
    }
    errno = EACCES;
    say(WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1);
    return 0;
}
"""
)

_SUSPENDED_FILTER = (
    _HEAD
    + r"""
/* PTRACE_O_SUSPEND_SECCOMP: meant for checkpointing, it switches a tracee's filters off. */
int main(int argc, char **argv) {
    struct sockaddr_in there = to(argv[4]);
    pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0) < 0) _exit(9);
        raise(SIGSTOP);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)&there, sizeof there) == 0) write(fd, argv[2], strlen(argv[2]));
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    long result = ptrace(PTRACE_SETOPTIONS, child, 0, 1 << 21);
    if (result == 0) { ptrace(PTRACE_CONT, child, 0, 0); waitpid(child, &status, 0); }
    say(result);
    kill(child, SIGKILL);
    return 0;
}
"""
)

_INJECTED = (
    _HEAD
    + r"""
/* The parent writes into its own child and makes it connect: whose doing it is must not matter. */
int main(int argc, char **argv) {
    struct sockaddr_in *there = mmap(0, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0);
    *there = to(argv[6]);
    int pipes[2];
    if (pipe(pipes)) return 1;
    pid_t child = fork();
    if (child == 0) {
        char go;
        if (read(pipes[0], &go, 1) != 1) _exit(1);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)there, sizeof *there) == 0) write(fd, argv[2], strlen(argv[2]));
        _exit(0);
    }
    struct sockaddr_in bad = to(argv[4]);
    long *words = (long *)&bad;
    if (ptrace(PTRACE_SEIZE, child, 0, 0) < 0 || ptrace(PTRACE_INTERRUPT, child, 0, 0) < 0) { say(-1); kill(child, SIGKILL); return 0; }
    waitpid(child, 0, 0);
    ptrace(PTRACE_POKEDATA, child, there, words[0]);
    ptrace(PTRACE_POKEDATA, child, (long *)there + 1, words[1]);
    ptrace(PTRACE_DETACH, child, 0, 0);
    write(pipes[1], "g", 1);
    waitpid(child, 0, 0);
    say(0);
    return 0;
}
"""
)

PROGRAMS = [
    Attack("static binary", _STATIC, refused=("EACCES",), flags=("-static",)),
    Attack("32-bit binary", _32_BIT, flags=("-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie")),
    Attack("connect between vfork and exec", _VFORK, refused=("EACCES",)),
    Attack("address flipped by a process that shares memory", _SHARED_MEMORY),
    Attack("descriptor swapped by a process that shares the table", _SHARED_DESCRIPTORS),
    Attack("call rewritten by a tracer", _TRACER, refused=("EACCES", "EPERM")),
    Attack("call rewritten behind a filter of one's own", _OWN_FILTER_TRACER, refused=("EACCES", "EPERM")),
    Attack("filter suspended by a tracer", _SUSPENDED_FILTER, refused=("EPERM",), privileged=True),
    Attack("memory of a child rewritten", _INJECTED),
    Attack(
        "program from memory (memfd)",
        """
def main():
    # Nothing on disk to be looked at: the interpreter itself, copied into memory and executed from there.
    descriptor = os.memfd_create('program')
    with open(os.path.realpath(sys.executable), 'rb') as source:
        os.sendfile(descriptor, source.fileno(), 0, os.fstat(source.fileno()).st_size)
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.send(sys.argv[2].encode())"
    done = subprocess.run([f'/proc/self/fd/{descriptor}', '-I', '-S', '-c', code, str(A['tcp']), A['token']], pass_fds=[descriptor],
                          env={'PYTHONHOME': sys.base_prefix}, capture_output=True, text=True)
    if 'PermissionError' in done.stderr: raise OSError(errno.EACCES, 'refused')
""",
        refused=("EACCES",),
    ),
    Attack(
        "filter of one's own that answers for us",
        """
def main():
    # A stacked filter that says ALLOW of everything: the stricter of two counts, not the later.
    code = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7fff0000), 8)
    libc.prctl(38, 1, 0, 0, 0)
    class Prog(ctypes.Structure): _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
    call(317, 1, 0, ctypes.byref(Prog(1, ctypes.addressof(code))))
    connect(AF_INET, STREAM, ('127.0.0.1', A['tcp']))
""",
        refused=("EACCES",),
    ),
    Attack(
        "unreadable to its supervisor (PR_SET_DUMPABLE)",
        """
def main():
    libc.prctl(4, 0, 0, 0, 0)
    connect(AF_INET, STREAM, ('127.0.0.1', A['tcp']))
""",
        refused=("EACCES", "EPERM"),
    ),
    Attack(
        "unreadable program file",
        """
def main():
    # exec of a file one may not read makes a process that others cannot look into either.
    program = os.path.join(A['folder'], 'program')
    with open(os.path.realpath(sys.executable), 'rb') as source, open(program, 'wb') as copy: copy.write(source.read())
    os.chmod(program, 0o111)
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.send(sys.argv[2].encode())"
    done = subprocess.run([program, '-I', '-S', '-c', code, str(A['tcp']), A['token']], env={'PYTHONHOME': sys.base_prefix}, capture_output=True, text=True)
    if 'PermissionError' in done.stderr: raise OSError(errno.EACCES, 'refused')
""",
        refused=("EACCES",),
    ),
]  # fmt: skip


@cases(PROGRAMS, "programs of another kind")
def test_program(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)

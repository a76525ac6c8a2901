"""Wraps a whole process tree, supervisor included, in what a common host allows: ``launcher.py HOST -- COMMAND …``.

What the host refuses is refused by a seccomp filter (without a listener: there may be one only, and it is the guard's)
that is stacked before anything of ours starts; capabilities are reduced to what the host gives. Hosts:

- ``docker``: Docker's and containerd's default profile and capabilities: no pidfd_getfd, process_vm_*, mounts,
  namespaces or perf; CAP_SYS_PTRACE is not there.
- ``k8s``: the same without any capability and with no_new_privs, as an unprivileged user (Kubernetes "restricted").
- ``unprivileged``: an ordinary user without a capability, and nothing else changed.
- ``yama``: the same under Yama's restriction 1, by a library preloaded everywhere: the memory and the descriptors of a
  process are its ancestors' alone, and those it has named (PR_SET_PTRACER).
- ``listener``: a filter with a listener is present already, as under another sandbox.
- ``landlock-none``: no Landlock. ``landlock-4``, ``landlock-1``: its fourth version (Linux 6.7), its first (5.13), by a
  library preloaded everywhere.
- ``k8s-landlock-2``: ``k8s`` on a node of Linux 6.1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from ray_guard.kernel import libc, seccomp
from ray_guard.kernel.seccomp import NOTIFY, Rule, differs, refuse

HOSTS: Final = (
    *("docker", "k8s", "k8s-landlock-2", "unprivileged", "yama"),
    *("listener", "landlock-none", "landlock-1", "landlock-4"),
)
UNPRIVILEGED: Final = ("k8s", "unprivileged", "yama", "k8s-landlock-2")
"""Those whose user is nobody: a root that enters them becomes uid 65534."""
VARIABLE: Final = "RAY_GUARD_TEST_HOST"
_WITHIN: Final = "RAY_GUARD_TEST_WITHIN"
"""Set for what runs on a host: which one it is."""

#: chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod audit_write
#: setfcap: what Docker leaves to root
_DOCKER_CAPABILITIES: Final = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
_PR_GET_NO_NEW_PRIVS: Final = 39
_EPERM: Final = refuse(errno.EPERM)
_NEW_NAMESPACES: Final = 0x7E020000

#: what moby's default.json grants to CAP_SYS_ADMIN, CAP_SYS_PTRACE and others alone, as far as filters know its name
_REFUSED_BY_DOCKER: Final = """
pidfd_getfd process_vm_readv process_vm_writev kcmp process_madvise
mount umount2 pivot_root move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr setns unshare
bpf perf_event_open userfaultfd fanotify_init open_by_handle_at
add_key request_key keyctl kexec_load kexec_file_load init_module finit_module delete_module
acct quotactl swapon swapoff reboot sethostname setdomainname iopl ioperm settimeofday clock_settime vhangup syslog
""".split()


def prefix(name: str | None = None) -> list[str]:
    """What to put before a command so that it runs on this host; empty: on the real one.

    Args:
        name: of a host; None: what the environment variable RAY_GUARD_TEST_HOST says, if anything.
    """
    name = os.environ.get(VARIABLE, "") if name is None else name
    return [sys.executable, str(Path(__file__).resolve()), name, "--"] if name else []


def within() -> str:
    """The simulated host on which this process runs; empty: none."""
    return os.environ.get(_WITHIN, "")


def current() -> str:
    """The host on which tests run, or start what they confine; empty: the real one."""
    return within() or os.environ.get(VARIABLE, "")


def missing(name: str) -> tuple[str, ...]:
    """What is not there, in the words in which the guard says so."""
    container = ("pidfd_getfd", "mount namespaces", "CAP_SYS_PTRACE")
    user = ("CAP_NET_RAW",)
    return {
        "docker": container,
        "k8s": (*container, *user),
        "k8s-landlock-2": (*container, *user, "signal scopes"),
        "unprivileged": user,
        "yama": (*user, "memory of an actor's children"),
        "listener": ("another sandbox",),
        "landlock-none": ("Landlock",),
        "landlock-1": ("signal scopes", "links between folders"),
        "landlock-4": ("signal scopes",),
    }.get(name, ())


def rules(name: str) -> list[Rule]:
    """What this host refuses."""
    docker = [Rule(call, _EPERM) for call in _REFUSED_BY_DOCKER]
    docker.append(Rule("clone", _EPERM, (differs(0, 0, mask=_NEW_NAMESPACES),)))
    docker.append(Rule("clone3", refuse(errno.ENOSYS)))
    landlock = [Rule(call, refuse(errno.ENOSYS)) for call in _LANDLOCK]
    return {"docker": docker, "k8s": docker, "k8s-landlock-2": docker, "landlock-none": landlock}.get(name, [])


_LANDLOCK: Final = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")


def enter(name: str) -> None:
    """Makes this process, and what it starts, one of this host's."""
    if name not in HOSTS:
        raise SystemExit(f"launcher: no host is called {name!r}")
    os.environ[_WITHIN] = name
    root = os.geteuid() == 0
    _, is_old, version = name.partition("landlock-")
    if is_old and version != "none":
        _preload(_OLDER_LANDLOCK, VERSION=version, RIGHTS=str(_RIGHTS[int(version)]))
    if name == "yama":
        _preload(_YAMA)
    if name in UNPRIVILEGED and root:
        _unlock(sys.base_prefix)
    refused = rules(name)
    if refused:
        program = seccomp.assemble(refused, platform.machine())
        if root and name not in UNPRIVILEGED:
            seccomp._install(program, 0)  # without no_new_privs, which Docker does not set
        else:
            seccomp.stack_on_thread(program)
    if name == "listener":
        _listen()
    if name == "docker" and root:
        _reduce(_DOCKER_CAPABILITIES)
    if name in UNPRIVILEGED and root:
        os.setgroups([])
        os.setresgid(*[65534] * 3)
        os.setresuid(*[65534] * 3)
        libc.prctl(libc.PR_SET_DUMPABLE, 1)  # which a change of user takes away
    if name.startswith("k8s"):
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


def _listen() -> None:
    """The rest of this process's life is a child's that has a filter with a listener; the listener stays here."""
    told, tell = os.pipe()
    taken, take = os.pipe()
    pid = os.fork()
    if pid == 0:
        listener = seccomp.install_on_thread(seccomp.assemble([Rule("acct", NOTIFY)], platform.machine()))
        os.write(tell, b"%d" % listener)
        os.read(taken, 1)
        os.close(listener)
        return
    kept = libc.pidfd_getfd(os.pidfd_open(pid), int(os.read(told, 16)))
    if kept < 0:
        raise SystemExit(f"launcher: the listener cannot be taken: {os.strerror(-kept)}")
    os.write(take, b"t")
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


def _reduce(kept: Sequence[int]) -> None:
    for capability in range(64):
        if capability not in kept:
            try:
                libc.prctl(libc.PR_CAPBSET_DROP, capability)
            except OSError:
                break  # past this kernel's last
    mask = sum(1 << capability for capability in kept)
    effective, permitted, _ = libc.capget()
    libc.capset(effective & mask, permitted & mask, 0)


# ---------------------------------------------------------------------------------------------------------------------
# an older Landlock: a filter can answer an error or 0, but no version; so the C library's own syscall() does

_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many file rights a version knows."""

_OLDER_LANDLOCK: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
/* landlock_create_ruleset as a version before the sixth has it: no scopes, RIGHTS file rights */
long syscall(long number, ...) {
    static long (*next)(long, ...);
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    if (number == 444) {
        if (a[2] & 1) return VERSION;
        unsigned long long fields[4] = {0};
        if (a[0] && a[1] >= 8 && a[1] <= 32) {
            memcpy(fields, (void *)a[0], a[1]);
            if (fields[2] | fields[3]) { errno = E2BIG; return -1; }
            if (VERSION < 4 && fields[1]) { errno = E2BIG; return -1; }
            if (fields[0] >> RIGHTS || fields[1] >> 2) { errno = EINVAL; return -1; }
        }
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Yama, restriction 1: nothing but the kernel can refuse by relation, so the C library does

_YAMA: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static long field(long pid, const char *name) {
    char path[64], line[256];
    long found = -1;
    snprintf(path, sizeof path, "/proc/%ld/status", pid);
    FILE *file = fopen(path, "r");
    if (!file) return -1;
    while (found < 0 && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name))) found = atol(line + strlen(name));
    fclose(file);
    return found;
}
/* whom a process has named: a file, since the kernel keeps nothing for us; children do not inherit it */
static void name_of(char *path, size_t size, long pid) { snprintf(path, size, "%s/yama.%ld", FOLDER, pid); }
static int may(long tid) {
    long target = field(tid, "Tgid:"), me = getpid(), at;
    if (target < 0 || target == me) return 1;
    for (at = target; at > 1; at = field(at, "PPid:")) if (at == me) return 1;
    char path[256], word[32] = "";
    name_of(path, sizeof path, target);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (!fgets(word, sizeof word, file)) word[0] = 0;
    fclose(file);
    long named = atol(word);
    if (named == -1) return 1;
    for (at = me; at > 1; at = field(at, "PPid:")) if (at == named) return 1;
    return 0;
}
int prctl(int option, ...) {
    static int (*next)(int, ...);
    va_list list;
    unsigned long a[4];
    va_start(list, option);
    for (int i = 0; i < 4; i++) a[i] = va_arg(list, unsigned long);
    va_end(list);
    if (!next) next = (int (*)(int, ...))dlsym(RTLD_NEXT, "prctl");
    if (option == 0x59616d61) {
        char path[256];
        name_of(path, sizeof path, getpid());
        FILE *file = fopen(path, "w");
        if (file) { fprintf(file, "%ld", (long)a[0]); fclose(file); }
        return 0;
    }
    return next(option, a[0], a[1], a[2], a[3]);
}
long syscall(long number, ...) {
    static long (*next)(long, ...);
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long pid = 0;
    if (number == 438) {  /* pidfd_getfd */
        char path[64], line[256];
        snprintf(path, sizeof path, "/proc/self/fdinfo/%ld", a[0]);
        FILE *file = fopen(path, "r");
        while (file && fgets(line, sizeof line, file)) if (!strncmp(line, "Pid:", 4)) pid = atol(line + 4);
        if (file) fclose(file);
    }
    if (number == 310 || number == 311) pid = a[0];
    if (number == 101 && a[0] != 0) pid = a[1];
    if (pid > 0 && !may(pid)) { errno = EPERM; return -1; }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
static int refused(const char *path) {
    long pid;
    char rest[32];
    if (sscanf(path, "/proc/%ld/%31s", &pid, rest) != 2 || strcmp(rest, "mem")) return 0;
    if (may(pid)) return 0;
    errno = EACCES;
    return 1;
}
#define OPEN(symbol)                                                            \
    int symbol(const char *path, int flags, ...) {                              \
        static int (*next)(const char *, int, ...);                             \
        va_list list;                                                           \
        va_start(list, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        if (!next) next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #symbol); \
        return refused(path) ? -1 : next(path, flags, mode);                    \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(symbol)                                                          \
    int symbol(int folder, const char *path, int flags, ...) {                  \
        static int (*next)(int, const char *, int, ...);                        \
        va_list list;                                                           \
        va_start(list, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        if (!next) next = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #symbol); \
        return refused(path) ? -1 : next(folder, path, flags, mode);            \
    }
OPENAT(openat)
OPENAT(openat64)
"""


def _preload(source: str, **defined: str) -> None:
    """Into every process from here on, whatever its environment: ld.so.preload, in a mount namespace of its own.

    Library and list lie in an overlay of /etc, where tools may read: else each of their programs would complain. Where
    that is so already, it stays so: processes of one namespace share a supervisor.
    """
    if os.path.exists("/etc/ray_guard_host.so"):
        return
    folder = tempfile.mkdtemp(prefix="ray_guard_host_", dir="/tmp")
    os.chmod(folder, 0o755)
    upper, work, notes = (f"{folder}/{name}" for name in ("upper", "work", "notes"))
    for each in (upper, work, notes):
        os.mkdir(each)
    os.chmod(notes, 0o777)
    defines = [f'-DFOLDER="{notes}"', *(f"-D{key}={value}" for key, value in defined.items())]
    command = ["gcc", "-shared", "-fPIC", "-O1", *defines, "-o", f"{upper}/ray_guard_host.so", "-x", "c", "-"]
    subprocess.run(command, input=source.encode(), check=True)
    Path(f"{upper}/ld.so.preload").write_text("/etc/ray_guard_host.so\n")
    names = _own_mounts()
    # What a test has put over a file in there (resolv.conf) would be below the overlay: it is put over that again.
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounted = {place: os.open(place, os.O_PATH) for place in places if place.startswith("/etc/")}
    options = f"lowerdir=/etc,upperdir={upper},workdir={work}".encode()
    if names.mount(b"overlay", b"/etc", b"overlay", 0, options) != 0:
        raise SystemExit(f"launcher: no overlay over /etc: {os.strerror(ctypes.get_errno())}")
    for place, held in mounted.items():
        if names.mount(f"/proc/self/fd/{held}".encode(), place.encode(), None, 0x1000, None) != 0:
            raise SystemExit(f"launcher: cannot put {place} back: {os.strerror(ctypes.get_errno())}")
        os.close(held)


def _own_mounts() -> ctypes.CDLL:
    """The C library, in a mount namespace of its own."""
    names = ctypes.CDLL(None, use_errno=True)
    if names.unshare(0x00020000) != 0 or names.mount(b"none", b"/", None, 0x44000, None) != 0:
        raise SystemExit("launcher: this host needs the right to make a mount namespace")
    return names


def _unlock(folder: str) -> None:
    """Makes ``folder`` (the interpreter's) reachable for everybody, where it lies below somebody's home."""
    locked = [str(each) for each in Path(folder).parents if not each.stat().st_mode & 0o001]
    if not locked:
        return
    names = _own_mounts()
    held = os.open(folder, os.O_PATH)
    if names.mount(b"tmpfs", locked[-1].encode(), b"tmpfs", 0, b"mode=755") != 0:
        raise SystemExit(f"launcher: cannot cover {locked[-1]}")
    os.makedirs(folder)
    if names.mount(f"/proc/self/fd/{held}".encode(), folder.encode(), None, 0x1000, None) != 0:
        raise SystemExit(f"launcher: cannot uncover {folder}")
    os.close(held)


def main() -> None:
    name, separator, *command = sys.argv[1:]
    if separator != "--" or not command:
        raise SystemExit("usage: launcher.py HOST -- COMMAND …")
    enter(name)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

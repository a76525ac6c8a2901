/* What the minimal supervisors here have in common: a child whose calls of one kind are notified, and the answers. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS _IOW(SECCOMP_IOC_MAGIC, 4, __u64)
#endif
#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#endif

static pid_t child;
static int pidfd, listener;

static int install(int call) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

/* Starts the command with that call notified; non-zero: it could not. */
static int start(int call, char **command) {
    int told[2], go[2];
    if (pipe(told) || pipe(go)) return 2;
    child = fork();
    if (child == 0) {
        char taken;
        listener = install(call);
        if (write(told[1], &listener, sizeof listener) < 0 || read(go[0], &taken, 1) != 1) _exit(3);
        close(listener);
        for (int i = 0; i < 2; i++) close(told[i]), close(go[i]);
        execvp(*command, command);
        _exit(127);
    }
    pidfd = syscall(SYS_pidfd_open, child, 0);
    if (read(told[0], &listener, sizeof listener) != sizeof listener || listener < 0) return 3;
    listener = syscall(SYS_pidfd_getfd, pidfd, listener, 0);
    if (listener < 0 || write(go[1], "g", 1) != 1) return 3;
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, 1UL); /* SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP */
    close(0);
    return 0;
}

/* The next notification, with the answer that is to be filled in; 0: the child has ended. */
static int receive(struct seccomp_notif *notification, struct seccomp_notif_resp *answer) {
    for (;;) {
        memset(notification, 0, sizeof *notification);
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, notification) == 0) break;
        if ((errno != EINTR && errno != ENOENT) || waitpid(child, NULL, WNOHANG) == child) return 0;
    }
    memset(answer, 0, sizeof *answer);
    answer->id = notification->id;
    return 1;
}

/* Whether that much of the caller's memory could be read, and it still waits. */
static ssize_t read_caller(struct seccomp_notif *from, __u64 address, void *into, size_t length) {
    struct iovec here = {into, length}, there = {(void *)address, length};
    ssize_t got = process_vm_readv(from->pid, &here, 1, &there, 1, 0);
    return ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &from->id) ? -1 : got;
}

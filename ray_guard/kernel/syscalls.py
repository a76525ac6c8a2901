"""System call numbers by architecture, for the filter and for decoding notifications. Pure data.

Source: the kernel's ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``scripts/syscall.tbl`` (arm64), Linux 6.18.
A name that an architecture lacks is absent: the filter skips it there.
"""

from __future__ import annotations

import os
from typing import Final

_X86_64 = """
socket 41 connect 42 sendto 44 sendmsg 46 bind 49 listen 50 socketpair 53 setsockopt 54 clone 56 fork 57 vfork 58
shmget 29 shmat 30 shmctl 31 execve 59 kill 62 semget 64 semop 65 semctl 66 msgget 68 msgsnd 69 msgrcv 70 msgctl 71
ptrace 101 syslog 103 ioctl 16 prctl 157 mknod 133 personality 135 setpriority 141 sched_setparam 142
sched_setscheduler 144 vhangup 153 pivot_root 155 adjtimex 159 chroot 161 acct 163 settimeofday 164 mount 165 umount2
166 swapon 167 swapoff 168 reboot 169 sethostname 170 setdomainname 171 iopl 172 ioperm 173 init_module 175
delete_module 176 quotactl 179 tkill 200 sched_setaffinity 203 semtimedop 220 clock_settime 227 exit_group 231 tgkill
234 mq_open 240 mq_unlink 241 kexec_load 246 add_key 248 request_key 249 keyctl 250 ioprio_set 251 migrate_pages 256
mknodat 259 unshare 272 move_pages 279 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 perf_event_open 298 fanotify_init 300
prlimit64 302 name_to_handle_at 303 open_by_handle_at 304 clock_adjtime 305 sendmmsg 307 setns 308 process_vm_readv
310 process_vm_writev 311 kcmp 312 finit_module 313 sched_setattr 314 seccomp 317 kexec_file_load 320 bpf 321 execveat
322 userfaultfd 323 fcntl 72 chmod 90 fchmod 91 chown 92 fchown 93 lchown 94 utime 132 setxattr 188 lsetxattr 189
fsetxattr 190 removexattr 197 lremovexattr 198 fremovexattr 199 utimes 235 fchownat 260 futimesat 261 fchmodat 268
utimensat 280 open 2 truncate 76 setpgid 109 setsid 112 openat 257 setgroups 116 setresgid 119
"""
_AARCH64 = """
socket 198 socketpair 199 bind 200 listen 201 connect 203 sendto 206 setsockopt 208 sendmsg 211 clone 220 execve 221
exit_group 94 kill 129 ptrace 117 syslog 116 ioctl 29 prctl 167 personality 92 setpriority 140 sched_setparam 118
sched_setscheduler 119 vhangup 58 pivot_root 41 adjtimex 171 chroot 51 acct 89 settimeofday 170 mount 40 umount2 39
swapon 224 swapoff 225 reboot 142 sethostname 161 setdomainname 162 init_module 105 delete_module 106 quotactl 60
tkill 130 sched_setaffinity 122 clock_settime 112 tgkill 131 kexec_load 104 add_key 217 request_key 218 keyctl 219
ioprio_set 30 migrate_pages 238 mknodat 33 unshare 97 move_pages 239 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240
perf_event_open 241 fanotify_init 262 prlimit64 261 name_to_handle_at 264 open_by_handle_at 265 mq_open 180 mq_unlink
181 msgget 186 msgctl 187 msgrcv 188 msgsnd 189 semget 190 semctl 191 semtimedop 192 semop 193 shmget 194 shmctl 195
shmat 196 clock_adjtime 266 sendmmsg 269 setns 268 process_vm_readv 270 process_vm_writev 271 kcmp 272 finit_module
273 sched_setattr 274 seccomp 277 kexec_file_load 294 bpf 280 execveat 281 userfaultfd 282 fcntl 25 setxattr 5
lsetxattr 6 fsetxattr 7 removexattr 14 lremovexattr 15 fremovexattr 16 fchmod 52 fchmodat 53 fchownat 54 fchown 55
utimensat 88 truncate 45 openat 56 setpgid 154 setsid 157 setgroups 159 setresgid 149
"""
_EVERYWHERE = """
pidfd_send_signal 424 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 open_tree 428 move_mount 429 fsopen
430 fsconfig 431 fsmount 432 fspick 433 pidfd_open 434 clone3 435 close_range 436 pidfd_getfd 438 process_madvise 440
mount_setattr 442 quotactl_fd 443 landlock_create_ruleset 444 landlock_add_rule 445 landlock_restrict_self 446
process_mrelease 448 fchmodat2 452 setxattrat 463 removexattrat 466 open_tree_attr 467 file_setattr 469 openat2 437
"""


def _table(*texts: str) -> dict[str, int]:
    words = " ".join(texts).split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
TABLES: Final = {"x86_64": _table(_X86_64, _EVERYWHERE), "aarch64": _table(_AARCH64, _EVERYWHERE)}
LAST_KNOWN: Final = 470
"""Highest number of Linux 6.18; anything above is unknown to this version and therefore denied."""
MACHINE: Final = os.uname().machine
NUMBERS: Final = TABLES.get(MACHINE, {})
"""This machine's numbers; empty where the architecture is not supported."""

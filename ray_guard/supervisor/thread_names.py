"""A tool names its threads: /proc/self/task/TID/comm opened on its behalf. Runs in the supervisor.

For tools that may use a GPU alone: CUDA names threads of its own that way, and does not start where it cannot. Landlock
knows no difference between that file and the rest of /proc. Every other open that writes goes on to be judged by it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from typing import Final

from ray_guard.egress.gate import Gate, Handler
from ray_guard.egress.sockaddr import BadAddress
from ray_guard.kernel import procfs
from ray_guard.kernel.seccomp import Notification
from ray_guard.supervisor import metadata

_NAME: Final = re.compile(rb"/proc/(self|[0-9]+)/task/([0-9]+)/comm")


def handlers() -> Mapping[str, Handler]:
    return {
        "open": lambda gate, n: _opens(gate, n, n.arg0, n.arg1),
        "openat": lambda gate, n: _opens(gate, n, n.arg1, n.arg2),
    }


def _opens(gate: Gate, n: Notification, pointer: int, flags: int) -> None:
    found = _NAME.fullmatch(metadata.text(gate, n, pointer, metadata.PATH_LIMIT, errno.ENAMETOOLONG))
    group = procfs.thread_group(n.pid) if found is not None else None
    if found is None or group is None or found[1] not in (b"self", b"%d" % group):
        gate.listener.proceed(n.id)
        return
    try:
        name = os.open(f"/proc/{group}/task/{int(found[2])}/comm", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadAddress(error.errno or errno.EACCES) from error
    try:
        if gate.listener.is_valid(n.id):  # the number may be another process's by now
            gate.listener.answer_with_descriptor(n.id, name, close_on_exec=bool(flags & os.O_CLOEXEC))
    finally:
        os.close(name)

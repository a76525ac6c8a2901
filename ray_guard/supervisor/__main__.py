"""Entry point of the supervisor: one small process per node, user and set of namespaces. Runs in the supervisor.

Started by the first target (:mod:`ray_guard.client.channel`), which hands over the listening socket; it ends after the
last. The zygote is forked before the service is imported: what it starts is forked the faster the smaller it is, and
both load what they are at the same time. What both need is loaded before, once, and they share its memory.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from typing import Final

from ray_guard import log
from ray_guard.kernel import borrowing, ipc, mounting, trial
from ray_guard.supervisor import to_zygote

SHARED: Final = (
    "ray_guard.egress",
    "ray_guard.kernel.cgroup",
    "ray_guard.kernel.devices",
    "ray_guard.kernel.landlock",
    "ray_guard.kernel.rendezvous",
    "ray_guard.kernel.seccomp",
    "ray_guard.policy.files",
    "ray_guard.supervisor.leaf",
    "ray_guard.supervisor.leftovers",
    "ray_guard.supervisor.start",
    "ray_guard.supervisor.unread",
    "ray_guard.supervisor.wards",
)
"""What both the zygote and the service load, with what that loads."""


def main(descriptor: int, prepared: int = 0) -> None:
    """Runs the supervisor on the listening socket ``descriptor`` until its last target has gone.

    ``prepared``: how many tools its zygote makes ready at once where it can, for they are to be started at once.
    """
    gc.disable()  # until all is loaded (serve)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends after its last target, not with a terminal or a job's group
    os.umask(0o077)
    # Begun here, so that the zygote goes by the same answers; nobody waits for them yet.
    trial.begin([borrowing.TRIAL, ipc.TRIAL, mounting.TRIAL])
    for name in SHARED:
        importlib.import_module(name)
    starts, zygote_pid = to_zygote.fork(close=[descriptor])
    log.to_stderr()
    from ray_guard.supervisor.service import serve

    # Where tools have mounts, which ones is for their policy to say: a leader that is ready before would not fit.
    leaders = [] if mounting.works() else [to_zygote.ask_for_leader(starts) for _ in range(prepared)]
    serve(descriptor, starts, zygote_pid, leaders)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Entry point of the supervisor: one small process per node, user and set of namespaces. Runs in the supervisor.

Started by the first target (:mod:`ray_guard.client.channel`), which hands over the listening socket; it ends after the
last. The zygote is forked before anything else is imported: what it starts is forked the faster the smaller it is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

from ray_guard.kernel import borrowing, ipc, mounting
from ray_guard.supervisor import leaf, zygote


def main(descriptor: int, prepared: int = 0) -> None:
    """Runs the supervisor on the listening socket ``descriptor`` until its last target has gone.

    ``prepared``: how many tools its zygote makes ready at once, because they are to be started as soon as it is there.
    """
    gc.disable()  # until all is loaded (serve)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends after its last target, not with a terminal or a job's group
    os.umask(0o077)
    # Asked here, so that the zygote goes by the same answers.
    borrowing.works(), ipc.can_be_own(), mounting.works(), leaf.place()
    starts, zygote_pid = zygote.fork(close=[descriptor])
    leaders = [zygote.ask_for_leader(starts) for _ in range(prepared)]
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    from ray_guard.supervisor.service import serve

    serve(descriptor, starts, zygote_pid, leaders)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Entry point of the supervisor: one small process per node, user and set of namespaces. Runs in the supervisor.

Started by the first target (:mod:`ray_guard.client.channel`), which hands over the listening socket; it ends after the
last. The zygote is forked before anything else is imported: what it starts is forked the faster the smaller it is.
"""

from __future__ import annotations

import os
import signal
import sys

from ray_guard.kernel import borrowing, mounting
from ray_guard.supervisor import zygote


def main(descriptor: int) -> None:
    """Runs the supervisor on the listening socket ``descriptor`` until its last target has gone."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # it ends after its last target, not with a terminal or a job's group
    os.umask(0o077)
    borrowing.works()  # asked here, so that the zygote goes by the same answers
    mounting.works()
    starts, zygote_pid = zygote.fork(close=[descriptor])
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    from ray_guard.supervisor.service import serve

    serve(descriptor, starts, zygote_pid)


if __name__ == "__main__":
    main(int(sys.argv[1]))

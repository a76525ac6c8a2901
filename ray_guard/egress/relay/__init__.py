"""The relay: connections whose bytes are checked or counted as they flow, and stop on the byte. Supervisor and helper.

    target's socket ──loopback──▶ ours ─┐ mover ┌─ upstream ──▶ destination
                                        └───────┘
``front`` connects: the upstream first, then the target's own socket to ours (supervisor). ``mover`` moves the bytes, in
a process of its own, so that no decision waits for them. ``leases`` are the bytes it may move: reserved in the budgets
before, settled after.
"""

import select
from typing import Final

STEPS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
"""Each step of a connect that is made is an edge: connected, then what a proxy answers."""

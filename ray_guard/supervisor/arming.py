"""What stands between a filtered process and this one once its listener is there. Runs in the supervisor.

Gathered here because it is loaded late: while a supervisor's first leader gets ready, or with its first actor. It is a
quarter of all that a supervisor loads, and a cold start would wait for it.
"""

from __future__ import annotations

from ray_guard.egress.gate import Gate, Handler
from ray_guard.supervisor import bystanders, thread_names
from ray_guard.supervisor.metadata import Metadata
from ray_guard.supervisor.processes import Processes
from ray_guard.supervisor.ring import Ring
from ray_guard.supervisor.signals import Signals

__all__ = ["Gate", "Handler", "Metadata", "Processes", "Ring", "Signals", "bystanders", "thread_names"]

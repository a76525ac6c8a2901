"""target: a worker that cannot be confined does no work at all, and says why.

Raising in the setup hook would do it too (Ray then ends the worker), but a task's owner would only read that a worker
died, after three retries. So the worker stays, and fails whatever it is given, before anything of the user's is loaded:
neither classes nor functions nor arguments.
"""

from __future__ import annotations

from typing import Any, Never

from ray_guard.actors import internals


class Refused:
    """Stands in for an actor class that must not be loaded."""

    async def nothing(self) -> None:
        """Ray wants an asyncio actor to have a coroutine method."""


def refuse_all_work(error: Exception) -> None:
    """Makes every task of this worker fail with `error`."""

    def refuse(*_args: Any, **_kwargs: Any) -> Never:
        raise error

    internals.fail_all_work(refuse, Refused)

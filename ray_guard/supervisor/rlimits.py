"""The resource limits of a tool: its requester's. Runs in the supervisor, while the tool's process waits to execute."""

from __future__ import annotations

import functools
import resource
from collections.abc import Mapping


@functools.cache
def _own() -> dict[str, tuple[int, int]]:
    """This process's, which its leaders have too, and so what they start."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def impose(pid: int, wanted: Mapping[str, tuple[int, int]], memory: int | None) -> None:
    """Gives process ``pid`` these limits.

    Args:
        memory: bytes its call may use in all. No single process shall outgrow that by far between two samples: twice as
            much may be reserved, for threads reserve stacks that they never touch. Its children inherit it.
    """
    for name, own in _own().items():
        if wanted.get(name, own) != own:
            _set(pid, name, wanted[name])
    if memory is not None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        data = 2 * memory if hard == resource.RLIM_INFINITY else min(2 * memory, hard)
        resource.prlimit(pid, resource.RLIMIT_DATA, (data, data))


def _set(pid: int, name: str, limit: tuple[int, int]) -> None:
    try:
        resource.prlimit(pid, getattr(resource, name), limit)
    except (PermissionError, ValueError):
        pass  # raising a limit above one's own is not for everybody; it then stays as it is, lower

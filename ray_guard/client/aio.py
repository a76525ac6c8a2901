"""``create_subprocess_exec`` and ``create_subprocess_shell``: asyncio's, confined. Runs in target."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray_guard.client import process
from ray_guard.client.takeover import demanded, install_takeover


async def create_subprocess_exec(*args: Any, **keywords: Any) -> asyncio.subprocess.Process:
    """``asyncio.create_subprocess_exec``, confined and owned by the current tool call. See :class:`ray_guard.Popen`."""
    with _confined():
        return await asyncio.create_subprocess_exec(*args, **keywords)


async def create_subprocess_shell(*args: Any, **keywords: Any) -> asyncio.subprocess.Process:
    """``asyncio.create_subprocess_shell``, confined and owned by the current tool call."""
    with _confined():
        return await asyncio.create_subprocess_shell(*args, **keywords)


def _confined() -> contextlib.AbstractContextManager[None]:
    if process.is_inside_call():  # all of it is
        return contextlib.nullcontext()
    install_takeover(confine_plain=False)
    return demanded()

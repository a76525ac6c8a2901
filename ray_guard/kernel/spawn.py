"""posix_spawn(3), for a thread that lends its own credentials, filter and working folder. Runs in the zygote.

The child shares this process's memory until it executes (vfork): nothing is copied, however large this process is. Not
``os.posix_spawn``, which keeps the interpreter's lock meanwhile: the other threads would wait with it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from typing import Final

from ray_guard.kernel import libc

_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_ROOM: Final = 1024
"""More than any C library needs for one of its attribute, action or signal set objects."""

_spawn = libc.c_library["posix_spawn"]
_spawn.argtypes = (ctypes.c_void_p, ctypes.c_char_p, *(ctypes.c_void_p,) * 4)


def _call(name: str, *arguments: object) -> None:
    code = getattr(libc.c_library, name)(*arguments)
    if code:
        raise OSError(code, f"{name}: {os.strerror(code)}")


def spawn(
    path: str,
    argv: Sequence[str],
    environment: Sequence[str],
    descriptors: Iterable[tuple[int, int]],
    *,
    ignored: Iterable[int] = (),
    terminal: int | None = None,
) -> int:
    """Starts ``path`` in a session of its own, no signal blocked; its pid.

    Args:
        environment: ``NAME=value`` each.
        descriptors: (here, there): what is open there, in this order. All others must be close-on-exec.
        ignored: signals that stay as they are here; all others are at their default.
        terminal: a descriptor here whose terminal becomes the session's.

    Raises:
        OSError: with the errno of exec.
    """
    actions, attributes, signals = (ctypes.create_string_buffer(_ROOM) for _ in range(3))
    _call("posix_spawn_file_actions_init", actions)
    _call("posix_spawnattr_init", attributes)
    try:
        _call("posix_spawnattr_setflags", attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))
        libc.c_library.sigemptyset(signals)
        _call("posix_spawnattr_setsigmask", attributes, signals)
        libc.c_library.sigfillset(signals)
        for number in ignored:
            libc.c_library.sigdelset(signals, int(number))
        _call("posix_spawnattr_setsigdefault", attributes, signals)
        pairs = list(descriptors)
        if terminal is not None:  # whoever leads a session and has none gets the first that it opens
            free = max(max(pair) for pair in pairs) + 1
            own = f"/proc/self/fd/{terminal}".encode()
            _call("posix_spawn_file_actions_addopen", actions, free, own, os.O_RDWR, 0)
            _call("posix_spawn_file_actions_addclose", actions, free)
        for here, there in pairs:
            _call("posix_spawn_file_actions_adddup2", actions, here, there)
        pid = ctypes.c_int()
        code = _spawn(
            ctypes.addressof(pid),
            os.fsencode(path),
            ctypes.addressof(actions),
            ctypes.addressof(attributes),
            ctypes.cast(_strings(argv), ctypes.c_void_p),
            ctypes.cast(_strings(environment), ctypes.c_void_p),
        )
        if code:
            raise OSError(code, os.strerror(code))
        return pid.value
    finally:
        libc.c_library.posix_spawnattr_destroy(attributes)
        libc.c_library.posix_spawn_file_actions_destroy(actions)


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*map(os.fsencode, texts), None)

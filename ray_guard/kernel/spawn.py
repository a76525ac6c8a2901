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

_FLAGS: Final = 0x04 | 0x08 | 0x80
"""POSIX_SPAWN_SETSIGDEF, SETSIGMASK and SETSID."""
_Room = ctypes.c_char * 1024
"""More than any C library needs for one of its attribute, action or signal set objects."""

# Looked up here, for all leaders at once.
_spawn = libc.c_library["posix_spawn"]
_spawn.argtypes = (ctypes.c_void_p, ctypes.c_char_p, *(ctypes.c_void_p,) * 4)
_actions_init = libc.c_library["posix_spawn_file_actions_init"]
_actions_destroy = libc.c_library["posix_spawn_file_actions_destroy"]
_add_open = libc.c_library["posix_spawn_file_actions_addopen"]
_add_close = libc.c_library["posix_spawn_file_actions_addclose"]
_add_dup2 = libc.c_library["posix_spawn_file_actions_adddup2"]
_attributes_init = libc.c_library["posix_spawnattr_init"]
_attributes_destroy = libc.c_library["posix_spawnattr_destroy"]
_set_flags = libc.c_library["posix_spawnattr_setflags"]
_set_flags.argtypes = (ctypes.c_void_p, ctypes.c_short)
_set_mask = libc.c_library["posix_spawnattr_setsigmask"]
_set_default = libc.c_library["posix_spawnattr_setsigdefault"]
_empty, _add_signal = libc.c_library["sigemptyset"], libc.c_library["sigaddset"]


def _check(code: int, call: str) -> None:
    if code:
        raise OSError(code, f"posix_spawn, {call}: {os.strerror(code)}")


def spawn(
    path: str,
    argv: Sequence[str],
    environment: Sequence[str],
    descriptors: Iterable[tuple[int, int]],
    *,
    restored: Iterable[int] = (),
    terminal: int | None = None,
) -> int:
    """Starts ``path`` in a session of its own, no signal blocked; its pid.

    Args:
        environment: ``NAME=value`` each.
        descriptors: (here, there): what is open there, in this order. All others must be close-on-exec.
        restored: signals that are ignored here and not there.
        terminal: a descriptor here whose terminal becomes the session's.

    Raises:
        OSError: with the errno of exec.
    """
    actions, attributes, signals = _Room(), _Room(), _Room()
    _check(_actions_init(actions), "actions")
    _check(_attributes_init(attributes), "attributes")
    try:
        _check(_set_flags(attributes, _FLAGS), "flags")
        _empty(signals)
        _check(_set_mask(attributes, signals), "mask")
        for number in restored:
            _add_signal(signals, int(number))
        _check(_set_default(attributes, signals), "default signals")
        pairs = list(descriptors)
        if terminal is not None:  # whoever leads a session and has none gets the first that it opens
            free = max(max(pair) for pair in pairs) + 1
            own = f"/proc/self/fd/{terminal}".encode()
            _check(_add_open(actions, free, own, os.O_RDWR, 0), "open")
            _check(_add_close(actions, free), "close")
        for here, there in pairs:
            _check(_add_dup2(actions, here, there), "dup2")
        pid = ctypes.c_int()
        code = _spawn(
            ctypes.addressof(pid),
            os.fsencode(path),
            actions,
            attributes,
            _strings(argv),
            _strings(environment),
        )
        if code:
            raise OSError(code, os.strerror(code))
        return pid.value
    finally:
        _attributes_destroy(attributes)
        _actions_destroy(actions)


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*map(os.fsencode, texts), None)

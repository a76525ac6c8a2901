"""A start: what a requester wants started, as it travels in a memory file. Runs in supervisor and zygote."""

from __future__ import annotations

import errno
import json
import os

from ray_guard.named import NamedTuple


class Start(NamedTuple):
    """What a requester asked for: the content of the start's memory file.

    Strings are as ``os.fsdecode`` makes them, so that undecodable bytes survive the way.
    """

    argv: tuple[str, ...]
    executable: str | None
    environment: dict[str, str]
    umask: int
    group: int
    groups: tuple[int, ...]
    nice: int
    limits: dict[str, tuple[int, int]]
    affinity: tuple[int, ...]
    descriptors: tuple[int, ...]
    """Numbers in the tool, in the order in which the descriptors are passed."""
    terminal: int | None
    """The descriptor that is to be the controlling terminal of the tool's session."""
    restore_signals: bool

    @classmethod
    def parse(cls, data: bytes) -> Start:
        """Raises ValueError for anything that is not a start."""
        try:
            fields = json.loads(str(data, "utf-8"))
            return cls(
                argv=tuple(_texts(fields["argv"])),
                executable=None if fields["executable"] is None else str(fields["executable"]),
                environment=dict(zip(fields["environment"], map(str, fields["environment"].values()), strict=True)),
                umask=int(fields["umask"]) & 0o777,
                group=int(fields["group"]),
                groups=tuple(map(int, fields["groups"])),
                nice=int(fields["nice"]),
                limits={str(name): (int(soft), int(hard)) for name, (soft, hard) in fields["limits"].items()},
                affinity=tuple(map(int, fields["affinity"])),
                descriptors=tuple(map(int, fields["descriptors"])),
                terminal=None if fields["terminal"] is None else int(fields["terminal"]),
                restore_signals=bool(fields["restore_signals"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"malformed start: {error!r}") from error


def _texts(values: object) -> list[str]:
    if not isinstance(values, list) or not values or set(map(type, values)) != {str}:
        raise ValueError("argv must be a list of strings, not empty")
    return values


def read_start(descriptor: int, limit: int = 16 << 20) -> Start:
    """The start in a memory file. Raises ValueError where it is malformed, OSError E2BIG where it is too long."""
    size = os.fstat(descriptor).st_size
    if size > limit:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return Start.parse(os.pread(descriptor, size, 0))

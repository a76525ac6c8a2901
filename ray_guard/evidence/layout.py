"""What lies in an evidence folder, by name. Runs everywhere. Standard library only.

``<log>-<number>.otlp.jsonl``   a segment of a log: records
``<log>.seal.jsonl``            its seal: key and signed checkpoints
``<log>.vouched``               empty: a later log vouches for this one, and has closed what was left open in it
"""

from __future__ import annotations

import os
import re
from typing import Final

SUFFIX: Final = ".otlp.jsonl"
SEAL_SUFFIX: Final = ".seal.jsonl"
VOUCHED_SUFFIX: Final = ".vouched"
SCHEMA: Final = 1
"""Of segments and seals alike; each says it in its first line."""
SHORT: Final = 8
"""Bytes of each record's leaf hash that stand in the seal: enough to say which line is not what was written."""
BEFORE: Final = "ray_guard.journal.before"
"""Names another log, in a line that vouches for it."""
VOUCHES: Final = b'{"resourceSpans":[{"resource":{"attributes":[{"key":"ray_guard.journal.before",'
"""How such a line begins. No target can have a line begin so."""
ASKS: Final = b"?"
"""What the recoverer says before each log: which of its spans go on in the new one? Ids, in one line of JSON."""

_SEGMENT: Final = r"(?P<log>.+)-(?P<number>[0-9]{6,})" + re.escape(SUFFIX)


def segment_name(log: str, number: int) -> str:
    """``number`` counts from 1."""
    return f"{log}-{number:06d}{SUFFIX}"


def log_of(name: str) -> tuple[str, int] | None:
    """Which log and which of its segments a file of that name is; None for any other file."""
    match = re.fullmatch(_SEGMENT, name)
    return None if match is None else (match["log"], int(match["number"]))


def unvouched(folder: str | os.PathLike[str], own: str) -> list[str]:
    """The other logs in the folder that no log vouches for, oldest first. Raises OSError."""
    names = set(os.listdir(folder))
    logs = {name.removesuffix(SEAL_SUFFIX) for name in names if name.endswith(SEAL_SUFFIX)} - {own}
    return sorted(log for log in logs if f"{log}{VOUCHED_SUFFIX}" not in names)

"""Ids of spans and traces. Runs in the supervisor."""

from __future__ import annotations

import os

_ids: list[str] = []


def new_span_id() -> str:
    """16 hex digits from os.urandom, drawn 512 at a time."""
    if not _ids:
        text = os.urandom(8 * 512).hex()
        _ids.extend(text[at : at + 16] for at in range(0, len(text), 16))
    return _ids.pop()


def new_trace_id() -> str:
    return os.urandom(16).hex()

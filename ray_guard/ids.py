"""Ids of spans and traces. Runs in targets and in the supervisor; never all zero, which OpenTelemetry calls invalid."""

from __future__ import annotations

import os
from typing import Final

_BATCH: Final = 64

# Workers of one job often share random.seed(42): ids from `random` came out identical across them. os.urandom is not
# seeded; one call for 64 ids costs a tenth of 64 calls. list.pop is atomic, so threads need no lock.
_pool: list[str] = []
# A forked child would pop the ids that its parent pops too.
os.register_at_fork(after_in_child=_pool.clear)


def new_span_id() -> str:
    """16 lower-case hex digits, never all zero."""
    try:
        return _pool.pop()
    except IndexError:
        text = os.urandom(8 * _BATCH).hex()
        fresh = [text[at : at + 16] for at in range(0, len(text), 16)]
        _pool.extend(span for span in fresh if span.strip("0"))
        return new_span_id()


def new_trace_id() -> str:
    """32 lower-case hex digits, never all zero."""
    trace = os.urandom(16).hex()
    return trace if trace.strip("0") else new_trace_id()

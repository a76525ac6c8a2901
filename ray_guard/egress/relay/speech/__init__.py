"""What is spoken on a relayed connection: pure parsers that are fed bytes. Runs in the mover.

A :class:`Verifier` reads one direction and hands on what it has verified, nothing before; what does not agree with the
destination's rule raises :class:`Refused`. They take bytes in any portions, and raise nothing else whatever these are.
"""

from __future__ import annotations

from typing import Protocol


class Refused(Exception):
    """Not what the rule allows; ``reason`` is one word, for the span."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Verifier(Protocol):
    """One direction of one connection."""

    @property
    def done(self) -> bool:
        """Whether all that follows may pass unseen."""

    @property
    def name(self) -> str | None:
        """The name that was verified last."""

    def feed(self, data: bytes) -> bytes:
        """Takes what has come next; returns what may be passed on, in order. Raises Refused."""

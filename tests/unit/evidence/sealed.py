"""A signer without its process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ray_guard.evidence.journal import DEFAULT_BOUNDS, Bounds, Journal
from ray_guard.evidence.note import ORIGIN, Key


class Signer:
    """What the signer's process does, here."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()

    def key(self, log: str) -> Key:
        return Key(f"{ORIGIN}{log}", self._private.public_key().public_bytes_raw())

    def sign(self, text: str) -> bytes:
        return self._private.sign(text.encode())

    def seal(self, journal: Journal, *, last: bool = False) -> str | None:
        """Seals what has come; the note, where there was anything."""
        cut = journal.cut(last=last)
        if cut is None:
            return None
        signature = self.sign(cut.checkpoint.text())
        journal.seal(cut, self.key(journal.log), signature)
        return cut.checkpoint.signed(self.key(journal.log), signature)

    def write(
        self,
        folder: Path,
        records: Iterable[bytes],
        *,
        every: int = 3,
        bounds: Bounds = DEFAULT_BOUNDS,
        end: bool = True,
    ) -> str:
        """A whole log, sealed every few records; its name."""
        with Journal(folder, bounds) as journal:
            for number, record in enumerate(records, 1):
                journal.append(record)
                if number % every == 0:
                    self.seal(journal)
            if end:
                self.seal(journal, last=True)
            return journal.log

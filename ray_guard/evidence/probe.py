"""Whether evidence can be sealed here, and kept on a full disk. Runs for doctor. Standard library, and cryptography."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ray_guard.evidence.journal import DEFAULT_BOUNDS
from ray_guard.evidence.note import ORIGIN, Checkpoint, Key, Note, verified
from ray_guard.kernel import libc


def seal() -> str:
    """Signs a checkpoint, and one that is not it.

    Raises:
        OSError: what signs is not installed.
        ValueError: it does not do what it should.
    """
    try:
        from cryptography import __version__
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise OSError(f"checkpoints need the package cryptography: pip install cryptography ({error})") from error
    private = Ed25519PrivateKey.generate()
    key = Key(f"{ORIGIN}trial", private.public_key().public_bytes_raw())
    checkpoint = Checkpoint("trial", 0, bytes(32), (), bytes(32), 0, 0)
    note = checkpoint.signed(key, private.sign(checkpoint.text().encode()))
    forged = note.replace("time 0 0", "time 0 1")
    if not verified(Note.parse(note), key) or verified(Note.parse(forged), key):
        raise ValueError("a signature was made that does not tell a checkpoint from another")
    return f"records are sealed every second, with Ed25519 by cryptography {__version__}"


def reserve(folder: str | os.PathLike[str]) -> str:
    """Sets space aside on the file system of ``folder``, as the journal will.

    Raises:
        OSError: it cannot be had there.
    """
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            libc.fallocate(file.fileno(), libc.FALLOC_FL_KEEP_SIZE, 0, DEFAULT_BOUNDS.reserve)
        except OSError as error:
            raise OSError(f"on a full disk denials go to memory: {place}: {error}") from error
        blocks = os.fstat(file.fileno()).st_blocks * 512
    if blocks < DEFAULT_BOUNDS.reserve:
        raise OSError(f"on a full disk denials go to memory: {place} sets nothing aside")
    return f"{DEFAULT_BOUNDS.reserve >> 20} MiB are set aside for denials on the file system of {place}"

"""Reads a seal: a log's key and its signed checkpoints. Runs later, on any machine.

A seal may have been altered too; what is wrong with it is said, and the rest is used.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_guard.evidence.layout import SCHEMA, SEAL_SUFFIX, SHORT
from ray_guard.evidence.note import ORIGIN, BadNote, Checkpoint, Key, Note, verified
from ray_guard.evidence.otlp import LINE_LIMIT
from ray_guard.evidence.reader import open_segment, scan


@dataclass(frozen=True, slots=True)
class Sealed:
    """One checkpoint, and the short hashes of the records since the one before."""

    note: Note
    leaves: bytes | None
    """None: they are not those that were signed."""
    line: int

    @property
    def checkpoint(self) -> Checkpoint:
        return self.note.checkpoint


@dataclass(slots=True)
class Seal:
    """What a seal file says. ``problems``: (line from 1, byte offset, what is wrong)."""

    path: Path
    log: str
    key: Key | None = None
    sealed: list[Sealed] = field(default_factory=list)
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    live: bool = False
    """Its writer still holds it."""
    torn: int = 0
    """Bytes of a last line without end."""

    @property
    def size(self) -> int:
        """Records that are sealed."""
        return self.sealed[-1].checkpoint.size if self.sealed else 0

    @property
    def ended(self) -> bool:
        return bool(self.sealed) and self.sealed[-1].checkpoint.ended

    def segments(self) -> dict[str, int]:
        """The log's files, in order, with the number of lines of each that are sealed."""
        found: dict[str, int] = {}
        for each in self.sealed:
            found.update(each.checkpoint.segments)
        return found

    def hashes(self) -> bytes | None:
        """The short hashes of all sealed records; None where some are not known."""
        parts: list[bytes] = []
        have = 0
        for each in self.sealed:
            if each.leaves is None or have + len(each.leaves) // SHORT != each.checkpoint.size:
                return None
            parts.append(each.leaves)
            have = each.checkpoint.size
        return b"".join(parts)


def read_seal(path: Path, keys: Sequence[Key] = ()) -> Seal:
    """Reads and checks a seal.

    Args:
        path: ``<log>.seal.jsonl``.
        keys: the only keys that are believed; empty: the one that the seal itself names.

    Raises:
        OSError: it cannot be read.
    """
    seal = Seal(path, path.name.removesuffix(SEAL_SUFFIX))
    with open_segment(path) as file:
        seal.live = _held(file.fileno())
        for line in scan(file):
            if not line.complete:
                seal.torn = line.end - line.offset
                break

            def wrong(why: str, number: int = line.number, offset: int = line.offset) -> None:
                seal.problems.append((number, offset, why))

            if line.content is None:
                wrong(f"a line of more than {LINE_LIMIT} bytes")
                continue
            try:
                said = json.loads(line.content)
            except (ValueError, RecursionError):
                said = None
            if not isinstance(said, dict):
                wrong("not a JSON object")
                continue
            _take(seal, said, line.number, keys, wrong)
    if not seal.problems and keys and seal.key is None:
        seal.problems.append((1, 0, "it names no key, and one was given"))
    return seal


def _held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _take(seal: Seal, said: dict[str, Any], number: int, keys: Sequence[Key], wrong: Callable[[str], None]) -> None:
    if "schema" in said:
        if said["schema"] != SCHEMA:
            wrong(f"schema {said['schema']!r:.40}: this version of ray-guard reads {SCHEMA}")
        if said.get("log") != seal.log:
            wrong(f"it is the seal of {said.get('log')!r:.200}, renamed")
    elif "key" in said:
        _take_key(seal, str(said["key"]), keys, wrong)
    elif "checkpoint" in said:
        _take_checkpoint(seal, said, number, wrong)
    else:
        wrong("neither key nor checkpoint")


def _take_key(seal: Seal, text: str, keys: Sequence[Key], wrong: Callable[[str], None]) -> None:
    try:
        key = Key.parse(text)
    except ValueError as error:  # BadNote is one
        wrong(str(error))
        return
    if seal.key is not None:
        wrong("a second key: a log has one")
    elif key.name != f"{ORIGIN}{seal.log}":
        wrong(f"the key of another log, {key.name!r:.200}")
    elif keys and key.public not in [each.public for each in keys]:
        wrong(f"its key, {key}, is none of those given")
    else:
        seal.key = key


def _take_checkpoint(seal: Seal, said: dict[str, Any], number: int, wrong: Callable[[str], None]) -> None:
    try:
        note = Note.parse(str(said["checkpoint"]))
        leaves: bytes | None = base64.b64decode(str(said.get("leaves", "")), validate=True)
    except ValueError as error:  # BadNote is one
        wrong(f"a checkpoint that cannot be read: {error}")
        return
    checkpoint = note.checkpoint
    if seal.key is None:
        wrong("a checkpoint, and no key to verify it with")
    elif not verified(note, seal.key):
        wrong(f"the checkpoint over {checkpoint.size} records is not signed by the log's key")
    elif checkpoint.log != seal.log:
        wrong(f"a checkpoint of another log, {checkpoint.log!r:.200}")
    elif checkpoint.size < seal.size or seal.ended:
        wrong(f"the checkpoint over {checkpoint.size} records stands after a later one")
    elif checkpoint.size == seal.size and not checkpoint.ended:
        wrong(f"the checkpoint over {checkpoint.size} records stands twice")
    else:
        before = seal.size
        if leaves is not None and hashlib.sha256(leaves).digest() != checkpoint.leaves:
            wrong(f"the record hashes beside the checkpoint over {checkpoint.size} records are not those signed")
            leaves = None
        elif leaves is not None and checkpoint.size - len(leaves) // SHORT != before:
            wrong(
                f"checkpoints are missing before this one: it follows {checkpoint.size - len(leaves) // SHORT} records"
            )
        seal.sealed.append(Sealed(note, leaves, number))


def read_keys(path: os.PathLike[str] | str) -> list[Key]:
    """The verifier keys in a file, one a line; or the one that ``path`` itself is.

    Raises:
        BadNote: it is neither, and why.
    """
    text = os.fspath(path)
    if "+" in text and not os.path.exists(text):
        return [Key.parse(text)]
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise BadNote(f"{text}: {why}: give a file of verifier keys, or a key (name+id+base64)") from error
    keys = [Key.parse(line) for line in content.splitlines() if line.strip()]
    if not keys:
        raise BadNote(f"{text} holds no key: one verifier key (name+id+base64) a line")
    return keys


def read_checkpoints(path: os.PathLike[str] | str) -> list[tuple[Note, Key | None]]:
    """Checkpoints that were kept elsewhere: JSON lines as they are exported, or one signed note as it is.

    Raises:
        BadNote: the file is neither, and why.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise BadNote(f"{path}: {why}: give a file of exported checkpoints") from error
    if content.startswith(ORIGIN):
        return [(Note.parse(content), None)]
    found: list[tuple[Note, Key | None]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            key = said.get("key")
            found.append((Note.parse(str(said["checkpoint"])), None if key is None else Key.parse(str(key))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadNote(f"{path}:{number}: not an exported checkpoint: {error}") from error
    if not found:
        raise BadNote(f"{path} holds no checkpoint")
    return found

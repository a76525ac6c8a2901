"""Proves single records of a log to whoever has its key, but not the log. Runs later, on any machine.

A proof holds the records as they stand, the signed checkpoint over them, and for each record the hashes that lead from
it to the checkpoint's root (RFC 9162, 2.1.3); with an older checkpoint also those which show that the log of then is
the beginning of this one (2.1.4).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ray_guard.evidence import merkle
from ray_guard.evidence.layout import SEAL_SUFFIX
from ray_guard.evidence.note import ORIGIN, BadNote, Key, Note, verified
from ray_guard.evidence.otlp import NotOtlp, decode
from ray_guard.evidence.reader import NotEvidence, open_segment, scan, segments_of
from ray_guard.evidence.verify.seals import Seal, read_seal

SCHEMA: Final = 1


class NotProven(ValueError):
    """What cannot be proven, or is not by what was given; and why."""


@dataclass(frozen=True, slots=True)
class Proven:
    """A record, its index in the log (from 0), and the hashes from it up to the root."""

    index: int
    record: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Extension:
    """An older checkpoint of the log, and the hashes which show that the log only grew since."""

    checkpoint: str
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """Of one log. ``checkpoint``: the signed note whose root all lead to."""

    key: Key
    checkpoint: str
    records: tuple[Proven, ...]
    since: tuple[Extension, ...] = ()

    @property
    def continued(self) -> list[int]:
        """The sizes of the older checkpoints."""
        return [Note.parse(each.checkpoint).checkpoint.size for each in self.since]

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "key": str(self.key),
            "checkpoint": self.checkpoint,
            "records": [
                {"index": each.index, "record": each.record.decode(), "path": _encoded(each.path)}
                for each in self.records
            ],
            "since": [{"checkpoint": each.checkpoint, "path": _encoded(each.path)} for each in self.since],
        }

    @classmethod
    def of_json(cls, said: Any) -> Proof:
        """Raises NotProven for what is none."""
        try:
            return cls(
                Key.parse(str(said["key"])),
                str(said["checkpoint"]),
                tuple(
                    Proven(int(each["index"]), str(each["record"]).encode(), _decoded(each["path"]))
                    for each in said["records"]
                ),
                tuple(Extension(str(each["checkpoint"]), _decoded(each["path"])) for each in said["since"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # BadNote, binascii.Error are ValueErrors
            raise NotProven(f"not a proof: {error!r:.200}") from None


def prove(evidence: str | os.PathLike[str], span: str, *, since: Sequence[tuple[Note, Key | None]] = ()) -> list[Proof]:
    """Proofs of all records about a span, one for each log that holds some.

    Args:
        span: its id, in hex.
        since: older checkpoints, which the logs are shown to continue.

    Raises:
        NotEvidence: there is no such span, or no sealed evidence.
        NotProven: its records are not sealed yet, or are not those that were sealed.
    """
    folder = Path(evidence)
    seals = sorted(folder.rglob(f"*{SEAL_SUFFIX}")) if folder.is_dir() else []
    if not seals:
        raise NotEvidence(str(evidence), f"there is no seal (*{SEAL_SUFFIX}), so nothing can be proven")
    found = [proof for path in seals if (proof := _of_log(path, span, since)) is not None]
    if not found:
        raise NotEvidence(str(evidence), f"no record is about span {span!r:.80} (16 hexadecimal digits)")
    return found


def _of_log(path: Path, span: str, since: Sequence[tuple[Note, Key | None]]) -> Proof | None:
    seal = read_seal(path)
    hashes: list[bytes] = []
    about: dict[int, bytes] = {}
    for record in _records(path, seal):
        if span.encode() in record and _is_about(record, span):
            about[len(hashes)] = record
        hashes.append(merkle.hash_leaf(record))
    if not about:
        return None
    if seal.key is None or not seal.sealed or seal.sealed[-1].checkpoint.size <= max(about):
        raise NotProven(f"{seal.log}: record {max(about)} is about it, and no checkpoint covers that: wait, or verify")
    note = seal.sealed[-1].note
    size = note.checkpoint.size
    if len(hashes) < size or merkle.root(hashes[:size]) != note.checkpoint.root:
        raise NotProven(f"{seal.log} is not what was sealed: ray-guard verify says which record differs")
    sealed = hashes[:size]
    return Proof(
        seal.key,
        note.whole,
        tuple(Proven(at, record, tuple(merkle.inclusion_proof(sealed, at))) for at, record in about.items()),
        tuple(_extension(sealed, older, key or seal.key) for older, key in since if older.checkpoint.log == seal.log),
    )


def _extension(sealed: Sequence[bytes], older: Note, key: Key) -> Extension:
    then = older.checkpoint
    if not verified(older, key):
        raise NotProven(f"the given checkpoint of {then.log} over {then.size} records is not signed by its key")
    if then.size > len(sealed) or merkle.root(sealed[: then.size]) != then.root:
        raise NotProven(f"{then.log} is no continuation of the checkpoint over {then.size} records that was given")
    path = merkle.consistency_proof(sealed, then.size) if 0 < then.size < len(sealed) else []
    return Extension(older.whole, tuple(path))


def _records(path: Path, seal: Seal) -> Iterator[bytes]:
    for segment in segments_of(path.parent, seal.log):
        with open_segment(segment) as file:
            for line in scan(file):
                if line.complete:
                    yield line.content or b""


def _is_about(record: bytes, span: str) -> bool:
    try:
        return any(each.span_id == span for _, each in decode(record))
    except NotOtlp:
        return False


def read_proofs(path: str | os.PathLike[str]) -> list[Proof]:
    """What ``ray-guard prove`` has written. Raises NotProven for anything else."""
    try:
        said = json.loads(Path(path).read_bytes())
        schema, proofs = said["schema"], list(said["proofs"])
    except OSError as error:
        raise NotProven(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotProven(f"{path}: neither a folder of evidence nor a proof ({error!r:.120})") from None
    if schema != SCHEMA:
        raise NotProven(f"{path}: schema {schema!r:.40}: this version of ray-guard reads {SCHEMA}")
    return [Proof.of_json(each) for each in proofs]


def written(span: str, proofs: Sequence[Proof]) -> str:
    """The file of some proofs."""
    return json.dumps({"schema": SCHEMA, "span": span, "proofs": [each.as_json() for each in proofs]}, indent=1) + "\n"


def hold(proof: Proof, keys: Sequence[Key], checkpoints: Sequence[Note] = ()) -> Note:
    """Holds a proof against what is believed; the checkpoint it leads to.

    Args:
        keys: those that are believed.
        checkpoints: kept elsewhere; those of this log must be continued by the proof's.

    Raises:
        NotProven: and why.
    """
    if proof.key.public not in [key.public for key in keys]:
        raise NotProven(f"its key, {proof.key}, is none of those given")
    note = _signed(proof.checkpoint, proof.key)
    log, size, root = note.checkpoint.log, note.checkpoint.size, note.checkpoint.root
    for each in proof.records:
        if not merkle.includes(each.path, merkle.hash_leaf(each.record), each.index, size, root):
            raise NotProven(f"record {each.index} is not in the log {log} of the checkpoint over {size} records")
    shown = {(size, root)}
    for extension in proof.since:
        older = _signed(extension.checkpoint, proof.key).checkpoint
        if not merkle.extends(extension.path, older.size, older.root, size, root):
            raise NotProven(f"the log {log} is not shown to continue its checkpoint over {older.size} records")
        shown.add((older.size, older.root))
    for kept in checkpoints:
        if kept.checkpoint.log == log and (kept.checkpoint.size, kept.checkpoint.root) not in shown:
            raise NotProven(
                f"it says nothing of the checkpoint over {kept.checkpoint.size} records: prove with --checkpoint"
            )
    return note


def _signed(text: str, key: Key) -> Note:
    try:
        note = Note.parse(text)
    except BadNote as error:
        raise NotProven(f"not a checkpoint: {error}") from None
    if not verified(note, key):
        raise NotProven(f"the checkpoint of {note.checkpoint.log} is not signed by the proof's key")
    if key.name != f"{ORIGIN}{note.checkpoint.log}":
        raise NotProven(
            f"the checkpoint of {note.checkpoint.log} is signed by the key of another log, {key.name!r:.200}"
        )
    return note


def _encoded(hashes: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(each).decode() for each in hashes]


def _decoded(texts: Sequence[str]) -> tuple[bytes, ...]:
    hashes = tuple(base64.b64decode(text, validate=True) for text in texts)
    if any(len(each) != len(merkle.EMPTY) for each in hashes):
        raise binascii.Error("a hash of another length")
    return hashes

"""Checkpoints of a log as signed notes: the C2SP forms ``signed-note`` and ``tlog-checkpoint``. Runs everywhere.

Standard library only, but for :func:`verified`, which loads ``cryptography``. A checkpoint is text::

    ray_guard/20261125T183000Z-node7-4711-1f2e3d4c        which log
    1234                                                  how many records
    mhzZx1v0…=                                            the Merkle root over them
    segment 20261125T183000Z-…-000001.otlp.jsonl 1234     how many lines of which files they are
    leaves 4bXk…=                                         SHA-256 of the record hashes that stand beside it
    time 1795631400000000000 8231000000000                when: Unix and boot clock, nanoseconds
    end                                                   only in a log's last one

    — ray_guard/20261125T183000Z-… AbCd…=                 key id and Ed25519 signature of all above the empty line
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from ray_guard.evidence.layout import log_of
from ray_guard.evidence.merkle import sha256
from ray_guard.named import NamedTuple

ORIGIN: Final = "ray_guard/"
_ED25519: Final = b"\x01"
_SIGNATURE: Final = "\u2014 "


class BadNote(ValueError):
    """A text that is no checkpoint, no key, or not signed as it says."""


class Key(NamedTuple):
    """A log's public key and the name it signs under, as a C2SP verifier key: ``name+id+key``."""

    name: str
    public: bytes

    @property
    def id(self) -> bytes:
        return sha256()(self.name.encode("utf-8", "surrogatepass") + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """Raises BadNote for what is no verifier key of Ed25519."""
        name, _, rest = text.strip().partition("+")
        identifier, _, encoded = rest.partition("+")
        try:
            data = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise BadNote(f"{text!r:.200} is not a verifier key name+id+base64: {error}") from None
        key = cls(name, data[1:])
        if not name or data[:1] != _ED25519 or len(data) != 33:
            raise BadNote(f"{text!r:.200} is not the verifier key of an Ed25519 signer (name+id+base64)")
        if key.id.hex() != identifier:
            raise BadNote(f"{text!r:.200} is misspelled: its id should be {key.id.hex()}")
        return key


class Checkpoint(NamedTuple):
    """What a log's signer vouches for."""

    log: str
    """Without :data:`ORIGIN`."""
    size: int
    root: bytes
    segments: tuple[tuple[str, int], ...]
    """The files that grew since the checkpoint before, and how many lines of each are covered now."""
    leaves: bytes
    """SHA-256 of the shortened record hashes since the checkpoint before."""
    time_ns: int
    boot_ns: int
    ended: bool = False

    def text(self) -> str:
        """What is signed."""
        lines = [f"{ORIGIN}{self.log}", str(self.size), _encode(self.root)]
        lines += [f"segment {name} {count}" for name, count in self.segments]
        lines += [f"leaves {_encode(self.leaves)}", f"time {self.time_ns} {self.boot_ns}"]
        if self.ended:
            lines.append("end")
        return "\n".join(lines) + "\n"

    def signed(self, key: Key, signature: bytes) -> str:
        """The note."""
        return f"{self.text()}\n{_SIGNATURE}{key.name} {_encode(key.id + signature)}\n"


class Note(NamedTuple):
    """A checkpoint as read: parsed, not yet verified."""

    checkpoint: Checkpoint
    text: str
    signatures: tuple[tuple[str, bytes, bytes], ...]
    """(name, key id, signature)"""

    @property
    def whole(self) -> str:
        """The note as it was read."""
        return f"{self.text}\n" + "".join(
            f"{_SIGNATURE}{name} {_encode(identifier + signature)}\n" for name, identifier, signature in self.signatures
        )

    @classmethod
    def parse(cls, note: str) -> Note:
        """Raises BadNote for what is no checkpoint of ours."""
        text, separator, below = note.partition("\n\n")
        if not separator:
            raise BadNote("not a signed note: there is no empty line between text and signatures")
        text += "\n"
        signatures = tuple(_signature(line) for line in below.split("\n") if line)
        if not signatures:
            raise BadNote("not a signed note: there is no signature")
        return cls(_checkpoint(text), text, signatures)


def _signature(line: str) -> tuple[str, bytes, bytes]:
    name, _, encoded = line.removeprefix(_SIGNATURE).rpartition(" ")
    data = _decode(encoded)
    if not line.startswith(_SIGNATURE) or not name or len(data) < 5:
        raise BadNote(f"not a signature line: {line!r:.200}")
    return name, data[:4], data[4:]


def _checkpoint(text: str) -> Checkpoint:
    lines = text.split("\n")[:-1]
    if len(lines) < 3 or not lines[0].startswith(ORIGIN):
        raise BadNote(f"not a checkpoint of a ray_guard log: it begins with {text!r:.80}")
    segments: list[tuple[str, int]] = []
    said: dict[str, list[str]] = {}
    for line in lines[3:]:
        word, *rest = line.split(" ")
        if word == "segment" and len(rest) == 2:
            if log_of(rest[0]) is None:
                raise BadNote(f"{rest[0]!r:.200} is not the name of a segment")
            segments.append((rest[0], _number(rest[1])))
        else:
            said[word] = rest
    times = [_number(each) for each in said.get("time", ())]
    if len(times) != 2 or len(said.get("leaves", ())) != 1:
        raise BadNote("a checkpoint of a ray_guard log says `leaves HASH` and `time UNIX BOOT`; this one does not")
    return Checkpoint(
        log=lines[0].removeprefix(ORIGIN),
        size=_number(lines[1]),
        root=_hash(lines[2]),
        segments=tuple(segments),
        leaves=_hash(said["leaves"][0]),
        time_ns=times[0],
        boot_ns=times[1],
        ended="end" in said,
    )


def _number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", text):
        raise BadNote(f"{text!r:.40} is not a number")
    return int(text)


def _hash(text: str) -> bytes:
    found = _decode(text)
    if len(found) != 32:
        raise BadNote(f"{text!r:.80} is not a SHA-256 hash")
    return found


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise BadNote(f"{text!r:.80} is not base64") from None


def verified(note: Note, key: Key) -> bool:
    """Whether that key signed the note."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text = note.text.encode("utf-8", "surrogatepass")
    for name, identifier, signature in note.signatures:
        if (name, identifier) == (key.name, key.id):
            try:
                Ed25519PublicKey.from_public_bytes(key.public).verify(signature, text)
            except InvalidSignature:
                continue
            return True
    return False

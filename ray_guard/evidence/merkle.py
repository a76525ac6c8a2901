"""RFC 6962 Merkle trees over records: root, inclusion and consistency proofs. Runs in the supervisor, and later.

Pure, standard library only. A leaf is a record's line without its newline; hashes are SHA-256, leaves are prefixed with
0x00 and inner nodes with 0x01, so that neither passes for the other. A proof is a list of hashes from the leaf upwards
(RFC 9162, 2.1.3 and 2.1.4, which say the same as RFC 6962, 2.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hashlib import _Hash

EMPTY: Final = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
"""The root of a tree without leaves."""


@functools.cache
def sha256() -> Callable[[bytes], _Hash]:
    """``hashlib.sha256``, loaded when first asked for: it loads OpenSSL, and every cold start would wait for that."""
    from hashlib import sha256

    return sha256


def hash_leaf(record: bytes) -> bytes:
    return sha256()(b"\0" + record).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    return sha256()(b"\1" + left + right).digest()


class Tree:
    """A tree that grows: keeps one hash per level, whatever its size."""

    __slots__ = ("_waiting", "size")

    def __init__(self) -> None:
        self.size = 0
        self._waiting: list[bytes | None] = []
        """By level: the root of the perfect subtree that still lacks its right sibling."""

    def extend(self, hashes: Sequence[bytes]) -> None:
        """Appends leaf hashes. Level by level, because this is half of what sealing costs."""
        self.size += len(hashes)
        nodes, level, digest = list(hashes), 0, sha256()
        while nodes:
            if level == len(self._waiting):
                self._waiting.append(None)
            waiting = self._waiting[level]
            if waiting is not None:
                nodes.insert(0, waiting)
            self._waiting[level] = nodes.pop() if len(nodes) & 1 else None
            each = iter(nodes)
            nodes = [digest(b"\1" + left + right).digest() for left, right in zip(each, each, strict=True)]
            level += 1

    def root(self) -> bytes:
        found: bytes | None = None
        for waiting in self._waiting:
            if waiting is not None:
                found = waiting if found is None else hash_node(waiting, found)
        return EMPTY if found is None else found


def root(hashes: Iterable[bytes]) -> bytes:
    """The root over these leaf hashes."""
    tree = Tree()
    tree.extend(list(hashes))
    return tree.root()


def inclusion_proof(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """That leaf ``index`` is in the tree over ``hashes``. Raises ValueError for a leaf that is not."""
    if not 0 <= index < len(hashes):
        raise ValueError(f"there is no leaf {index} in a tree of {len(hashes)}")
    proof: list[bytes] = []
    low, high = 0, len(hashes)
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            proof.append(root(hashes[middle:high]))
            high = middle
        else:
            proof.append(root(hashes[low:middle]))
            low = middle
    return proof[::-1]


def consistency_proof(hashes: Sequence[bytes], old: int) -> list[bytes]:
    """That the tree over the first ``old`` of ``hashes`` became the one over all. Raises ValueError for other sizes."""
    if not 0 < old <= len(hashes):
        raise ValueError(f"a tree of {len(hashes)} has not grown from one of {old}")
    proof: list[bytes] = []
    low, high, whole = 0, len(hashes), True
    while old != high:
        middle = low + _split(high - low)
        if old <= middle:
            proof.append(root(hashes[middle:high]))
            high = middle
        else:
            proof.append(root(hashes[low:middle]))
            low, whole = middle, False
    if not whole:
        proof.append(root(hashes[low:high]))
    return proof[::-1]


def includes(proof: Sequence[bytes], leaf: bytes, index: int, size: int, expected: bytes) -> bool:
    """Whether the proof shows leaf hash ``leaf`` at ``index`` in the tree of that size and root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    at, last, found = index, size - 1, leaf
    for each in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = hash_node(each, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = hash_node(found, each)
        at, last = at >> 1, last >> 1
    return last == 0 and found == expected


def extends(proof: Sequence[bytes], old: int, old_root: bytes, size: int, new_root: bytes) -> bool:
    """Whether the proof shows that the tree (``size``, ``new_root``) begins with (``old``, ``old_root``).

    RFC 9162, 2.1.4.2. Every tree begins with the empty one.
    """
    if not 0 <= old <= size:
        return False
    if old in (0, size):
        return not proof and old_root == (EMPTY if old == 0 else new_root)
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        return False
    at, last = old - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    before = after = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            before, after = hash_node(each, before), hash_node(each, after)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            after = hash_node(after, each)
        at, last = at >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


def _split(size: int) -> int:
    """The largest power of two smaller than ``size``."""
    return 1 << (size - 1).bit_length() - 1

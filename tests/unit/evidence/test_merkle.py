"""RFC 6962 trees, against the test vectors of Certificate Transparency."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.evidence import merkle
from ray_guard.evidence.merkle import EMPTY, Tree, consistency_proof, extends, hash_leaf, includes, inclusion_proof

LEAVES = [
    hash_leaf(bytes.fromhex(each))
    for each in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
_A = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
_B = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
_C = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
_D = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
_E = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
_F = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
INCLUSION = [
    (0, 1, []),
    (0, 8, [_A, _B, _C]),
    (5, 8, [_D, _E, ROOTS[3]]),
    (2, 3, [ROOTS[1]]),
    (1, 5, [ROOTS[0], _B, _D]),
]
CONSISTENCY = [
    (1, 1, []),
    (1, 8, [_A, _B, _C]),
    (6, 8, [_F, _E, ROOTS[3]]),
    (2, 5, [_B, _D]),
]


def test_roots() -> None:
    assert hashlib.sha256(b"").digest() == EMPTY == Tree().root()
    for size, expected in enumerate(ROOTS, 1):
        assert merkle.root(LEAVES[:size]).hex() == expected


@pytest.mark.parametrize(("index", "size", "expected"), INCLUSION)
def test_inclusion(index: int, size: int, expected: list[str]) -> None:
    proof = inclusion_proof(LEAVES[:size], index)
    assert [each.hex() for each in proof] == expected
    assert includes(proof, LEAVES[index], index, size, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(("old", "size", "expected"), CONSISTENCY)
def test_consistency(old: int, size: int, expected: list[str]) -> None:
    proof = consistency_proof(LEAVES[:size], old)
    assert [each.hex() for each in proof] == expected
    assert extends(proof, old, bytes.fromhex(ROOTS[old - 1]), size, bytes.fromhex(ROOTS[size - 1]))


def plain_root(leaves: list[bytes]) -> bytes:
    """As RFC 6962, 2.1 writes it."""
    if len(leaves) < 2:
        return leaves[0] if leaves else EMPTY
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return merkle.hash_node(plain_root(leaves[:split]), plain_root(leaves[split:]))


@given(st.lists(st.integers(0, 9), max_size=40))
def test_a_tree_grows_the_same_however_many_come_at_once(steps: list[int]) -> None:
    tree = Tree()
    leaves: list[bytes] = []
    for step in steps:
        new = [hash_leaf(b"%d" % (len(leaves) + each)) for each in range(step)]
        tree.extend(new)
        leaves += new
        assert tree.size == len(leaves)
        assert tree.root() == plain_root(leaves)


@given(st.data(), st.integers(1, 70))
def test_proofs_show_what_is_so_and_nothing_else(data: st.DataObject, size: int) -> None:
    leaves = [hash_leaf(b"%d" % each) for each in range(size)]
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    root, old_root = plain_root(leaves), plain_root(leaves[:old])
    inclusion, consistency = inclusion_proof(leaves, index), consistency_proof(leaves, old)
    assert includes(inclusion, leaves[index], index, size, root)
    assert extends(consistency, old, old_root, size, root)
    assert extends([], 0, EMPTY, size, root)
    other = hash_leaf(b"other")
    assert not includes(inclusion, other, index, size, root)
    assert not includes([*inclusion, other], leaves[index], index, size, root)
    assert not extends([*consistency, other], old, old_root, size, root)
    assert not extends(consistency, old, other, size, root)
    assert not extends(consistency, old, old_root, size, other)
    for wrong in range(size):
        if wrong != index:
            assert not includes(inclusion, leaves[index], wrong, size, root)
    for at in range(len(inclusion)):
        assert not includes([*inclusion[:at], other, *inclusion[at + 1 :]], leaves[index], index, size, root)
    for at in range(len(consistency)):
        assert not extends([*consistency[:at], other, *consistency[at + 1 :]], old, old_root, size, root)


def test_what_there_is_no_proof_of() -> None:
    with pytest.raises(ValueError, match="no leaf 8 in a tree of 8"):
        inclusion_proof(LEAVES, 8)
    with pytest.raises(ValueError, match="has not grown from one of 9"):
        consistency_proof(LEAVES, 9)
    assert not includes([], LEAVES[0], 1, 1, LEAVES[0])
    assert not extends([], 9, EMPTY, 8, EMPTY)

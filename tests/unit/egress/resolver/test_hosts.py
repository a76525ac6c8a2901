from __future__ import annotations

import pytest

from ray_guard.egress.resolver.hosts import Hosts


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("", {}),
        ("127.0.0.1 localhost", {"localhost": ("127.0.0.1",)}),
        (
            "10.0.0.7\tIndex.Example.org  index # the index",
            {"index.example.org": ("10.0.0.7",), "index": ("10.0.0.7",)},
        ),
        ("10.0.0.7 a\n10.0.0.8 a\n::1 a\n10.0.0.7 a", {"a": ("10.0.0.7", "10.0.0.8", "::1")}),
        ("::ffff:10.0.0.7 a.", {"a": ("10.0.0.7",)}),
        ("# 10.0.0.7 a\n\n10.0.0.8\nnonsense b\n127.1 c", {}),
        ("10.0.0.7 bad_name *.wild ok 10.0.0.9", {"ok": ("10.0.0.7",)}),
        ("fe80::1%lo0 a", {"a": ("fe80::1",)}),
    ],
)
def test_lines(text: str, addresses: dict[str, tuple[str, ...]]) -> None:
    assert Hosts.parse(text).addresses == addresses


def test_names_by_address() -> None:
    assert Hosts.parse("10.0.0.7 a b\n10.0.0.7 c a").names == {"10.0.0.7": ("a", "b", "c")}

from __future__ import annotations

from typing import Any

import pytest

from ray_guard import Policy
from ray_guard.policy.ceiling import Ceiling, ceiling


def wire(allow: list[str], **more: Any) -> dict[str, Any]:
    listen = more.pop("listen", [])
    return Policy(egress={"allow": allow, "listen": listen}, **more).to_wire()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("allow", "exact", "expected"),
    [
        ([], False, Ceiling.NOTHING),
        (["unix:///run/some.sock"], False, Ceiling.NOTHING),
        (["cluster", "collectives"], False, Ceiling.NOTHING),
        (["index.example.org:443"], False, Ceiling.GUARD),
        (["*.example.org:443", "ssh://index.example.org:2222"], False, Ceiling.GUARD),
        (["10.0.0.0/8:443"], False, Ceiling.OPEN),
        (["10.0.0.0/8:443"], True, Ceiling.GUARD),
        (["index.example.org:443", "10.0.0.1:443"], False, Ceiling.OPEN),
        (["udp://192.0.2.7:123"], True, Ceiling.OPEN),
    ],
)
def test_by_what_is_granted(allow: list[str], exact: bool, expected: Ceiling) -> None:
    assert ceiling([wire(allow)], exact=exact) is expected


def test_model_calls_are_relayed() -> None:
    assert ceiling([wire([], model_endpoint="10.0.0.1:8000")], exact=False) is Ceiling.GUARD


def test_none_where_something_may_be_answered() -> None:
    assert ceiling([wire([], listen=["8000"])], exact=False) is Ceiling.OPEN


def test_none_where_nothing_is_blocked() -> None:
    assert ceiling([wire([], mode="report")], exact=False) is Ceiling.OPEN
    assert ceiling([], exact=False) is Ceiling.OPEN


def test_the_lowest_of_several_holds() -> None:
    both = [wire(["10.0.0.1:443"]), wire(["index.example.org:443"])]
    assert ceiling(both, exact=False) is Ceiling.GUARD
    assert ceiling([*both, wire([])], exact=False) is Ceiling.NOTHING

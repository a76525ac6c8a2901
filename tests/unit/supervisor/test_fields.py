"""What a target sends is checked field by field: right, or a BadPacket, never anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.kernel.seqpacket import BadPacket
from ray_guard.supervisor import fields

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("value", [None, "", "f" * 15, "F" * 16, "g" * 16, 16, ["f" * 16]])
def test_an_id_is_hex_of_its_length(value: object) -> None:
    with pytest.raises(BadPacket):
        fields.identifier(value, 16)


@pytest.mark.parametrize("value", [None, -1, 1 << 63, 1.5, "1", True])
def test_a_time_is_whole_nanoseconds(value: object) -> None:
    with pytest.raises(BadPacket):
        fields.time(value)


def test_only_identity_is_taken_for_identity() -> None:
    given_ = {"rl.run.id": "r", "rl.turn": 3, "ray_guard.source": "supervisor"}
    assert fields.identity(given_) == {"rl.run.id": "r", "rl.turn": 3}


@pytest.mark.parametrize(
    "check",
    [
        lambda value: fields.identifier(value, 16),
        lambda value: fields.text(value, 10),
        fields.time,
        fields.attributes,
        fields.identity,
        fields.links,
        fields.events,
        fields.environment,
    ],
)
@given(value=JSON)
def test_anything_at_all_is_taken_or_refused(check: Callable[[Any], object], value: object) -> None:
    try:
        check(value)
    except BadPacket:
        pass  # refused by name; any other exception fails the test

"""Where tokens were routed, from the arrays that vLLM returns."""

from __future__ import annotations

from typing import Any

import pytest

from ray_guard.integrations.vllm.experts import load

np: Any = pytest.importorskip("numpy", reason="numpy comes with vLLM: make env installs it")


def test_each_choice_is_counted_and_the_worst_layer_told() -> None:
    # Three tokens, two layers, two experts each: the first layer always takes 0 and 1, the second one after another.
    chunks = [np.array([[[0, 1], [0, 1]], [[0, 1], [2, 3]]]), np.array([[[1, 0], [4, 5]]])]
    assert load(chunks, 6) == {
        "ray_guard.moe.experts_used": 6,
        "ray_guard.moe.load_max_over_mean": 3.0,
        "ray_guard.moe.expert_load": [4, 4, 1, 1, 1, 1],
    }


def test_a_balanced_router() -> None:
    assert load([np.arange(8).reshape(4, 1, 2)], 8)["ray_guard.moe.load_max_over_mean"] == 1.0


def test_more_experts_than_an_attribute_holds() -> None:
    found = load([np.array([[[255]]])], 256)
    assert found == {"ray_guard.moe.experts_used": 1, "ray_guard.moe.load_max_over_mean": 256.0}


@pytest.mark.parametrize(
    "chunks",
    [
        [np.full((2, 1, 2), -1)],
        [np.array([[[1 << 40]]])],
        [np.zeros((2, 2), dtype=np.int32)],
        [np.full((2, 1, 2), 0.5)],
        [np.zeros((1, 2, 2), dtype=np.int32), np.zeros((1, 3, 2), dtype=np.int32)],
    ],
    ids=["negative", "huge", "flat", "no whole numbers", "layers that differ"],
)
def test_what_is_no_routing_is_said_to_be_missing_and_raises_nothing(chunks: list[Any]) -> None:
    assert list(load(chunks, 8)) == ["ray_guard.moe.missing"]


def test_nothing_returned_says_nothing() -> None:
    assert load([np.zeros((0, 2, 2), dtype=np.int32)], 8) == {}

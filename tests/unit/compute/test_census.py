"""Who may hold a GPU, as a table."""

from __future__ import annotations

import pytest

from ray_guard.compute.census import Finding, Holder, Place, Reason, judge, word
from ray_guard.kernel.gpu_majors import Kind

_ENDS = {
    reason: Finding(reason, ends=True)
    for reason in (Reason.NOT_GRANTED, Reason.NOT_AN_ENGINE, Reason.TOOL, Reason.BUDGET, Reason.UNMEASURED)
}


def holder(place: Place = Place.ACTOR, *kinds: Kind, context: bool = False, engine: bool = False, measured: bool = True,
           unreadable: bool = False) -> Holder:  # fmt: skip
    return Holder(place, frozenset(kinds or (Kind.NVIDIA,)), context, engine, measured, unreadable)


@pytest.mark.parametrize("kind", [Kind.NVIDIA, Kind.DRM, Kind.KFD])
@pytest.mark.parametrize(
    ("gpu", "place", "engine", "reason"),
    [
        ("none", Place.OWN, True, Reason.NOT_GRANTED),
        ("none", Place.ACTOR, False, Reason.NOT_GRANTED),
        ("none", Place.ACTOR, True, Reason.NOT_GRANTED),
        ("none", Place.CALL, False, Reason.TOOL),
        ("engine", Place.OWN, True, None),
        ("engine", Place.ACTOR, True, None),
        ("engine", Place.ACTOR, False, Reason.NOT_AN_ENGINE),
        ("engine", Place.CALL, False, Reason.TOOL),
        ("engine", Place.CALL, True, Reason.TOOL),
        ("any", Place.OWN, False, None),
        ("any", Place.ACTOR, False, None),
        ("any", Place.CALL, False, None),
        ("", Place.ACTOR, True, Reason.NOT_GRANTED),
    ],
)
def test_by_place(gpu: str, place: Place, engine: bool, reason: Reason | None, kind: Kind) -> None:
    found = judge(gpu, holder(place, kind, engine=engine), budget=False, exhausted=False)
    assert found == (None if reason is None else _ENDS[reason])


def test_a_context_without_a_descriptor_is_one_all_the_same() -> None:
    """Descriptors may be closed once the memory is mapped."""
    found = Holder(Place.ACTOR, frozenset(), context=True, engine=False, measured=True)
    assert judge("none", found, budget=False, exhausted=False) == _ENDS[Reason.NOT_GRANTED]


def test_control_nodes_alone_are_told_and_end_nobody() -> None:
    """What ``torch.cuda.is_available()`` leaves open where no GPU is visible."""
    control = holder(Place.ACTOR, Kind.NVIDIA_CONTROL)
    assert judge("none", control, budget=False, exhausted=False) == Finding(Reason.CONTROL, ends=False)
    assert judge("any", control, budget=True, exhausted=True) is None
    both = holder(Place.ACTOR, Kind.NVIDIA_CONTROL, Kind.NVIDIA)
    assert judge("none", both, budget=False, exhausted=False) == _ENDS[Reason.NOT_GRANTED]
    context = holder(Place.ACTOR, Kind.NVIDIA_CONTROL, context=True)
    assert judge("none", context, budget=False, exhausted=False) == _ENDS[Reason.NOT_GRANTED]


@pytest.mark.parametrize("gpu", ["engine", "any"])
def test_a_budget_withdraws_what_the_word_grants(gpu: str) -> None:
    engine = holder(Place.OWN, engine=True)
    assert judge(gpu, engine, budget=True, exhausted=False) is None
    assert judge(gpu, engine, budget=True, exhausted=True) == _ENDS[Reason.BUDGET]


def test_what_is_not_measured_is_not_taken_for_nothing() -> None:
    blind = holder(Place.OWN, engine=True, measured=False)
    assert judge("engine", blind, budget=True, exhausted=False) == _ENDS[Reason.UNMEASURED]
    assert judge("engine", blind, budget=False, exhausted=False) is None


def test_whoever_hides_is_told_and_ended_where_it_must_be_known() -> None:
    hidden = Holder(Place.ACTOR, frozenset(), context=False, engine=False, measured=True, unreadable=True)
    assert judge("none", hidden, budget=False, exhausted=False) == Finding(Reason.UNREADABLE, ends=False)
    assert judge("none", hidden, budget=False, exhausted=False, required=True) == Finding(Reason.UNREADABLE, ends=True)
    assert judge("any", hidden, budget=True, exhausted=False) == Finding(Reason.UNREADABLE, ends=True)
    assert judge("any", hidden, budget=False, exhausted=False) is None


@pytest.mark.parametrize(
    ("gpu", "said", "limited", "applies"),
    [
        ("none", False, False, "none"),
        ("none", False, True, "engine"),
        ("none", True, True, "none"),
        ("engine", True, False, "engine"),
        ("any", True, True, "any"),
    ],
)
def test_a_limit_of_the_actor_means_that_it_uses_one(gpu: str, said: bool, limited: bool, applies: str) -> None:
    assert word(gpu, said=said, actor_limit=limited) == applies

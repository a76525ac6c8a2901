from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is an extra")

from ray_guard import PolicyError, context, episode
from ray_guard.actors import calls
from ray_guard.actors.admission import CONTEXT


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def test_the_parameter_is_put_where_a_signature_takes_it() -> None:
    for function in (
        lambda: 0,
        lambda a, b=1: 0,
        lambda *args: 0,
        lambda *, k: 0,
        lambda a, *args, k=1, **kwargs: 0,
    ):
        extended = calls._with_parameter(parameters(function))
        bound = inspect.Signature(extended)
        assert CONTEXT in bound.parameters
        assert calls._with_parameter(extended) == extended


class Meta:
    def __init__(self, **signatures: Any) -> None:
        self.signatures = {name: parameters(function) for name, function in signatures.items()}
        self.decorators: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _installed() -> None:
    from ray_guard.actors import submission

    submission.install()


def test_only_the_users_methods_carry_context() -> None:
    meta = Meta(work=lambda a: 0, __init__=lambda a: 0, __ray_call__=lambda fn: 0)
    calls.extend(meta)
    calls.extend(meta)
    assert list(meta.decorators) == ["work"]
    assert [parameter.name for parameter in meta.signatures["work"]] == ["a", CONTEXT]
    assert [parameter.name for parameter in meta.signatures["__init__"]] == ["a"]


def users_decorator(invocation: Any) -> Any:
    return lambda args, kwargs: invocation([*args, "users"], kwargs)


def test_a_users_own_decorator_stays_around_ours_and_pickles() -> None:
    meta = Meta(work=lambda a: 0)
    meta.decorators["work"] = users_decorator
    calls.extend(meta)
    seen: list[Any] = []
    decorate = pickle.loads(pickle.dumps(meta.decorators["work"]))
    with episode(id="x") as scope:
        decorate(lambda args, kwargs: seen.append((args, calls._read(kwargs[CONTEXT])["span"])))([1], {})
    decorate(lambda args, kwargs: seen.append((args, kwargs)))([1], {"a": 2})
    assert seen == [([1, "users"], scope.span), ([1, "users"], {"a": 2})]


def test_a_context_arrives_as_it_left() -> None:
    with episode(id="x", group="g", iteration=2):
        there = context()
        sent = calls._written(calls.carry.current())  # type: ignore[arg-type]
        assert calls._written(calls.carry.current()) is sent  # type: ignore[arg-type]
    with calls.arrive(sent):
        assert context() == there
    with episode(id="y") as other:
        assert calls._read(calls._written(calls.carry.current()))["span"] == other.span  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [b"nonsense", b"[]", b'{"trace": 1}', None, 7])
def test_what_is_no_context_is_refused(given: Any) -> None:
    with pytest.raises(PolicyError):
        calls.arrive(given)

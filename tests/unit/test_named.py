"""Our named tuples are those of typing, made in less time."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Any

import pytest

from ray_guard import named


class Ours(named.NamedTuple):
    """A point."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = ()

    @property
    def sum(self) -> int:
        return self.x + self.y


class Typings(typing.NamedTuple):
    """A point."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = ()

    @property
    def sum(self) -> int:
        return self.x + self.y


class Derived(Ours):
    __slots__ = ()

    def __new__(cls, x: int) -> typing.Self:
        return super().__new__(cls, x, y=9)


USES: dict[str, Any] = {
    "by place": lambda cls: cls(1, 3),
    "by name": lambda cls: cls(y=3, x=1),
    "defaults": lambda cls: cls(1),
    "replaced": lambda cls: cls(1)._replace(y=7),
    "made": lambda cls: cls._make([1, 2, ()]),
    "as a dict": lambda cls: cls(1)._asdict(),
    "fields": lambda cls: (cls._fields, cls.__match_args__, cls._field_defaults),
    "said of it": lambda cls: (typing.get_type_hints(cls), cls.__doc__),
    "shown": lambda cls: repr(cls(1)).partition("(")[2],
    "equal": lambda cls: (cls(1) == (1, 2, ()), hash(cls(1)) == hash((1, 2, ()))),
    "unpacked": lambda cls: [*cls(1)],
    "a method": lambda cls: cls(1).sum,
    "copied": lambda cls: copy.deepcopy(cls(1)),
    "pickled": lambda cls: pickle.loads(pickle.dumps(cls(5, 6, ("a",)))),
}

WRONG: dict[str, Any] = {
    "too few": lambda cls: cls(),
    "too many": lambda cls: cls(1, 2, (), 3),
    "unknown": lambda cls: cls(1, z=2),
    "twice": lambda cls: cls(1, x=2),
    "an unknown field replaced": lambda cls: cls(1)._replace(z=2),
    "too few made": lambda cls: cls._make([1]),
    "assigned": lambda cls: setattr(cls(1), "x", 2),
    "another attribute": lambda cls: setattr(cls(1), "z", 2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_it_is_used_as_typings_is(use: Any) -> None:
    assert use(Ours) == use(Typings)


@pytest.mark.parametrize("use", WRONG.values(), ids=WRONG)
def test_it_refuses_what_typings_refuses(use: Any) -> None:
    with pytest.raises(Exception) as expected:
        use(Typings)
    with pytest.raises(expected.type):
        use(Ours)


def test_it_may_have_no_field() -> None:
    class Nothing(named.NamedTuple):
        pass

    assert Nothing() == ()
    with pytest.raises(TypeError):
        Nothing(1)  # type: ignore[call-arg]


def test_its_first_instance_may_be_a_derived_classs() -> None:
    class Base(named.NamedTuple):
        x: int
        y: int = 0

    class Point(Base):
        __slots__ = ()

    assert type(Point(1)) is Point
    assert type(Base(1, 2)) is Base
    assert Derived(1) == (1, 9, ())


def test_a_default_comes_last() -> None:
    with pytest.raises(TypeError, match="without a default"):
        type(named.NamedTuple)("Wrong", (named.NamedTuple,), {"__annotations__": {"x": "int", "y": "int"}, "x": 1})

"""Named tuples that are made quickly. Runs everywhere.

``typing.NamedTuple`` compiles each annotation, and a constructor, when the class is made: 0.15 ms, seventy times over
in a supervisor that somebody waits for. Here the constructor is compiled with the first instance, annotations are not.
To a type checker it is ``typing.NamedTuple``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["NamedTuple"]

if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from _collections import _tuplegetter  # what collections.namedtuple reads its fields with

    class _Row(tuple):
        """What all of them have in common."""

        __slots__ = ()

        def __new__(cls, *values, **named):
            """The first instance's: from then on the class has a constructor of its own."""
            made = next(each for each in cls.__mro__ if "_fields" in vars(each))
            names = "".join(f"{field}, " for field in made._fields)
            scope = {"__name__": f"namedtuple_{made.__name__}", "_new": tuple.__new__}
            new = eval(f"lambda _cls, {names}: _new(_cls, ({names}))", scope)  # noqa: S307 - a class's own fields
            new.__name__, new.__qualname__ = "__new__", f"{made.__qualname__}.__new__"
            new.__defaults__ = tuple(made._field_defaults.values())
            made.__new__ = new
            return new(cls, *values, **named)

        @classmethod
        def _make(cls, values):
            row = tuple.__new__(cls, values)
            if len(row) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, not {len(row)}")
            return row

        def _replace(self, /, **named):
            row = self._make(map(named.pop, self._fields, self))
            if named:
                raise ValueError(f"{type(self).__name__} has no fields {sorted(named)}")
            return row

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({fields})"

        def __getnewargs__(self):
            return tuple(self)

    class _Making(type):
        """Makes of each class statement a tuple with that class's fields."""

        def __new__(cls, name, bases, namespace):
            if not bases:
                return type.__new__(cls, name, bases, namespace)
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = {field: namespace[field] for field in fields if field in namespace}
            if fields[len(fields) - len(defaults) :] != tuple(defaults):
                raise TypeError(f"{name}: fields without a default come first")
            for number, field in enumerate(fields):
                namespace[field] = _tuplegetter(number, f"field {number}")
            namespace |= {
                "__slots__": (),
                "__match_args__": fields,
                "_fields": fields,
                "_field_defaults": defaults,
            }
            return type(name, (_Row, *bases[1:]), namespace)

    class NamedTuple(metaclass=_Making):
        """See the module."""

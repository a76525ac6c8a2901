"""YAML, stricter: plain data only, no key twice, no aliases. Runs wherever a policy file is read."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import yaml

_QUOTES: Final = '; put what begins with * or [ in quotes, as in "*.example.org:443"'


class NotYaml(Exception):
    """Says what stands where."""


def load(text: str) -> object:
    """The plain data that ``text`` holds.

    Raises:
        NotYaml: it holds none.
        RecursionError: it is nested too deeply.
        ValueError: a date or number that YAML recognises and Python cannot hold.
    """
    try:
        # A loader derived from SafeLoader builds plain data only.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise NotYaml(f"{error.problem or error.context}{where}{_QUOTES}") from None
    except yaml.YAMLError as error:
        raise NotYaml(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader, stricter: a key given twice is refused, and so are aliases, whose expansion has no bound."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "write it out: aliases are not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # SafeLoader refuses it below, and says where
            if key in seen:
                problem = f"the key {key!r} is given twice; the second would hide the first"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

"""Reads a policy file into plain data; what it means is the model's business.

Runs in the driver, and in the target before it is confined. The one module of this package that reads a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml

from ray_guard.errors import PolicyError

_MOST_BYTES: Final = 1 << 20
_QUOTES: Final = '; put what begins with * or [ in quotes, as in "*.example.org:443"'
_SMALLEST: Final = 'the smallest policy is "version: 1", which lets nothing out'


def read_policy(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds.

    Raises:
        PolicyError: no such file, no file, unreadable, larger than 1 MiB, not UTF-8, not YAML or JSON, a key given
            twice, an anchor or alias, or not a mapping; its key is ``policy``, its value the path.
    """
    text = _text(path)
    shown = os.fspath(path)
    try:
        value = _parse(text)
    except _FaultError as fault:
        raise PolicyError("policy", shown, str(fault)) from None
    if value is None:
        raise PolicyError("policy", shown, f"the file is empty: {_SMALLEST}")
    if not isinstance(value, dict):
        raise PolicyError("policy", shown, f"it holds a {type(value).__name__}, not a mapping: {_SMALLEST}")
    return value


class _FaultError(Exception):
    """Carries the remedy out of the parsers; never leaves this module."""


def _text(path: str | os.PathLike[str]) -> str:
    shown = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise PolicyError("policy", shown, "there is no such file") from None
    except IsADirectoryError:
        raise PolicyError("policy", shown, "it is a folder; name the file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise PolicyError("policy", shown, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _MOST_BYTES:
        raise PolicyError("policy", shown, "it is larger than 1 MiB; a policy is a page of text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError("policy", shown, f"it is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _parse(text: str) -> object:
    # JSON first where it looks like JSON: YAML reads nearly all of it, but not tabs between its parts.
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            pass  # a YAML flow mapping, or broken: YAML's message says where
    try:
        # A loader derived from SafeLoader builds plain data only.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise _FaultError(f"it is neither YAML nor JSON: {error.problem or error.context}{where}{_QUOTES}") from None
    except yaml.YAMLError as error:
        raise _FaultError(f"it is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise _FaultError("it is nested too deeply") from None
    except ValueError as error:  # a date or number that YAML recognises and Python cannot hold
        raise _FaultError(f"it holds a value that cannot be read: {error}; put text in quotes") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise _FaultError(f"the key {key!r} is given twice; the second would hide the first")
        value[key] = item
    return value


def _no_constant(word: str) -> object:
    raise _FaultError(f"{word} is no limit: leave the key out for no limit")


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

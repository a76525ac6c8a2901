"""target: the content of tool calls as it is recorded, where that was asked for: bounded, and without secrets.

A copy is made of what will be seen, and no more: arguments may be a hundred megabytes, and their secrets lie in
structures, where the name of a field says that its value is one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from ray_guard.client.spans import TEXT_LIMIT, canonical, clean_text, type_name
from ray_guard.evidence.redact import MARGIN, REDACTED, is_secret_name, redact

_ITEMS = 256
_DEPTH = 16
_ENOUGH = 4 * TEXT_LIMIT
"""Characters copied of all texts together: of more nothing would be seen."""


class Content(NamedTuple):
    """``whole``: nothing was cut."""

    text: str
    whole: bool


def shown(value: object) -> Content:
    """What is recorded of a call's arguments or result: canonical JSON, a text as it is; at most 8192 characters.

    Raises whatever the value's own methods raise.
    """
    copy = _Copy()
    made = copy.of(value, 0, secret=False)
    text = made if isinstance(made, str) else canonical(made)
    return Content(clean_text(text), copy.whole and len(text) <= TEXT_LIMIT)


class _Copy:
    def __init__(self) -> None:
        self._room = _ENOUGH
        self.whole = True

    def of(self, value: object, depth: int, *, secret: bool) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return REDACTED if secret and value else self._text(str.__str__(value))
        if isinstance(value, (bytes, bytearray, memoryview)):
            return REDACTED if secret else {"$bytes": hashlib.sha256(value).hexdigest()}
        if isinstance(value, os.PathLike):
            return self._text(os.fsdecode(value))
        if isinstance(value, (Mapping, list, tuple)):
            if depth >= _DEPTH or self._room <= 0:
                self.whole = False
                return "…"
            return (
                self._mapping(value, depth, secret) if isinstance(value, Mapping) else self._list(value, depth, secret)
            )
        return {"$type": type_name(type(value))}

    def _text(self, text: str) -> str:
        kept = min(TEXT_LIMIT, max(self._room, 0))
        found = redact(text[: kept + MARGIN])
        if len(text) > kept + MARGIN or len(found) > kept:
            self.whole = False
            found = f"{found[:kept]}…"
        self._room -= len(found)
        return found

    def _mapping(self, value: Mapping[Any, Any], depth: int, secret: bool) -> dict[str, Any]:  # noqa: FBT001
        self.whole &= len(value) <= _ITEMS
        found = {}
        for key in islice(value, _ITEMS):
            name = self._text(str(key))
            found[name] = self.of(value[key], depth + 1, secret=secret or is_secret_name(name[:256]))
        return found

    def _list(self, value: list[Any] | tuple[Any, ...], depth: int, secret: bool) -> list[Any]:  # noqa: FBT001
        self.whole &= len(value) <= _ITEMS
        return [self.of(each, depth + 1, secret=secret) for each in islice(value, _ITEMS)]

"""YAML that is plain at first sight, read without PyYAML: loading that takes longer than starting a tool.

Runs wherever a policy file is read. Standard library only. Mappings and lists by indentation or in brackets, words,
whole numbers, sizes, text in simple quotes: what a policy is mostly written in. What is not certainly that is left to
:mod:`ray_guard.policy.strict_yaml`, which says what is wrong with it. That both read the same is a test's business.
"""

from __future__ import annotations

import re
from typing import Any, Final

_KEY: Final = r"( *)([a-z_]+):(?: +(.*))?\Z"
_ITEM: Final = r"( *)- +(.*)\Z"
#: what no rule of YAML 1.1 makes anything but text of: no number, time, truth, nothing, tag, anchor or comment
_WORD: Final = (
    r"[A-Za-z][A-Za-z0-9_./*-]*(?::[A-Za-z0-9_./*-]+)*"
    r"|[0-9]{1,9}(?:\.[0-9]{1,9})?[KMG]iB|[0-9.]{7,15}/[0-9]+:[0-9]+"  # 5MiB, 10.20.0.0/16:6379
)
_QUOTED: Final = r""""([ !#-\[\]-~]*)"|'([ -&(-~]*)'"""
_WHOLE: Final = r"0|[1-9][0-9]{0,15}"
#: of what stands in brackets
_PART: Final = r""" *([\[\]{},]|[a-z_]+:(?= )|"[^"]*"|'[^']*'|[^ \[\]{},"'#]+)"""
_MOST: Final = 1 << 14
_MEANS_MORE: Final = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
_TRUTH: Final = {"true": True, "false": False}


class _NotPlain(Exception):
    """Carries nothing: the other reader looks at it."""


def load(text: str) -> dict[str, Any] | None:
    """The mapping that ``text`` holds; None: it is not plain at first sight. Raises RecursionError."""
    if len(text) > _MOST:
        return None
    lines = [line.rstrip(" ") for line in text.split("\n")]
    lines = [line for line in lines if line and not line.lstrip(" ").startswith("#")]
    try:
        value, rest = _mapping(lines, 0)
    except _NotPlain:
        return None
    return None if rest or not value else value


def _mapping(lines: list[str], indent: int) -> tuple[dict[str, Any], list[str]]:
    read: dict[str, Any] = {}
    while lines and (match := re.match(_KEY, lines[0])) and len(match[1]) == indent:
        key, given, lines = match[2], match[3], lines[1:]
        if key in read or key in _MEANS_MORE:
            raise _NotPlain
        if given is not None:
            read[key] = _value(given)
        else:
            read[key], lines = _below(lines, indent)
    if lines and len(lines[0]) - len(lines[0].lstrip(" ")) >= indent:
        raise _NotPlain
    return read, lines


def _below(lines: list[str], indent: int) -> tuple[Any, list[str]]:
    """What stands below a key: a list, which may stand as far left as that, or a mapping further in."""
    if not lines:
        raise _NotPlain
    inner = len(lines[0]) - len(lines[0].lstrip(" "))
    if re.match(_ITEM, lines[0]) and inner >= indent:
        items = []
        while lines and (match := re.match(_ITEM, lines[0])) and len(match[1]) == inner:
            items.append(_scalar(match[2]))
            lines = lines[1:]
        return items, lines
    if inner <= indent:
        raise _NotPlain
    return _mapping(lines, inner)


def _value(given: str) -> Any:
    """What stands on one line."""
    if given[0] not in "[{":
        return _scalar(given)
    tokens = []
    at = 0
    while at < len(given):
        match = re.compile(_PART).match(given, at)
        if match is None:
            raise _NotPlain
        tokens.append(match[1])
        at = match.end()
    value = _bracketed(tokens)
    if tokens:
        raise _NotPlain
    return value


def _bracketed(tokens: list[str]) -> Any:
    """The value that ``tokens`` begin with, which are taken."""
    opening = _take(tokens)
    if opening not in ("[", "{"):
        return _scalar(opening)
    items: list[Any] = []
    read: dict[str, Any] = {}
    closing = "]" if opening == "[" else "}"
    while tokens[:1] != [closing]:
        if items or read:
            _take(tokens, ",")
        if opening == "[":
            items.append(_bracketed(tokens))
            continue
        key = _take(tokens)
        name = key.removesuffix(":")
        if name == key or not re.fullmatch("[a-z_]+", name) or name in read or name in _MEANS_MORE:
            raise _NotPlain
        read[name] = _bracketed(tokens)
    _take(tokens, closing)
    return items if opening == "[" else read


def _take(tokens: list[str], expected: str | None = None) -> str:
    if not tokens or expected not in (None, tokens[0]):
        raise _NotPlain
    return tokens.pop(0)


def _scalar(text: str) -> Any:
    quoted = re.fullmatch(_QUOTED, text)
    if quoted:
        return quoted[1] if quoted[1] is not None else quoted[2]
    if re.fullmatch(_WHOLE, text):
        return int(text)
    if text in _TRUTH:
        return _TRUTH[text]
    if text.lower() in _MEANS_MORE or not re.fullmatch(_WORD, text):
        raise _NotPlain
    return text

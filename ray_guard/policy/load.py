"""Reads a policy file into plain data; what it means is the model's business.

Runs in the driver, and in the target before it is confined. The one module of this package that reads a file.
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

from ray_guard.errors import PolicyError
from ray_guard.policy import plain_yaml

_MOST_BYTES: Final = 1 << 20
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
        with open(path, "rb") as file:
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
    plain = plain_yaml.read(text)
    if plain is not None:
        return plain
    from ray_guard.policy import strict_yaml  # the parser takes longer to load than the policy to read

    try:
        return strict_yaml.load(text)
    except strict_yaml.NotYaml as error:
        raise _FaultError(f"it is neither YAML nor JSON: {error}") from None
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

"""target: how others say where a call comes from, and how we say it to them.

Three ways, which all may be absent, empty or malformed; then they are ignored, and a malformed one is said to be:

* W3C ``traceparent``: in the environment, in a header, in a carrier that OpenTelemetry's ``inject`` filled;
* ROLL puts such a carrier under ``_otel_ctx`` into the ``meta_info`` of what it hands from worker to worker;
* ROCK passes the header ``eagleeye-traceid`` from client to admin to rocklet and writes it into each log line. It names
  no span, so it is an attribute: of all spans below, wherever they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from ray_guard.client.spans import say_once

OTEL_CONTEXT: Final = "_otel_ctx"
TRACEPARENT: Final = "traceparent"
EAGLEEYE: Final = "eagleeye-traceid"

_IDS = r"((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})"
_TRACEPARENT = re.compile(rf"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(?:-.*)?")  # later versions may have more to say
_EAGLEEYE = re.compile(r"[!-~]{1,128}")
_KEYS_LIMIT = 512

Place = tuple[str, str, bool]
"""Trace, span and sampled flag of somebody else's span."""


class Origin(NamedTuple):
    """Where a call comes from, as far as others say; both may be unknown."""

    place: Place | None = None
    eagleeye: str | None = None


NOWHERE: Final = Origin()


def parse_traceparent(text: str | None) -> Place | None:
    """The span that a W3C ``traceparent`` names; None for none and for what is no such text."""
    found = _TRACEPARENT.fullmatch(text.strip()) if text else None
    if found is None:
        return None
    trace, span, flags = [each for each in found.groups() if each is not None]
    return trace, span, bool(int(flags, 16) & 1)


def named(text: str | None, where: str) -> Place | None:
    """:func:`parse_traceparent`; one that is malformed is said to be, once for each `where`."""
    place = parse_traceparent(text)
    if place is None and text and text.strip():
        say_once(
            f"traceparent {where}",
            f"ray_guard: {where} {text[:100]!r} names no span and is ignored: W3C trace context is "
            "00-<32 hex digits>-<16 hex digits>-<2 hex digits>, lower case, ids not all zero",
        )
    return place


def read(given: object) -> Origin | None:
    """What `given` says of where a call comes from; None: it is nothing that says so.

    Args:
        given: headers, a carrier, ROLL's ``meta_info``, or what has one (a ``DataProto``).
    """
    if isinstance(given, Origin):
        return given
    if not isinstance(given, Mapping):
        given = getattr(given, "meta_info", None)
        if not isinstance(given, Mapping) or OTEL_CONTEXT not in given:
            return None
    where = "header traceparent"
    if OTEL_CONTEXT in given:
        given, where = given[OTEL_CONTEXT], f"{OTEL_CONTEXT}: traceparent"
        if not isinstance(given, Mapping):
            return NOWHERE
    elif "trace" in given:
        return None  # ours
    traceparent, eagleeye = _header(given, TRACEPARENT), _header(given, EAGLEEYE)
    if traceparent is None and eagleeye is None and where != f"{OTEL_CONTEXT}: traceparent":
        return None
    return Origin(named(traceparent, where), eagleeye_id(eagleeye))


def find(arguments: Iterable[object]) -> Origin | None:
    """The first of a call's arguments that carries ROLL's ``_otel_ctx``; looks no deeper than its ``meta_info``."""
    for each in arguments:
        if type(each) is dict:
            if OTEL_CONTEXT in each:
                return read(each)
        elif isinstance(meta := _fields(each).get("meta_info"), dict) and OTEL_CONTEXT in meta:
            return read(meta)
    return None


def _fields(value: object) -> Mapping[str, Any]:
    """The instance dictionary, without running any code of the value's; empty where there is none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def _header(given: Mapping[Any, Any], name: str) -> str | None:
    value = given.get(name)
    if value is None and len(given) <= _KEYS_LIMIT:
        value = next((given[key] for key in given if isinstance(key, str) and key.lower() == name), None)
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return value if isinstance(value, str) else None


def eagleeye_id(text: str | None) -> str | None:
    """An EagleEye id as it may stand in an attribute and a header; None for none and for what is none."""
    if not text or not (text := text.strip()):
        return None
    if _EAGLEEYE.fullmatch(text):
        return text
    say_once(EAGLEEYE, f"ray_guard: {EAGLEEYE} {text[:100]!r} is ignored: at most 128 visible ASCII characters")
    return None


# --- what a library knows of the request it serves ----------------------------------------------------------------

_followed: list[ContextVar[str]] = []

told: ContextVar[str | None] = ContextVar("ray_guard_eagleeye", default=None)
"""The EagleEye id of a place outside of any scope."""


def follow(variable: ContextVar[str]) -> None:
    """From here on an outermost scope takes its EagleEye id from `variable`, where nothing nearer names one."""
    if variable not in _followed:
        _followed.append(variable)


def around() -> str | None:
    """The EagleEye id of the request that is being served, outside of any scope."""
    found = told.get()
    if found is None:
        for variable in _followed:
            found = eagleeye_id(variable.get(None))
            if found is not None:
                break
    return found

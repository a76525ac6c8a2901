"""What each value of a policy may be: sizes, counts, times, ports, places. Every complaint names its remedy.

Runs in the driver, and in the target before it is confined. Standard library only. The key is not known here: an error
carries an empty one, filled in further out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from ray_guard.errors import PolicyError
from ray_guard.policy.destination import parse_endpoint, parse_ports, parse_rule

_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE: Final = r"([0-9]+(?:\.[0-9]+)?)[ ]?([A-Za-z]*)\Z"
_NUMBER: Final = r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\Z"
_MOST_BYTES: Final = 1 << 60
_MOST_COUNT: Final = 1 << 53
_MOST_SECONDS: Final = 1e12
_MOST_FLOPS: Final = 1e36
_LONGEST_NUMBER: Final = 40


def parse_size(value: object) -> int:
    """A number of bytes: ``5MiB``, ``0.5 GiB``, ``1048576``. Raises PolicyError for what is none."""
    size = value
    if isinstance(value, str):
        match = re.match(_SIZE, value) if len(value) <= _LONGEST_NUMBER else None
        if match is None:
            raise _problem(value, "a size is a number of bytes, plain or with KiB, MiB or GiB: 5MiB")
        number, unit = match.groups()
        if unit and unit not in _UNITS:
            raise _problem(value, f"the units are KiB, MiB and GiB: write {number}{_nearest_unit(unit)}")
        size = float(number) * _UNITS.get(unit, 1) if "." in number else int(number) * _UNITS.get(unit, 1)
    number_of_bytes = _whole(value, size, "bytes")
    if number_of_bytes > _MOST_BYTES:
        raise _problem(value, "more than any network or memory holds: leave the key out for no limit")
    return number_of_bytes


def parse_count(value: object) -> int:
    """A whole number: connections, processes, tokens. Raises PolicyError."""
    number = _whole(value, _from_text(value), "things")
    if number > _MOST_COUNT:
        raise _problem(value, "too large to be counted exactly: leave the key out for no limit")
    return number


def parse_seconds(value: object) -> float:
    """A number of seconds. Raises PolicyError."""
    if isinstance(value, str) and not re.match(_NUMBER, value):
        raise _problem(value, "a plain number of seconds: write 600 for ten minutes")
    return _real(value, _MOST_SECONDS, "a number of seconds")


def parse_flops(value: object) -> float:
    """A number of floating-point operations, such as 1e18. Raises PolicyError."""
    return _real(value, _MOST_FLOPS, "a number of floating-point operations, such as 1e18")


def _problem(value: object, remedy: str) -> PolicyError:
    return PolicyError("", value, remedy)  # the key is filled in where it is known


def _from_text(value: object) -> object:
    # YAML 1.1 reads 1e18, which has no dot, as text; so numbers may be text.
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and re.match(_NUMBER, value):
        return int(value) if value.isdigit() else float(value)
    return value


def _whole(value: object, number: object, what: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _problem(value, f"a whole number of {what}")
    if number < 0:
        raise _problem(value, "a limit is not negative; 0 grants nothing, and no key at all is no limit")
    if isinstance(number, float) and not math.isfinite(number):
        raise _problem(value, "no number that can be reached: leave the key out for no limit")
    if number != int(number):
        raise _problem(value, f"a whole number of {what}")
    return int(number)


def _real(value: object, most: float, what: str) -> float:
    number = _from_text(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _problem(value, what)
    if number < 0:
        raise _problem(value, "a limit is not negative; 0 grants nothing, and no key at all is no limit")
    if not number <= most:
        raise _problem(value, "no number that can be reached: leave the key out for no limit")
    return number


def _nearest_unit(unit: str) -> str:
    return {"k": "KiB", "m": "MiB"}.get(unit[0].lower(), "GiB")


def destination(value: object) -> object:
    """An entry of ``egress.allow``. Raises PolicyError."""
    parse_rule(value, key="")  # where it stands is known further out
    return value


def port(value: object) -> object:
    """A port or a range as text, however it was given. Raises PolicyError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    try:
        if isinstance(value, str):
            return str(parse_ports(value))
    except ValueError:
        pass
    raise _problem(value, 'a port from 1 to 65535, or a range in quotes, "6000-6010"; port 0 is free to send from')


def proxy(value: object) -> object:
    """``egress.proxy``. Raises PolicyError."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith("http://"):
        raise _problem(value, "a proxy is http://host:port")
    try:
        parse_endpoint(value.removeprefix("http://"))
    except ValueError as error:
        raise _problem(value, f"a proxy is http://host:port: {error}") from None
    return value


def endpoint(value: object) -> object:
    """``model_endpoint``. Raises PolicyError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise _problem(value, "the engine's server as host:port")
    if "/" in value:
        raise _problem(
            value, "the engine's server as host:port: no http:// before it (TLS is not spoken), no path behind"
        )
    try:
        parse_endpoint(value)
    except ValueError as error:
        raise _problem(value, f"the engine's server as host:port: {error}") from None
    return value


def version(value: object) -> object:
    """The format's version. Raises PolicyError."""
    if isinstance(value, bool) or value != 1:
        raise _problem(value, "this release reads version 1")
    return 1


def place(value: object, words: tuple[str, ...]) -> object:
    """One of ``words``, or an absolute path, or one below the home folder. Raises PolicyError."""
    if not isinstance(value, str) or "\0" in value:
        raise _problem(value, "a path is text")
    if value in words or value == "~" or value.startswith(("/", "~/")):
        return value
    named = f"one of {', '.join(words)}, or " if words else ""
    raise _problem(value, f"{named}an absolute path, or one that begins with ~/{meant(value, words)}")


def meant(word: object, words: Iterable[str]) -> str:
    """`` (did you mean …?)`` where one of ``words`` is close."""
    import difflib  # only for complaints

    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""

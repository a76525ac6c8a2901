"""Times as logs write them, as intervals. Runs later, on any machine. Pure.

A time stands for all instants that would have been written the same way: ``03:40:11`` is the whole second. What a log
does not say (year, zone) is not guessed here; :class:`~ray_guard.attribution.observation.Time` marks it.
"""

from __future__ import annotations

import calendar
import re
from functools import lru_cache
from typing import Final

from ray_guard.attribution.observation import Semantics, Time

SECOND: Final = 1_000_000_000
_EARLIEST: Final = 946_684_800  # 2000-01-01: no log of a container is older
_LATEST: Final = 4_102_444_800  # 2100-01-01
_FIRST: Final = _EARLIEST * SECOND
_END: Final = _LATEST * SECOND

_CIVIL: Final = re.compile(r"(\d{4})[-/](\d\d)[-/](\d\d)[T t](\d\d):(\d\d):(\d\d)")
_CIVIL_LENGTH: Final = 19
_FRACTION_AND_ZONE: Final = re.compile(r"(?:[.,](\d{1,9})\d*)?\s*(\S*)")
_ZONE: Final = re.compile(r"Z|z|UTC|[+-]\d\d:?(?:\d\d)?|")
_SYSLOG: Final = re.compile(r"([A-Z][a-z]{2} {1,2}\d{1,2} \d\d:\d\d:\d\d)(?:\.(\d{1,9}))?")
_SYSLOG_CIVIL: Final = re.compile(r"([A-Z][a-z]{2}) {1,2}(\d{1,2}) (\d\d):(\d\d):(\d\d)")
_CTIME: Final = re.compile(
    r"(?:[A-Z][a-z]{2} +)?(?P<month>[A-Z][a-z]{2}) +(?P<day>\d{1,2}) (?:(?P<year>\d{4}) )?"
    r"(?P<clock>\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?(year)| (?P<last>\d{4}))(?!\d)"
)
_MONTH_FIRST: Final = re.compile(r"(\d\d)/(\d\d)(?:/(\d\d|\d{4}))?-(\d\d:\d\d:\d\d(?:\.\d{1,9})?)")
_MONTHS: Final = {name: number for number, name in enumerate(calendar.month_abbr) if name}
_EPOCH: Final = re.compile(r"([+-]?\d{1,20})(?:\.(\d+))?")
_UNITS: Final = tuple((_FIRST // width, _END // width, width) for width in (SECOND, 1_000_000, 1_000, 1))
"""The first number that is possible, the first that is too late, and nanoseconds, of each unit."""


class BadTime(ValueError):
    """A text or number that is no time."""


def iso(text: object, semantics: Semantics) -> Time:
    """RFC 3339 and its relatives: ``2026-03-07T03:40:11.123456+0000``, ``2026/03/07 03:40:11`` (no zone).

    Raises:
        BadTime: it is none.
    """
    written = text.strip() if isinstance(text, str) else ""
    rest = _FRACTION_AND_ZONE.fullmatch(written, _CIVIL_LENGTH)
    fraction, zone = rest.groups() if rest is not None else (None, "none")
    # Lines come many in a second: all but the fraction has mostly been met before.
    start = _civil(written[:_CIVIL_LENGTH], zone)
    if start is None:
        raise BadTime(f"{text!r:.60} is no date and time")
    width = SECOND
    if fraction:
        width = 10 ** (9 - len(fraction))
        start += int(fraction) * width
    if not _FIRST <= start < _END:
        raise BadTime(f"{text!r:.60} is no time between 2000 and 2100")
    return Time(start, start + width, semantics, zone != "")


@lru_cache(maxsize=4096)
def _civil(date: str, zone: str) -> int | None:
    """Unix nanoseconds of a date with its time of day; None for what is none. Raises BadTime for impossible ones."""
    match = _CIVIL.fullmatch(date)
    if match is None or not _ZONE.fullmatch(zone):
        return None
    year, month, day, hour, minute, second = map(int, match.groups())
    return (_seconds((year, month, day), (hour, minute, second)) - _offset(zone)) * SECOND


def syslog(text: str, semantics: Semantics) -> tuple[Time, str]:
    """``Mar  7 03:40:11`` at the begin of a line: no year, no zone. Returns the rest of the line too.

    Raises:
        BadTime: the line begins with something else.
    """
    match = _SYSLOG.match(text)
    start = _syslog_civil(match[1]) if match is not None else None
    if match is None or start is None:
        raise BadTime(f"{text!r:.40} does not begin with a syslog time")
    width = SECOND
    if fraction := match[2]:
        width = 10 ** (9 - len(fraction))
        start += int(fraction) * width
    return Time(start, start + width, semantics, zoned=False, dated=False), text[match.end() :].lstrip()


@lru_cache(maxsize=4096)
def _syslog_civil(date: str) -> int | None:
    match = _SYSLOG_CIVIL.fullmatch(date)
    if match is None or match[1] not in _MONTHS:
        return None
    month, day, hour, minute, second = _MONTHS[match[1]], *map(int, match.groups()[1:])
    # 1972 has a 29 February; every other day is the same in 1970.
    year = 1972 if (month, day) == (2, 29) else 1970
    return _seconds((year, month, day), (hour, minute, second)) * SECOND


def month_first(text: str, semantics: Semantics) -> Time:
    """``03/07/2026-03:40:11.123456``, as Suricata's text has it; Snort leaves the year out: no zone.

    Raises:
        BadTime: it is none.
    """
    match = _MONTH_FIRST.fullmatch(text)
    if match is None:
        raise BadTime(f"{text!r:.40} is no date with the month first")
    month, day, year, clock = match.groups()
    if year is None:
        return syslog(f"{calendar.month_abbr[int(month) % 13]} {day} {clock}", semantics)[0]
    return iso(f"{year if len(year) == 4 else f'20{year}'}-{month}-{day} {clock}", semantics)


def ctime(text: str, semantics: Semantics) -> tuple[Time, str]:
    """``Sat Mar  7 03:40:11 2026`` at the begin of a line, or ``Mar  7 2026 03:40:11``: no zone. The rest of it too.

    Raises:
        BadTime: the line begins with something else.
    """
    match = _CTIME.match(text)
    month = _MONTHS.get(match["month"]) if match is not None else None
    if match is None or month is None:
        raise BadTime(f"{text!r:.40} does not begin with a date and a year")
    year, clock = match["year"] or match["last"], match["clock"]
    return iso(f"{year}-{month:02}-{int(match['day']):02} {clock}", semantics), text[match.end() :].lstrip()


def epoch_ns(value: object) -> tuple[int, int]:
    """An epoch in seconds, milliseconds, microseconds or nanoseconds, by its size: (start, width), nanoseconds.

    Raises:
        BadTime: it is no number, or no instant between 2000 and 2100 in any of these units.
    """
    if isinstance(value, float):
        text = f"{value:.9f}".rstrip("0").rstrip(".")
    else:
        text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    match = _EPOCH.fullmatch(text)
    if match is None:
        raise BadTime(f"{value!r:.60} is no epoch")
    whole, fraction = match.groups()
    number = int(whole)
    for earliest, latest, width in _UNITS:
        if earliest <= number < latest:
            start = number * width
            if fraction and (digits := min(len(fraction), len(str(width)) - 1)):
                width //= 10**digits  # noqa: PLW2901 - the width of what was written, from here on
                start += int(fraction[:digits]) * width
            # A double holds 2026 in seconds to about a quarter of a microsecond: its digits are not all true.
            return start, max(width, 1_000) if isinstance(value, float) else width
    raise BadTime(f"{value!r:.60} is no time between 2000 and 2100 in s, ms, µs or ns")


def epoch(value: object, semantics: Semantics) -> Time:
    """:func:`epoch_ns` as an interval."""
    start, width = epoch_ns(value)
    return Time(start, start + width, semantics)


def between(first: object, last: object, semantics: Semantics) -> Time:
    """An interval between two epochs, both included. The wrong way round, it is turned.

    Raises:
        BadTime: one of them is no time.
    """
    start, _ = epoch_ns(first)
    end, width = epoch_ns(last)
    if end < start:
        start, end = end, start
    return Time(start, end + width, semantics)


def lasting(begin: Time, seconds: object, semantics: Semantics = Semantics.FLOW) -> Time:
    """``begin`` and all of the following ``seconds``; as it is where they are no number."""
    try:
        length = int(float(seconds) * SECOND)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return begin
    end = begin.end_ns + length
    return begin._replace(end_ns=end, semantics=semantics) if length >= 0 and end < _LATEST * SECOND else begin


def ending(end: Time, seconds: int) -> Time:
    """``end`` and the ``seconds`` before it; as it is where they lead out of what a log can be of."""
    begin = end.start_ns - seconds * SECOND
    possible = 0 < seconds < _LATEST and (begin >= _EARLIEST * SECOND or not end.dated)
    return end._replace(start_ns=begin, semantics=Semantics.FLOW) if possible else end


@lru_cache(maxsize=4096)
def _day(year: int, month: int, day: int) -> int:
    if not 1 <= month <= 12 or not 1 <= day <= calendar.monthrange(year, month)[1]:
        raise BadTime(f"{year:04}-{month:02}-{day:02} is no day")
    return calendar.timegm((year, month, day, 0, 0, 0))


def _seconds(date: tuple[int, int, int], clock: tuple[int, int, int]) -> int:
    hour, minute, second = clock
    if hour > 23 or minute > 59 or second > 60 or date[0] < 1:
        raise BadTime(f"{hour:02}:{minute:02}:{second:02} is no time of day")
    return _day(*date) + hour * 3600 + minute * 60 + second


def _offset(zone: str) -> int:
    """Seconds east of UTC; of no zone too."""
    if zone in ("", "Z", "z", "UTC"):
        return 0
    digits = zone[1:].replace(":", "")
    hours, minutes = int(digits[:2]), int(digits[2:] or 0)
    if hours > 15 or minutes > 59:
        raise BadTime(f"{zone} is no time zone")
    return (-1 if zone[0] == "-" else 1) * (hours * 3600 + minutes * 60)

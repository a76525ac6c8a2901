"""Values as people read them, and strings that cannot play tricks on the screen that shows them.

Runs later, on any machine. Pure.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from ray_guard.report.summary import Destination

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def printable(text: str) -> str:
    r"""The text with everything a terminal would obey, or that would hide, written out (``\x1b``, ``\u202e``).

    Names, arguments and reasons come from tools; a report must show them, not run them.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def counted(counts: Mapping[str, int]) -> str:
    """``2 invalid, 1 torn``: by name; empty where there is nothing."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def width(text: str) -> int:
    """Columns a printable text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def cut(text: str, columns: int) -> str:
    """The text in at most ``columns`` columns, with an ellipsis for what is missing."""
    if width(text) <= columns:
        return text
    kept, used = "", 0
    for char in text:
        used += width(char)
        if used > columns - 1:
            break
        kept += char
    return kept + "…" if columns > 0 else ""


def size(count: float) -> str:
    """Bytes: ``0 B``, ``999 B``, ``1.2 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.95 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def number(count: float) -> str:
    """Counts with commas up to a million, then ``1.2 M``; FLOPs reach E."""
    value = float(count)
    if abs(value) < 1e6:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.95 or unit == "E":
            break
        value /= 1000
    return f"{value:.1f} {unit}"


def seconds(value: float) -> str:
    if value < 0:
        return f"-{seconds(-value)}"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def amount(kind: str, value: float | None) -> str:
    """A violation's limit or value in the unit its kind has."""
    if value is None:
        return ""
    if "bytes" in kind or "memory" in kind:
        return size(value)
    return seconds(value) if kind.endswith("seconds") else number(value)


def moment(time_ns: int) -> datetime:
    """A Unix time in nanoseconds as UTC, to the microsecond; beyond year 9999 the last moment there is."""
    try:
        return _EPOCH + timedelta(microseconds=time_ns // 1000)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def clock(time_ns: int) -> str:
    """``05:35:47.123``, UTC."""
    return moment(time_ns).strftime("%H:%M:%S.%f")[:-3]


def date(time_ns: int) -> str:
    """``2026-11-22 05:35:47``, UTC."""
    return f"{moment(time_ns):%Y-%m-%d %H:%M:%S}"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def endpoint(address: str, port: int | None) -> str:
    host = f"[{address}]" if ":" in address else address
    return host if port is None else f"{host}:{port}"


def destination(where: Destination) -> str:
    """``files.example.org:443``, ``192.0.2.7:22``, ``udp://192.0.2.7:123``, ``unix:///run/x.sock``."""
    text = endpoint(where.name or where.address, where.port) or "unknown"
    if where.transport == "unix":
        return f"unix://{text}"
    return text if where.transport in ("tcp", "") else f"{where.transport}://{text}"


def destinations(found: Iterable[Destination]) -> str:
    """One destination, or what a sweep over many has in common: ``254 addresses 10.0.0.1 … 10.0.0.254, port 22``."""
    every = sorted(set(found), key=_order)
    if len(every) <= 2:
        return ", ".join(destination(item) for item in every)
    hosts = list(dict.fromkeys(item.name or item.address for item in every))
    ports = sorted({item.port for item in every if item.port is not None})
    transports = {item.transport for item in every}
    scheme = "" if transports <= {"tcp", ""} else f"{'/'.join(sorted(transports))} "
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} addresses {hosts[0]} … {hosts[-1]}"
    which = (
        "" if not ports else f"port {ports[0]}" if len(ports) == 1 else f"{len(ports)} ports {ports[0]} … {ports[-1]}"
    )
    return f"{scheme}{where}{', ' if which else ''}{which}"


def _order(item: Destination) -> tuple[int, int, str, int, str]:
    try:
        address = ip_address(item.address)
        return address.version, int(address), item.name, item.port or 0, item.transport
    except ValueError:
        return 0, 0, item.name or item.address, item.port or 0, item.transport

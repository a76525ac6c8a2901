"""Values as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.report import text
from ray_guard.report.summary import Destination


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_size(count: int, said: str) -> None:
    assert text.size(count) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (12345, "12,345"), (0.5, "0.50"), (2.5e12, "2.5 T"), (1e18, "1.0 E"), (1e21, "1000.0 E")],
)
def test_number(value: float, said: str) -> None:
    assert text.number(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 ms"),
        (0.5, "500 ms"),
        (0.9999, "1.0 s"),
        (99.96, "1m 40s"),
        (3599.7, "1h 00m"),
        (7260, "2h 01m"),
        (-1, "-1.0 s"),
    ],
)
def test_seconds(value: float, said: str) -> None:
    assert text.seconds(value) == said


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("egress_bytes", 5 * 2**20, "5.0 MiB"),
        ("memory", 1024, "1.0 KiB"),
        ("wall_seconds", 120, "2m 00s"),
        ("tokens", 200000, "200,000"),
        ("egress_bytes", None, ""),
    ],
)
def test_amount(kind: str, value: float | None, said: str) -> None:
    assert text.amount(kind, value) == said


def test_times_beyond_the_calendar() -> None:
    assert text.date(2**64 - 1).startswith("2554-")
    assert text.clock(999_999_999) == "00:00:00.999"


@given(st.text())
def test_printable_is_printable_and_leaves_the_rest_alone(value: str) -> None:
    shown = text.printable(value)
    assert shown.isprintable()
    if value.isprintable():
        assert shown == value


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M"])), st.integers(0, 30))
def test_cut_fits(value: str, columns: int) -> None:
    assert text.width(text.cut(value, columns)) <= columns


def where(address: str, port: int | None = 22, name: str = "", transport: str = "tcp") -> Destination:
    return Destination(transport, name, address, port)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([where("192.0.2.1")], "192.0.2.1:22"),
        ([where("2001:db8::1")], "[2001:db8::1]:22"),
        ([where("192.0.2.1", name="x.example.org")], "x.example.org:22"),
        ([where("192.0.2.1", transport="udp")], "udp://192.0.2.1:22"),
        ([where("/run/x.sock", None, transport="unix")], "unix:///run/x.sock"),
        ([where("", None)], "unknown"),
        ([where("192.0.2.10"), where("192.0.2.9")], "192.0.2.9:22, 192.0.2.10:22"),
        ([where(f"192.0.2.{n}") for n in (10, 9, 1)], "3 addresses 192.0.2.1 … 192.0.2.10, port 22"),
        ([where("192.0.2.1", n) for n in (1, 80, 443)], "192.0.2.1, 3 ports 1 … 443"),
        ([where("192.0.2.1", n, transport="udp") for n in (1, 2, 3)], "udp 192.0.2.1, 3 ports 1 … 3"),
    ],
)
def test_destinations(found: list[Destination], said: str) -> None:
    assert text.destinations(found) == said

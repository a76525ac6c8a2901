"""No line, however damaged, ends the reading of a log, is lost without a count, or gets a time that cannot be stored.

The seeds are lines of every format and layout (``lines/every_format.log``); what is done to them is what disks,
networks and attackers do: bits flip, lines are cut and joined, keys come twice, values are of another type, huge, deep.
"""

from __future__ import annotations

import bisect
import copy
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_guard.attribution import nat, store
from ray_guard.attribution.intake import Intake, Options
from ray_guard.attribution.observation import Semantics
from ray_guard.attribution.sources import FORMATS
from ray_guard.attribution.sources.reader import FileReport, Record, read
from ray_guard.attribution.times import iso

SEEDS = [line.encode() for line in (Path(__file__).parent / "lines" / "every_format.log").read_text().splitlines()]
OBJECTS = [json.loads(line) for line in SEEDS if line.startswith(b"{")]
FIRST = iso("2000-01-01T00:00:00Z", Semantics.PACKET).start_ns
LAST = iso("2099-12-31T23:59:59Z", Semantics.PACKET).end_ns

quick = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

garbage = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1 << 31, 1 << 63, -(1 << 63) - 1, 10**30, 1e308, -0.0, float("nan"), float("inf")]),
    st.sampled_from(["", "-", "0", "9" * 5000, "1e999", "\ud800", "\0", "::ffff:10.0.0.5", "999.1.1.1", "9999-99-99"]),
    st.sampled_from(["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999-1500", "9" * 20, "Feb 30 2026"]),
    st.sampled_from([[], {}, [[]], [{}], {"": None}, [None, 7], {"a": {"b": {"c": [1, "x"]}}}]),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)


def paths(value: Any, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in items for each in ((*here, key), *paths(inner, (*here, key)))]


PATHS = [(number, path) for number, parsed in enumerate(OBJECTS) for path in paths(parsed)]


@st.composite
def mistyped(draw: st.DrawFn) -> bytes:
    """A JSON line with garbage at one to three of its paths."""
    number, path = draw(st.sampled_from(PATHS))
    parsed = json.loads(json.dumps(OBJECTS[number]))
    for each in [path, *draw(st.lists(st.sampled_from(paths(parsed)), max_size=2))]:
        inner = parsed
        try:
            for key in each[:-1]:
                inner = inner[key]
            inner[each[-1]] = copy.deepcopy(draw(garbage))
        except (KeyError, IndexError, TypeError):
            continue  # what was here is garbage already
    return json.dumps(parsed).encode()


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes] = SEEDS) -> bytes:
    """A line with bits flipped, cut, doubled, joined with another, with numbers blown up or keys that come twice."""
    line = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        if not line:
            break
        at = draw(st.integers(0, len(line) - 1))
        match draw(st.sampled_from(["flip", "cut", "head", "insert", "double", "join", "grow", "twice"])):
            case "flip":
                line[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del line[at:]
            case "head":
                del line[:at]
            case "insert":
                line[at:at] = draw(st.binary(max_size=8))
            case "double":
                line[at:at] = line[at : at + draw(st.integers(1, 40))]
            case "join":
                line += draw(st.sampled_from(seeds))
            case "grow":
                line = bytearray(bytes(line).replace(b"1", draw(st.sampled_from([b"9" * 30, b"-1", b"1e9", b"0x"])), 3))
            case "twice":
                line = bytearray(bytes(line).replace(b"{", b'{"timestamp": [], "start": {}, "time": 7, ', 1))
    return bytes(line)


def checked(content: bytes, forced: str | None = None) -> tuple[list[Record], FileReport]:
    """Reads bytes as a file, and asserts what holds of whatever they are."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        report = FileReport(file.name)
        found = list(read(Path(file.name), report, forced))
    assert [each.record for each in found] == list(range(len(found)))
    assert sum(report.records.values()) == len(found)
    assert len(report.sha256) == 64
    for record in found:
        time = record.seen.time
        assert time.start_ns < time.end_ns
        if time.dated:
            assert time.start_ns >= FIRST - 86_400 * 10**9
            assert time.end_ns <= LAST + 86_400 * 10**9
        for side in (record.seen.src, record.seen.dst, record.seen.translated_src, record.seen.translated_dst):
            assert side.port is None or 0 <= side.port <= 65535
    return found, report


@pytest.fixture(scope="module")
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    """One store for all examples: to make one takes longer than to fill it."""
    connection = store.connect()
    yield connection
    connection.close()


def stored(db: duckdb.DuckDBPyConnection, found: list[Record]) -> None:
    """That the store takes them."""
    logs = Intake()
    assert list(logs.take(found, FileReport("log"), Options(), (0, 0)))[-1] == len(found)
    store.add_alerts(db, logs.batches)
    store.add_nat(db, logs.mappings)
    assert [logs.lines[number] for number in range(len(found))] == [each.raw for each in found]


def test_the_seeds_are_read_by_every_format() -> None:
    found, report = checked(b"\n".join(SEEDS))
    assert not report.quarantined, report.first
    assert {each.format for each in found} == set(FORMATS)


@quick
@given(st.lists(st.one_of(damaged(), mistyped(), st.sampled_from(SEEDS)), min_size=1, max_size=8))
def test_every_line_is_a_record_or_counted(lines: list[bytes]) -> None:
    # Within a file of others a broken line is a line: an array or a document it does not begin.
    content = b"\n".join([b"first", *lines])
    found, report = checked(content)
    begins = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
    assert report.first[0].line == 1
    rejected = {(each.line, each.byte_offset) for each in report.first}
    for record in found:
        # Where several share a line or a document, each has its own part of it.
        assert record.raw in content[record.byte_offset : record.byte_offset + len(record.raw) + 200]
        assert (bisect.bisect(begins, record.byte_offset), record.byte_offset) not in rejected
    for each in report.first:
        assert bisect.bisect(begins, each.byte_offset) == each.line
        assert each.reason in ("malformed", "time", "fields", "unknown", "binary", "huge")


TOLD = [seed for seed in SEEDS if not seed.startswith((b"#", b"version ")) and b"NODATA" not in seed]
"""Lines that are records; no header, and none that says that there was nothing."""


@quick
@given(
    damaged(TOLD)
    .map(lambda line: line.replace(b"\n", b"").replace(b"\r", b""))
    .filter(lambda line: line.strip(b" \0[]{},\x1e\xef\xbb\xbf"))
)
def test_no_damaged_line_vanishes(line: bytes) -> None:
    found, report = checked(b"first\n" + line + b"\nlast")
    assert len(found) + report.quarantined.total() >= 3, report.first


@quick
@given(st.lists(mistyped(), min_size=1, max_size=20))
def test_what_was_read_can_be_stored(db: duckdb.DuckDBPyConnection, lines: list[bytes]) -> None:
    found, _ = checked(b"first\n" + b"\n".join(lines))
    stored(db, found)


@quick
@given(st.binary(max_size=300), st.sampled_from([None, *FORMATS]))
def test_arbitrary_bytes(content: bytes, forced: str | None) -> None:
    checked(content, forced)


@quick
@given(st.one_of(damaged(), mistyped()), st.sampled_from(list(FORMATS)))
def test_a_forced_format_meets_every_other(line: bytes, forced: str) -> None:
    checked(line, forced)


@quick
@given(
    st.lists(mistyped(), min_size=1, max_size=4), st.sampled_from([b"[%s]", b"[%s", b"[\n%s\n]", b'{"records": [%s]}'])
)
def test_documents(db: duckdb.DuckDBPyConnection, lines: list[bytes], around: bytes) -> None:
    stored(db, checked(around % b",\n".join(lines))[0])


@quick
@given(st.sampled_from([gzip.compress, zstandard.compress]), st.integers(0, 10_000), st.integers(0, 7))
def test_packed_files_that_are_damaged(pack: Any, at: int, bit: int) -> None:
    packed = bytearray(pack(b"\n".join(SEEDS)))
    packed[at % len(packed)] ^= 1 << bit
    checked(bytes(packed))


@pytest.mark.timeout(40)  # what is quadratic takes minutes
@pytest.mark.parametrize("filler", [b"x", b"a1:", b"0", b" ", b'"', b"=", b"|", b",", b"k=", b"SRC=", b"{", b"\\"])
def test_a_long_line_takes_no_longer_than_it_is(filler: bytes) -> None:
    run = filler * (100_000 // len(filler))
    lines = [line[: len(line) // 2] + run + line[len(line) // 2 :] for line in SEEDS]
    lines += [run + line for line in SEEDS[::4]]
    checked(b"first\n" + b"\n".join(lines))


@pytest.mark.parametrize("kind", ["conntrack", "csv", "fortigate", "panos"])
def test_damaged_nat_maps(tmp_path: Path, db: duckdb.DuckDBPyConnection, kind: str) -> None:
    seeds = {
        "conntrack": "[1772854811.123456] [NEW] tcp 6 120 SYN_SENT src=10.0.0.5 dst=198.51.100.7 sport=44318 dport=22 "
        "src=198.51.100.7 dst=203.0.113.9 sport=22 dport=61000",
        "csv": "1772854811,1772854869,10.0.0.5,44318,203.0.113.9,61000,tcp",
        "fortigate": next(line.decode() for line in SEEDS if b"transip" in line),
        "panos": next(line.decode() for line in SEEDS if b"TRAFFIC,end" in line),
    }
    path = tmp_path / "map"

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        line = seeds[kind]
        at = data.draw(st.integers(0, len(line) - 1))
        with_ = data.draw(st.sampled_from(["", "\0", '"', "9" * 25, "[", "\r", "x" * 200_000]))
        path.write_text(f"{line}\n{line[:at]}{with_}{line[at:]}\n", newline="")
        report = FileReport(str(path))
        store.add_nat(db, [(0, each) for each in nat.load(path, report)])
        assert sum(report.records.values()) >= 1

    damage()

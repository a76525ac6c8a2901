"""What was sent to a supervisor that was killed before it read it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_guard.client.spans import close_message, open_message
from ray_guard.evidence.journal import Journal
from ray_guard.evidence.layout import SEAL_SUFFIX, VOUCHED_SUFFIX
from ray_guard.evidence.otlp import LineEncoder
from ray_guard.evidence.reader import Quarantine, merge, read
from ray_guard.records import Resource, SpanKind, SpanRecord
from ray_guard.supervisor.unread import About, Unread

TRACE = "a" * 32
WAS = {"was": "there", "ray_guard.source": "target"}
RESOURCE = {"service.name": "rome", "host.ip": ("192.0.2.1",)}


def begins(span: str) -> bytes:
    return open_message(
        span=span, trace=TRACE, parent=None, scope="tool", name="execute_tool work", kind=1, start_ns=5,
        attributes_json='{"gen_ai.tool.name":"work"}', identity_json='{"rl.turn":3}',
    )  # fmt: skip


def ends(span: str) -> bytes:
    return close_message(span=span, end_ns=9, attributes={"more": 1})


class Line:
    """A target's end, and the zygote's hold of the other."""

    def __init__(self, folder: Path, unread: Unread) -> None:
        self.target, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            unread.hold(1, os.dup(theirs.fileno()), About(str(folder), "run", {**RESOURCE, "host.ip": ["192.0.2.1"]}))


@pytest.fixture
def unread() -> Unread:
    return Unread()


@pytest.fixture
def line(tmp_path: Path, unread: Unread) -> Iterator[Line]:
    made = Line(tmp_path / "e", unread)
    yield made
    made.target.close()
    unread.release(1)


def killed(folder: Path, *open_spans: str) -> str:
    """A log that a supervisor of this pid has left, and its name."""
    with Journal(folder) as journal:
        for span in open_spans:
            record = SpanRecord(TRACE, span, None, "execute_tool work", SpanKind.INTERNAL, 5, None, WAS)
            journal.keep(LineEncoder(Resource(RESOURCE)).encode(record))
        return journal.log


def spans(folder: Path) -> dict[str, Any]:
    quarantine = Quarantine()
    found = {entry.span.span_id: entry for entry in merge(read([folder], quarantine)).values()}
    assert quarantine.total == 0
    return found


def test_what_was_sent_is_in_the_log(tmp_path: Path, unread: Unread, line: Line) -> None:
    log = killed(tmp_path / "e", "1" * 16)
    for packet in (ends("1" * 16), begins("2" * 16), ends("2" * 16), begins("3" * 16), b'{"op":"start"}', b"garbage"):
        line.target.send(packet)
    unread.shut(os.getpid())
    with pytest.raises(BrokenPipeError):  # from here on a call does not begin
        line.target.send(begins("4" * 16))
    unread.write()
    found = spans(tmp_path / "e")
    assert {span: entry.span.end_ns for span, entry in found.items()} == {"1" * 16: 9, "2" * 16: 9, "3" * 16: None}
    assert found["1" * 16].span.attributes == {**WAS, "more": 1}
    second = found["2" * 16]
    assert second.resource.attributes == RESOURCE
    assert second.span.attributes["rl.turn"] == 3
    assert second.span.attributes["rl.run.id"] == "run"
    assert {Path(entry.position.path).name.rpartition("-")[0] for entry in found.values()} == {log}


def test_an_actor_that_has_learnt_who_it_is(tmp_path: Path, unread: Unread, line: Line) -> None:
    killed(tmp_path / "e")
    unread.rename(1, {**RESOURCE, "ray.actor_id": "7"})
    line.target.send(begins("2" * 16))
    unread.shut(os.getpid())
    unread.write()
    assert spans(tmp_path / "e")["2" * 16].resource.attributes["ray.actor_id"] == "7"


@pytest.mark.parametrize("why", ["nothing was sent", "somebody else's", "vouched for", "held by another"])
def test_nothing_is_written(tmp_path: Path, unread: Unread, line: Line, why: str) -> None:
    folder = tmp_path / "e"
    log = killed(folder)
    if why != "nothing was sent":
        line.target.send(begins("2" * 16))
    if why == "vouched for":
        (folder / f"{log}{VOUCHED_SUFFIX}").touch()
    with (folder / f"{log}{SEAL_SUFFIX}").open("rb") as seal:
        if why == "held by another":
            fcntl.flock(seal, fcntl.LOCK_SH)
        unread.shut(1 << 23 if why == "somebody else's" else os.getpid())
    unread.write()
    assert len(list(folder.glob("*.otlp.jsonl"))) == 1

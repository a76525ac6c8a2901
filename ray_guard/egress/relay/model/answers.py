"""What the engine's server answers: heads, bodies, and streams of events. Pure; runs in the mover."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ray_guard.egress.relay.model.framing import Body, Fields, Heads, Malformed, fields, length

ANSWER_LIMIT: Final = 64 << 20
"""Bytes of an answer that is no stream."""
EVENT_LIMIT: Final = 16 << 20
_STATUS: Final = re.compile(rb"(HTTP/1\.[01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?\Z")
_TYPE: Final = re.compile(r"[a-z]+/[a-z0-9.+-]+(?:; ?charset=[A-Za-z0-9-]+)?\Z", re.IGNORECASE)
_EVENT_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class AnswerHead(NamedTuple):
    status: int
    content_type: str
    keep: bool
    """The server keeps the connection."""
    retry_after: str | None


class Answers:
    """Reads one answer after the other out of what the server sends."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._heads = Heads()
        self._body: Body | None = None

    @property
    def size(self) -> int:
        return len(self._held)

    @property
    def idle(self) -> bool:
        """Nothing has come that is not at its end."""
        return not self._held and self._body is None

    def feed(self, data: bytes) -> None:
        self._held += data

    def head(self) -> AnswerHead | None:
        """The next answer's; interim ones are passed over. Raises Malformed."""
        while True:
            lines = self._heads.take(self._held)
            if lines is None:
                return None
            found = _STATUS.match(lines[0])
            if found is None:
                raise Malformed("malformed_answer", "no HTTP/1.1 answer")
            version, status = found[1], int(found[2])
            if status == 101:
                raise Malformed("malformed_answer", "the server switches protocols")
            if status >= 200:
                break
        named = fields(lines[1:])
        bare = status in (204, 304)
        size = 0 if bare else length(named, version=version, absent=-1)
        self._body = Body(size)
        keep = size != -1 and version == b"HTTP/1.1" and b"close" not in b",".join(named.get(b"connection", [])).lower()
        return AnswerHead(status, _type(named), keep, _retry_after(named))

    def body(self) -> bytes:
        """What has come of the body. Raises Malformed."""
        assert self._body is not None  # noqa: S101 - for the type checker
        return self._body.take(self._held)

    @property
    def done(self) -> bool:
        """Whether the answer is at its end."""
        return self._body is not None and self._body.done

    def close(self) -> bool:
        """The connection has ended; whether that is where the answer ends."""
        if self._body is None or not self._body.until_close:
            return False
        self._body.done = True
        return True

    def next(self) -> None:
        self._body = None


def _type(found: Fields) -> str:
    text = found.get(b"content-type", [b""])[0].decode("latin-1")
    return text if _TYPE.match(text) else "application/octet-stream"


def _retry_after(found: Fields) -> str | None:
    text = found.get(b"retry-after", [b""])[0].decode("latin-1")
    return text if text.isascii() and text.isdigit() and len(text) < 10 else None


class Events:
    """Cuts a stream of server-sent events into its events, each with the empty line at its end."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now. Raises Malformed."""
        before = max(0, len(self._held) - 3)
        self._held += data
        events = []
        while (end := _EVENT_END.search(self._held, before)) is not None:
            events.append(bytes(self._held[: end.end()]))
            del self._held[: end.end()]
            before = 0
        if len(self._held) > EVENT_LIMIT:
            raise Malformed("malformed_answer", f"an event has at most {EVENT_LIMIT} bytes")
        return events

    def rest(self) -> bytes:
        """What stands behind the last whole event."""
        rest = bytes(self._held)
        self._held.clear()
        return rest


def data_of(event: bytes) -> bytes:
    """What an event carries: its ``data`` lines."""
    lines = re.split(rb"\r\n|\n|\r", event)
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))

"""HTTP/1.1 framing, for both directions: heads and bodies by the strict reading of RFC 9112. Pure; in the mover."""

from __future__ import annotations

from typing import Final

from ray_guard.egress.relay.speech import Refused
from ray_guard.egress.relay.speech.http import (
    BARE_LINE_FEED,
    CHUNK_LINE_LIMIT,
    CHUNK_SIZE,
    HEAD_LIMIT,
    LENGTH,
    fields_of,
)

_FRAMING: Final = (b"host", b"content-length", b"transfer-encoding")


class Malformed(Exception):
    """No message, or one that two readers may read differently; ``reason`` is one word, for the record."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


Fields = dict[bytes, list[bytes]]


class Heads:
    """Finds the end of heads in what has come so far."""

    def __init__(self) -> None:
        self._seen = 0

    def take(self, held: bytearray) -> list[bytes] | None:
        """The lines of the head that ``held`` begins with, taken out of it; None: it has not all come.

        Raises Malformed.
        """
        end = held.find(b"\r\n\r\n", max(0, self._seen - 3))
        stop = len(held) if end < 0 else end
        if stop > HEAD_LIMIT:
            raise Malformed("malformed_http", f"a head has at most {HEAD_LIMIT} bytes")
        if BARE_LINE_FEED.search(held, self._seen, stop):
            raise Malformed("malformed_http", "a line ends with CR LF")
        if end < 0:
            self._seen = stop
            return None
        lines = bytes(held[:end]).split(b"\r\n")
        del held[: end + 4]
        self._seen = 0
        return lines


class Body:
    """A body, decoded as it comes.

    Args:
        length: its bytes; None: it is chunked; -1: it ends where the connection does.
    """

    def __init__(self, length: int | None) -> None:
        self.done = length == 0
        self._length = length
        self._left = 0
        self._step = "size"
        self._trailer = Heads()

    @property
    def until_close(self) -> bool:
        return self._length == -1

    def take(self, held: bytearray) -> bytes:
        """What can be decoded of ``held``, taken out of it. Raises Malformed."""
        if self._length is None:
            return self._chunks(held)
        count = len(held) if self._length < 0 else min(self._length, len(held))
        data = bytes(held[:count])
        del held[:count]
        if self._length >= 0:
            self._length -= count
            self.done = self._length == 0
        return data

    def _chunks(self, held: bytearray) -> bytes:
        decoded: list[bytes] = []
        while not self.done and held:
            if self._step == "size":
                end = held.find(b"\r\n", 0, CHUNK_LINE_LIMIT)
                if end < 0:
                    if len(held) >= CHUNK_LINE_LIMIT or b"\n" in held:
                        raise Malformed("http_smuggling", "a chunk begins with its size alone")
                    break
                if not CHUNK_SIZE.match(held[:end]):
                    raise Malformed("http_smuggling", "a chunk begins with its size alone")
                self._left = int(bytes(held[:end]), 16)
                del held[: end + 2]
                self._step = "data" if self._left else "trailer"
            elif self._step == "data":
                data = bytes(held[: self._left])
                del held[: self._left]
                self._left -= len(data)
                decoded.append(data)
                if self._left == 0:
                    self._step = "end"
            elif self._step == "end":
                if not b"\r\n".startswith(bytes(held[:2])):
                    raise Malformed("http_smuggling", "a chunk is longer than it says")
                if len(held) < 2:
                    break
                del held[:2]
                self._step = "size"
            elif not self._trailers(held):
                break
        return b"".join(decoded)

    def _trailers(self, held: bytearray) -> bool:
        """Whether they have come to their end; what they say is dropped."""
        if b"\r\n".startswith(bytes(held[:2])):
            if len(held) < 2:
                return False
            del held[:2]
        else:
            lines = self._trailer.take(held)
            if lines is None:
                return False
            if any(name in _FRAMING for name in fields(lines)):
                raise Malformed("http_smuggling", "a trailer says nothing about framing")
        self.done = True
        return True


def fields(lines: list[bytes]) -> Fields:
    """Header fields by name in lower case. Raises Malformed."""
    try:
        return fields_of(lines)
    except Refused as refused:
        raise Malformed(refused.reason, "a header line is name: value") from None


def length(found: Fields, *, version: bytes, absent: int) -> int | None:
    """What a head says of its body, as :class:`Body` takes it; ``absent``: what it means to say nothing.

    Raises Malformed.
    """
    lengths, codings = found.get(b"content-length", []), found.get(b"transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        raise Malformed("http_smuggling", "the length of a body is said once")
    if codings:
        if codings[0].lower() != b"chunked" or version != b"HTTP/1.1":
            raise Malformed("http_smuggling", "the one transfer coding is chunked, of HTTP/1.1")
        return None
    if not lengths:
        return absent
    if not LENGTH.match(lengths[0]):
        raise Malformed("http_smuggling", "a length is a number")
    return int(lengths[0])


def encode_head(first: str, named: dict[str, str]) -> bytes:
    """A head, of text that holds no line ends."""
    lines = [first, *(f"{name}: {value}" for name, value in named.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")

"""HTTP/1.x: the host of every request on a connection. Pure; runs in the mover.

Requests are framed by the strict reading of RFC 9112 alone. Whatever two servers might frame differently (both lengths,
either twice, obsolete line folding, bare line feeds, chunk extensions, space before a colon) is refused, because what
one takes for a body another may take for the next request, to another host. CONNECT and Upgrade are refused as well:
what follows them is not HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ray_guard.egress.relay.speech import Refused
from ray_guard.policy.destination import canonical_name

HEAD_LIMIT: Final = 1 << 16
"""Bytes of a request line with its fields, and of trailer fields."""
CHUNK_LINE_LIMIT: Final = 20
_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) (HTTP/1\.[01])\Z")
_FIELD: Final = re.compile(rb"(" + _TOKEN + rb"):[\t ]*([\t\x20-\x7e\x80-\xff]*)\Z")
_ABSOLUTE: Final = re.compile(rb"http://([^/?#@]+)(?:[/?#].*)?\Z", re.IGNORECASE)
_AUTHORITY: Final = re.compile(rb"([A-Za-z0-9.-]+)(?::([0-9]{1,5}))?\Z")
BARE_LINE_FEED: Final = re.compile(rb"(?<!\r)\n")
LENGTH: Final = re.compile(rb"[0-9]{1,18}\Z")
CHUNK_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,15}\Z")
_FRAMING: Final = (b"host", b"content-length", b"transfer-encoding")


class Requests:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` of what an HTTP client sends.

    Args:
        names: hosts that may be asked, canonical.
        port: the connection's; a host that states another is refused.
    """

    def __init__(self, names: frozenset[str], port: int) -> None:
        self.done = False
        self.name: str | None = None
        self._names = names
        self._port = port
        self._held = bytearray()
        self._seen = 0
        """How much of what is held has been searched for the end of a head."""
        self._body = 0
        self._chunked = False
        self._step: Callable[[], bytes] = self._head

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        self._held += data
        passed = b""
        while self._held:
            verified = self._step()
            if not verified:
                break
            passed += verified
        return passed

    def _pass(self, count: int) -> bytes:
        verified = bytes(self._held[:count])
        del self._held[:count]
        self._seen = 0
        return verified

    # Each step returns what it has verified; nothing: more must come first.

    def _head(self) -> bytes:
        lines, end = self._lines("malformed_http")
        if not end:
            return b""
        request = REQUEST_LINE.match(lines[0])
        if request is None:
            raise Refused("not_http" if self.name is None else "malformed_http")
        method, target, version = request.groups()
        fields = fields_of(lines[1:])
        if method == b"CONNECT" or b"upgrade" in fields or b"http2-settings" in fields:
            raise Refused("http_upgrade")
        hosts = fields.get(b"host", [])
        if not hosts:
            raise Refused("host_absent")
        if len(hosts) > 1:
            raise Refused("http_smuggling")
        for authority in (*hosts, *_authority_of(method, target)):
            self._check(authority)
        self._frame(version, fields)
        return self._pass(end)

    def _lines(self, reason: str) -> tuple[list[bytes], int]:
        """The lines up to the empty one, and where that ends; 0: it has not come. Raises Refused: there can be none."""
        end = self._held.find(b"\r\n\r\n", max(0, self._seen - 3))
        stop = len(self._held) if end < 0 else end
        if stop > HEAD_LIMIT or BARE_LINE_FEED.search(self._held, self._seen, stop):
            raise Refused(reason)
        if end < 0:
            self._seen = stop
            return [], 0
        return bytes(self._held[:end]).split(b"\r\n"), end + 4

    def _check(self, authority: bytes) -> None:
        found = _AUTHORITY.match(authority)
        if found is None or (found[2] is not None and int(found[2]) != self._port):
            raise Refused("host_mismatch")
        try:
            name = canonical_name(found[1].decode("ascii"))
        except ValueError:
            raise Refused("host_mismatch") from None
        if name not in self._names:
            raise Refused("host_mismatch")
        self.name = name

    def _frame(self, version: bytes, fields: dict[bytes, list[bytes]]) -> None:
        """What follows the head."""
        lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
        if len(lengths) + len(codings) > 1:
            raise Refused("http_smuggling")
        if codings:
            if codings[0].lower() != b"chunked" or version != b"HTTP/1.1":
                raise Refused("http_smuggling")
            self._step = self._chunk_size
        elif lengths:
            if not LENGTH.match(lengths[0]):
                raise Refused("http_smuggling")
            self._body = int(lengths[0])
            self._step = self._body_bytes if self._body else self._head
        else:
            self._step = self._head

    def _body_bytes(self) -> bytes:
        count = min(self._body, len(self._held))
        self._body -= count
        if self._body == 0:
            self._step = self._chunk_end if self._chunked else self._head
        return self._pass(count)

    def _chunk_size(self) -> bytes:
        end = self._held.find(b"\r\n", 0, CHUNK_LINE_LIMIT)
        if end < 0:
            if len(self._held) >= CHUNK_LINE_LIMIT or b"\n" in self._held:
                raise Refused("http_smuggling")
            return b""
        if not CHUNK_SIZE.match(self._held[:end]):
            raise Refused("http_smuggling")
        self._body = int(bytes(self._held[:end]), 16)
        self._chunked = self._body > 0
        self._step = self._body_bytes if self._chunked else self._trailers
        return self._pass(end + 2)

    def _chunk_end(self) -> bytes:
        if not b"\r\n".startswith(bytes(self._held[:2])):
            raise Refused("http_smuggling")
        if len(self._held) < 2:
            return b""
        self._chunked = False
        self._step = self._chunk_size
        return self._pass(2)

    def _trailers(self) -> bytes:
        if b"\r\n".startswith(bytes(self._held[:2])):  # none
            if len(self._held) < 2:
                return b""
            self._step = self._head
            return self._pass(2)
        lines, end = self._lines("http_smuggling")
        if not end:
            return b""
        if any(name in _FRAMING for name in fields_of(lines)):
            raise Refused("http_smuggling")
        self._step = self._head
        return self._pass(end)


def fields_of(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for line in lines:
        field = _FIELD.match(line)
        if field is None:
            raise Refused("malformed_http")
        found.setdefault(field[1].lower(), []).append(field[2].strip(b"\t "))
    return found


def _authority_of(method: bytes, target: bytes) -> list[bytes]:
    """The authority that a request target states, where it does. Raises Refused for a form nobody may send."""
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return []
    absolute = _ABSOLUTE.match(target)
    if absolute is None:
        raise Refused("malformed_http")
    return [absolute[1]]

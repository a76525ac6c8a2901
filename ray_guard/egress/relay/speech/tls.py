"""TLS: the name in the ClientHello. Pure; runs in the mover.

The hello is put together from records and segments of any size (RFC 8446, 4.1.2 and 5.1; RFC 6066, 3). It must name one
server, which is one of those expected. A hello with encrypted_client_hello is refused, GREASE (RFC 9849) too: by design
the two cannot be told apart, and the name that counts would be the encrypted one.

A server may ask for a second hello (HelloRetryRequest), in the clear like the first, and take the name in that for the
one that counts: OpenSSL 3.0 does. So records are looked at until there can be none: until the first that is no hello,
no change of cipher and no alert. Behind a hello that announces early data they are looked at for good, because a server
that wants none of it reads past it. What is inside is not looked at: whoever answers for that name may forward it
(fronting).
"""

from __future__ import annotations

from typing import Final

from ray_guard.egress.relay.speech import Refused
from ray_guard.policy.destination import canonical_name

_HEADER: Final = b"\x16\x03"  # a handshake record, of whichever version
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_ENCRYPTED: Final = frozenset({0xFE0D, 0xFFCE})  # encrypted_client_hello, and encrypted_server_name before it
_EARLY_DATA: Final = 42
_CHANGE_CIPHER, _HANDSHAKE, _APPLICATION = 20, 22, 23
_RECORD_LIMIT: Final = 1 << 14
_HELLO_LIMIT: Final = 1 << 16
_RAW_LIMIT: Final = 2 * _HELLO_LIMIT
"""With the headers of its records; whoever uses one for each few bytes is not after a handshake."""


class ClientHello:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` of what a TLS client sends.

    Args:
        names: those that may be named, canonical.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.done = False
        self.name: str | None = None
        self._names = names
        self._raw = bytearray()
        self._at = 0
        self._message = bytearray()
        self._early = False
        self._hello = True
        """What comes next is a hello, or the rest of one."""
        self._through = 0
        """Bytes of a record that is no hello, still to pass."""

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        if self.done:
            return data
        self._raw += data
        passed = b""
        while not self.done and self._raw:
            verified = self._read_hello() if self._hello else self._read_on()
            if not verified:
                return passed
            passed += verified
        return passed + self._pass(len(self._raw))

    # Each step returns what it has verified; nothing: more must come first.

    def _pass(self, count: int) -> bytes:
        verified = bytes(self._raw[:count])
        del self._raw[:count]
        return verified

    def _read_hello(self) -> bytes:
        while self._next_record():
            if len(self._message) < 4:
                continue
            length = int.from_bytes(self._message[1:4], "big")
            if self._message[0] != _CLIENT_HELLO or length > _HELLO_LIMIT or len(self._message) > 4 + length:
                raise Refused("malformed_tls")
            if len(self._message) == 4 + length:
                self._verify(_extensions(bytes(self._message[4:])))
                self._hello = False
                end, self._at = self._at, 0
                self._message.clear()
                return self._pass(end)
        if len(self._raw) > _RAW_LIMIT:
            raise Refused("malformed_tls")
        return b""

    def _verify(self, extensions: dict[int, bytes]) -> None:
        name = _server_name(extensions)
        if name not in self._names or (self.name is not None and name != self.name):
            raise Refused("sni_mismatch")
        self.done = self.name is not None  # nobody asks for a third
        self.name = name
        self._early = _EARLY_DATA in extensions

    def _read_on(self) -> bytes:
        """What follows the first hello."""
        if self._through:
            count = min(self._through, len(self._raw))
            self._through -= count
            return self._pass(count)
        kind = self._raw[0]
        if not _CHANGE_CIPHER <= kind <= _APPLICATION:
            self.done = True  # of which no server makes anything
            return self._pass(1)
        if len(self._raw) < 6:
            return b""
        length = int.from_bytes(self._raw[3:5], "big")
        if kind == _HANDSHAKE and (length == 0 or self._raw[5] == _CLIENT_HELLO):
            self._hello = True
            return self._read_hello()
        self.done = kind == _HANDSHAKE or (kind == _APPLICATION and not self._early)
        self._through = 5 + length
        return self._read_on()

    def _next_record(self) -> bool:
        """Appends the next whole record to the message; False: it is not all there. Raises Refused."""
        header = bytes(self._raw[self._at : self._at + 5])
        if not _HEADER.startswith(header[:2]):
            raise Refused("malformed_tls" if self._at else "not_tls")
        if len(header) < 5:
            return False
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= _RECORD_LIMIT:
            raise Refused("malformed_tls")
        end = self._at + 5 + length
        if len(self._raw) < end:
            return False
        self._message += self._raw[self._at + 5 : end]
        self._at = end
        return True


class _Reader:
    """Bytes with lengths before them. Raises Refused where they do not add up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise Refused("malformed_tls")
        self._at += count
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """What a length of ``size`` bytes stands before."""
        return self.take(self.number(size))

    def more(self) -> bool:
        return self._at < len(self._data)


def _extensions(hello: bytes) -> dict[int, bytes]:
    """Those of a ClientHello. Raises Refused."""
    reader = _Reader(hello)
    reader.take(2 + 32)  # legacy_version, random
    session, suites, compressions = reader.vector(1), reader.vector(2), reader.vector(1)
    if len(session) > 32 or not suites or len(suites) % 2 or not compressions:
        raise Refused("malformed_tls")
    found: dict[int, bytes] = {}
    if reader.more():
        extensions = _Reader(reader.vector(2))
        if reader.more():
            raise Refused("malformed_tls")
        while extensions.more():
            kind = extensions.number(2)
            if kind in found:
                raise Refused("malformed_tls")
            found[kind] = extensions.vector(2)
    return found


def _server_name(found: dict[int, bytes]) -> str:
    """The one name in a hello's extensions, canonical. Raises Refused."""
    if not _ENCRYPTED.isdisjoint(found):
        raise Refused("encrypted_client_hello")
    if _SERVER_NAME not in found:
        raise Refused("sni_absent")
    outer = _Reader(found[_SERVER_NAME])
    names = _Reader(outer.vector(2))
    kind, name = names.number(1), names.vector(2)
    if kind != 0 or names.more() or outer.more():
        raise Refused("malformed_tls")
    try:
        return canonical_name(name.decode("ascii"))
    except ValueError:  # not a name at all: an address, a trailing dot, other characters
        raise Refused("sni_mismatch") from None

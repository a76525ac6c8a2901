"""Requests of an HTTP/1.1 client, read whole, and which of them are calls of a model. Pure; runs in the mover."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ray_guard.egress.relay.model.framing import Body, Fields, Heads, Malformed, fields, length
from ray_guard.egress.relay.speech.http import REQUEST_LINE
from ray_guard.policy.destination import canonical_address, canonical_name

BODY_LIMIT: Final = 8 << 20
"""Bytes of a request's body."""
COMPLETIONS, CHAT, RESPONSES, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models"
CALLS: Final = frozenset({COMPLETIONS, CHAT, RESPONSES})
_MODEL: Final = re.compile(r"/v1/models/[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~=&+,:-]{0,1024}\Z")
_ABSOLUTE: Final = re.compile(r"http://([^/?#@]+)(/.*)\Z", re.IGNORECASE)
_AUTHORITY: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::([0-9]{1,5}))?\Z")
_SECRET: Final = re.compile(rb"[\x21-\x7e][\x20-\x7e]{0,8191}\Z")


class NotAllowed(Exception):
    """A request that was understood and is none that may be made; ``reason`` is one word, for the record."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Head(NamedTuple):
    """What is understood of a request's head; nothing else of it goes on."""

    method: str
    path: str
    """Without the query, which goes nowhere."""
    authorization: bytes | None
    version: bytes
    keep: bool
    """The connection stays open after the answer."""
    expects: bool
    """The client waits for ``100 Continue`` before it sends the body."""
    length: int | None


class Server(NamedTuple):
    """Who the client may think it is talking to.

    Args:
        hosts: canonical names and addresses.
    """

    hosts: frozenset[str]
    port: int

    def is_meant(self, authority: str) -> bool:
        """Whether ``host[:port]`` means this server."""
        found = _AUTHORITY.match(authority)
        if found is None or int(found[2] or 80) != self.port:
            return False
        host = found[1]
        try:
            return (canonical_address(host[1:-1]) if host.startswith("[") else _canonical(host)) in self.hosts
        except ValueError:
            return False


def _canonical(host: str) -> str:
    try:
        return canonical_address(host)
    except ValueError:
        return canonical_name(host)


class Requests:
    """Reads one request after the other out of what a client sends.

    Args:
        server: whom the client may mean.
        keeps: whether what has come is kept for :meth:`give_up`.
    """

    def __init__(self, server: Server, *, keeps: bool = False) -> None:
        self._server = server
        self._keeps = keeps
        self._held = bytearray()
        self._heads = Heads()
        self._body: Body | None = None
        self._whole = bytearray()
        self._raw = bytearray()
        """All that has come since the current request began, as it came."""

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return len(self._held) + len(self._whole) + len(self._raw)

    def feed(self, data: bytes) -> None:
        self._held += data
        if self._keeps:
            self._raw += data

    def give_up(self) -> bytes:
        """The current request and all that follows, as it came; nothing is read of it any more."""
        return bytes(self._raw)

    def head(self) -> Head | None:
        """The next request's head; None: it has not all come.

        Raises:
            Malformed: it cannot be told what it asks for; nothing that follows on the connection can be read.
            NotAllowed: it asks for what is no call of a model.
        """
        lines = self._heads.take(self._held)
        if lines is None:
            return None
        request = REQUEST_LINE.match(lines[0])
        if request is None:
            raise Malformed("malformed_http", "a request begins with METHOD TARGET HTTP/1.1")
        method, target, version = request[1].decode(), request[2].decode(), request[3]
        found = fields(lines[1:])
        if method == "CONNECT" or b"upgrade" in found or b"http2-settings" in found:
            raise NotAllowed("http_upgrade", "the connection stays HTTP/1.1")
        size = length(found, version=version, absent=0)
        hosts = [each.decode("latin-1") for each in found.get(b"host", [])]
        if len(hosts) != 1:
            raise Malformed("http_smuggling" if hosts else "host_absent", "a request names its host once")
        path = self._path(target, hosts)
        if not all(map(self._server.is_meant, hosts)):
            raise NotAllowed("host_mismatch", f"{hosts[-1][:80]} is not the model endpoint")
        _judge(method, path)
        if method == "GET" and size != 0:
            raise Malformed("http_smuggling", "GET has no body")
        if size is not None and size > BODY_LIMIT:
            raise Malformed("body_too_large", f"a request has at most {BODY_LIMIT} bytes")
        self._body = Body(size)
        return Head(method, path, _authorization(found), version, _stays(found, version), _expects(found), size)

    @staticmethod
    def _path(target: str, hosts: list[str]) -> str:
        """The path of a request target; an authority that it states is added to ``hosts``."""
        if not target.startswith("/"):
            absolute = _ABSOLUTE.match(target)
            if absolute is None:
                raise Malformed("malformed_http", "a request target is a path")
            hosts.append(absolute[1])
            target = absolute[2]
        path, _, query = target.partition("?")
        if not _QUERY.match(query):
            raise NotAllowed("path_not_allowed", "no such query")
        return path

    def body(self) -> bytes | None:
        """The body of the request whose head was read; None: it has not all come. Raises Malformed."""
        assert self._body is not None  # noqa: S101 - for the type checker
        self._whole += self._body.take(self._held)
        if len(self._whole) > BODY_LIMIT:
            raise Malformed("body_too_large", f"a request has at most {BODY_LIMIT} bytes")
        if not self._body.done:
            return None
        whole, self._whole, self._body = bytes(self._whole), bytearray(), None
        return whole

    def next(self) -> None:
        """The current request is done with."""
        if self._keeps:
            self._raw = bytearray(self._held)


def _judge(method: str, path: str) -> None:
    """Paths are compared as they are written: one that is spelled in any other way is another path."""
    if path in CALLS:
        allowed = "POST"
    elif path == MODELS or _MODEL.match(path):
        allowed = "GET"
    else:
        raise NotAllowed("path_not_allowed", f"{method} {path[:200]} is not part of the model endpoint")
    if method != allowed:
        raise NotAllowed("method_not_allowed", f"{path} takes {allowed}, not {method[:20]}")


def _authorization(found: Fields) -> bytes | None:
    given = found.get(b"authorization", [])
    if len(given) > 1 or not all(_SECRET.match(each) for each in given):
        raise Malformed("malformed_http", "Authorization is said once, in printable letters")
    return given[0] if given else None


def _words(found: Fields, name: bytes) -> set[bytes]:
    return {word.strip(b"\t ").lower() for value in found.get(name, []) for word in value.split(b",")}


def _stays(found: Fields, version: bytes) -> bool:
    words = _words(found, b"connection")
    return b"close" not in words and (version == b"HTTP/1.1" or b"keep-alive" in words)


def _expects(found: Fields) -> bool:
    words = _words(found, b"expect")
    if words - {b"100-continue", b""}:
        raise Malformed("malformed_http", "the one thing to expect is 100-continue")
    return b"100-continue" in words

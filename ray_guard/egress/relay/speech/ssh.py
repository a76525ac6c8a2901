"""SSH: the identification that each side begins with (RFC 4253, 4.2). Pure; runs in the mover."""

from __future__ import annotations

from typing import Final

from ray_guard.egress.relay.speech import Refused

_BANNER: Final = b"SSH-2.0-"
_SERVER_BANNERS: Final = (_BANNER, b"SSH-1.99-")
_BEFORE_LIMIT: Final = 1 << 13


class ClientBanner:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` of what an SSH client sends: no line before the banner."""

    def __init__(self) -> None:
        self.done = False
        self.name: str | None = None
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        if self.done:
            return data
        self._held += data
        if not self._held.startswith(_BANNER[: len(self._held)]):
            raise Refused("not_ssh")
        if len(self._held) < len(_BANNER):
            return b""
        self.done = True
        held, self._held = self._held, b""
        return held


class ServerBanner:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` of what an SSH server sends: lines may come before it."""

    def __init__(self) -> None:
        self.done = False
        self.name: str | None = None
        self._held = bytearray()
        self._line = 0

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        if self.done:
            return data
        self._held += data
        while True:
            start = bytes(self._held[self._line : self._line + 9])
            if start.startswith(_SERVER_BANNERS):
                self.done = True
                held, self._held = bytes(self._held), bytearray()
                return held
            if start.startswith(b"SSH-") and not any(each.startswith(start) for each in _SERVER_BANNERS):
                raise Refused("not_ssh")
            end = self._held.find(b"\n", self._line)
            if end < 0:
                break
            self._line = end + 1
        if len(self._held) > _BEFORE_LIMIT:
            raise Refused("not_ssh")
        return b""

"""The proxies that policies name: where they are. Runs in the supervisor.

A proxy is looked up outside this process's loop: by a child that asks the system's resolver and writes the answer into
a pipe. Until it is known nobody is connected through it, nor to its port; where it stays unknown that is refused.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from enum import Enum
from typing import Final

from ray_guard.kernel import libc
from ray_guard.log import logger
from ray_guard.policy.destination import canonical_address
from ray_guard.supervisor.loop import Loop

log = logger("ray_guard.proxies")

Endpoint = tuple[str, int]
_KEPT_S: Final = 60.0
_TRIED_AGAIN_S: Final = 5.0
_FIRST_STAND_IN: Final = 0xC6120001
_STAND_INS: Final = 1 << 16


class Standing(Enum):
    """What is known of a proxy."""

    KNOWN = "known"
    ASKED = "asked"
    UNKNOWN = "unknown"


class _Entry:
    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.asking = False
        self.asked_at = -_KEPT_S


class Proxies:
    """All that the node's policies name.

    Args:
        changed: called when other addresses are known.
    """

    def __init__(self, loop: Loop, changed: Callable[[], None]) -> None:
        self._loop = loop
        self._changed = changed
        self._entries: dict[Endpoint, _Entry] = {}
        self._stand_ins: dict[str, str] = {}

    @property
    def named(self) -> bool:
        """Whether any policy names one."""
        return bool(self._entries)

    def require(self, endpoint: Endpoint) -> None:
        """A policy names it."""
        if endpoint not in self._entries:
            entry = self._entries[endpoint] = _Entry()
            try:
                entry.addresses = (canonical_address(endpoint[0]),)
                entry.asked_at = float("inf")  # an address, which stays what it is
            except ValueError:
                self._ask(endpoint, entry)
            self._changed()

    def standing(self, endpoint: Endpoint) -> Standing:
        """Whether a connect through it can be tried now; asks anew where what is known is old."""
        entry = self._entries.get(endpoint)
        if entry is None:
            return Standing.UNKNOWN
        age = time.monotonic() - entry.asked_at
        if not entry.asking and age > (_KEPT_S if entry.addresses else _TRIED_AGAIN_S):
            self._ask(endpoint, entry)
        if entry.addresses:
            return Standing.KNOWN
        return Standing.ASKED if entry.asking else Standing.UNKNOWN

    def at_port(self, port: int) -> Standing:
        """The least that is known of the proxies at that port: KNOWN where there is none."""
        known = {self.standing(endpoint) for endpoint in self._entries if endpoint[1] == port}
        return next((each for each in (Standing.ASKED, Standing.UNKNOWN) if each in known), Standing.KNOWN)

    def address(self, endpoint: Endpoint) -> bytes:
        """Its ``sockaddr``. It must be known."""
        host = self._entries[endpoint].addresses[0]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        packed, port = socket.inet_pton(family, host), endpoint[1]
        if family == socket.AF_INET:
            return struct.pack("=H", family) + struct.pack(">H", port) + packed + bytes(8)
        return struct.pack("=H", family) + struct.pack(">HI", port, 0) + packed + bytes(4)

    def endpoints(self) -> frozenset[Endpoint]:
        """Where they are: nobody's destination."""
        return frozenset((address, port) for (_, port), entry in self._entries.items() for address in entry.addresses)

    def stand_in(self, name: str) -> str:
        """An address that stands for ``name`` where the proxy looks it up: of 198.18.0.0/15, nobody's (RFC 2544).

        Nothing is ever sent there: it only says which name a connect means. The oldest is given out again in the end.
        """
        found = self._stand_ins.get(name)
        if found is None:
            if len(self._stand_ins) >= _STAND_INS:
                oldest = next(iter(self._stand_ins))
                found = self._stand_ins.pop(oldest)
            else:
                found = socket.inet_ntoa(struct.pack(">I", _FIRST_STAND_IN + len(self._stand_ins)))
            self._stand_ins[name] = found
        return found

    def _ask(self, endpoint: Endpoint, entry: _Entry) -> None:
        entry.asking = True
        answer, told = os.pipe()
        pid = os.fork()  # this process has one thread
        if pid == 0:
            _look_up(endpoint[0], told)
        os.close(told)
        pidfd = os.pidfd_open(pid)

        def answered(_events: int) -> None:
            self._loop.forget(pidfd)
            os.waitpid(pid, 0)
            data = os.read(answer, 1 << 14)
            os.close(answer)
            os.close(pidfd)
            entry.asking, entry.asked_at = False, time.monotonic()
            found = tuple(canonical_address(each) for each in json.loads(data or b"[]"))
            if not found:
                log.warning("the proxy %s has no address", endpoint[0])
            elif found != entry.addresses:
                entry.addresses = found
                self._changed()

        self._loop.watch(pidfd, select.EPOLLIN, answered)


def _look_up(host: str, told: int) -> None:
    try:
        os.dup2(told, 3)
        libc.close_range(4, 0xFFFFFFFF)  # listeners among them: they must be the supervisor's alone
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        os.write(3, json.dumps(list(dict.fromkeys(str(each[4][0]) for each in found))[:16]).encode())
    except OSError:
        pass  # no answer is the answer
    finally:
        os._exit(0)

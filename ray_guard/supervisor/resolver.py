"""The line to the resolver's helper, which reads DNS messages and asks upstream. Runs in the supervisor.

The supervisor holds no DNS library: bytes go to the helper (:mod:`ray_guard.egress.resolver.helper`) and come back as a
question, which whoever asks decides; then the helper does as it was told. It is started when the first policy lists a
name, and lives while this process does. Without it, nothing is answered but that it failed.
"""

from __future__ import annotations

import base64
import functools
import itertools
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from ray_guard.egress.resolver.hosts import Hosts
from ray_guard.errors import NotEnforced
from ray_guard.kernel import seqpacket
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.decide import CompiledPolicy, Layer
from ray_guard.policy.destination import canonical_address

if TYPE_CHECKING:
    from ray_guard.egress.gate import Waiting
    from ray_guard.egress.resolver.door import Door, Reply
    from ray_guard.egress.resolver.start import Helper

log = logger("ray_guard.resolver")

PENDING_LIMIT: Final = 4096
_POLICIES_KEPT: Final = 64
_FILE_LIMIT: Final = 4 << 20
_START_AGAIN_S: Final = 1.0
_BATCH: Final = 64
_SWEEP_S: Final = 1.0
_PATIENCE_S: Final = 8.0
"""Beyond the helper's own: then it has lost the query."""
SERVFAIL: Final = 2
REFUSED: Final = 5


class Resolve(NamedTuple):
    """Ask upstream for this name (canonical) as it stands."""

    name: str


class Answer(NamedTuple):
    """Ask nobody: answer so. ``rcode`` is a mnemonic; ``addresses`` of the other family are left out."""

    rcode: str
    addresses: tuple[str, ...] = ()


class Forward(NamedTuple):
    """Pass the question on as it is, and the answer too: for policies that report and refuse nothing."""


Instruction = Resolve | Answer | Forward


class Query(Protocol):
    """One query: whoever asks decides what is done about it. Exactly one of reply, failed and ignored is called."""

    def question(self, name: str, kind: str) -> Instruction:
        """``name`` as it was asked for, without its trailing dot, odd bytes escaped; ``kind`` is the record's type."""

    def answered(self, addresses: tuple[str, ...], ttl: int, *, cached: bool) -> None:
        """What the reply that follows will tell (canonical addresses). ``cached``: nobody was asked upstream."""

    def reply(self, message: bytes) -> None: ...

    def failed(self) -> None:
        """It could not be read, decided or resolved."""

    def ignored(self) -> None:
        """It is no query: it gets no answer."""


class _Pending(NamedTuple):
    query: Query
    datagram: bool
    since: float


class Resolver:
    """See the module.

    Args:
        loop: the supervisor's event loop.
        opened: called when the door has been opened: its endpoints are known from then on.
    """

    def __init__(self, loop: Waiting, opened: Callable[[], None]) -> None:
        self._hosts, self._resolv_conf = (_content(f"/etc/{name}") for name in ("hosts", "resolv.conf"))
        self.search: tuple[str, ...] = ()
        """Domains that programs append to a name before they ask for it."""
        self._loop = loop
        self._opened = opened
        self._line: socket.socket | None = None
        self._helper: Helper | None = None
        self._started = float("-inf")
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._sweeping = False
        self._listed: dict[int, tuple[tuple[Layer, ...], Mapping[str, tuple[str, ...]]]] = {}
        self._door: Door | None = None

    @functools.cached_property
    def hosts(self) -> Hosts:
        """The hosts file as it was when this process began.

        Read then, as is resolv.conf, for a target may be able to write them: a line added later would make any address
        an allowed name's, or have a server of the target's own asked.
        """
        return Hosts.parse(self._hosts)

    def listed_hosts(self, policy: CompiledPolicy) -> Mapping[str, tuple[str, ...]]:
        """The names of the hosts file that ``policy`` lists, by address."""
        known = self._listed.get(id(policy.layers))
        if known is not None and known[0] is policy.layers:
            return known[1]  # looked through once: the file may be a long list of names that are blocked
        found: dict[str, tuple[str, ...]] = {}
        for address, names in self.hosts.names.items():
            listed = tuple(name for name in names if policy.allows_name(name))
            if listed:
                found[address] = listed
        if len(self._listed) >= _POLICIES_KEPT:
            self._listed.clear()
        self._listed[id(policy.layers)] = (policy.layers, found)
        return found

    def require(self) -> None:
        """Starts the helper, that it is ready when it is needed.

        Raises:
            NotEnforced: names cannot be resolved here.
        """
        from importlib.util import find_spec

        if find_spec("dns") is None:
            raise NotEnforced(["egress.allow"], "names need the package dnspython: pip install dnspython")
        try:
            self.door()
        except OSError as error:
            raise NotEnforced(["egress.allow"], f"names need a port on 127.0.0.1: {error.strerror}") from error
        self._start()

    def door(self) -> Door:
        """Where queries come in. Raises OSError: see :class:`Door`."""
        if self._door is None:
            from ray_guard.egress.resolver.door import Door  # most policies list no names

            self._door = Door(self._loop)
            self._opened()
        return self._door

    @property
    def endpoints(self) -> frozenset[tuple[str, int]]:
        """Where it listens, once it does: for sockets that are led there, and for no other."""
        return frozenset() if self._door is None else self._door.endpoints

    # -- asking --------------------------------------------------------------------------------------------------------

    def ask(self, message: bytes, query: Query, *, datagram: bool) -> None:
        """Has ``message`` read, and then answered as ``query`` decides."""
        number = next(self._numbers)
        if len(self._pending) >= PENDING_LIMIT or not self._start():
            query.failed()
            return
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(_SWEEP_S, self._sweep)
        self._pending[number] = _Pending(query, datagram, time.monotonic())
        self._tell({"op": "read", "id": number, "message": base64.b64encode(message).decode()}, number)

    def _tell(self, message: dict[str, Any], number: int) -> None:
        try:
            if self._line is None:
                raise BrokenPipeError
            seqpacket.send(self._line, message)
        except OSError as error:
            log.warning("the resolver cannot be asked: %s", error)
            self._failed(number)

    def _failed(self, number: int) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            pending.query.failed()

    def _sweep(self) -> None:
        """Gives up what the helper has lost: whoever asked has only so many questions waiting."""
        late = time.monotonic() - _PATIENCE_S
        for number in [number for number, pending in self._pending.items() if pending.since < late]:
            self._failed(number)
        self._sweeping = bool(self._pending)
        if self._sweeping:
            self._loop.later(_SWEEP_S, self._sweep)

    # -- the helper ----------------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Whether it runs, now perhaps started; tried once a second at most."""
        if self._line is not None:
            return True
        if time.monotonic() - self._started < _START_AGAIN_S:
            return False
        self._started = time.monotonic()
        try:
            from ray_guard.egress.resolver.start import start

            self._helper = start(self._resolv_conf)
        except OSError as error:
            log.warning("the resolver cannot be started: %s", error)
            return False
        self._line = line = self._helper.line
        line.setblocking(False)
        self._loop.watch(line.fileno(), select.EPOLLIN, lambda _events: self._ready(line))
        return True

    def _ready(self, line: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                received = seqpacket.receive(line)
            except (BlockingIOError, InterruptedError):
                return
            except seqpacket.BadPacket as error:
                log.warning("the resolver said %s", error)
                continue
            except OSError:
                received = None
            if received is None:
                self._lost()
                return
            message, descriptors = received
            seqpacket.close_all(descriptors)
            try:
                self._heard(message)
            except (KeyError, ValueError, TypeError) as error:
                log.warning("the resolver said %.200r: %r", message, error)

    def _heard(self, message: dict[str, Any]) -> None:
        if message["op"] == "ready":
            self.search = tuple(str(domain) for domain in message["search"])
            return
        number = int(message["id"])
        pending = self._pending.get(number)
        if pending is None:
            return
        if message["op"] == "question":
            try:
                self._decided(number, pending, str(message["name"]), str(message["type"]))
            except Exception:  # whoever decides: what cannot be decided is not answered
                log.exception("query %d", number)
                self._failed(number)
            return
        del self._pending[number]
        encoded = message["message"]
        if encoded is None:
            pending.query.ignored()
            return
        wire = base64.b64decode(encoded)
        if "addresses" in message:
            addresses = tuple(canonical_address(str(each)) for each in message["addresses"])
            pending.query.answered(addresses, int(message["ttl"]), cached=bool(message["cached"]))
        pending.query.reply(wire)

    def _decided(self, number: int, pending: _Pending, name: str, kind: str) -> None:
        what = pending.query.question(name, kind)
        message: dict[str, Any] = {"id": number, "datagram": pending.datagram}
        if isinstance(what, Resolve):
            message |= {"op": "resolve", "name": what.name, "type": kind}
        elif isinstance(what, Forward):
            message |= {"op": "forward"}
        else:
            message |= {"op": "answer", "rcode": what.rcode, "addresses": what.addresses}
        self._tell(message, number)

    def _lost(self) -> None:
        log.warning("the resolver has ended")
        self._hang_up()
        for number in list(self._pending):
            self._failed(number)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._loop.forget(self._line.fileno())
            self._line = None
        if self._helper is not None:
            self._helper.end()
            self._helper = None

    def close(self) -> None:
        if self._door is not None:
            self._door.close()
        self._hang_up()


def _content(path: str) -> str:
    """A configuration file; empty where it cannot be read, and then it says nothing."""
    try:
        with open(path, "rb") as file:
            return file.read(_FILE_LIMIT).decode(errors="replace")
    except OSError:
        return ""


def fail(query: bytes, reply: Reply, rcode: int) -> None:
    """Answers a query that nobody has read: its own bytes, marked as an answer with that code."""
    if len(query) >= 12 and not query[2] & 0x80:
        reply(query[:2] + bytes([0x80 | query[2] & 0x79, 0x80 | rcode]) + query[4:])

"""Names, for one ring: what its processes may ask the resolver, what they were told, what that is worth. In supervisor.

Order of work for a question, as for every request: decide (pure) → account → journal → only then is anybody asked.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ray_guard.egress.gate import Ruling
from ray_guard.egress.resolver.told import LOOKUPS, Told
from ray_guard.evidence.journal import JournalError
from ray_guard.log import logger
from ray_guard.policy.budgets import RECEIVED, SENT, Exceeded
from ray_guard.policy.decide import Decision, Operation, Reason, Request, Verdict
from ray_guard.policy.destination import Transport, canonical_name
from ray_guard.records import Mode
from ray_guard.supervisor import resolver
from ray_guard.supervisor.resolver import Answer, Forward, Instruction, Resolve

if TYPE_CHECKING:
    from ray_guard.egress.resolver.door import Reply
    from ray_guard.supervisor.ring import Ring
    from ray_guard.supervisor.target import Origin

log = logger("ray_guard.names")

_WAITING: Final = 512
"""Questions of one ring that may wait for their answer."""
_SAID: Final = 2 * LOOKUPS
"""Names of which the journal says that a call (an actor in an hour) asked for them; then, that there were more."""
_KINDS: Final = frozenset({"A", "AAAA"})
_NOTHING: Final = Answer("NOERROR")
_NO_NAME: Final = Answer("NXDOMAIN")
_OVER: Final = Answer("REFUSED")
_SHOWN: Final = 255
_STAND_IN_TTL: Final = 60


class Names:
    """See the module."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._resolver = ring.node.resolver
        self._call = ring.call
        span = None if self._call is None else ring.target.open.get(self._call)
        self._told = span.told if span is not None else Told(lasting=self._call is None)
        self._by_address: Mapping[str, tuple[str, ...]] | None = None
        self._version = -1
        self._noted: set[tuple[Transport, str, int, str | None]] = set()
        self._led = False
        self._over = False
        self.waiting = 0

    # -- what was told -------------------------------------------------------------------------------------------------

    def by_address(self) -> Mapping[str, tuple[str, ...]]:
        """For each address its names: those that were told, and those of the hosts file that the policy lists."""
        if self._by_address is None or self._version != self._told.version:
            self._version = self._told.version
            found = dict(self._told.names())
            for address, names in self._resolver.listed_hosts(self._ring.policy).items():
                found[address] = found.get(address, ()) + names
            self._by_address = found
        return self._by_address

    def policy_changed(self) -> None:
        """The policy is another: other names of the hosts file may be listed."""
        self._by_address = None

    def changed(self) -> bool:
        """Whether something was told, or has lived its time, since :meth:`by_address` was asked last."""
        if self._call is None:  # what a call was told holds as long as the call
            self._told.expire(time.monotonic(), self._ring.target.open.__contains__)
        return self._version != self._told.version

    # -- a socket that asks for a name server --------------------------------------------------------------------------

    def lead(self, request: Request, decision: Decision, origin: Origin) -> Ruling:
        """Leads it to the guard's own; journaled once per name server and call."""
        if not self._note(request, decision, origin):
            return Ruling(errno.EPERM)
        self._led = True
        return Ruling(0, resolver=_Asker(self, self._resolver, request, origin))

    def _note(self, request: Request, decision: Decision, origin: Origin, *, mute: bool = False) -> bool:
        key = (request.transport, request.address, request.port, origin.call)
        if key in self._noted:
            return True
        try:
            self._ring.note(request, decision, origin, mute=mute)
        except JournalError:
            log.exception("a decision could not be journaled")
            return False
        if len(self._noted) >= _SAID:
            self._noted.clear()
        self._noted.add(key)
        return True

    def sorts(self, request: Request) -> bool:
        """Whether a datagram socket is connected to an address that was told.

        So the C library finds out which of several addresses of a name is the better one; it sends nothing there.
        """
        datagram = request.transport is Transport.UDP and request.operation is Operation.CONNECT
        return datagram and request.address in self.by_address()

    def sort(self, request: Request, origin: Origin) -> Ruling:
        """Lets it, with a socket that can send nothing any more."""
        name = self.by_address()[request.address][0]
        granted = Decision(Verdict.ALLOW, Reason.NAME, name=name)
        if not self._note(request, granted, origin, mute=True):
            return Ruling(errno.EPERM)
        return Ruling(0, mute=not self.mute)

    def close(self) -> None:
        """Nobody is left who could ask."""
        if self._led:
            self._resolver.door().forget(self)

    @property
    def mute(self) -> bool:
        """Whether datagram sockets of this ring cannot send: an actor's, and all that had to be made for a target."""
        return self._ring.mute or not self._ring.node.means.borrows

    # -- questions -----------------------------------------------------------------------------------------------------

    def admits(self, size: int, origin: Origin) -> bool:
        """Whether a query of ``size`` bytes may be asked: they are sent, and count as that."""
        return self.waiting < _WAITING and self._books(SENT, size, origin)

    def takes(self, size: int, origin: Origin) -> bool:
        """Whether there is room for an answer of that size."""
        return self._books(RECEIVED, size, origin)

    def _books(self, kind: str, size: int, origin: Origin) -> bool:
        if origin.account.closed:
            return False
        exceeded = origin.account.reserve(kind, size)
        if exceeded is not None and not exceeded.report_only:
            self._passed(exceeded, origin)
            return False
        origin.account.settle(kind, size, size)
        return True

    def _passed(self, exceeded: Exceeded, origin: Origin) -> None:
        if not self._over:
            self._over = True
            try:
                self._ring.target.exceeded(origin, None, exceeded, "names")
            except JournalError:
                log.exception("a violation could not be journaled")

    def question(self, text: str, kind: str, asker: _Asker) -> Instruction:
        """What is done about one question. Raises JournalError: then it is not answered."""
        try:
            name = canonical_name(text)
        except ValueError:
            refused = Decision(reason=Reason.INVALID, name=text[:_SHOWN])
            if self._ring.policy.mode is Mode.REPORT:
                self._say(text[:_SHOWN], refused._replace(verdict=Verdict.ALLOW, report_only=True), asker)
                return Forward()
            self._say(text[:_SHOWN], refused, asker)
            return _NO_NAME
        decision = self._ring.policy.decide_name(name)
        if not decision.allowed:
            self._refuse(name, decision, asker)
            return _NO_NAME
        self._say(name, decision, asker)
        if kind not in _KINDS:
            if self._ring.policy.mode is Mode.REPORT:
                return Forward()
            return _NOTHING  # HTTPS and SVCB would tell of other ports and of keys to hide the name with
        known = self._resolver.hosts.addresses.get(name)
        if known is not None:
            return Answer("NOERROR", known)
        proxied = any(layer.proxy is not None for layer in self._ring.policy.layers)
        if proxied and not self._ring.policy.is_model_name(name):
            # The proxy looks it up, and where it is the only way out nobody else could.
            stand_in = (self._ring.node.proxies.stand_in(name),)
            self.answered(name, stand_in, _STAND_IN_TTL, asker.origin, cached=False)
            return Answer("NOERROR", stand_in)
        if not self._told.spend(len(name), time.monotonic()):
            self._say("", Decision(reason=Reason.BUDGET, name=name), asker)
            return _OVER
        return Resolve(name)

    def _refuse(self, name: str, decision: Decision, asker: _Asker) -> None:
        """Says so once, of the name that was meant: programs try each search domain behind it first."""
        for domain in self._resolver.search:
            meant = name.removesuffix("." + domain) if domain else name
            if meant == name:
                continue
            if self._ring.policy.allows_name(meant):
                return
            name = meant
            break
        self._say(name, decision._replace(name=name), asker)

    def _say(self, name: str, decision: Decision, asker: _Asker) -> None:
        """Journals the decision about ``name``, once per call. Raises JournalError."""
        key = (name, asker.origin.call)
        said = self._told.said
        if key in said:
            return
        if len(said) >= _SAID:
            key, decision = ("", None), Decision(reason=Reason.BUDGET, name=f"more than {_SAID} names")
            if key in said:
                return
        self._ring.note(asker.request, decision, asker.origin)
        said.add(key)

    def answered(self, name: str, addresses: tuple[str, ...], ttl: int, origin: Origin, *, cached: bool) -> None:
        """``addresses`` will be told next: they may be connected to from now on."""
        if cached:
            self._told.give_back(len(name))
        if addresses:
            for told in {id(told): told for told in (self._told, self._of_call(origin)) if told is not None}.values():
                told.tell(name, addresses, now=time.monotonic(), ttl=ttl, call=origin.call)

    def _of_call(self, origin: Origin) -> Told | None:
        """The memory of the tools of the open call ``origin`` is of."""
        span = None if origin.call is None else self._ring.target.open.get(origin.call)
        return None if span is None else span.told


class _Asker:
    """One socket that asked for a name server: what gate and door need of it."""

    def __init__(self, names: Names, resolver_: resolver.Resolver, request: Request, origin: Origin) -> None:
        self.request = request
        self.origin = origin
        self.owner = self._names = names
        self._resolver = resolver_

    # -- gate: NameServer ----------------------------------------------------------------------------------------------

    def address(self, raw: bytes, *, stream: bool) -> bytes:
        return self._resolver.door().address(raw, stream=stream)

    def expect(self, source: tuple[str, int], *, stream: bool) -> None:
        asked = None if self.request.operation is Operation.CONNECT else (self.request.address, self.request.port)
        self._resolver.door().expect(source, self, stream=stream, asked=asked)

    def line(self) -> socket.socket | None:
        return self._resolver.door().line(self) if self._names.mute else None

    # -- door: Asker ---------------------------------------------------------------------------------------------------

    def asks(self, query: bytes, reply: Reply, *, datagram: bool) -> None:
        if not self._names.admits(len(query), self.origin):
            resolver.fail(query, reply, resolver.REFUSED)
            return
        self._names.waiting += 1
        self._resolver.ask(query, _Question(self._names, self, query, reply), datagram=datagram)


class _Question:
    """One query, from its bytes to its answer."""

    def __init__(self, names: Names, asker: _Asker, query: bytes, reply: Reply) -> None:
        self._names = names
        self._asker = asker
        self._query = query
        self._reply = reply
        self._name: str | None = None

    def question(self, name: str, kind: str) -> Instruction:
        what = self._names.question(name, kind, self._asker)
        if isinstance(what, Resolve):
            self._name = what.name
        return what

    def answered(self, addresses: tuple[str, ...], ttl: int, *, cached: bool) -> None:
        if self._name is not None:
            self._names.answered(self._name, addresses, ttl, self._asker.origin, cached=cached)

    def reply(self, message: bytes) -> None:
        self._names.waiting -= 1
        if self._names.takes(len(message), self._asker.origin):
            self._reply(message)
        else:
            resolver.fail(self._query, self._reply, resolver.REFUSED)

    def failed(self) -> None:
        self._names.waiting -= 1
        resolver.fail(self._query, self._reply, resolver.SERVFAIL)

    def ignored(self) -> None:
        self._names.waiting -= 1

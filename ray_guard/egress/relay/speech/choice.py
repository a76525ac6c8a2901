"""Who reads along on a connection, given what its rule allows. Pure; runs in the mover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_guard.egress.relay.speech import Refused, Verifier
from ray_guard.egress.relay.speech.http import Requests
from ray_guard.egress.relay.speech.ssh import ClientBanner, ServerBanner
from ray_guard.egress.relay.speech.tags import SSH, STRATUM, Sniffer, Watch
from ray_guard.egress.relay.speech.tls import ClientHello
from ray_guard.policy.destination import Protocol


class Choice:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` where names of several protocols share address and port.

    Args:
        expected: by protocol, the names that may be spoken to in it; without ``tcp``, of which nothing is verified.
        port: the connection's.
    """

    def __init__(self, expected: Mapping[Protocol, frozenset[str]], port: int) -> None:
        self._expected = expected
        self._port = port
        self._chosen: Verifier | None = None
        self.protocol: Protocol | None = None
        if len(expected) == 1:
            self._choose(next(iter(expected)))

    @property
    def done(self) -> bool:
        return self._chosen is not None and self._chosen.done

    @property
    def name(self) -> str | None:
        return None if self._chosen is None else self._chosen.name

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        if not data:
            return b""
        if self._chosen is None:
            if data[0] == 0x16:
                self._choose(Protocol.TLS)
            else:
                ssh = data[:1] == b"S" and Protocol.SSH in self._expected
                self._choose(Protocol.SSH if ssh else Protocol.HTTP)
        if self._chosen is None:
            raise Refused("unexpected_protocol")
        return self._chosen.feed(data)

    def _choose(self, protocol: Protocol) -> None:
        names = self._expected.get(protocol)
        if names is None:
            return
        self.protocol = protocol
        if protocol is Protocol.TLS:
            self._chosen = ClientHello(names)
        elif protocol is Protocol.HTTP:
            self._chosen = Requests(names, self._port)
        elif protocol is Protocol.SSH:
            self._chosen = ClientBanner()


class Speech:
    """Both verifiers of one connection, and what they have found.

    Args:
        told: what its rule allows, as :func:`speech` wrote it.
    """

    def __init__(self, told: Mapping[str, Any]) -> None:
        expected = {Protocol(protocol): frozenset(names) for protocol, names in told["expected"].items()}
        self._named = bool(expected)
        self._judged = bool(told.get("judged"))
        self._choice: Choice | None = None
        self._sniffer: Sniffer | None = None
        self.sent: Verifier
        self.received: Verifier | None = None
        if expected and Protocol.TCP not in expected:
            self._choice = self.sent = Choice(expected, int(told["port"]))
            if expected.keys() == {Protocol.SSH}:
                self.received = ServerBanner()
        else:
            self._sniffer = Sniffer(frozenset(told["denied"]), judged=bool(told.get("judged")))
            self.sent, self.received = Watch(self._sniffer, sent=True), Watch(self._sniffer, sent=False)

    def seen(self) -> dict[str, Any] | None:
        """What is to be known while the connection still is open: its ``protocol``, what its first bytes ``offend``.

        None: nothing yet, or nobody judges it.
        """
        sniffer = self._sniffer
        if sniffer is None or not self._judged or (sniffer.offence is None and sniffer.tag not in (SSH, STRATUM)):
            return None
        return {"protocol": sniffer.tag, "offence": sniffer.offence}

    def found(self) -> dict[str, Any]:
        """``protocol`` that was spoken, where it is known; where names count, whether one was ``verified``, and which.

        An SSH banner names nobody: it is the protocol alone that is verified then.
        """
        if self._sniffer is not None:
            return {"protocol": self._sniffer.tag, **({"verified": False, "name": None} if self._named else {})}
        choice = self._choice
        spoken = choice is not None and (choice.name is not None or choice.done)
        protocol = choice.protocol if choice is not None and spoken else None
        return {"protocol": protocol, "verified": spoken, "name": None if choice is None else choice.name}

"""What a connection's first bytes look like, whatever the rule expects: ``ray_guard.egress.protocol``. Pure; mover.

A tag is a word for the record, and a ground to cut where a rule does not allow that: miners and tunnels use ports that
are open for something else. It is no proof of the opposite; only a name rule's verifier is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from ray_guard.detect import payloads
from ray_guard.egress.relay.speech import Refused

WINDOW: Final = 4096
"""Bytes of each direction that are looked at."""
SSH, TLS, HTTP, STRATUM = "ssh", "tls", "http", "stratum"

_HTTP: Final = re.compile(rb"[A-Z]{3,16} \S{1,2048} HTTP/[12]\.[01]\r?\n|HTTP/[12]\.[01] [0-9]{3}[ \r\n]")
_METHODS: Final = frozenset(
    "mining.subscribe mining.authorize mining.submit mining.configure mining.extranonce.subscribe mining.notify "
    "mining.set_difficulty mining.set_target mining.set_extranonce mining.suggest_difficulty mining.hello "
    "eth_submitLogin eth_submitWork eth_submitHashrate eth_getWork".split()
)
_MONERO: Final = frozenset({"login", "submit", "keepalived", "getjob", "job"})
_MONERO_WORDS: Final = frozenset({"login", "pass", "agent", "algo", "rigid", "nonce", "job_id", "blob", "target"})
_METHOD_TEXT: Final = re.compile(rb'"method"\s*:\s*"((?:mining\.|eth_(?:submit|getWork))[\w.]*)"')


class Sniffer:
    """Both directions of one connection.

    Args:
        denied: tags that must not be seen here.
        judged: the first bytes are judged as :mod:`ray_guard.detect.payloads` judges them, beyond a tag.
    """

    def __init__(self, denied: frozenset[str], *, judged: bool = False) -> None:
        self.tag: str | None = None
        self.offence: str | None = None
        """What was recognised in the first bytes, as ``kind: rule``; None: nothing, or nobody asks."""
        self._denied = denied
        self._judged = judged
        self._seen = {True: bytearray(), False: bytearray()}

    @property
    def done(self) -> bool:
        """Nothing more will be learnt."""
        known = self.tag is not None and (self.offence is not None or not self._judged)
        return known or all(len(seen) >= WINDOW for seen in self._seen.values())

    def look(self, data: bytes, *, sent: bool) -> None:
        """``data`` comes next in its direction (``sent``: from the client). Raises Refused for a tag that is denied."""
        seen = self._seen[sent]
        if self.done or len(seen) >= WINDOW:
            return
        seen += data[: WINDOW - len(seen)]
        if self.tag is None:
            self.tag = _tag(bytes(seen))
            if self.tag in self._denied:
                raise Refused(f"{self.tag}_not_allowed")
        if self._judged and self.offence is None:
            found = payloads.judge(bytes(seen), "sent" if sent else "received")
            if found is not None and found.rule != payloads.SSH:  # that is allowed here or denied above, by its port
                self.offence = f"{found.kind}: {found.rule}"


class Watch:
    """A :class:`~ray_guard.egress.relay.speech.Verifier` that only looks, and lets pass what is not denied."""

    def __init__(self, sniffer: Sniffer, *, sent: bool) -> None:
        self.name: str | None = None
        self._sniffer = sniffer
        self._sent = sent
        self._count = 0
        self.done = sniffer.done

    def feed(self, data: bytes) -> bytes:
        """See :class:`~ray_guard.egress.relay.speech.Verifier`."""
        self._sniffer.look(data, sent=self._sent)
        self._count += len(data)
        self.done = self._sniffer.done or self._count >= WINDOW
        return data


def _tag(seen: bytes) -> str | None:
    if seen.startswith(b"SSH-") or b"\nSSH-2.0-" in seen:
        return SSH
    if seen.startswith(b"\x16\x03"):
        return TLS
    if _HTTP.match(seen):
        return HTTP
    if seen.lstrip()[:1] in (b"{", b"[") and (_METHOD_TEXT.search(seen) or any(map(_mines, _objects(seen)))):
        return STRATUM
    return None


def _objects(seen: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects at the beginning of what was seen, in a list or not, as far as they are whole."""
    decoder, text, at = json.JSONDecoder(), seen.decode("utf-8", "replace"), 0
    while at < len(text):
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict))


def _mines(message: dict[str, Any]) -> bool:
    method, params = message.get("method"), message.get("params")
    if not isinstance(method, str):
        return False
    return method in _METHODS or (
        method in _MONERO and isinstance(params, dict) and not _MONERO_WORDS.isdisjoint(params)
    )


def foreign(rule: str | None, port: int) -> frozenset[str]:
    """Tags that a flow granted by an address rule must not show: one that says ``tcp://`` means whatever is spoken."""
    if rule is not None and rule.lower().startswith("tcp://"):
        return frozenset()
    return frozenset({STRATUM}) if port == 22 else frozenset({STRATUM, SSH})

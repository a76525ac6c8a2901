"""Asking the name servers that this host is configured with. Runs in the resolver's helper, imports dnspython."""

from __future__ import annotations

import io
import logging
import time
from typing import Final, NamedTuple

import dns.asyncquery
import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.resolver

log = logging.getLogger("ray_guard.resolver")

_CACHED: Final = 4096
_LIFETIME_S: Final = 5.0
"""How long all attempts at one question may take together."""
_FORWARDED_S: Final = 2.0
_ADDRESSES: Final = 64
TTL_S: Final = (1, 3600)
"""Least and most seconds to live that are told, whatever came from upstream."""


class Found(NamedTuple):
    """``rcode`` is NOERROR (with or without addresses), NXDOMAIN or SERVFAIL. ``cached``: nobody was asked for it."""

    rcode: str
    addresses: tuple[str, ...] = ()
    ttl: int = TTL_S[0]
    cached: bool = False


class Upstream:
    """The name servers of ``resolv_conf`` (its text), in its order; UDP, and TCP where that is too small."""

    def __init__(self, resolv_conf: str) -> None:
        try:
            self._resolver = dns.asyncresolver.Resolver(io.StringIO(resolv_conf))
        except dns.resolver.NoResolverConfiguration as error:
            log.warning("resolv.conf: %s; asking 127.0.0.1", error)
            self._resolver = dns.asyncresolver.Resolver(configure=False)
            self._resolver.nameservers = ["127.0.0.1"]
        self._resolver.cache = dns.resolver.LRUCache(_CACHED)
        self._resolver.lifetime = _LIFETIME_S

    @property
    def search(self) -> list[str]:
        """Domains that programs of this host append to a name before they ask."""
        return [domain.to_text(omit_final_dot=True).lower() for domain in self._resolver.search]

    async def resolve(self, name: str, kind: str) -> Found:
        """The addresses of ``name`` (canonical, asked as it stands), ``kind`` A or AAAA, aliases followed."""
        absolute = dns.name.from_text(name + ".")
        type_ = dns.rdatatype.from_text(kind)
        cached = self._cached(absolute, type_)
        try:
            answer = await self._resolver.resolve(absolute, type_, raise_on_no_answer=False, search=False)
        except dns.resolver.NXDOMAIN:
            return Found("NXDOMAIN", cached=cached)
        except (dns.exception.DNSException, OSError) as error:
            log.warning("%s %s: %s", name, kind, error)
            return Found("SERVFAIL")
        if answer.rrset is None:
            return Found("NOERROR", cached=cached)
        left = int(answer.expiration - time.time())  # it may have been kept for a while
        ttl = min(max(left, TTL_S[0]), TTL_S[1])
        return Found("NOERROR", tuple(found.address for found in answer.rrset)[:_ADDRESSES], ttl, cached)

    async def forward(self, query: dns.message.Message) -> dns.message.Message | None:
        """What the first name server that answers says to ``query``, as it stands; None: none does."""
        for server in self._resolver.nameservers:
            try:
                reply, _ = await dns.asyncquery.udp_with_fallback(query, str(server), _FORWARDED_S)
                return reply
            except (dns.exception.DNSException, OSError) as error:
                log.warning("%s: %s", server, error)
        return None

    def _cached(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> bool:
        cache = self._resolver.cache
        if cache is None:
            return False
        return any(cache.get((name, each, dns.rdataclass.IN)) is not None for each in (kind, dns.rdatatype.ANY))

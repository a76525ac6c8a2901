"""The names of mining pools, in a command line, a TLS hello or a proxy's request. Runs later, and live. Pure."""

from __future__ import annotations

from typing import Final

_POOLS: Final = (
    "minexmr.com supportxmr.com nanopool.org moneroocean.stream hashvault.pro xmrpool.eu xmrpool.net xmrpool.de "
    "xmr-pool.net c3pool.com c3pool.org monerohash.com 2miners.com ethermine.org flypool.org flexpool.io f2pool.com "
    "herominers.com unmineable.com nicehash.com miningpoolhub.com antpool.com viabtc.com viabtc.net poolin.com "
    "poolin.me slushpool.com braiins.com hiveon.com hiveon.net kryptex.network kryptex.com woolypooly.com zpool.ca "
    "rplant.xyz zergpool.com luckpool.net ezil.me suprnova.cc prohashing.com coinhive.com minergate.com "
    "kaspa-pool.org kaspa-pool.com acc-pool.pw k1pool.com"
)

NAME: Final = rf"(?i:(?<![\w-])(?:{_POOLS.replace('.', '[.]').replace(' ', '|')})\b)"
"""An expression for a pool's domain, whatever stands before it."""

"""The names of mining pools, in a command line, a TLS hello or a proxy's request. Runs later, and live. Pure."""

from __future__ import annotations

from typing import Final

_POOLS: Final = (
    "minexmr supportxmr nanopool moneroocean hashvault xmrpool c3pool 2miners ethermine f2pool flypool herominers "
    "unmineable nicehash miningpoolhub antpool viabtc poolin slushpool braiins hiveon kryptex woolypooly zpool rplant "
    "zergpool luckpool ezil flexpool suprnova prohashing coinhive minergate kaspa-pool acc-pool k1pool xmr-pool "
    "monerohash"
)
_ENDINGS: Final = "com org net network pro io stream co ca eu me in one xyz cc us"

NAME: Final = rf"(?i:(?<![\w-])(?:{_POOLS.replace(' ', '|')})\.(?:{_ENDINGS.replace(' ', '|')})\b)"
"""An expression for a pool's domain, whatever stands before it."""

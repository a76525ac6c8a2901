"""Commands that mine. Runs later, and live. Pure."""

from __future__ import annotations

import re
from typing import Final

from ray_guard.detect import Finding, Kind, pools
from ray_guard.detect.commands.line import Line
from ray_guard.detect.shell import READERS, Command

_STRATUM: Final = re.compile(
    r"(?i)(?<![a-z])(?:stratum[12]?s?\+?\w*|eth(?:proxy|stratum)?\+?\w*)(?:\+(?:tcp|ssl|tls))?://[\w\[]"
)
_RPC: Final = re.compile(
    r"mining\.(?:subscribe|authorize|notify|submit|configure)\b|eth_(?:submitLogin|getWork|submitWork)\b|"
    r"method[\\\"']{1,4}\s*:\s*[\\\"']{1,4}login[\\\"']{1,4}[^|;\n]{0,200}[\"'](?:pass|agent|algo|rigid)[\\\"']"
)
_WALLET: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:4[0-9AB][1-9A-HJ-NP-Za-km-z]{93}|8[1-9A-HJ-NP-Za-km-z]{94})(?![0-9A-Za-z])"
)
_POOL: Final = re.compile(pools.NAME)
_CONFIG: Final = re.compile(r"[\"']pools[\\\"']{1,3}\s*:\s*\[\s*\{")
_OF_CONFIG: Final = re.compile(
    r"[\"'](?:algo|coin|donate-level|rig-id|keepalive|randomx|nicehash|user)[\\\"']{1,3}\s*:"
)
_FLAGS: Final = re.compile(
    r"--(?:donate-level|coin(?=[ =])|cpu-max-threads-hint|randomx-\w+|nicehash|rig-id|cuda-bfactor-hint)\b|"
    r"(?:^|\s)(?:-a|--algo(?:rithm)?)[= ]?(?:rx/\w+|randomx|cn/\w+|cn-\w+|ethash|etchash|kawpow|autolykos2|"
    r"octopus|kheavyhash|progpow\w*|"
    r"equihash\w*|zhash|yescrypt\w*|sha256d|scrypt|verushash|ghostrider|cryptonight\w*|lyra2\w*|x16rv?2?|firopow|dynexsolve|"
    r"kaspa|karlsenhash|blake3|nexapow|beamhash\w*|cuckoo\w+|ironfish|pyrin\w*|astrobwt\w*|144_5|192_7)(?![\w.])",
    re.IGNORECASE,
)
_PAID: Final = re.compile(r"(?:^|\s)(?:-o|--url|--pool|-pool|-P|--server|-u|--user|--wallet|-wal|--donate-level)\b")
_POOL_OPTION: Final = re.compile(
    r"(?:^|\s)(?:-o|--url|--pool|-pool|--server|--daemon-address|-P|-r|-l|-c)[= ](?!https?:)(?:\w+(?:\+\w+)?://)?[\w.-]+:\d{2,5}\b"
)
_MINING_PORT: Final = re.compile(
    r":(?:3333|4444|5555|7777|8888|9999|14433|14444|45700|10128|20128|10300|1010|6060|3956)\b"
)
_PAYEE: Final = re.compile(r"(?:^|\s)(?:-u|--user|--wallet|-wal|-w)[= ](?:\w{20,}|\w+\.[A-Za-z]\w*(?:\s|$))|\s-p x\b")
_COIN_ADDRESS: Final = re.compile(
    r"(?:^|[\s=:/])(?:0x[0-9a-fA-F]{40}|bc1[0-9a-z]{25,62}|kaspa:\w{20,}|[13][1-9A-HJ-NP-Za-km-z]{25,34}|D[1-9A-HJ-NP-Za-km-z]{33}|"
    r"R[1-9A-HJ-NP-Za-km-z]{33}|t1[1-9A-HJ-NP-Za-km-z]{33}|dero1\w{10,}|9[1-9A-HJ-NP-Za-km-z]{50})(?=[.\s/@:]|$)"
)
_PROGRAMS: Final = re.compile(
    r"(?i)^(?:xmrig(?:-\w+)?|xmr-stak\S*|t-rex|ethminer|nbminer|lolminer|gminer|teamredminer|phoenixminer|cgminer|bfgminer|sgminer|"
    r"cpuminer\S*|minerd|ccminer|nanominer|srbminer\S*|wildrig\S*|claymore|rigel|bzminer|cryptonight|kdevtmpfsi|kinsing|"
    r"trex|hellminer|nheqminer|astrominer|tnn-miner\S*|onezerominer|miniz|cryptodredge|xmrigcc|p2pool|nsfminer|kawpowminer|"
    r"qli-client|rqiner\S*|ghostminer|minergate\S*|xmrigdaemon|verus-solver|gpu-?miner|cpu-?miner|sysrv|kthreaddi|dbused)(?:\.exe)?$"
)
_TELLS_OF_ITSELF: Final = frozenset(("--version", "--help", "-h", "-V", "version", "help"))


def in_text(line: Line) -> Finding | None:
    """What pools, wallets and their protocol look like, wherever they stand."""
    for pattern, rule in (
        (_STRATUM, "mining.stratum_url"), (_RPC, "mining.json_rpc"), (_WALLET, "mining.wallet"), (_POOL, "mining.pool"),
    ):  # fmt: skip
        if pattern.search(line.text) and not line.only_read:
            return Finding(Kind.MINING, rule)
    if _CONFIG.search(line.text) and _OF_CONFIG.search(line.text) and (line.writes or not line.only_read):
        return Finding(Kind.MINING, "mining.configuration")
    return None


def by_program(command: Command, _line: Line) -> Finding | None:
    """Miners by their names, and by what they are told."""
    if command.name in READERS:
        return None
    if _PROGRAMS.match(command.program) and not _TELLS_OF_ITSELF.issuperset(command.arguments or ["run"]):
        return Finding(Kind.MINING, "mining.program")
    text = " ".join(command.arguments)
    if _FLAGS.search(text) and _PAID.search(text):
        return Finding(Kind.MINING, "mining.flags")
    pool = _POOL_OPTION.search(text)
    if pool and ((_MINING_PORT.search(pool[0]) and _PAYEE.search(text)) or _COIN_ADDRESS.search(text)):
        return Finding(Kind.MINING, "mining.pool_shape")
    if re.search(r"(?:^|\s)--?pool\b", text) and re.search(r"(?:^|\s)--?wal(?:let)?\b", text):
        return Finding(Kind.MINING, "mining.pool_shape")
    if re.search(r"(?:^|\s)--(?:mine|start-mining)\b", text) and re.search(
        r"etherbase|--start-mining|--mining-threads", text
    ):
        return Finding(Kind.MINING, "mining.node")
    return None

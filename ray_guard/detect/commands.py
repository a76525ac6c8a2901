"""Judges one command line. Runs later, and live. Pure.

Rules look at programs and arguments (:mod:`.shell`), never at spelling alone; each is a function from a command to a
finding. What is recognised by shape (pool addresses, wallets, mining flags) holds for programs under any name.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import socket
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from ray_guard.detect import METADATA_ADDRESSES, Finding, Kind, ssh
from ray_guard.detect.shell import LONGEST, Command, commands, unhidden

_ADDRESS: Final = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?![\w.]*\w\.)")
_METADATA: Final = frozenset(map(ipaddress.ip_address, METADATA_ADDRESSES))
_METADATA_NAMES: Final = re.compile(
    r"(?i)metadata\.google\.internal|\bmetadata\.goog\b|metadata\.azure\.(?:internal|com)|instance-data\.ec2\.internal"
    r"|169-254-169-254|\$\{?(?:ECS_CONTAINER_METADATA_URI|AWS_CONTAINER_CREDENTIALS_)|//metadata/|/latest/meta-data|computeMetadata/v1|/metadata/instance\?api-version"
)
_HOSTS: Final = re.compile(
    r"(?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]{0,30}://)(?:[^/@\s'\"]*@)?(\[[^\]]+\]|[^/:\s'\"?#]+)", re.IGNORECASE
)


def judge(text: str) -> Finding | None:
    """The first thing that is wrong with a command line; None: nothing that is known."""
    for plain in unhidden(text[:LONGEST]):
        for rule in _TEXT_RULES:
            found = rule(plain)
            if found is not None:
                return found
        for command in commands(plain):
            for judging in _COMMAND_RULES:
                found = judging(command)
                if found is not None:
                    return found
        found = _loop(plain)
        if found is not None:
            return found
    return None


# -- by the text ------------------------------------------------------------------------------------------------------

_STRATUM: Final = re.compile(r"(?i)\b(?:stratum[12]?\+?\w*|eth(?:proxy|stratum)?\+?\w*)(?:\+(?:tcp|ssl|tls))?://[\w\[]")
_RPC: Final = re.compile(
    r"mining\.(?:subscribe|authorize|notify|submit|configure)\b|eth_(?:submitLogin|getWork|submitWork)\b"
)
_WALLET: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:4[0-9AB][1-9A-HJ-NP-Za-km-z]{93}|8[1-9A-HJ-NP-Za-km-z]{94})(?![0-9A-Za-z])"
)
_POOL: Final = re.compile(
    r"(?i)(?<![\w-])(?:minexmr|supportxmr|nanopool|moneroocean|hashvault|xmrpool|c3pool|2miners|ethermine|f2pool|flypool|"
    r"herominers|unmineable|nicehash|miningpoolhub|antpool|viabtc|poolin|slushpool|braiins|hiveon|kryptex|woolypooly|zpool)"
    r"\.(?:com|org|net|pro|io|stream|co|ca|eu|me|in|one)\b[:/]?\d*"
)
_MINER_FLAGS: Final = re.compile(
    r"--(?:donate-level|coin(?=[ =])|cpu-max-threads-hint|randomx-\w+|nicehash|rig-id|cuda-bfactor-hint)\b|"
    r"(?:^|\s)(?:-a|--algo)[= ]?(?:rx/\d|randomx|cn/\w+|ethash|etchash|kawpow|autolykos2|octopus|kheavyhash|progpow|"
    r"equihash|zhash|yescrypt\w*|sha256d|scrypt)\b",
    re.IGNORECASE,
)
_DEV_TCP: Final = re.compile(r"/dev/(?:tcp|udp)/([\w.$\{\}-]+)/([\w$\{\}-]+)")
_SHELL_OUT: Final = re.compile(
    r"\b(?:ba|z|da|k)?sh\s+(?:-i\b|[0-2]?[<>]&)|0>&1|0<&\d+|>&\s*/dev/(?:tcp|udp)/|\bread\b[^|]{0,200}\bdo\s+(?:eval\b|\"?\$|(?:ba|da|z)?sh\b)"
)


class _Code(NamedTuple):
    """What a program's text must show, all of it; and what excuses it. Each is searched by itself, in linear time."""

    kind: Kind
    rule: str
    shows: tuple[re.Pattern[str], ...]
    excused: re.Pattern[str] | None = None


_CODE: Final = (
    _Code(Kind.REVERSE_SHELL, "code.socket_to_shell", (
        re.compile(
            r"socket\.socket|create_connection|fsockopen|socket\.tcp\(|TCPSocket|IO::Socket|"
            r"net\.(?:connect|Socket|createConnection)|socket\(\s*(?:S,\s*)?PF_INET"),
        re.compile(
            r"dup2|pty\.spawn|/bin/(?:ba|da|z)?sh|cmd\.exe|child_process|proc_open|exec\s*\(?\s*[\"'](?:/bin/)?(?:ba)?sh"),
    )),
    _Code(Kind.REVERSE_SHELL, "code.ztcp", (re.compile(r"\bztcp\b"), re.compile(r"[<>]&"))),
    _Code(Kind.DNS_TUNNEL, "code.dns", (
        re.compile(r"(?:gethostbyname|getaddrinfo|resolver\.(?:resolve|query)|dns\.lookup)\s*\("),
        re.compile(r"b(?:16|32|64|85)encode|hexlify|\.hex\(\)|toString\(['\"](?:hex|base64)"),
    )),
    _Code(Kind.EXFILTRATION, "code.secret", (
        re.compile(
            r"(?:requests|httpx|session|aiohttp)\.(?:post|put)\b|\burlopen\b|\.sendall\b|http\.client|smtplib|ftplib|\bfetch\("),
        re.compile(
            r"\.ssh/(?!config\b|known_hosts)|id_(?:rsa|ed25519|ecdsa|dsa)\b(?!\.pub)|\.aws/credentials|\.netrc\b|"
            r"\.git-credentials|\.kube/config|/etc/shadow|/proc/(?:self|\d+)/environ|wallet\.dat"),
    ), re.compile(r"localhost|127\.0\.0\.1")),
    _Code(Kind.REVERSE_TUNNEL, "code.remote_forward", (
        re.compile(
            r"request_port_forward|forward_remote_port|reverse_forward_tunnel|ngrok\.(?:connect|forward)|pyngrok|"
            r"RemoteForward[ =]\S+\s+\S+"),
    )),
)  # fmt: skip


def _by_text(text: str) -> Finding | None:
    for pattern, rule in (
        (_STRATUM, "mining.stratum_url"), (_RPC, "mining.json_rpc"), (_WALLET, "mining.wallet"), (_POOL, "mining.pool"),
    ):  # fmt: skip
        if pattern.search(text) and not _only_read(text):
            return Finding(Kind.MINING, rule)
    for code in _CODE:
        if all(each.search(text) for each in code.shows) and not (code.excused and code.excused.search(text)):
            return None if _only_read(text) else Finding(code.kind, code.rule)
    return None


def _only_read(text: str) -> bool:
    """The words stand in what is searched for, shown or written down, not in what is run."""
    programs = [command.name for command in commands(text)]
    return bool(programs) and all(name in _READERS for name in programs)


_READERS: Final = frozenset(
    (
        "grep egrep fgrep rg ag ack cat less more head tail echo printf sed awk find ls wc sort uniq diff git man "
        "cd jq tee vi vim nano"
    ).split()
)


def _metadata(text: str) -> Finding | None:
    if _only_read(text):
        return None
    if _METADATA_NAMES.search(text):
        return Finding(Kind.METADATA, "metadata.name")
    words = [*_HOSTS.findall(text), *(word for command in commands(text) for word in command.arguments)]
    for word in words:
        address = _canonical(word.partition("/")[0] if "://" not in word else "")
        if address in _METADATA:
            return Finding(Kind.METADATA, "metadata.address")
    if any(str(each) in text for each in _METADATA):
        return Finding(Kind.METADATA, "metadata.address")
    return None


def _canonical(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address in any of the forms that inet_aton takes (decimal, octal, hex, short), IPv6, mapped or not."""
    text = host.strip("[]").partition("%")[0]
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        if not re.fullmatch(r"(?:0[xX][0-9a-fA-F]+|\d+)(?:\.(?:0[xX][0-9a-fA-F]+|\d+)){0,3}", text) or len(text) < 8:
            return None
        try:
            return ipaddress.ip_address(socket.inet_aton(text))
        except (OSError, ValueError):
            return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _shell_by_device(text: str) -> Finding | None:
    found = _DEV_TCP.search(text)
    if found is None or _only_read(text):
        return None
    if _SHELL_OUT.search(text):
        return Finding(Kind.REVERSE_SHELL, "shell.dev_tcp")
    return None


_TEXT_RULES: Final = (_by_text, _metadata, _shell_by_device)

# -- by the program ---------------------------------------------------------------------------------------------------

#: program, and what its arguments must show for it to be at work
_TUNNELS: Final = dict(
    line.split(" ", 1)
    for line in r"""
autossh .
boringproxy .
bore \blocal\b
chisel \b(?:client|server)\b
cloudflared \b(?:tunnel|access)\b
code ^tunnel\b
cpolar \b(?:tcp|http|start)\b
devtunnel \bhost\b
earthworm .
edge -c\s+\S+\s.*-l\b
ew -s\s+(?:rssocks|rcsocks)
frpc .
frps .
gost (?:^|\s)-(?:L|F|R|C)\b|-[LFR]=
inlets \bclient\b
jprq .
ligolo .
localtunnel --port
lt --port
ngrok \b(?:http|tcp|tls|start|tunnel)\b
npc -server|-vkey
nps .
openvpn --(?:remote|config)
pagekite .
pagekite.py .
pinggy .
playit .
rathole .
revsocks .
rpivot .
sish .
sshuttle -r|--remote
suo5 .
tailscale \b(?:up|funnel|serve)\b
tailscaled .
telebit .
tunnelto --port
wg-quick \bup\b
wstunnel \bclient\b
zerotier-cli \bjoin\b
zrok \bshare\b
""".strip().splitlines()
)
_MINERS: Final = re.compile(
    r"(?i)^(?:xmrig(?:-\w+)?|xmr-stak\S*|t-rex|ethminer|nbminer|lolminer|gminer|teamredminer|phoenixminer|cgminer|bfgminer|"
    r"cpuminer\S*|minerd|ccminer|nanominer|srbminer\S*|wildrig\S*|claymore|rigel|bzminer|cryptonight|kdevtmpfsi|kinsing)$"
)
_DNS_TUNNELS: Final = frozenset("iodine iodined dnscat dnscat2 dns2tcpc dns2tcp dnscapy dnspot ozymandns".split())
_SCANNERS: Final = frozenset(
    "nmap masscan zmap rustscan unicornscan arp-scan netdiscover nbtscan naabu zgrab zgrab2 sx".split()
)
_SHELLS: Final = re.compile(r"(?:/bin/|/usr/bin/)?(?:ba|da|z|k|a)?sh\b|cmd\.exe|powershell")


def _ssh(command: Command) -> Finding | None:
    if command.name in ("ssh", "autossh", "slogin", "dbclient", "plink", "ssh.exe"):
        if command.name == "autossh":
            return Finding(Kind.REVERSE_TUNNEL, "ssh.autossh")
        rule = ssh.tunnels_back(command.arguments)
        if rule:
            return Finding(Kind.REVERSE_TUNNEL, rule)
        if command.name in ("dbclient", "plink") and "-R" in command.arguments:
            return Finding(Kind.REVERSE_TUNNEL, "ssh.remote_forward")
    # A renamed client keeps its arguments: -R port:host:port … user@host
    text = command.text
    if (
        command.name not in _KNOWN
        and re.search(r"\s-\w*R\s*(?:\[?[\w.*:]*\]?:)?\d+:[\w.-]+:\d+\b", text)
        and "@" in text
    ):
        return Finding(Kind.REVERSE_TUNNEL, "ssh.remote_forward_shape")
    return None


_KNOWN: Final = frozenset("grep rsync ls cp chown chmod curl sort diff pip git tar rg docker".split())


def _tunnel(command: Command) -> Finding | None:
    name = command.name.removesuffix(".exe")
    arguments = " ".join(command.arguments)
    if name in ("npx", "bunx", "pnpx"):
        name = next((word for word in command.arguments if not word.startswith("-")), name)
    if name in ("python", "python3") and command.arguments[:2] in (["-m", "pyngrok"], ["-m", "sshtunnel"]):
        return Finding(Kind.REVERSE_TUNNEL, f"tunnel.{command.arguments[1]}")
    if name in _TUNNELS and re.search(_TUNNELS[name], arguments):
        return Finding(Kind.REVERSE_TUNNEL, f"tunnel.{name}")
    if re.search(r"\bclient\s+(?:-\S+\s+)*\S+:\d+\s+.*\bR:(?:\S+:)?(?:socks|\d+)", arguments):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.chisel_shape")
    frp = r"(?:^|\s)(?:-c\s+)?\S*frpc?\.(?:ini|toml|yaml)\b|^(?:tcp|udp|https?|stcp|xtcp)\s.*--local[_-]port\b"
    if re.search(frp, arguments) and command.name not in _READERS:
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.frp_shape")
    source = command.piped_from
    relays = name in _NETCATS and source is not None and source.name in _NETCATS
    if relays and source is not None and not (_is_loopback(arguments) and _is_loopback(source.text)):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.nc_pipe")
    if name in _NETCATS and re.search(r"(?:-\w*[ec]|--exec|--sh-exec)[= ]\S*\b(?:nc|ncat|netcat|socat)\b", arguments):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.nc_exec")
    if name == "socat":
        ends = [word for word in command.arguments if not word.startswith("-")]
        outward = [
            word
            for word in ends
            if re.match(r"(?i)(?:tcp[46]?|openssl|ssl|udp[46]?|proxy|socks4a?)(?:-connect)?:", word)
        ]
        if outward and any(re.match(r"(?i)(?:exec|system|pty)[:,]", word) for word in ends):
            return Finding(Kind.REVERSE_SHELL, "shell.socat")
        if len(outward) > 1 and not all(_is_loopback(word) for word in outward):
            return Finding(Kind.REVERSE_TUNNEL, "tunnel.socat")
    return None


_NETCATS: Final = frozenset(("nc", "ncat", "netcat", "nc.traditional", "nc.openbsd"))


def _is_loopback(text: str) -> bool:
    return re.search(r"(?i)\b(?:localhost|127(?:\.\d+){3}|0\.0\.0\.0|\[?::1\]?)(?![\w.])", text) is not None


def _miner(command: Command) -> Finding | None:
    if command.name in _READERS:
        return None
    if _MINERS.match(command.name) and not {"--version", "--help", "-h", "-V"}.issuperset(command.arguments or ["run"]):
        return Finding(Kind.MINING, "mining.program")
    text = " ".join(command.arguments)
    flags = _MINER_FLAGS.search(text)
    if flags and re.search(r"(?:^|\s)(?:-o|--url|--pool|-P|--server|-u|--user|--wallet|--donate-level)\b", text):
        return Finding(Kind.MINING, "mining.flags")
    if re.search(
        r"(?:^|\s)(?:-o|--url|--pool)[= ](?!https?:)\S+:(?:3333|4444|5555|7777|8888|9999|14433|14444|45700)\b", text
    ) and re.search(r"(?:^|\s)(?:-u|--user|--wallet)[= ](?:\w{20,}|\w+\.[A-Za-z]\w*(?:\s|$))|\s-p x\b", text):
        return Finding(Kind.MINING, "mining.pool_shape")
    return None


def _scanner(command: Command) -> Finding | None:
    text = " ".join(command.arguments)
    if command.name in _SCANNERS and not {"--version", "--help", "-h", "-V"}.issuperset(command.arguments or ["-h"]):
        targets = [word for word in command.arguments if not word.startswith("-")]
        if not targets or not all(_is_loopback(word) or word.isdigit() for word in targets):
            return Finding(Kind.PROBING, f"probing.{command.name}")
    if command.name in ("nc", "ncat", "netcat") and re.search(r"(?:^|\s)-\w*z", text):
        ranged = re.search(r"\s\d+-\d+\b", f" {text}") is not None
        if not _is_loopback(text) and (ranged or _ADDRESS.search(text)):
            return Finding(Kind.PROBING, "probing.nc")
    if command.name == "fping" and re.search(r"(?:^|\s)-\w*g|/\d{1,2}\b", text):
        return Finding(Kind.PROBING, "probing.fping")
    if command.name in (
        "hping3",
        "hping",
        "crackmapexec",
        "nxc",
        "netexec",
        "enum4linux",
        "smbmap",
        "medusa",
        "responder",
    ) or (command.name == "hydra" and re.search(r"(?:^|\s)-[lLpPC]\s", text)):
        return Finding(Kind.PROBING, f"probing.{command.name}")
    return None


def _dns(command: Command) -> Finding | None:
    if command.name.removesuffix(".py") in _DNS_TUNNELS and command.arguments:
        return Finding(Kind.DNS_TUNNEL, f"dns.{command.name}")
    if command.name in ("dig", "nslookup", "host", "drill", "kdig", "resolvectl", "getent", "ping"):
        for word in command.arguments:
            computed = r"\$\(|`" if command.name == "ping" else r"\$\(|`|\$\{?\w+\}?\."
            if re.search(computed, word) and re.search(r"\.\w", word):
                return Finding(Kind.DNS_TUNNEL, "dns.substituted_label")
            if any(len(label) >= 40 for label in word.split(".")) and "." in word and "/" not in word:
                return Finding(Kind.DNS_TUNNEL, "dns.long_label")
    return None


def _reverse_shell(command: Command) -> Finding | None:
    text = " ".join(command.arguments)
    if command.name in _NETCATS:
        executes = re.search(r"(?:^|\s)(?:-\w*[ec]|--exec|--sh-exec)[= ](.*)", text)
        if executes and _SHELLS.search(executes[1]):
            return Finding(Kind.REVERSE_SHELL, "shell.nc_exec")
        source = command.piped_from
        if source is not None and re.fullmatch(r"(?:ba|da|z)?sh", source.name) and not re.search(r"-\w*l", text):
            return Finding(Kind.REVERSE_SHELL, "shell.nc_pipe")
    source = command.piped_from
    if (
        re.fullmatch(r"(?:ba|da|z)?sh", command.name)
        and source is not None
        and (source.name in _NETCATS or source.name == "telnet" or source.text.startswith("openssl s_client"))
    ):
        return Finding(Kind.REVERSE_SHELL, "shell.nc_pipe")
    fed_by_shell = source is not None and re.fullmatch(r"(?:ba|da|z)?sh", source.name) is not None
    if command.name == "openssl" and "s_client" in command.arguments and fed_by_shell:
        return Finding(Kind.REVERSE_SHELL, "shell.openssl")
    if command.name == "msfvenom" and "reverse" in text:
        return Finding(Kind.REVERSE_SHELL, "shell.msfvenom")
    if command.name in ("awk", "gawk") and "/inet/tcp/" in text:
        return Finding(Kind.REVERSE_SHELL, "shell.awk")
    return None


# -- what leaves ------------------------------------------------------------------------------------------------------

_SECRET: Final = re.compile(
    r"(?:^|[\s'\"=@:/~])(?:\.ssh(?:/(?!config\b|known_hosts)|(?=\s))|id_(?:rsa|ed25519|ecdsa|dsa)\b(?!\.pub)|\.aws/credentials|\.netrc|\.git-credentials|"
    r"\.docker/config\.json|\.kube/config|\.config/gcloud|etc/shadow|etc/passwd|proc/(?:self|\d+)/environ|\.huggingface/token|"
    r"\.pypirc|\.npmrc|\.env\b|\.bash_history|serviceaccount/token|wallet\.dat|\.gnupg)"
)
_DROPS: Final = re.compile(
    r"(?i)\b(?:transfer\.sh|file\.io|0x0\.st|webhook\.site|requestbin\.\w+|pipedream\.net|pastebin\.com|paste\.rs|ix\.io|termbin\.com|"
    r"bashupload\.com|oshi\.at|catbox\.moe|gofile\.io|anonfiles\.com|temp\.sh|discord(?:app)?\.com/api/webhooks|api\.telegram\.org/bot|"
    r"interactsh?\.\w+|oast\.\w+|burpcollaborator\.net|beeceptor\.com)"
)
_ENVIRONMENT: Final = frozenset({"env", "printenv", "set", "export"})


def _exfiltration(command: Command) -> Finding | None:
    text = " ".join(command.arguments)
    if _is_loopback(text):
        return None
    if command.name in ("curl", "wget") and "kubernetes.default" not in text:
        computed = " ".join(re.findall(r"\$\([^)]*\)?|`[^`]*`", text))
        if _SECRET.search(computed) or re.search(r"[(`]\s*(?:env|printenv)\b", computed):
            return Finding(Kind.EXFILTRATION, "exfiltration.secret")
    if not _sends(command):
        return None
    text = " ".join(command.arguments)  # with what _sends found to be read from files
    if _SECRET.search(f" {text}"):
        return Finding(Kind.EXFILTRATION, "exfiltration.secret")
    if _DROPS.search(text):
        return Finding(Kind.EXFILTRATION, "exfiltration.drop")
    source = command.piped_from
    while source is not None:
        if _SECRET.search(f" {source.text}") or source.name in _ENVIRONMENT:
            return Finding(Kind.EXFILTRATION, "exfiltration.secret")
        if source.name in ("tar", "zip", "7z", "dd", "mysqldump", "pg_dump") or (
            source.name == "find" and "-exec" in source.arguments
        ):
            return Finding(Kind.EXFILTRATION, "exfiltration.archive")
        source = source.piped_from
    return None


def _sends(command: Command) -> bool:
    """Whether a program hands data of its own to the far side."""
    text = " ".join(command.arguments)
    if command.name == "curl":
        return (
            re.search(r"(?:^|\s)(?:-[A-Za-z]*[TFd]\b|-[TFd]\S|--(?:data|upload-file|form|json)\S*)", text) is not None
        )
    if command.name == "wget":
        return "--post" in text or "--body" in text
    if command.name in _NETCATS or command.name in ("socat", "telnet"):
        redirected = any(each.lstrip("0123456789").startswith("<") for each in command.redirects)
        return command.piped_from is not None or (redirected and _note_redirects(command))
    if command.name in ("scp", "rsync", "sftp", "rclone", "ftp", "lftp"):
        words = [word for word in command.arguments if not word.startswith("-")]
        return bool(words) and re.match(r"[\w.@-]+:(?!\\)", words[-1]) is not None
    if command.name == "ssh":
        return command.piped_from is not None
    return command.name in ("aws", "gsutil", "az", "http", "https", "xh")


def _note_redirects(command: Command) -> bool:
    """What is read from a file is an argument too, to the rules that follow."""
    command.arguments.extend(each.lstrip("0123456789<") for each in command.redirects if "<" in each)
    return True


_COMMAND_RULES: Final[tuple[Callable[[Command], Finding | None], ...]] = (
    _ssh, _tunnel, _miner, _reverse_shell, _scanner, _dns, _exfiltration,
)  # fmt: skip

# -- by repetition ----------------------------------------------------------------------------------------------------

_LOOPS: Final = (
    (re.compile(r"\b(?:for|while|until)\b"), re.compile(r"\bdo\b"), re.compile(r"\bdone\b")),
    (re.compile(r"\bseq\b"), re.compile(r"\|\s*(?:xargs|parallel)\b"), None),
    (re.compile(r"\bparallel\b"), re.compile(r""), re.compile(r":::")),
    (re.compile(r"\bfor\b"), re.compile(r"\bin\s+range\("), None),
)
"""How a loop begins, where its body begins, and what must stand behind it (the body is what follows to the end)."""
_COUNTED: Final = re.compile(r"\bfor\s+(\w+)\s+in\s+([^;\n]{1,2000})[;\n]\s*do\b")
_MOST_LOOPS: Final = 16
_TRIES: Final = re.compile(
    r"\b(?:ping|nc|ncat|netcat|telnet|curl|wget|timeout\s+\S+\s+bash)\b|/dev/tcp/|connect_ex|socket\.connect|create_connection|\.connect\(\("
)
_VARIED: Final = re.compile(
    r"(?:\d{1,3}\.){1,3}(?:\$\{?\w+\}?|\{\w*\}|%[sd]|['\"]?\s*[+%]\s*(?:str\()?\w+|\{\}|\{\d+\.\.\d+\})|/dev/tcp/[^/\s]+/\$\{?\w+|"
    r"-z\S*\s+\S+\s+\$\{?\w+|connect_ex\(\(\s*\S+,\s*\w+\s*\)\)|\$\{?(?:ip|host|addr|target|subnet|net)\w*\}?"
)


def _loop(text: str) -> Finding | None:
    """Many hosts or ports, one after the other."""
    for loop in itertools.islice(_COUNTED.finditer(text), _MOST_LOOPS):
        variable, listed, body = loop[1], loop[2], text[loop.end() :]
        many = re.search(r"\$\(|`|\{\w+\.\.\w+\}", listed) or len(listed.split()) > 3
        tried = (
            rf"(?:curl|wget)[^;|&\n]*:\$\{{?{variable}\b|(?:nc|ncat|netcat)\s[^;|&\n]*-\w*z[^;|&\n]*\$\{{?{variable}\b"
        )
        if many and re.search(tried, body) and not _is_loopback(body):
            return Finding(Kind.PROBING, "probing.loop")
    for body in _bodies(text):
        if _TRIES.search(body) and _VARIED.search(body) and not _only_loopback(text):
            return Finding(Kind.PROBING, "probing.loop")
        if re.search(r"\b(?:dig|nslookup|host)\b[^|;&\n]*\$\{?\w+\}?\.[\w.-]+", body):
            return Finding(Kind.DNS_TUNNEL, "dns.loop")
    return None


def _bodies(text: str) -> Iterator[str]:
    for begins, body, ends in _LOOPS:
        first = begins.search(text)
        found = first and body.search(text, first.end())
        if found and (ends is None or ends.search(text, found.end())):
            yield text[found.end() :]


def _only_loopback(text: str) -> bool:
    varied = re.search(r"(?:\d{1,3}\.){1,3}(?:\$|\{|%|['\"])", text)
    return (
        varied is None
        and _is_loopback(text)
        and all(each.startswith(("127.", "0.")) for each in _ADDRESS.findall(text))
    )

"""Commands that let the far side in, or everything out. Runs later, and live. Pure."""

from __future__ import annotations

import re
from typing import Final

from ray_guard.detect import Finding, Kind, ssh
from ray_guard.detect.commands.line import Line, is_loopback, is_outside
from ray_guard.detect.shell import NETCATS, READERS, Command

_SSH: Final = frozenset("ssh slogin dbclient plink ssh.exe plink.exe dropbear-client scp sftp tsh".split())
#: programs whose -R, -D or -w is no forward
_OTHERS: Final = READERS | frozenset(
    "rsync cp chown chmod chgrp setfacl curl sort pip tar docker nc ncat netcat lsof ctags go cmake ctest java mosh "
    "patch zip unzip 7z rpm dpkg apt apt-get yum dnf git svn hg make gcc g++ clang ld scp sftp kubectl helm "
    "ffmpeg".split()
)

_TALKERS: Final = frozenset("curl wget http https httpie youtube-dl yt-dlp aria2c".split())
#: program, and what its arguments must show for it to be at work
_PROGRAMS: Final = dict(
    line.split(" ", 1)
    for line in r"""
boringproxy .
bore \blocal\b
brook \b(?:client|wsclient|wssclient|relay|connect|server)\b
chisel \b(?:client|server)\b
cloudflared \b(?:tunnel|access)\b(?!\s+(?:list|login|info|help|version))
code ^tunnel\b(?!\s+(?:status|user|--help))
code-cli ^tunnel\b
code-insiders ^tunnel\b
code-tunnel .
corkscrew \S+\s+\d+\s+\S+\s+\d+
cpolar \b(?:tcp|http|start)\b
devtunnel \b(?:host|connect)\b
earthworm .
edge -c\s+\S+\s.*-l\b
ew -s\s+(?:rssocks|rcsocks|lcx_\w+|ssocksd)
expose \bshare\b
frpc ^(?!-v\b|--version|completion|verify|-h\b|--help)
frps ^(?!-v\b|--version|completion|verify|-h\b|--help)
gost (?:^|\s)-(?:L|F|R|C)\b|-[LFR]=
gsocket .
gs-netcat .
hans (?:^|\s)-[cs]\b
headscale \b(?:serve|nodes)\b
holesail --live|--connect
htc .
hts .
httptunnel .
hysteria \b(?:client|server)\b|-c\b
icmptunnel .
inlets \bclient\b
inlets-pro \bclient\b
iox ^(?:fwd|proxy)\b
jprq ^(?:http|tcp|serve)\b
kcptun_client .
client_linux_amd64 -r\s.*-l\s
ktunnel \b(?:expose|inject)\b
lcx -(?:slave|listen|tran)\b
ligolo .
ligolo-agent .
ligolo-ng .
ligolo-proxy .
localtunnel --port|-p\b
localxpose \b(?:http|tcp|tls|udp|tunnel)\b
loclx \b(?:http|tcp|tls|udp|tunnel)\b
lt --port|-p[ =]?\d
n2n_edge .
naive --listen|--proxy
nebula -config
neoreg.py -u\b
reGeorgSocksProxy.py -u\b
netbird ^up\b
netmaker .
ngrok \b(?:http|tcp|tls|start|tunnel|service)\b
nhc ^start\b
npc -server|-vkey
nps .
nps_client -server|-vkey
openconnect \S
openvpn --(?:remote|config)|\.(?:ovpn|conf)\b
pagekite .
pagekite.py .
pinggy .
playit .
pproxy -[lr]\b
proxytunnel -[pd]\b
ptunnel -p\b|-x\b|-c\b
ptunnel-ng -p
pyngrok .
rathole \S*\.toml|--(?:client|server)
revsocks -(?:connect|listen)
rpivot .
rsocx -[lr]\b
rsocks .
rssocks .
shadowsocks-rust .
sing-box ^run\b
sish .
softether .
ss-local .
ss-redir .
ss-tunnel .
sslocal .
ssh-tunnel .
sshtunnel .
sshuttle (?:^|\s)-\w*r|--remote
stowaway_agent .
stunnel ^(?!-version|-help|-sockets)
stunnel4 ^(?!-version|-help|-sockets)
suo5 .
tailscale \b(?:up|funnel|serve|login)\b
tailscaled .
telebit \S
telepresence ^(?:connect|intercept)\b
teleport ^start\b
tincd .
tmate ^(?!-V)
tor ^(?!--version|--help|--hash-password|--verify-config|--list)
trojan .
trojan-go .
tunnelmole .
tunnelto --port
udp2raw -[cs]\b
upterm ^host\b
v2ray ^run\b|-c(?:onfig)?\b
venom_agent .
vtund .
wg-quick \bup\b
wg \bset(?:conf)?\b
wireproxy -c\b
wstunnel .
xray ^run\b|-c(?:onfig)?\b
zerotier-cli \bjoin\b
zerotier-one .
zrok \b(?:share|reserve)\b
""".strip().splitlines()
)
_SHAPED: Final = 4096
"""Characters of arguments whose shape is looked at: many patterns look on from each of many places."""
#: what the arguments of tunnels look like under any name
_SHAPES: Final = tuple(
    (rule, re.compile(pattern))
    for rule, pattern in (
        ("chisel", r"^.{0,300}?\bclient\s.{0,300}?:\d+\S{0,200}\s.{0,300}?\bR:(?:\S{1,253}:)?(?:socks|\d+)"),
        ("chisel", r"\bserver\b.{0,300}\s--reverse\b"),
        ("frp", r"(?:^|\s)(?:-c[= ]?|--config[= ])?\S*\bfrp[cs]?\.(?:ini|toml|ya?ml|json)\b"),
        ("frp", r"^(?:tcp|udp|https?|stcp|xtcp)\s.{0,300}--local[_-]port\b"),
        ("frp", r"^(?:tcp|udp)\s.{0,300}-s\s\S+:\d+\s.{0,300}-r\s\d+"),
        ("ngrok", r"^(?:tcp|http|tls)\b.{0,300}--authtoken\b"),
        ("ngrok", r"^start\s+--all\b.{0,300}--config\b"),
        ("cloudflared", r"\btunnel\b\s.{0,300}(?:--no-autoupdate|\brun\b.{0,300}--token|--hello-world)"),
        ("cloudflared", r"\btunnel\b\s.{0,300}--url[ =](?:https?|tcp|ssh|unix|rdp):"),
        ("bore", r"^local\s.{0,300}--to[ =]\S"),
        ("gost", r"(?:^|\s)-L[= ]?(?:rtcp|rudp|socks5?|relay|red\w*|http2?|ss)(?:\+\w+)?://"),
        ("gost", r"(?:^|\s)-F[= ]?(?:relay|socks[45]a?|https?2?|wss?|m?tls|quic|kcp|sshd?|ss|h2c?|grpc|forward)(?:\+\w+)?://[^\s/]*:\d+(?:[\s?]|$)"),
        ("reverse_socks", r"^(?:-[\w-]{1,30}\s+){0,8}-connect[ =]\S{1,253}:\d{2,5}(?:\s|$)"),
        ("web_socks", r"https?://\S{1,300}\.(?:jspx?|php|as[hp]x?)\b.{0,300}\s--(?:polling|listen|socks)\S{0,30}"),
        ("web_socks", r"(?:^|\s)(?:-[pl]|--listen[\w-]{0,20})[= ]\d{2,5}\s.{0,300}https?://\S{1,300}\.(?:jspx?|php|as[hp]x?)\b"),
        ("wstunnel", r"\bclient\b.{0,300}\s-[RL]\s*\S*(?:tcp|udp|socks5|http)://.{0,300}\bwss?://"),
        ("wstunnel", r"(?:^|\s)-R\s*\S*:\d+.{0,300}\bwss?://"),
        ("websocket_relay", r"(?:^|\s)tcp:\S+:\d+\s.{0,300}\bwss?://"),
        ("websocket_relay", r"\bwss?://\S+\s+(?:\S{1,200}\s+){0,8}tcp:\S+:\d+"),
        ("kcptun", r"(?:^|\s)-r\s+\S+:\d+\s+.{0,300}-l\s+\S*:\d+\s.{0,300}--?(?:mode|crypt|key)\b"),
        ("rpivot", r"--server-(?:ip|port)[ =]\S{1,253}\s.{0,300}--server-(?:ip|port)\b"),
        ("nps", r"(?:^|\s)-server=\S+:\d+\s.{0,300}-vkey="),
        ("stowaway", r"(?:^|\s)-c\s+\S+:\d+\s.{0,300}-s\s+\S+.{0,300}--reconnect\b"),
        ("icmp", r"(?:^|\s)-lp\s*\d+\s.{0,300}-da\s*\S+\s.{0,300}-dp\s*\d+"),
        ("rathole", r"(?:^|\s)--client\s+\S*\.toml\b"),
        ("tailscale", r"--auth-?key[= ]\S*tskey-"),
        ("tailscale", r"--tun=userspace-networking"),
        ("hidden_service", r"(?i)HiddenService(?:Dir|Port)"),
        ("vscode", r"^tunnel\s.{0,300}--accept-server-license-terms"),
    )
)  # fmt: skip
_BY_SERVICE: Final = re.compile(
    r"(?i)(?:^|[\s@/])(?:serveo\.net|(?:ssh\.)?localhost\.run|(?:[\w-]+\.)?a\.pinggy\.io|(?:free|pro)\.pinggy\.(?:io|online)|"
    r"srv\.us|tunnel\.us\.ngrok\.com|connect\.ngrok-agent\.com|bore\.pub|ssh-j\.com)(?=[\s:/]|$)"
)
_ONION: Final = re.compile(r"(?i)(?<![\w.])(?:[a-z2-7]{16}|[a-z2-7]{56})\.onion\b")
_CONFIGURES: Final = re.compile(
    r"(?im)^[ \t]*RemoteForward[ =\t]+\S+[ \t]+\S|\bRemoteForward[ =]+\S+\s+\S+|^[ \t]*HiddenServicePort\s+\d|"
    r"server_?addr\s*=.{1,400}(?:remote_?port|proxies)\b|^[ \t]*Endpoint\s*=\s*\S+:\d+|\[client\.services\.",
    re.DOTALL,
)
_NETCATS: Final = NETCATS | {"telnet"}
_OUTWARD: Final = re.compile(r"(?i)(?:tcp[46]?|openssl|ssl|udp[46]?|proxy|socks4a?|socks5|sctp)(?:-connect)?:")
_LISTENS: Final = re.compile(r"(?i)(?:tcp[46]?|openssl|udp[46]?|sctp)-(?:listen|l):")
_DESCRIPTOR: Final = re.compile(r"(?<!\d)(\d{1,3})<>\s*/dev/(?:tcp|udp)/")
_COPIED: Final = re.compile(r"<&\s*(\d{1,3})\s*1?>&\s*(\d{1,3})")
_INWARD: Final = re.compile(r"(?i)(?:exec|system|pty)[:,]")


def by_ssh(command: Command, _line: Line) -> Finding | None:
    """OpenSSH's client and those that take its arguments, under any name."""
    if command.name == "autossh":
        rule = (
            ssh.tunnels_back([word for word in command.arguments if not re.fullmatch(r"-M\d*", word)]) or "ssh.autossh"
        )
        return Finding(Kind.REVERSE_TUNNEL, rule)
    if command.name in _SSH:
        rule = ssh.tunnels_back(command.arguments)
        if not rule and command.name not in ("ssh", "slogin", "ssh.exe", "scp", "sftp"):  # other options than OpenSSH's
            rule = (
                "ssh.remote_forward" if any(re.match(r"-[A-Za-z0-9]{0,8}R", word) for word in command.arguments) else ""
            )
        return Finding(Kind.REVERSE_TUNNEL, rule) if rule else None
    # A renamed client keeps its arguments: -R port:host:port … host
    if command.name not in _OTHERS and ssh.looks_like_remote_forward(command.arguments):
        return Finding(Kind.REVERSE_TUNNEL, "ssh.remote_forward_shape")
    return None


def by_program(command: Command, _line: Line) -> Finding | None:
    """Tunnels by their names, and by what they are told."""
    name = command.name if command.name in _PROGRAMS else command.program
    arguments = " ".join(command.arguments)
    if command.name in READERS or arguments in ("--version", "--help", "-h", "-V", "help", "version"):
        return None
    if name in _PROGRAMS and (
        re.search(_PROGRAMS[name], arguments) or (not arguments and _PROGRAMS[name] in (".", "^(?!-V)"))
    ):
        return Finding(Kind.REVERSE_TUNNEL, f"tunnel.{name}")
    for rule, shape in _SHAPES if command.name not in _TALKERS else ():
        if shape.search(arguments[:_SHAPED]):
            return Finding(Kind.REVERSE_TUNNEL, f"tunnel.{rule}_shape")
    if command.name in ("ssh", "curl", "nc", "ncat") and (_BY_SERVICE.search(arguments) or _ONION.search(arguments)):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.service")
    if name == "ip" and re.search(r"\blink\s+add\b.*\btype\s+(?:wireguard|gre|ipip|sit|vxlan|l2tp|tun)\b", arguments):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.ip_link")
    return _relay(command, name, arguments)


def _relay(command: Command, name: str, arguments: str) -> Finding | None:
    """Two connections of netcat's or socat's kind, back to back."""
    source = command.piped_from
    relays = name in _NETCATS and source is not None and (source.name in _NETCATS or "s_client" in source.arguments)
    if relays and source is not None and not (is_loopback(arguments) and is_loopback(source.text)):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.nc_pipe")
    runs = r"(?:^|\s)(?:-\w*[ec]|--exec|--sh-exec)[= ]\S*\b(?:nc|ncat|netcat|socat|sshd|ssh)\b"
    if name in _NETCATS and re.search(runs, arguments):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.nc_exec")
    ends = [word for word in command.arguments if not word.startswith("-")]
    outward = [word for word in ends if _OUTWARD.match(word) and (name == "socat" or re.search(r":[^:/\s]+:\d", word))]
    if not outward or len(ends) < 2:
        return None
    if any(_INWARD.match(word) for word in ends):
        return Finding(Kind.REVERSE_SHELL, "shell.socat")
    local = [word for word in ends if re.match(r"(?i)unix(?:-connect)?:", word)]
    if (len(outward) > 1 or local) and not all(is_loopback(word) and "socks" not in word.lower() for word in outward):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.socat")
    listens = [word for word in ends if _LISTENS.match(word)]
    enters = listens and (
        re.match(r"(?i)openssl", listens[0])
        or any(re.match(r"(?i)socks|proxy|openssl", word) or is_outside(word.split(":")[1]) for word in outward)
    )
    return Finding(Kind.REVERSE_TUNNEL, "tunnel.socat") if enters else None


def in_text(line: Line) -> Finding | None:
    """Configurations of tunnels that are written, and used; connections whose descriptors are copied crosswise."""
    opened = set(_DESCRIPTOR.findall(line.text))
    if len(opened) > 1 and any(opened.issuperset(each.groups()) for each in _COPIED.finditer(line.text)):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.descriptors")
    found = _CONFIGURES.search(line.text)
    if found and (line.writes or not line.only_read):
        return Finding(Kind.REVERSE_TUNNEL, "tunnel.configuration")
    return None

"""Programs in other languages, given on a command line, in a here-document or in a file. Runs later, and live. Pure.

Each rule names what a text must show, all of it, and what excuses it. Each is searched for by itself, in linear time.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ray_guard.detect import Finding, Kind
from ray_guard.detect.commands.line import Line


class _Code(NamedTuple):
    kind: Kind
    rule: str
    shows: tuple[re.Pattern[str], ...]
    excused: re.Pattern[str] | None = None


_CONNECTS: Final = re.compile(
    r"socket\.socket|\bsocket\(|create_connection|[\"']socket[\"']\)\.socket|open_connection|fsockopen|stream_socket_client|socket_create|[sS]ocket\.(?:tcp|connect)\(|"
    r"TCPSocket|TCPServer|TcpClient\(|TcpListener|IO::Socket|require\(?\s*[\"']socket[\"']|-MIO\b|net\.(?:connect|Socket|createConnection|Dial)|[\"']net[\"']\)|socket\(\s*(?:S,\s*)?PF_INET|"
    r"Sockets\.TCPClient|using Sockets\b|new Socket\(|\bsocket \d+\.\d+\.\d+\.\d+ \d+|"
    r"\[socket\s+(?:-server\s+)?[\w.-]+\s+\d+\]|syscall\.Socket\(|TcpStream::connect"
)
_LOOPBACK: Final = re.compile(r"localhost|127\.0\.0\.1|\[::1\]")
_SENDS: Final = re.compile(
    r"(?:requests|httpx|session|aiohttp|client|s|r)\.(?:post|put)\(|\burlopen\b|\bRequest\(|\.sendall\b|\.send\(|http\.client|smtplib|sendmail|ftplib|\bfetch\(|"
    r"https?[\"']\)\.request|->post\b|Net::HTTP\.(?:post|put|start)|file_get_contents\([\"']https?:|upload_file\(|upload_fileobj\(|\.put\([\"']/|"
    r"put_object\(|axios\.(?:post|put)|curl_exec|storbinary|UploadString|Invoke-(?:WebRequest|RestMethod)"
)
_SECRET: Final = re.compile(
    r"\.ssh/(?!config\b|known_hosts)|id_(?:rsa|ed25519|ecdsa|dsa)\b(?!\.pub)|\.aws/credentials|\.netrc\b|"
    r"\.git-credentials|\.kube/config|\.docker/config\.json|/etc/shadow|/etc/passwd|/proc/(?:self|\d+)/environ|wallet\.dat|\.bash_history|\.gnupg|"
    r"serviceaccount/token|huggingface/token"
)

_CODE: Final = (
    _Code(Kind.REVERSE_SHELL, "code.socket_to_shell", (
        _CONNECTS,
        re.compile(
            r"dup2|(?<!#!)(?<!#! )/bin/(?:ba|da|z|k)?sh\b|"
            r"pty[\"']?\)?\.spawn|ProcessBuilder\(\w+\)\.redirectErrorStream|cmd\.exe|proc_open|exec(?:\s*\()?\s*[\"'](?:/bin/)?(?:ba)?sh|"
            r"spawn\(?\s*[\"'](?:/bin/)?(?:ba|z)?sh|\biex\b|Invoke-Expression|fdopen\("),
    )),
    _Code(Kind.REVERSE_SHELL, "code.obeys", (
        _CONNECTS,
        re.compile(r"\.recv\(|fgets\(|\.gets\b|[.:]receive\(|socket_read|\.receive\b|<\$\w+>|<>|readline|\bgets\s+\$|\[gets\b|\.read\(|\.on\(['\"]data"),
        re.compile(
            r"(?:getoutput|check_output|popen|os\.system|subprocess\.\w+|Popen|io\.popen|os\.execute|shell_exec|"
            r"IO\.popen|Process\.new|proc_open|popen|pipeline|exec|system|eval)\s{0,8}"
            r"(?:\(|\s|\$)(?:\"\$\w+\"|`\$\w+`|[^\n\"'(]{0,20}(?:\bs\.recv|\brecv|\bfgets|\b\w{1,8}\s*[,)]|"
            r"\$_|\.rstrip|\{\*\}|\[gets))|\[eval \$|[`]\$_?\w*`"),
    ), _LOOPBACK),
    _Code(Kind.REVERSE_SHELL, "code.request_to_shell", (
        re.compile(
            r"(?:system|exec|shell_exec|passthru|popen|proc_open|eval|assert)\s*\(\s*(?:\w+\(\s*)?\$_(?:GET|POST|REQUEST|COOKIE|SERVER)\b|"
            r"`\s*\$_(?:GET|POST|REQUEST|COOKIE)\b|\$_(?:GET|POST|REQUEST|COOKIE)\[[^\]\n]{1,40}\][^\n]{0,80}(?:system|exec|passthru)\(\$\w+\)"),
    )),
    _Code(Kind.REVERSE_SHELL, "code.ztcp", (re.compile(r"\bztcp\b"), re.compile(r"[<>]&"))),
    _Code(Kind.DNS_TUNNEL, "code.dns", (
        re.compile(
            r"(?:gethostbyname|getaddrinfo|resolver\.(?:resolve|query)|dns\.(?:lookup|resolve\w*)|dns_get_record|Resolv\.getaddress)\s*\(|gethostbyname\b"),
        re.compile(r"b(?:16|32|64|85)encode|hexlify|\.hex\(\)|toString\(['\"](?:hex|base64)|unpack\(['\"]H|bin2hex|base64_encode|unpack1?\("),
    )),
    _Code(Kind.EXFILTRATION, "code.secret", (_SENDS, _SECRET), _LOOPBACK),
    _Code(Kind.EXFILTRATION, "code.environment", (
        _SENDS,
        re.compile(
            r"(?:dict|str|repr|dumps|urlencode)\(\s*(?:\w+=)?\s*os\.environ\s*\)|(?:json|data|params|files)\s*=\s*(?:dict\()?os\.environ\b(?!\s*\[|\.get)|"
            r"JSON\.stringify\(process\.env\)|ENV\.to_(?:h|a|s|json)|json_encode\(\$_ENV\)|\(getenv\(\)\)|https?://[^\s\"']*[\"']\s*\+\s*os\.environ\b"),
    ), _LOOPBACK),
    _Code(Kind.EXFILTRATION, "code.file_to_address", (
        re.compile(
            r"(?:requests|httpx)\.(?:post|put)\(\s*f?[\"']https?://(?!10\.|127\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"
            r"\d{1,3}\.\d+\.\d+\.\d+"),
        re.compile(r"\bopen\(|read_bytes\(|read_text\("),
    )),
    _Code(Kind.EXFILTRATION, "code.file_to_socket", (
        re.compile(
            r"(?:[.:]connect\(\(?(?:\s*\d+,)?|PeerAddr\s*=>|fsockopen\(|TCPSocket\.(?:new|open)\(|create_connection\(\(?)\s*[\"'][\w.-]+\.[\w-]+[\"']"),
        re.compile(r"\bopen\([^)\n]{0,40}[\"']/|io\.open\(|readFile|createReadStream\(|File\.(?:read|open)\(|file_get_contents\([\"'][^h]"),
        re.compile(r"[.:]send(?:all|file)?\(|\.write\(|fwrite\(|\bprint \$\w+ |\.puts\b|\.pipe\("),
    ), _LOOPBACK),
    _Code(Kind.REVERSE_TUNNEL, "code.remote_forward", (
        re.compile(
            r"request_port_forward|forward_remote_port|reverse_forward_tunnel|create_remote_forward|"
            r"ngrok\.(?:connect|forward)|from pyngrok|"
            r"\bpyngrok\b.{0,300}connect|localtunnel\(|forward_remote_path|open_reverse_tunnel|start_ngrok|cloudflared_tunnel"),
    )),
    _Code(Kind.MINING, "code.browser_miner", (
        re.compile(r"(?i)coin-?hive|CoinImp|cryptoloot|webminepool|deepMiner\b"),
    )),
    _Code(Kind.PROBING, "code.scanner", (
        re.compile(
            r"\barping\(|\bPortScanner\(|\bnmap\.(?:PortScanner|Scan)|\bsrp?1?\(\s*(?:Ether|IP)\(|"
            r"PortScannerAsync|masscan\.PortScanner"),
    )),
)  # fmt: skip


def in_text(line: Line) -> Finding | None:
    """The first of the rules whose words the text shows."""
    for code in _CODE:
        if all(each.search(line.text) for each in code.shows) and not (code.excused and code.excused.search(line.text)):
            return None if line.only_read else Finding(code.kind, code.rule)
    return None

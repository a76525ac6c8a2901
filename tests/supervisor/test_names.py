"""Names: every way to ask a name server reaches the guard's own, which answers for listed names alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Host, Outcome, grants, lacks, open_up, skip_without, wait
from names import UPSTREAM, Names, named

from ray_guard.egress.resolver.told import LEAST_S

pytestmark = pytest.mark.kernel

RINGS = ("call", "actor", "actor_udp")
Span = dict[str, Any]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Names]:
    with named(tmp_path_factory.mktemp("names")) as stage:
        yield stage


def promptly(run: Callable[[], Outcome]) -> Outcome:
    """A wait of the guard's making, or of a resolver that asks again, is there each time; a busy machine's is not."""
    for _ in range(3):
        outcome = run()
        if outcome.seconds < 3:
            return outcome
    raise AssertionError(f"it is answered late: {outcome}")


def spans(host: Host, name: str = "egress connect", **wanted: Any) -> list[Span]:
    found = [span for span in host.journal() if span["name"] == name]
    return [
        s for s in found if all(s["attributes"].get(key.replace("__", ".")) == value for key, value in wanted.items())
    ]


# ---------------------------------------------------------------------------------------------------------------------
# ways to ask

ASK = [
    ("getaddrinfo", "[4, sorted({each[4][0] for each in socket.getaddrinfo('both.example.org', A['port'])})]", None),
    ("gethostbyname", "[0, socket.gethostbyname_ex('both.example.org')[2]]", None),
    ("connected datagram", "told(datagram(A['upstream'], query('both.example.org')))", None),
    ("datagram", "told(datagram(A['upstream'], query('both.example.org'), connected=False))", None),
    ("stream", "told(stream(A['upstream'], query('both.example.org')))", None),
    ("another name server", "told(datagram('203.0.113.53', query('both.example.org')))", None),
    ("another name server by stream", "told(stream('203.0.113.53', query('both.example.org')))", None),
    ("loopback", "told(datagram('127.0.0.53', query('both.example.org')))", None),
    ("0.0.0.0", "told(datagram('0.0.0.0', query('both.example.org'), connected=False))", None),
    ("IPv6", "told(datagram('2001:db8::53', query('both.example.org'), AF_INET6))", None),
    ("IPv6 datagram", "told(datagram('2001:db8::53', query('both.example.org'), AF_INET6, False))", None),
    ("IPv4-mapped", "told(datagram('::ffff:203.0.113.53', query('both.example.org'), AF_INET6))", None),
    ("IPv4-mapped datagram", "told(datagram('::ffff:203.0.113.53', query('both.example.org'), AF_INET6, False))", None),
    ("IPv6 stream", "told(stream('2001:db8::53', query('both.example.org')))", None),
    (
        "sendmmsg",
        """
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        entries = (MMsgHdr * 2)(*[MMsgHdr(message(query('both.example.org', number=n), ADDRESS), 0) for n in (1, 2)])
        sent = call(307, sock.fileno(), ctypes.byref(entries), 2, 0)
        assert (sent, entries[0].length) == (2, len(query('both.example.org'))), (sent, entries[0].length)
        sock.settimeout(3)
        first, second = sock.recv(4096), sock.recv(4096)
        assert {first[:2], second[:2]} == {b"\\0\\1", b"\\0\\2"}
        return told(first)
""",
        ("call", "actor_udp"),
    ),
    (
        "nonblocking stream",
        """
def main():
    with socket.socket() as sock:
        sock.setblocking(False)
        result = sock.connect_ex((A['upstream'], 53))
        assert result in (0, errno.EINPROGRESS), result
        sock.settimeout(3)
        assert sock.connect_ex((A['upstream'], 53)) in (0, errno.EISCONN)
        for part in (struct.pack(">H", len(query('both.example.org'))), query('both.example.org')[:5],
                     query('both.example.org')[5:]):
            sock.sendall(part)
        return told(sock.recv(4096)[2:])
""",
        None,
    ),
    (
        "a stream that is half closed",
        """
def main():
    with socket.create_connection((A['upstream'], 53), 3) as sock:
        sock.sendall(struct.pack(">H", len(query('both.example.org'))) + query('both.example.org'))
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile('rb') as file: return told(file.read()[2:])
""",
        None,
    ),
    (
        "a bound socket, a second question, and another name server",
        """
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.settimeout(3)
        sock.bind(('', 0))
        for server in (A['upstream'], '203.0.113.1'):
            sock.connect((server, 53))
            for _ in range(2):
                sock.send(query('both.example.org'))
                reply = sock.recv(4096)
        return told(reply)
""",
        RINGS,
    ),
]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(("program", "rings"), [pytest.param(p, rings, id=name) for name, p, rings in ASK])
def test_whoever_is_asked_the_guard_answers(
    names: Names, program: str, rings: tuple[str, ...] | None, ring: str
) -> None:
    if rings is not None and (ring not in rings or lacks("pidfd_getfd")):
        pytest.skip("not of such a socket in this ring, or where pidfd_getfd is missing")
    if "def main" not in program:
        program = f"def main(): return {program}"
    outcome = promptly(lambda: names.run(ring, "ADDRESS = sockaddr(A['upstream'], 53)\n" + program))
    assert outcome.said.get("result") in (
        [0, ["127.0.0.1", "127.0.0.3"]],
        [0, ["127.0.0.3", "127.0.0.1"]],
        [4, ["127.0.0.1", "127.0.0.3", "::1"]],
    ), outcome.said or outcome.stderr


@pytest.mark.parametrize("ring", ["call", "actor"])
@pytest.mark.parametrize("options", ["use-vc", ""])
@pytest.mark.parametrize(
    "command",
    [
        ["curl", "-sS", "--http0.9", "--max-time", "5", "http://index.example.org:{port}/"],
        ["node", "-e", "require('net').connect({port},'index.example.org').on('data',d=>process.stdout.write(d))"],
        ["bash", "-c", "cat < /dev/tcp/index.example.org/{port}"],
        ["getent", "ahosts", "index.example.org"],
    ],
    ids=lambda command: command[0],
)
def test_programs_reach_a_listed_name(names: Names, command: list[str], options: str, ring: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"missing: {command[0]}")
    argv = ["env", f"RES_OPTIONS={options}", *(word.replace("{port}", str(names.sink.port)) for word in command)]
    outcome = names.host().run(ring, argv)
    assert "hello" in outcome.stdout or "127.0.0.1" in outcome.stdout, outcome


@pytest.mark.parametrize("ring", ["call", "actor"])
def test_c_ares(names: Names, ring: str) -> None:
    """It takes an answer from another address for forged, so it is told to ask by stream."""
    if shutil.which("node") is None:
        pytest.skip("missing: node")
    program = "require('dns').resolve4('both.example.org',(e,a)=>console.log(JSON.stringify({said:e||a.sort()})))"
    outcome = promptly(lambda: names.host().run(ring, ["node", "-e", program]))
    assert outcome.said == {"said": ["127.0.0.1", "127.0.0.3"]}, outcome


STRICT = """
def main():
    "as musl does: bound, not connected, and the answer must come from a name server that was asked"
    family = AF_INET6 if ':' in A['server'] else AF_INET
    with socket.socket(family, DGRAM) as sock:
        sock.bind(('', 0))
        for n, server in enumerate((A['server'], A['server'])):
            sock.sendto(query('both.example.org', number=n), (server, 53))
        sock.settimeout(3)
        data, source = sock.recvfrom(4096)
        return [*source[:2], told(data)]
"""


@pytest.mark.parametrize("server", [UPSTREAM, "203.0.113.53", "::ffff:203.0.113.53", "2001:db8::53"])
def test_a_program_that_takes_answers_from_whom_it_asked_alone(names: Names, server: str) -> None:
    skip_without("pidfd_getfd")  # datagram sockets cannot send there, and get a line of their own
    skip_without("CAP_NET_RAW")  # the answer comes from an address of the guard's
    for ring in ("call", "actor_udp"):
        said = names.run(ring, STRICT, server=server).said
        assert said.get("result", [])[:2] == [server, 53], said
        assert said["result"][2] in ([0, ["127.0.0.1", "127.0.0.3"]], [0, ["127.0.0.3", "127.0.0.1"]])


MUSL = r"""
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/socket.h>
int main(int count, char **words) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *each;
    int error = getaddrinfo(words[1], words[2], &hints, &found);
    char said[16] = "";
    if (error) { printf("%s\n", gai_strerror(error)); return 0; }
    for (each = found; each && !*said; each = each->ai_next) {
        int sock = socket(each->ai_family, SOCK_STREAM, 0);
        if (!connect(sock, each->ai_addr, each->ai_addrlen) && read(sock, said, 15) < 0) perror("read");
        close(sock);
    }
    printf("%s\n", *said ? said : "refused");
}
"""


@pytest.fixture(scope="module")
def musl(names: Names, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static program with another C library: its resolver asks by datagram, and believes whom it asked alone."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("missing: musl-gcc (apt-get install musl-tools)")
    folder = tmp_path_factory.mktemp("musl")
    open_up(folder)
    subprocess.run(["musl-gcc", "-static", "-x", "c", "-", "-o", folder / "ask"], input=MUSL, text=True, check=True)
    for name, more in (("musl", []), ("musl udp", ["udp://127.0.0.1:9"])):
        policy = names.policy()
        policy["egress"]["allow"] += more
        names.another(name, {**policy, "files": grants(folder)})
    return str(folder / "ask")


@pytest.mark.parametrize(
    ("name", "said"), [("index.example.org", "hello"), ("evil.example.com", "Name does not resolve")]
)
@pytest.mark.parametrize("ring", ["call", "actor", "actor_udp"])
def test_musl(names: Names, musl: str, ring: str, name: str, said: str) -> None:
    # A datagram socket of an actor's gets a line of its own, and that has no address to believe.
    if ring == "actor" or lacks("CAP_NET_RAW"):
        said = "Try again"
    argv = [musl, name, str(names.sink.port)]
    free = subprocess.run([*names.namespace.prefix, *argv], capture_output=True, text=True, check=True)
    assert free.stdout == "hello\n", free
    host = names.host("musl udp" if ring == "actor_udp" else "musl")
    outcome = promptly(lambda: host.run(ring.removesuffix("_udp"), argv))
    assert outcome.stdout == f"{said}\n", outcome


GO = r"""
package main
import ("bufio"; "fmt"; "net"; "os"; "time")
func main() {
    resolver := &net.Resolver{PreferGo: true}
    dialer := net.Dialer{Timeout: 5 * time.Second, Resolver: resolver}
    connection, err := dialer.Dial("tcp", net.JoinHostPort(os.Args[1], os.Args[2]))
    if err != nil { fmt.Println(err); return }
    said := make([]byte, 5)
    if _, err = bufio.NewReader(connection).Read(said); err != nil { fmt.Println(err); return }
    fmt.Println(string(said))
}
"""


@pytest.fixture(scope="module")
def go(names: Names, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static program without a C library: runtime, system calls and resolver are Go's own."""
    if shutil.which("go") is None:
        pytest.skip("missing: go (apt-get install golang-go)")
    folder = tmp_path_factory.mktemp("go")
    open_up(folder)
    (folder / "ask.go").write_text(GO)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", folder / "ask", folder / "ask.go"], env=environment, check=True)
    names.another("go", {**names.policy(), "files": grants(folder)})
    return str(folder / "ask")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("index.example.org", "hello"),
        ("both.example.org", "hello"),
        ("evil.example.com", "dial tcp: lookup evil.example.com on {server}:53: no such host"),
        ("127.0.0.6", "dial tcp 127.0.0.6:{port}: connect: permission denied"),
    ],
)
@pytest.mark.parametrize("ring", ["call", "actor"])
def test_go(names: Names, go: str, ring: str, name: str, said: str) -> None:
    argv = [go, name, str(names.sink.port)]
    free = subprocess.run([*names.namespace.prefix, *argv], capture_output=True, text=True, check=True)
    assert free.stdout == "hello\n", free
    before = len(spans(names.host("go"), "ray_guard.violation"))
    outcome = names.host("go").run(ring, argv)
    assert outcome.stdout == said.format(server=UPSTREAM, port=names.sink.port) + "\n", outcome
    assert len(spans(names.host("go"), "ray_guard.violation")) == before + (said != "hello")


def test_in_the_actor_itself(names: Names) -> None:
    code = """
import socket
def reach(_=None):
    with socket.create_connection(('index.example.org', port), 5) as sock: return sock.recv(9).decode()
from concurrent.futures import ThreadPoolExecutor
with ray_guard.tool_call('inside', {}):
    result = [reach(), *ThreadPoolExecutor(4).map(reach, range(8))]
"""
    assert names.host().inside(code, port=names.sink.port) == ["hello"] * 9


def test_a_program_that_knew_its_name_servers_before_it_was_confined(names: Names, tmp_path: Path) -> None:
    """The C library has read resolv.conf and RES_OPTIONS by then, and asks by datagram."""
    program = f"""
import socket, sys, ray_guard
assert socket.gethostbyname('evil.example.com') == '127.0.0.6'
ray_guard.confine({names.policy()!r})
with socket.create_connection(('index.example.org', {names.sink.port}), 5) as sock: print(sock.recv(9).decode())
try: print(socket.gethostbyname('evil.example.com'))
except socket.gaierror: print('no such name')
"""
    open_up(tmp_path)
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(tmp_path / "e"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*names.namespace.prefix, sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["hello", "no such name"], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# what is answered


@pytest.mark.parametrize("ring", RINGS)
def test_a_name_that_is_not_listed_does_not_exist_at_once(names: Names, ring: str) -> None:
    host = names.host("udp" if ring == "actor_udp" else "plain")
    name = f"{ring.replace('_', '-')}.evil.example.com"
    outcome = names.run(ring, f"def main(): return socket.getaddrinfo('{name}', 80)")
    assert (outcome.said["kind"], outcome.said["errno"]) == ("gaierror", "-2"), outcome
    assert outcome.seconds < 2
    assert not any(name in asked for _, asked, _ in names.upstream.log)
    # once, of the name that was meant: the C library has asked for it behind both search domains as well
    about = {"server__address": name, "ray_guard__egress__decision": "deny", "ray_guard__egress__reason": "not_listed"}
    (span,) = [s for s in spans(host) if name in str(s["attributes"]["server.address"])]
    assert span in spans(host, **about)
    assert (span["attributes"]["network.peer.address"], span["attributes"]["network.peer.port"]) == (UPSTREAM, 53)
    (violation,) = spans(host, "ray_guard.violation", ray_guard__violation__destination=name)
    assert violation["parent"] == span["id"]


def test_search_domains_behind_a_listed_name_are_no_violation(names: Names) -> None:
    before = len(spans(names.host(), "ray_guard.violation"))
    program = "def main(): return [told(datagram(A['upstream'], query('index.example.org' + e)))[0] for e in ENDS]"
    outcome = names.run("call", "ENDS = ('.corp.example', '.lab.example', '')\n" + program)
    assert outcome.said["result"] == [3, 3, 0]
    assert len(spans(names.host(), "ray_guard.violation")) == before


KINDS = {
    "A": (1, [0, ["127.0.0.1"]]),
    "AAAA": (28, [0, []]),
    "TXT": (16, [0, []]),
    "NULL": (10, [0, []]),
    "MX": (15, [0, []]),
    "SVCB": (64, [0, []]),
    "HTTPS": (65, [0, []]),
    "ANY": (255, [0, []]),
    "TYPE65400": (65400, [0, []]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_addresses_are_all_that_is_told(names: Names, kind: str) -> None:
    number, expected = KINDS[kind]
    names.upstream.log.clear()
    outcome = names.run(
        "call", f"def main(): return told(datagram(A['upstream'], query('index.example.org', {number})))"
    )
    assert outcome.said["result"] == expected
    assert {asked for _, _, asked in names.upstream.log} <= {"A", "AAAA"}


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        ("query('', raw=labels(b'index.example.org') + b'')", 0),
        ("query('INDEX.Example.ORG')", 0),
        ("query('', raw=b'\\x0dindex.example\\x03org\\0')", 3),
        ("query('', raw=b'\\x12index.example.org\\0\\x04evil\\x03com\\0')", 3),
        ("query('', raw=b'\\x05index\\x07example\\x03org\\x01\\0\\0')", 3),
        ("query('', raw=labels(b'x' * 63 + b'.example.org'))", 3),
        ("query('under_score.example.org')", 3),
        ("query('127.0.0.1')", 3),
        ("query('', raw=b'\\xc0\\x0c')", 1),
        ("query('index.example.org', cls=3)", 5),
        ("query('index.example.org')[:-1]", 1),
        ("query('index.example.org') + b'tail'", 1),
        ("b'\\0' * 12", 1),
        ("b'\\0' * 5000", None),
        ("b'\\0' * 5", None),
        ("b'\\0\\0\\x80' + b'\\0' * 20", None),
    ],
)
def test_odd_messages(names: Names, message: str, rcode: int | None) -> None:
    names.upstream.log.clear()
    program = f"""
def main():
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect((A['upstream'], 53))
        sock.send({message})
        try: first = sock.recv(4096)[3] & 15
        except TimeoutError: first = None
        sock.send(query('index.example.org', number=7))
        sock.settimeout(3)
        return [first, told(sock.recv(4096))]
"""
    outcome = names.run("call", program)
    assert outcome.said.get("result") == [rcode, [0, ["127.0.0.1"]]], outcome
    assert {asked.lower() for _, asked, _ in names.upstream.log} <= {"index.example.org", "x" * 63 + ".example.org"}


def test_aliases_are_followed_and_not_told(names: Names) -> None:
    program = "def main(): return told(datagram(A['upstream'], query('alias.example.org')))"
    assert names.run("call", program).said["result"] == [0, ["127.0.0.5"]]
    program = "def main(): return told(datagram(A['upstream'], query('behind.example.net')))"
    assert names.run("call", program).said["result"] == [3, []]


def test_many_addresses_come_by_stream(names: Names) -> None:
    """From upstream, which cuts its datagram short, and to the target alike."""
    program = """
def main():
    short = datagram(A['upstream'], query('many.example.org'))
    return [short[2] & 2, told(short)[1], len(told(stream(A['upstream'], query('many.example.org')))[1])]
"""
    assert names.run("call", program).said["result"] == [2, [], 64]
    assert ("tcp", "many.example.org", "A") in names.upstream.log
    assert (
        names.run("call", "def main(): return len(socket.gethostbyname_ex('many.example.org')[2])").said["result"] >= 40
    )


# ---------------------------------------------------------------------------------------------------------------------
# what the answers are worth

REACH = """
def main():
    with socket.create_connection((A['host'], A['port']), 5) as sock, sock.makefile() as file: return file.read()
"""


def test_the_span_says_the_name_and_the_address(names: Names) -> None:
    assert names.run("call", REACH, host="four.example.org").said["result"] == "hello"
    (span,) = wait(
        lambda: [s for s in spans(names.host(), server__address="four.example.org", ray_guard__egress__reason="name")
                 if "ray_guard.egress.bytes_received" in s["attributes"]],
        "the flow did not end",
    )  # fmt: skip
    found = span["attributes"]
    assert (found["network.peer.address"], found["network.peer.port"]) == ("127.0.0.4", names.sink.port)
    assert (found["ray_guard.egress.decision"], found["ray_guard.egress.bytes_received"]) == ("allow", 5)


def test_choosing_among_addresses_is_no_violation_and_sends_nothing(names: Names) -> None:
    before = len(spans(names.host(), "ray_guard.violation"))
    assert names.run("call", REACH, host="both.example.org").said["result"] == "hello"
    program = """
def main():
    socket.getaddrinfo('both.example.org', A['port'])
    with socket.socket(AF_INET, DGRAM) as sock:
        sock.connect(('127.0.0.1', A['port']))
        own = sock.getsockname()[0]
        try: sock.send(b'x')
        except BrokenPipeError: return own
"""
    assert names.run("call", program).said["result"] == "127.0.0.1"
    assert len(spans(names.host(), "ray_guard.violation")) == before


def test_names_of_the_hosts_file_count(names: Names) -> None:
    assert names.run("call", REACH, host="hosted.example.org").said["result"] == "hello"
    assert names.run("actor", REACH, host="127.0.0.9").said["result"] == "hello"
    assert names.run("call", REACH, host="hosted.example.com").said["errno"] == "EACCES"
    program = "def main(): return told(datagram(A['upstream'], query('hosted.example.org')))"
    assert names.run("call", program).said["result"] == [0, ["127.0.0.9"]]
    assert not names.upstream.asked("hosted.example.org")


def test_two_tools_of_a_call_are_told_together_and_no_other_call(names: Names) -> None:
    code = """
import json
def run(argv): return json.loads(ray_guard.run(argv, capture_output=True, text=True).stdout.splitlines()[-1])
with ray_guard.tool_call('one', {}):
    first = run(raw)
    named = run(ask)
    then = run(raw)
with ray_guard.tool_call('two', {}):
    other = run(raw)
result = [first.get('errno'), named.get('result'), then.get('result'), other.get('errno')]
"""
    raw = names.argv(REACH, host="127.0.0.4")
    ask = names.argv("def main(): return socket.gethostbyname('four.example.org')")
    assert names.host().inside(code, raw=raw, ask=ask) == ["EACCES", "127.0.0.4", "hello", "EACCES"]


@pytest.mark.slow
def test_an_actor_is_told_for_as_long_as_the_answer_lives(names: Names) -> None:
    ask = "def main(): return socket.gethostbyname('brief.example.org')"
    names.upstream.ttl = 1
    try:
        host = names.another("brief", names.policy())
        assert host.run("actor", names.argv(REACH, host="127.0.0.8")).said["errno"] == "EACCES"
        assert host.run("actor", names.argv(ask)).said["result"] == "127.0.0.8"
        assert host.run("actor", names.argv(REACH, host="127.0.0.8")).said["result"] == "hello"
        time.sleep(LEAST_S + 1)
        assert host.run("actor", names.argv(REACH, host="127.0.0.8")).said["errno"] == "EACCES"
        assert host.run("actor", names.argv(REACH, host="brief.example.org")).said["result"] == "hello"
    finally:
        names.upstream.ttl = 60


def test_a_listed_name_leads_to_no_special_address(names: Names) -> None:
    outcome = names.run("call", REACH, host="rebound.example.org")
    assert outcome.said["errno"] == "EACCES"
    assert spans(names.host(), network__peer__address="169.254.169.254", ray_guard__egress__reason="metadata_address")


# ---------------------------------------------------------------------------------------------------------------------
# budgets, modes, losses


def test_queries_and_answers_are_bytes_of_the_call(names: Names) -> None:
    policy = {**names.policy(), "budgets": {"call": {"egress_sent_bytes": 100}}}
    host = names.another("capped", policy)
    program = "def main(): return [told(datagram(A['upstream'], query('index.example.org')))[0] for _ in range(5)]"
    outcome = host.run("call", names.argv(program))
    assert outcome.said["result"] == [0, 0, 5, 5, 5], outcome  # 35 bytes each
    (violation,) = spans(host, "ray_guard.violation")
    assert violation["attributes"]["ray_guard.violation.kind"] == "egress_sent_bytes"


def test_a_policy_that_reports_resolves_everything_and_says_so(names: Names) -> None:
    host = names.another("reporting", {**names.policy(), "mode": "report"})
    assert host.run("call", names.argv(REACH, host="evil.example.com")).said["result"] == "hello"
    found = spans(host, server__address="evil.example.com")
    assert {s["attributes"]["ray_guard.egress.reason"] for s in found} == {"report_only:not_listed"}
    program = """
def main(): return b'secret' in datagram(A['upstream'], query('index.example.org', 16))
"""
    assert host.run("call", names.argv(program)).said["result"] is True
    assert not spans(host, "ray_guard.violation")


def test_without_names_there_is_no_resolver(names: Names) -> None:
    host = names.another("nameless", {"egress": {"allow": [f"127.0.0.1:{names.sink.port}"]}})
    program = "def main(): return datagram(A['upstream'], query('index.example.org'))"
    assert host.run("call", names.argv(program)).said["errno"] == "EACCES"
    program = "def main(): return stream(A['upstream'], query('index.example.org'))"
    assert host.run("call", names.argv(program)).said["errno"] == "EACCES"


def test_the_helper_dies_and_another_takes_its_place(names: Names) -> None:
    host = names.host()
    assert names.run("call", REACH, host="index.example.org").said["result"] == "hello"
    (helper,) = [
        pid for pid in _children(host.supervisor) if b"resolver.helper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(helper, signal.SIGKILL)

    def again() -> bool:
        return names.run("call", REACH, host="index.example.org").said.get("result") == "hello"

    began = time.monotonic()
    wait(again, "names are not resolved any more", 10)
    assert time.monotonic() - began < 8
    assert host.alive


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()

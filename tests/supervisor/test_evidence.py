"""Evidence of real supervisors: sealed as it is written, after they were killed, on a full disk, and meddled with."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, ROOT, Host, Namespace, grants, has_own_supervisors, read_journal, wait

from ray_guard.evidence.verify.check import Kind, State, check
from ray_guard.evidence.verify.seals import read_checkpoints

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own, and so a mount namespace"),
]

_CONNECT = """
import socket, sys
try: socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print('ok')
except OSError as error: print(error.errno)
"""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def port() -> Iterator[int]:
    """Takes connections, and closes them."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def confined(namespace: Namespace, folder: Path, evidence: Path, *allowed: int) -> Iterator[Host]:
    allow = [f"127.0.0.1:{port}" for port in allowed]
    host = Host({"egress": {"allow": allow}, "files": grants(folder)}, evidence, namespace)
    try:
        yield host
    finally:
        host.close()


def connects(host: Host, port: int) -> str:
    return host.run("call", [PYTHON, "-I", "-S", "-c", _CONNECT, str(port)]).stdout.strip()


def violations(evidence: Path, reason: str) -> list[dict[str, Any]]:
    found = [span["attributes"] for span in read_journal(evidence) if span["name"] == "ray_guard.violation"]
    return [each for each in found if each["ray_guard.violation.kind"] == "evidence" and each["error.type"] == reason]


def signer_of(supervisor: int) -> int | None:
    """The process that holds the key: forked by the zygote, which is the supervisor's child."""
    for parent in subprocess.run(["pgrep", "-P", str(supervisor)], capture_output=True, text=True).stdout.split():
        argv = ["pgrep", "-P", parent, "-x", "ray-guard-seal"]
        for pid in subprocess.run(argv, capture_output=True, text=True).stdout.split():
            return int(pid)
    return None


def test_a_job_is_sealed_while_it_runs_and_to_its_end(namespace: Namespace, tmp_path: Path, port: int) -> None:
    evidence = tmp_path / "evidence"
    with confined(namespace, tmp_path, evidence, port) as host:
        assert connects(host, port) == "ok"
        assert connects(host, 9) == "13"
        wait(lambda: check(evidence)[0].sealed, "nothing was sealed")
        (live,) = check(evidence)
        assert (live.state, live.findings) == (State.LIVE, [])
    wait(lambda: check(evidence)[0].state is State.ENDED, "the log was not ended", 10)
    (ended,) = check(evidence)
    assert ended.findings == ended.notes == []
    assert ended.sealed == ended.records > 10


def test_the_next_supervisor_sees_to_what_a_killed_one_left(namespace: Namespace, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    with confined(namespace, tmp_path, evidence) as host:
        host.inside("import builtins; builtins.kept = ray_guard.Popen(['sleep', '100'])")
        wait(lambda: check(evidence)[0].sealed, "nothing was sealed")
        os.kill(host.supervisor, signal.SIGKILL)
        wait(lambda: not host.alive, "the target lives on")
    # What is killed while it waits for the disk holds its log until that has answered.
    wait(lambda: check(evidence)[0].state is not State.LIVE, "its log is held on")
    (segment,) = evidence.glob("*.otlp.jsonl")
    with segment.open("ab") as file:  # the half of a record that a power cut leaves
        file.write(b'{"resourceSpans":[{"re')
    (killed,) = check(evidence)
    assert killed.state is State.KILLED
    assert [finding.kind for finding in killed.findings] == [Kind.UNSEALED]
    left = {span["id"]: span["name"] for span in read_journal(evidence) if not span["ended"]}
    assert sorted(left.values()) == ["execute_tool sleep", "process sleep"]
    before = segment.read_bytes()

    def those_left() -> dict[str, dict[str, Any]]:
        return {span["id"]: span for span in read_journal(evidence) if span["id"] in left}

    with confined(namespace, tmp_path, evidence):
        wait(lambda: list(evidence.glob("*.vouched")), "nothing was recovered")
        wait(lambda: all(span["ended"] for span in those_left().values()), "spans were left open")
    assert segment.read_bytes() == before
    closed = those_left()
    for span in closed.values():
        assert span["ended"]
        assert span["attributes"]["ray_guard.ended_by"] == "supervisor"
        assert span["attributes"]["ray_guard.recovered_from"] == killed.log
    wait(lambda: check(evidence)[1].state is State.ENDED, "the log was not ended", 10)
    old, new = check(evidence)
    assert (old.state, old.findings, new.findings) == (State.RECOVERED, [], [])
    assert any("22 bytes of an unfinished line" in note for note in old.notes)
    # And not twice: the second one finds nothing to do.
    with confined(namespace, tmp_path, evidence) as host:
        wait(lambda: len(list(evidence.glob("*.vouched"))) == 2, "the second log is not vouched for")
    lines = b"".join(path.read_bytes() for path in evidence.glob("*.otlp.jsonl"))
    assert lines.count(b'"ray_guard.recovered_from"') == len(left)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_signer_is_killed(namespace: Namespace, tmp_path: Path, port: int, how: signal.Signals) -> None:
    """An actor can kill or stop what runs as its own user. It is told, and what follows is sealed by another key."""
    evidence = tmp_path / "evidence"
    with confined(namespace, tmp_path, evidence, port) as host:
        wait(lambda: check(evidence)[0].sealed, "nothing was sealed")
        signer = signer_of(host.supervisor)
        assert signer is not None
        os.kill(signer, how)
        assert connects(host, port) == "ok"
        wait(lambda: violations(evidence, "signer lost"), "it was not told", 15)
        assert connects(host, port) == "ok"
        os.kill(signer, signal.SIGCONT) if how is signal.SIGSTOP else None
        wait(lambda: signer_of(host.supervisor) not in (None, signer), "there is no other signer", 10)
    wait(lambda: check(evidence)[1].state is State.ENDED, "the log was not ended", 10)
    old, new = check(evidence)
    assert (old.state, old.findings, new.findings) == (State.RECOVERED, [], [])
    assert old.key is not None
    assert new.key is not None
    assert old.key.public != new.key.public


def test_checkpoints_leave_the_host(
    namespace: Namespace, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever then replaces all of the evidence, key and all, is found out."""
    evidence, kept = tmp_path / "evidence", tmp_path / "elsewhere" / "kept"
    monkeypatch.setenv("RAY_GUARD_EVIDENCE_CHECKPOINTS", str(kept))
    with confined(namespace, tmp_path, evidence, port) as host:
        assert connects(host, port) == "ok"
        wait(lambda: violations(evidence, "checkpoint not exported"), "it was not told")  # there is no such folder
        kept.parent.mkdir()
        assert connects(host, port) == "ok"  # and it was no reason to refuse anything
        wait(kept.exists, "no checkpoint arrived")
    wait(lambda: check(evidence)[0].state is State.ENDED, "the log was not ended", 10)
    wait(lambda: any(note.checkpoint.ended for note, _ in read_checkpoints(kept)), "the last one did not arrive")
    (report,) = check(evidence, checkpoints=read_checkpoints(kept))
    assert report.findings == []
    for path in evidence.iterdir():
        path.rename(tmp_path / path.name.replace(report.log, "gone"))
    monkeypatch.delenv("RAY_GUARD_EVIDENCE_CHECKPOINTS")
    with confined(namespace, tmp_path, evidence, port) as host:
        assert connects(host, port) == "ok"
    wait(lambda: check(evidence)[0].state is State.ENDED, "the log was not ended", 10)
    assert check(evidence)[0].findings == []
    found = [finding.kind for each in check(evidence, checkpoints=read_checkpoints(kept)) for finding in each.findings]
    assert found == [Kind.MISSING]


def test_a_destination_of_checkpoints_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GUARD_EVIDENCE_CHECKPOINTS", "kept/here")
    (tmp_path / "policy.yaml").write_text("version: 1\negress: {allow: []}\n")
    command = str(Path(sys.executable).with_name("ray-guard"))
    argv = [command, "run", "--policy", str(tmp_path / "policy.yaml"), "--evidence", str(tmp_path / "e"), "--", "true"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 125
    assert (
        "RAY_GUARD_EVIDENCE_CHECKPOINTS: 'kept/here' is no destination of checkpoints: an absolute path" in done.stderr
    )


def test_a_segment_is_cut_behind_the_supervisors_back(namespace: Namespace, tmp_path: Path, port: int) -> None:
    evidence = tmp_path / "evidence"
    with confined(namespace, tmp_path, evidence, port) as host:
        assert connects(host, port) == "ok"
        wait(lambda: check(evidence)[0].sealed > 5, "nothing was sealed")
        (segment,) = evidence.glob("*.otlp.jsonl")
        lines = segment.read_bytes().splitlines(keepends=True)
        os.truncate(segment, len(b"".join(lines[:4])))
        (said,) = wait(lambda: violations(evidence, "altered"), "it was not told")
        assert segment.name in said["ray_guard.violation.destination"]
        assert connects(host, port) == "ok"  # and it goes on, in another segment
    wait(lambda: check(evidence)[0].state is State.ENDED, "the log was not ended", 10)
    (report,) = check(evidence)
    (finding,) = report.findings
    assert finding.kind is Kind.REMOVED
    assert f"{len(lines) - 4} records are gone" in finding.text


@pytest.mark.skipif(not ROOT, reason="missing: root, to mount a small disk")
def test_a_full_disk(namespace_on_small_disk: tuple[Namespace, Path], tmp_path: Path, port: int) -> None:
    """Grants are refused, denials recorded, and both are told; with room again all is as before."""
    namespace, disk = namespace_on_small_disk
    evidence = disk / "evidence"
    with confined(namespace, tmp_path, evidence, port) as host:
        assert connects(host, port) == "ok"
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096) == 4096:
                pass
        code = """
import socket
def attempt(port):
    try: socket.create_connection(('127.0.0.1', port)).close()
    except OSError as error: return error.errno
found = [attempt(port) for _ in range(2500)]
result = [found.index(1), set(found[found.index(1):]) == {1}, [attempt(9) for _ in range(50)]]
"""
        granted, all_refused, denied = host.inside(code, port=port)
        assert 0 < granted < 2500  # until what had been set aside for it was used up
        assert all_refused
        assert denied == [13] * 50
        wait(lambda: violations(evidence, "full"), "it was not told")
        egress = [span["attributes"] for span in read_journal(evidence) if span["name"] == "egress connect"]
        assert sum(each["ray_guard.egress.decision"] == "deny" for each in egress) == 50
        filler.unlink()
        assert connects(host, port) == "ok"
    wait(lambda: check(evidence)[0].state is State.ENDED, "the log was not ended", 10)
    (report,) = check(evidence)
    assert report.findings == []
    assert all(span["ended"] for span in read_journal(evidence))


@pytest.fixture
def namespace_on_small_disk(tmp_path: Path) -> Iterator[tuple[Namespace, Path]]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], check=True)
    namespace = Namespace()
    yield namespace, disk
    namespace.close()
    subprocess.run(["umount", "-l", str(disk)], check=True)

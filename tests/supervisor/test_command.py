"""``ray-guard run`` as a command: statuses, what is said, what is passed on, what is left in evidence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import read_journal, wait

pytestmark = pytest.mark.kernel

COMMAND = str(Path(sys.executable).with_name("ray-guard"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text("version: 1\negress: {allow: []}\n")
    (tmp_path / "short.yaml").write_text("version: 1\nbudgets: {call: {wall_seconds: 0.5}}\n")
    return tmp_path


def guarded(
    folder: Path, *command: str, policy: str = "policy.yaml", options: Sequence[str] = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence"), **more.pop("env", {})}
    argv = [COMMAND, "run", "--policy", policy, *options, "--", *command]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize(
    ("program", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 125", 125), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("exit 300", 44)],
)
def test_the_status_is_its_own(folder: Path, program: str, status: int) -> None:
    done = guarded(folder, "sh", "-c", program)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize(
    ("command", "policy", "said"),
    [
        ((), "policy.yaml", "no command"),
        (("/no/such/program",), "policy.yaml", "/no/such/program: No such file or directory"),
        (("/etc/passwd",), "policy.yaml", "/etc/passwd: Permission denied"),
        (("true",), "missing.yaml", "there is no such file"),
        (("true",), "faulty.yaml", "did you mean egress"),
        (("true",), "beyond.yaml", "not enforced: budgets.call.flops"),
    ],
)
def test_where_nothing_is_started_it_says_why_and_ends_with_125(
    folder: Path, command: tuple[str, ...], policy: str, said: str
) -> None:
    (folder / "faulty.yaml").write_text("egres: {allow: []}\n")
    (folder / "beyond.yaml").write_text("budgets: {call: {flops: 1}}\n")
    done = guarded(folder, *command, policy=policy)
    assert done.returncode == 125
    assert done.stderr.startswith("ray-guard: ")
    assert said in done.stderr
    assert done.stdout == ""


def test_a_budget_that_ends_it_is_named(folder: Path) -> None:
    began = time.monotonic()
    done = guarded(folder, "sh", "-c", 'trap "" TERM; sleep 30', policy="short.yaml")
    assert done.returncode == 128 + signal.SIGKILL
    assert "wall_seconds" in done.stderr
    assert done.stderr.startswith("ray-guard: ")
    assert time.monotonic() - began < 10


def test_signals_are_passed_on(folder: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "run", "--policy", "policy.yaml", "--", "sh", "-c", 'trap "exit 9" USR1; echo up; sleep 30 & wait'],
        cwd=folder,
        env={**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 9


def test_it_keeps_folder_limits_umask_and_variables_less_secrets(folder: Path) -> None:
    program = "pwd; ulimit -n; umask; echo $PLAIN $AWS_SECRET_ACCESS_KEY; cat"
    shell = ["sh", "-c", 'ulimit -n 77; umask 027; exec "$@"', "sh"]
    done = subprocess.run(
        [*shell, COMMAND, "run", "--policy", "policy.yaml", "--", "sh", "-c", program],
        cwd=folder,
        env={**os.environ, "RAY_GUARD_EVIDENCE": "evidence", "PLAIN": "kept", "AWS_SECRET_ACCESS_KEY": "secret"},
        input="what came in\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [str(folder), "77", "0027", "kept", "what came in"], done.stderr


def test_descriptors_are_passed_where_they_are_named(folder: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    program = f"echo through >&{write}; ls /proc/self/fd | wc -l"
    alone = guarded(folder, "bash", "-c", program, pass_fds=[write])
    named = guarded(folder, "bash", "-c", program, options=["--pass-fd", str(write)], pass_fds=[write])
    os.close(write)
    with open(read) as pipe:
        assert pipe.read() == "through\n"
    assert "Bad file descriptor" in alone.stderr
    assert (named.stdout.strip(), named.stderr) == ("5", "")  # of ls: 0, 1, 2, the one that was passed, the folder


@pytest.mark.parametrize("descriptor", [77, -1])
def test_a_descriptor_that_is_none_is_named(folder: Path, descriptor: int) -> None:
    done = guarded(folder, "true", options=[f"--pass-fd={descriptor}"])
    assert done.returncode == 125
    assert f"--pass-fd {descriptor}: no descriptor is open" in done.stderr


def test_evidence_is_left_where_it_was_asked_for(folder: Path) -> None:
    done = guarded(folder, "sh", "-c", "exit 3", options=["--evidence", "elsewhere"])
    assert done.returncode == 3
    assert not (folder / "evidence").exists()
    spans = {span["name"]: span for span in read_journal(folder / "elsewhere")}
    assert set(spans) == {"execute_tool sh", "process sh"}
    wait(lambda: all(span["ended"] for span in read_journal(folder / "elsewhere")), "the call has not ended")
    assert spans["process sh"]["attributes"]["process.command_args"] == ["sh", "-c", "exit 3"]


@pytest.mark.parametrize(
    ("given", "parent"),
    [("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "b7ad6b7169203331"), ("nonsense", None)],
)
def test_a_trace_goes_on_in_it(folder: Path, given: str, parent: str | None) -> None:
    done = guarded(folder, "printenv", "TRACEPARENT", env={"TRACEPARENT": given})
    assert done.stdout.strip() == given
    assert ("TRACEPARENT 'nonsense' names no span and is ignored" in done.stderr) == (parent is None)
    evidence = folder / "evidence"
    calls = wait(
        lambda: [each for each in read_journal(evidence) if each["name"] == "execute_tool printenv"], "no call"
    )
    assert [each["parent"] for each in calls] == [parent]


def test_what_it_leaves_running_ends_with_it(folder: Path) -> None:
    (folder / "work").mkdir()  # the evidence beside it may keep a tool from making files here
    behind = "echo $$ > pid; exec sleep 60 > /dev/null 2>&1 < /dev/null"
    waits = "while ! test -s pid; do sleep 0.02; done; cat pid"
    done = guarded(folder, "sh", "-c", f"cd work; setsid -f sh -c '{behind}'; {waits}")
    pid = int(done.stdout)
    wait(lambda: not Path(f"/proc/{pid}").exists(), "it is still there", 2)

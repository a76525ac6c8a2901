"""What a tool has of its requester, and what of the guard: groups, control groups, rights, session, variables."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Host, Stage, needs, wait

pytestmark = pytest.mark.kernel


def _inside(stage: Stage, code: str, **arguments: Any) -> Any:
    return stage.host().inside("import os, signal, subprocess, sys, time\n" + code, **arguments)


def test_it_has_no_right_that_could_come_back(stage: Stage) -> None:
    code = "result = ray_guard.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout"
    status = dict(line.split(":\t", 1) for line in _inside(stage, code).splitlines() if ":\t" in line)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    if ROOT:
        assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["SigBlk"], 16) == 0


def test_it_leads_a_session_without_a_terminal(stage: Stage) -> None:
    code = "result = ray_guard.run(['sh', '-c', 'echo $$ $(ps -o sid= -o pgid= -o tty= -p $$)'], capture_output=True, text=True).stdout"
    pid, session, group, terminal = _inside(stage, code).split()
    assert pid == session == group
    assert terminal == "?"


def test_a_trace_goes_on_in_it(stage: Stage) -> None:
    code = """
with ray_guard.episode(id='e', group='g', iteration=1), ray_guard.tool_call('bash', {}):
    here = ray_guard.context()
    result = [here['trace'], here['span'], ray_guard.run(['printenv', 'TRACEPARENT'], capture_output=True, text=True).stdout.strip(),
              subprocess.check_output(['printenv', 'TRACEPARENT'], text=True, env={'TRACEPARENT': 'theirs'}).strip()]
"""
    trace, span, ours, theirs = _inside(stage, code)
    assert re.fullmatch(f"00-{trace}-{span}-0[01]", ours)
    assert theirs == ours


def test_what_is_started_outside_of_any_scope_stands_below_what_started_the_job(stage: Stage) -> None:
    code = """
os.environ['TRACEPARENT'] = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
try: ray_guard.run(['printenv', 'HOME'], capture_output=True)
finally: del os.environ['TRACEPARENT']
result = None
"""
    _inside(stage, code)
    journal = stage.host().journal()
    assert "b7ad6b7169203331" in {each["parent"] for each in journal if each["name"] == "execute_tool printenv"}


def test_secrets_are_left_out_but_for_what_is_granted(stage: Stage) -> None:
    code = """
own = {'AWS_SECRET_ACCESS_KEY': 's1', 'RAY_ADDRESS': 's2', 'HF_TOKEN': 's3', 'PIP_INDEX_URL': 'https://u:s4@host/', 'PLAIN': 'kept'}
os.environ.update(own)
def names(**options):
    shown = ray_guard.run(['env'], capture_output=True, text=True, **options).stdout
    return sorted(line.partition('=')[0] for line in shown.splitlines() if line.partition('=')[0] in own)
try: result = [names(), names(env={**os.environ, 'X': '1'}), names(env={'PATH': os.environ['PATH'], 'HF_TOKEN': 's3'})]
finally:
    for name in own: del os.environ[name]
"""
    assert _inside(stage, code) == [["PLAIN"], ["PLAIN"], ["HF_TOKEN"]]


@pytest.mark.skipif(not ROOT, reason="missing: root, to have groups that the supervisor has not")
@needs("CAP_SYS_PTRACE")  # to read a process with another group
def test_groups_are_its_requesters(stage: Stage, tmp_path: Path) -> None:
    host = stage.host()  # a supervisor is there, with groups of its own
    assert host.alive
    program = """
import os, ray_guard
os.setgroups([7, 42]); os.setresgid(33, 33, 33)
ray_guard.confine({"egress": {"allow": []}})
print(ray_guard.run(["sh", "-c", "id -g; id -G"], capture_output=True, text=True))
"""
    done = subprocess.run(
        [*stage.namespace.prefix, sys.executable, "-c", program],
        env={**os.environ, "RAY_GUARD_EVIDENCE": str(tmp_path / "evidence")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "33\\n33 7 42\\n" in done.stdout, done


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that the supervisor is not in."""
    if not ROOT:
        pytest.skip("missing: root, to make a control group")
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        made = folder / f"ray_guard-test-{secrets.token_hex(4)}"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / "cgroup.procs").exists():
            yield made
            _end(made)
            return
        made.rmdir()
    pytest.skip("missing: a control group hierarchy of version 2 that can be written to")


def _end(group: Path) -> None:
    wait(lambda: not (group / "cgroup.procs").read_text(), "a process is left in the group")
    group.rmdir()


def test_control_groups_are_its_requesters(stage: Stage, group: Path, tmp_path: Path) -> None:
    first = stage.host()
    host = Host({"egress": {"allow": []}}, tmp_path / "evidence", stage.namespace)
    try:
        assert host.supervisor == first.supervisor
        before = host.run("call", ["cat", "/proc/self/cgroup"]).stdout
        (group / "cgroup.procs").write_text(str(host.pid))
        after = host.run("call", ["sh", "-c", "cat /proc/self/cgroup; sleep 0.01 & wait"]).stdout
        assert group.name not in before
        assert re.search(f"^0::/{group.name}/ray_guard-[0-9a-f]{{12}}$", after, re.MULTILINE)
        assert group.name not in Path(f"/proc/{host.supervisor}/cgroup").read_text()
        assert group.name not in first.run("call", ["cat", "/proc/self/cgroup"]).stdout
    finally:
        host.close()

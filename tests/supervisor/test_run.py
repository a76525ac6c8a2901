"""``ray_guard.run`` and ``Popen`` return as subprocess does: compared with it, case by case."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from harness import Stage

pytestmark = pytest.mark.kernel

_BOTH = """
import subprocess
def describe(run):
    try:
        done = eval(expression, {'run': run, 'subprocess': subprocess, 'sys': __import__('sys'), 'os': __import__('os')})
        return [done.returncode, repr(done.stdout), repr(done.stderr)]
    except Exception as error:
        return [type(error).__name__, getattr(error, 'errno', None), getattr(error, 'filename', None), getattr(error, 'returncode', None)]
result = [describe(subprocess.run), describe(ray_guard.run)]
"""


@pytest.mark.parametrize(
    "expression",
    [
        "run(['true'])",
        "run(['false'])",
        "run(['sh', '-c', 'exit 77'])",
        "run(['sh', '-c', 'kill -TERM $$'])",
        "run(['sh', '-c', 'kill -KILL $$'])",
        "run(['sh', '-c', 'kill -SEGV $$'])",
        "run('exit 5', shell=True)",
        "run('echo $0 $1', shell=True, capture_output=True)",
        "run(['echo', 'a b'], capture_output=True, text=True)",
        "run(['cat'], input=b'x' * 300000, capture_output=True)",
        "run(['cat'], input='ä€', capture_output=True, text=True, encoding='utf-8')",
        "run(['sh', '-c', 'echo out; echo err >&2'], capture_output=True)",
        "run(['sh', '-c', 'echo out; echo err >&2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)",
        "run(['sh', '-c', 'echo out'], stdout=subprocess.DEVNULL)",
        "run(['pwd'], cwd='/usr', capture_output=True)",
        "run(['pwd'], cwd='/nonexistent')",
        "run(['no-such-program-anywhere'])",
        "run(['/nonexistent/program'])",
        "run(['/etc/passwd'])",
        "run(['/tmp'])",
        "run([])",
        "run(['sh', '-c', 'printf %s $X'], env={'X': 'value'}, capture_output=True)",
        "run(['sh', '-c', 'exit 3'], check=True)",
        "run(['sleep', '10'], timeout=0.2)",
        "run(['echo', b'\\xff\\xfe'], capture_output=True)",
        "run(['sh', '-c', 'umask'], umask=0o027, capture_output=True)",
        "run(['sh', '-c', 'ulimit -n'], capture_output=True)",
        "run(['sh', '-c', 'nice'], capture_output=True)",
        "run(['sh', '-c', 'read line; echo $line'], stdin=subprocess.DEVNULL, capture_output=True)",
        "run(['python3', '-I', '-S', '-c', 'import signal; print(signal.getsignal(signal.SIGPIPE))'], capture_output=True)",
        "run(['argument0', '-c', 'echo $0'], executable='/bin/sh', capture_output=True)",
        "run(['sh', '-c', 'echo ' + 'x' * 100000], capture_output=True)",
    ],
)
def test_like_subprocess(stage: Stage, expression: str) -> None:
    plain, guarded = stage.host().inside(_BOTH, expression=expression)
    assert guarded == plain


def _inside(stage: Stage, code: str) -> Any:
    return stage.host().inside("import os, signal, subprocess, sys, time\n" + code)


def test_timeout_kills_it_soon(stage: Stage) -> None:
    began = time.monotonic()
    code = """
try: ray_guard.run(['sh', '-c', 'trap "" TERM; echo here; sleep 30'], timeout=0.5, capture_output=True)
except subprocess.TimeoutExpired as expired: result = [expired.timeout, expired.stdout.decode()]
"""
    assert _inside(stage, code) == [0.5, "here\n"]
    assert time.monotonic() - began < 3


def test_popen_is_signalled_waited_and_polled(stage: Stage) -> None:
    code = """
tool = ray_guard.Popen(['sleep', '30'])
result = [tool.poll(), tool.pid > 1, os.path.exists(f'/proc/{tool.pid}')]
tool.send_signal(signal.SIGINT)
result += [tool.wait(5), tool.poll(), tool.returncode]
tool.send_signal(signal.SIGTERM)  # nothing happens
tool = ray_guard.Popen(['sleep', '30']); tool.terminate(); result.append(tool.wait(5))
tool = ray_guard.Popen(['sleep', '30']); tool.kill(); result.append(tool.wait(5))
tool = ray_guard.Popen(['sleep', '30']); os.killpg(tool.pid, signal.SIGUSR1); result.append(tool.wait(5))
"""
    expected = [None, True, True, -signal.SIGINT, -signal.SIGINT, -signal.SIGINT, -15, -9, -signal.SIGUSR1]
    assert _inside(stage, code) == expected


def test_communicate_in_both_directions(stage: Stage) -> None:
    code = """
tool = ray_guard.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
tool.stdin.write('one\\n'); tool.stdin.flush()
result = [tool.stdout.readline()]
result += [tool.communicate('two\\n')[0], tool.returncode]
with ray_guard.Popen(['sh', '-c', 'exit 9']) as tool: pass
result.append(tool.returncode)
"""
    assert _inside(stage, code) == ["one\n", "two\n", 0, 9]


def test_a_tool_does_not_inherit_secrets(stage: Stage) -> None:
    code = """
os.environ.update(AWS_SECRET_ACCESS_KEY='s1', RAY_ADDRESS='s2', HF_TOKEN='s3', MY_API_KEY='s4', SSH_AUTH_SOCK='s5', PLAIN='kept')
result = ray_guard.run(['env'], capture_output=True, text=True).stdout
for name in ('AWS_SECRET_ACCESS_KEY', 'RAY_ADDRESS', 'HF_TOKEN', 'MY_API_KEY', 'SSH_AUTH_SOCK', 'PLAIN'): del os.environ[name]
"""
    environment = _inside(stage, code)
    assert "PLAIN=kept" in environment
    assert "RAY_GUARD_CALL=" in environment
    assert not [line for line in environment.splitlines() if line.endswith(("=s1", "=s2", "=s3", "=s4", "=s5"))]


def test_within_a_tool_run_is_plain_subprocess(stage: Stage) -> None:
    import sys

    program = "import ray_guard; print(ray_guard.run(['echo', 'nested'], capture_output=True, text=True).stdout)"
    outcome = stage.host().run("call", [sys.executable, "-c", program])
    assert outcome.stdout == "nested\n\n", outcome


def test_a_call_that_ends_ends_what_still_runs(stage: Stage) -> None:
    code = """
with ray_guard.tool_call('leaving', {}):
    tool = ray_guard.Popen(['sleep', '30'])
began = time.monotonic()
result = [tool.wait(5), time.monotonic() - began]
"""
    status, seconds = _inside(stage, code)
    assert status == -9
    assert seconds < 1

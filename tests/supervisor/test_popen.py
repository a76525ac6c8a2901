"""``ray_guard.Popen`` beside ``subprocess.Popen``: the odd arguments, descriptors, terminals, threads, and many of them."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import os
from typing import Any

import pytest
from harness import Stage

pytestmark = pytest.mark.kernel

_BOTH = """
import os, pathlib, signal, subprocess, sys, tempfile
names = {'os': os, 'pathlib': pathlib, 'signal': signal, 'subprocess': subprocess, 'sys': sys, 'tempfile': tempfile}
def describe(run):
    try:
        done = eval(expression, {**names, 'run': run})
        return [done.returncode, repr(done.stdout), repr(done.stderr)]
    except Exception as error:
        told = [getattr(error, name, None) for name in ('errno', 'filename', 'returncode')]
        return [type(error).__name__, *map(repr, told), str(error)]
result = [describe(subprocess.run), describe(ray_guard.run)]
"""


@pytest.mark.parametrize(
    "expression",
    [
        "run(['echo', 'ä'], capture_output=True, text=True, encoding='latin-1', errors='replace')",
        r"run(['printf', r'a\r\nb\r'], capture_output=True, universal_newlines=True)",
        "run('cat', stdin=open('/etc/hostname'), capture_output=True, shell=True)",
        "run(['sh', '-c', 'test $(ps -o sid= -p $$) = $$'], start_new_session=True)",
        "run(['sh', '-c', 'test $(ps -o pgid= -p $$) = $$'], process_group=0)",
        "run([b'/bin/echo', 'x'], capture_output=True)",
        "run([pathlib.Path('/bin/echo'), pathlib.Path('/x')], capture_output=True)",
        "run(pathlib.Path('/bin/true'))",
        "run('/bin/true')",
        "run('echo hello world')",
        "run('')",
        "run([''])",
        r"run(['echo', 'a\0b'])",
        "run(['echo', 1])",
        "run(['echo'], env={'A=B': 'x'})",
        "run(['echo'], env={'A': 1})",
        r"run(['echo'], env={'A': 'x\0y'})",
        r"run(['sh', '-c', 'env | grep -c ^BYTES='], env={b'BYTES': b'\xff'}, capture_output=True)",
        "run(['/bin/true', 'x' * 200000])",
        "run(['/bin/true'] + ['x' * 100000] * 30)",
        "run(['sh', '-c', 'exit 300'])",
        "run(['pwd'], cwd=b'/usr', capture_output=True)",
        "run(['pwd'], cwd=pathlib.Path('/usr/lib'), capture_output=True)",
        "run(['./true'], cwd='/usr/bin')",
        "run(['true'], cwd='/etc/passwd')",
        "run(['ls'], cwd='')",
        "run(['true'], executable='/no/such')",
        "run('echo $0', shell=True, executable='/bin/bash', capture_output=True)",
        "run(['echo $0 $1', 'zero', 'one'], shell=True, capture_output=True)",
        "run(['true'], pass_fds=(99,))",
        "run(['true'], pass_fds=(-1,))",
        "run(['sh', '-c', 'kill -34 $$'])",
        "run(['sh', '-c', 'exec 1>&-; exec 2>&-; exit 2'], capture_output=True)",
        "run(['sh', '-c', 'head -c1'], input=b'x' * 500000, capture_output=True)",
        "run(['cat'], input='x', capture_output=True)",
        "run(['cat'], stdin=-1, input=b'x')",
        "run(['true'], stdout=-1, capture_output=True)",
        "run(['true'], bufsize='x')",
        "run(['true'], stdout=12345)",
        "run(['true'], nonsense=1)",
        "run(['true'], pipesize=65536, stdout=-1)",
        "run(['sh', '-c', 'echo out; exit 4'], check=True, capture_output=True)",
        "run(['sh', '-c', 'id -G; id -u; id -g'], capture_output=True)",
        "run(['sh', '-c', 'cat /proc/self/oom_score_adj; grep -v ^0:: /proc/self/cgroup'], capture_output=True)",
        "run(['sh', '-c', 'taskset -p $$ | sed s/.*://'], capture_output=True)",
        "run(['sh', '-c', 'ulimit -c; ulimit -n; ulimit -s; ulimit -u'], capture_output=True)",
        "run(['python3', '-I', '-S', '-c', 'import signal; print(signal.pthread_sigmask(0, []))'], capture_output=True)",
        "run(['python3', '-I', '-S', '-c', 'import signal as s; print([n for n in s.valid_signals() - {1, 2, 3} if s.getsignal(n) == s.SIG_IGN])'], capture_output=True, restore_signals=False)",
    ],
)
def test_like_subprocess(stage: Stage, expression: str) -> None:
    plain, guarded = stage.host().inside(_BOTH, expression=expression)
    assert guarded == plain


def _inside(stage: Stage, code: str) -> Any:
    return stage.host().inside("import os, signal, subprocess, sys, time\n" + code)


def test_what_cannot_be_is_refused_by_name(stage: Stage) -> None:
    code = """
result = []
for options in ({'preexec_fn': os.getpid}, {'user': 0}, {'group': 0}, {'extra_groups': [0]}, {'process_group': 1}):
    try: ray_guard.run(['true'], **options)
    except ray_guard.NotEnforced as error: result.append(list(error.features))
"""
    assert _inside(stage, code) == [["preexec_fn"], ["user"], ["group"], ["extra_groups"], ["process_group"]]


def test_descriptors_that_would_lead_out_are_refused(stage: Stage) -> None:
    code = """
import socket
unconnected, folder = socket.socket(), os.open('/', os.O_RDONLY)
result = []
for number in (unconnected.fileno(), folder):
    try: ray_guard.run(['true'], pass_fds=[number])
    except ValueError as error: result.append(str(error).split(':')[-1])
unconnected.close(); os.close(folder)
"""
    assert _inside(stage, code) == [" pass a pipe, a file or a socketpair", " pass files, pipes or socketpairs"]


def test_descriptors_that_are_passed_arrive_under_their_numbers_and_no_others_do(stage: Stage) -> None:
    code = """
import socket, tempfile
read, write = os.pipe()
near, far = socket.socketpair()
file = tempfile.TemporaryFile(); file.write(b'in the file'); file.flush(); file.seek(0)
stray = os.open('/etc/hostname', os.O_RDONLY); os.set_inheritable(stray, True)
program = '''
import os, socket, sys
write, far, file = map(int, sys.argv[1:])
os.write(write, b"through the pipe")
sock = socket.socket(fileno=far)
sock.send(os.read(file, 100))
listed = os.listdir("/proc/self/fd")
print(sorted(int(number) for number in listed if os.path.exists(f"/proc/self/fd/{number}")))
'''
numbers = [write, far.fileno(), file.fileno()]
argv = [sys.executable, '-I', '-S', '-c', program, *map(str, numbers)]
done = ray_guard.run(argv, pass_fds=numbers, close_fds=False, capture_output=True, text=True)
result = [os.read(read, 100).decode(), near.recv(100).decode(), eval(done.stdout) == sorted([0, 1, 2, *numbers]), done.stderr]
for each in (read, write, stray): os.close(each)
near.close(); far.close(); file.close()
"""
    assert _inside(stage, code) == ["through the pipe", "in the file", True, ""]


def test_a_pty_can_be_its_standard_streams_and_its_controlling_terminal(stage: Stage) -> None:
    code = """
import pty
program = '''
import fcntl, os, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with open("/dev/tty", "r+b", buffering=0) as terminal: terminal.write(b"hello " + terminal.readline())
print(os.isatty(1), os.tcgetpgrp(0) == os.getpgrp())
'''
result = []
for popen in (subprocess.Popen, ray_guard.Popen):
    master, slave = pty.openpty()
    tool = popen([sys.executable, '-I', '-S', '-c', program], stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.write(master, b'there\\n')
    shown = b''
    while True:
        try: shown += os.read(master, 1000)
        except OSError: break
    os.close(master)
    result.append([tool.wait(5), shown.decode().replace('\\r', '')])
"""
    assert _inside(stage, code) == [[0, "there\nhello there\nTrue True\n"]] * 2


def test_one_that_is_forgotten_while_it_runs_warns_and_is_collected(stage: Stage) -> None:
    code = """
import gc, warnings
result = []
for popen in (subprocess.Popen, ray_guard.Popen):
    before = len(os.listdir('/proc/self/fd'))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        tool = popen(['sleep', '0.2'], stdout=subprocess.DEVNULL); pid = tool.pid; del tool; gc.collect()
        result.append([str(each.message) == f'subprocess {pid} is still running' for each in caught])
    time.sleep(0.5)
    popen(['true']).wait()
    result += [len(subprocess._active), len(os.listdir('/proc/self/fd')) - before]
"""
    assert _inside(stage, code) == [[True], 0, 0] * 2


def test_starts_from_many_threads_at_once(stage: Stage) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
def start(n): return ray_guard.run(['sh', '-c', f'echo {n}; exit {n % 7}'], capture_output=True, text=True)
with ThreadPoolExecutor(24) as pool: results = list(pool.map(start, range(100)))
result = [(done.stdout, done.returncode) for done in results] == [(f'{n}\\n', n % 7) for n in range(100)]
"""
    assert _inside(stage, code)


def test_many_starts_leave_no_descriptors(stage: Stage) -> None:
    code = """
def start(n):
    try: ray_guard.run(['true'] if n % 5 else ['/no/such/program'], capture_output=n % 2 == 0)
    except FileNotFoundError: pass
for n in range(20): start(n)
before = len(os.listdir('/proc/self/fd'))
for n in range(200): start(n)
result = len(os.listdir('/proc/self/fd')) - before
"""
    assert _inside(stage, code) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="missing: root, to see the supervisor's descriptors")
def test_thousands_of_starts_leave_no_descriptors(stage: Stage) -> None:
    host = stage.host()
    code = "for _ in range(200): ray_guard.run(['true'])\nresult = len(os.listdir('/proc/self/fd'))"
    counts = [(_inside(stage, code), len(os.listdir(f"/proc/{host.supervisor}/fd"))) for _ in range(12)]
    assert counts[-1][0] <= counts[0][0]
    assert counts[-1][1] <= counts[0][1] + 3 * 8  # of idle leaders, a few more or less


@pytest.mark.slow
def test_256_at_once_hold_and_end(stage: Stage) -> None:
    code = """
tools = [ray_guard.Popen(['sh', '-c', 'read line; exit 3'], stdin=subprocess.PIPE) for _ in range(256)]
result = [sum(tool.poll() is None for tool in tools)]
for tool in tools: tool.stdin.close()
result += [sorted({tool.wait(60) for tool in tools}), ray_guard.run(['true']).returncode]
"""
    assert stage.host().inside("import subprocess\n" + code) == [256, [3], 0]

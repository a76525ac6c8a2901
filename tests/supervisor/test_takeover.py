"""``subprocess: confine``: what other frameworks' tools do, unchanged, within a tool call; and nowhere else.

The control is the same code outside of any call: there the process is the actor's own child.
"""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Host, Stage

pytestmark = pytest.mark.kernel

#: prints whether the process is a tool: of a call of its own session, below a leader
WHERE = "echo ${RAY_GUARD_CALL:-none} $PPID"

_RUN = """
import asyncio, os, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
def in_a_folder(action):
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try: return action()
        finally: os.chdir(before)
def both(start):
    with ray_guard.tool_call('bash', {}):
        inside = start()
    return [inside, start()]
"""


def _inside(host: Host, code: str) -> Any:
    return host.inside(_RUN + code, WHERE=WHERE)


@pytest.fixture(scope="module")
def host(stage: Stage) -> Host:
    return stage.host()


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run(WHERE, shell=True, capture_output=True, text=True).stdout",
        "subprocess.check_output(['sh', '-c', WHERE], text=True)",
        "subprocess.getoutput(WHERE)",
        "subprocess.Popen(['sh', '-c', WHERE], stdout=subprocess.PIPE, text=True).communicate()[0]",
        "subprocess.Popen(['sh', '-c', WHERE], stdout=-1, text=True, preexec_fn=os.setsid).communicate()[0]",
        "subprocess.Popen(['sh', '-c', WHERE], stdout=-1, text=True, start_new_session=True).communicate()[0]",
        "os.popen(WHERE).read()",
        "in_a_folder(lambda: (os.system(f'({WHERE}) > where'), open('where').read())[1])",
        "asyncio.run(_communicate(asyncio.create_subprocess_shell(WHERE, stdout=-1)))",
        "asyncio.run(_communicate(asyncio.create_subprocess_exec('sh', '-c', WHERE, stdout=-1, stdin=-3)))",
        "ThreadPoolExecutor(1).submit(subprocess.getoutput, WHERE).result()",
        "asyncio.run(_in_thread())",
    ],
)
def test_within_a_call_it_is_a_tool_and_outside_it_is_not(host: Host, start: str) -> None:
    code = f"""
async def _communicate(starting):
    process = await starting
    output = (await process.communicate())[0].decode()
    return output if process.returncode == 0 else process.returncode
async def _in_thread(): return await asyncio.to_thread(subprocess.getoutput, WHERE)
globals().update(locals())
result = [os.getpid(), *both(lambda: {start})]
"""
    own, inside, outside = _inside(host, code)
    call, parent = inside.split()
    assert call != "none"
    assert int(parent) != own
    assert outside.split() == ["none", str(own)]


def test_what_a_framework_does_needs_no_change(host: Host) -> None:
    """A file with the model's program, run by the interpreter with a timeout: as in many Python tools."""
    code = """
def execute(program, timeout):
    with tempfile.NamedTemporaryFile('w', suffix='.py') as file:
        file.write(program); file.flush()
        try:
            done = subprocess.run([sys.executable, '-I', '-S', file.name], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return ['timed out']
    return [done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]]
with tempfile.TemporaryDirectory() as folder, ray_guard.tool_call('python', {}):
    here = os.getcwd(); os.chdir(folder)
    try: result = [execute('print(6 * 7)', 10), execute('1 / 0', 10), execute('while True: pass', 0.5)]
    finally: os.chdir(here)
"""
    assert _inside(host, code) == [[0, "42\n", []], [1, "", ["ZeroDivisionError: division by zero"]], ["timed out"]]


def test_its_signals_and_statuses_are_subprocess_own(host: Host) -> None:
    code = """
def start():
    found = []
    slow = subprocess.Popen(['sleep', '30'])
    found += [slow.poll(), slow.returncode]
    try: slow.wait(0.05)
    except subprocess.TimeoutExpired: found.append('timeout')
    slow.terminate(); found += [slow.wait(), slow.poll()]
    slow.kill()
    found.append(subprocess.call(['sh', '-c', 'kill -USR1 $$']))
    found.append(os.waitstatus_to_exitcode(os.system('exit 7')))
    found.append(os.system('kill -KILL $$') & 0x7f)
    found.append(os.popen('exit 3').close())
    return found
result = both(start)
"""
    inside, outside = _inside(host, code)
    assert inside == outside == [None, None, "timeout", -15, -15, -10, 7, 9, 3 << 8]


def test_asyncio_waits_signals_and_streams(host: Host) -> None:
    code = """
async def main():
    found = []
    process = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)
    process.stdin.write(b'one\\n'); await process.stdin.drain()
    found.append((await process.stdout.readline()).decode())
    process.stdin.close(); found.append(await process.wait())
    sleepers = [await asyncio.create_subprocess_exec('sleep', '30') for _ in range(5)]
    for each in sleepers: each.kill()
    found.append([await each.wait() for each in sleepers])
    quick = await asyncio.create_subprocess_shell('exit 4')
    await asyncio.sleep(0.3)
    found += [quick.returncode, await quick.wait()]
    try: await asyncio.create_subprocess_exec('/no/such/program')
    except FileNotFoundError as error: found.append(error.filename)
    return found
result = both(lambda: asyncio.run(main()))
"""
    inside, outside = _inside(host, code)
    assert inside == outside == ["one\n", 0, [-9] * 5, 4, 4, "/no/such/program"]


def test_the_asyncio_functions_of_ours_are_confined_outside_of_calls_too(host: Host) -> None:
    code = """
async def main():
    exec_ = await ray_guard.create_subprocess_exec('sh', '-c', WHERE, stdout=-1)
    shell = await ray_guard.create_subprocess_shell(WHERE, stdout=-1)
    plain = await asyncio.create_subprocess_shell(WHERE, stdout=-1)
    return [(await each.communicate())[0].decode().split() for each in (exec_, shell, plain)] + [exec_.returncode]
globals().update(locals())
result = [os.getpid(), *asyncio.run(main())]
"""
    own, exec_, shell, plain, status = _inside(host, code)
    assert exec_[0] != "none" != shell[0]
    assert plain == ["none", str(own)]
    assert status == 0


def test_what_is_no_tool_is_waited_for_by_the_kernel_and_what_is_one_says_why_not(host: Host) -> None:
    code = """
plain = subprocess.Popen(['true'])
result = [os.waitpid(plain.pid, 0)[1]]; plain.returncode = 0
with ray_guard.tool_call('bash', {}):
    for tool in (subprocess.Popen(['sleep', '9']), ray_guard.Popen(['sleep', '9'])):
        try: os.waitpid(tool.pid, 0)
        except ChildProcessError as error: result.append(error.strerror.split(':')[1])
        tool.kill(); tool.wait()
"""
    assert _inside(host, code) == [
        0,
        " use the wait() or poll() of its Popen",
        " use the wait() or poll() of its Popen",
    ]


def test_what_no_tool_can_be_started_with_is_refused_by_name(host: Host) -> None:
    code = """
result = []
for options in ({'preexec_fn': os.getpid}, {'user': 0}, {'group': 0}, {'extra_groups': [0]}, {'process_group': 1}):
    with ray_guard.tool_call('bash', {}):
        try: subprocess.run(['true'], **options)
        except ray_guard.NotEnforced as error: result.append(list(error.features))
    try: subprocess.run(['true'], **options); result.append('ran')
    except (OSError, subprocess.SubprocessError) as error: result.append('ran')
"""
    options = ["preexec_fn", "user", "group", "extra_groups", "process_group"]
    assert _inside(host, code) == [entry for name in options for entry in ([name], "ran")]


@pytest.fixture
def plain_host(tmp_path: Path, stage: Stage) -> Iterator[Host]:
    made = Host({"egress": {"allow": []}, "subprocess": "plain"}, tmp_path / "evidence", stage.namespace)
    yield made
    made.close()


def test_subprocess_plain_leaves_it_alone(plain_host: Host) -> None:
    start = "[subprocess.getoutput(WHERE).split()[0], os.popen(WHERE).read().split()[0]]"
    assert _inside(plain_host, f"globals().update(locals()); result = both(lambda: {start})") == [["none", "none"]] * 2
    code = "with ray_guard.tool_call('b', {}): result = ray_guard.run(WHERE, shell=True, capture_output=True, text=True).stdout"
    assert _inside(plain_host, code).split()[0] != "none"


def test_a_script_made_for_the_call_is_read_by_it_and_nothing_else_beside_it(host: Host) -> None:
    """The temporary folder is not granted: only what was made there during the call and is named in the arguments."""
    code = """
def script(**more):
    file = tempfile.NamedTemporaryFile('w', suffix='.py', delete=False, **more)
    file.write("print('read')"); file.close()
    return file.name
def read(path, *arguments):
    return subprocess.run([sys.executable, '-I', '-S', path, *arguments], capture_output=True, text=True).stdout.strip()
earlier = script()
time.sleep(0.05)
with ray_guard.tool_call('bash', {}):
    made = script()
    link = made + '.link'; os.symlink(earlier, link)
    within = tempfile.mkdtemp()
    of_the_call = script(dir=within)
    found = [read(made), read(of_the_call), read(earlier), read(link)]
    other = script()
    found.append(subprocess.run(['sh', '-c', f'cat {other}'], capture_output=True, text=True).stdout)
result = found
"""
    assert _inside(host, code) == ["read", "read", "", "", ""]

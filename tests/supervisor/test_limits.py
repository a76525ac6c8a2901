"""Limits of what tool processes take together: processes, memory, CPU time and elapsed time. Judged from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from harness import PYTHON, Host, Namespace, has_own_supervisors, skip_without, wait

from ray_guard.supervisor import memory_group
from ray_guard.supervisor.leaf import place

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]

MIB = 1 << 20


WITHOUT = """
import errno, os, platform, sys
from ray_guard.kernel import mounting, seccomp
for what in sys.argv[1].split():
    if what == "cgroup":
        mounting.enter_own_namespace(mounting.way())
        mounting.mount("tmpfs", "/sys/fs/cgroup", "tmpfs", mounting.MS_RDONLY)
    elif what == "perf":
        rule = seccomp.Rule("perf_event_open", seccomp.refuse(errno.EPERM))
        seccomp.stack_on_thread(seccomp.assemble([rule], platform.machine()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
MEASURES = pytest.mark.parametrize(
    "without",
    [
        pytest.param(
            "",
            marks=pytest.mark.skipif(not memory_group.place(), reason="missing: a memory group of version 1"),
            id="group",
        ),
        pytest.param("cgroup", id="sampled"),
    ],
)
LEAVES = pytest.mark.skipif(not place(), reason="missing: a cgroup2 hierarchy in which this process may make groups")


@contextlib.contextmanager
def limited(folder: Path, through: tuple[str, ...] = (), **budgets: dict[str, float]) -> Iterator[Host]:
    """A confined process under these limits, by scope."""
    namespace = Namespace()
    host = None
    try:
        policy = {"egress": {"allow": []}, "budgets": budgets}
        host = Host(policy, folder / "evidence", namespace, (PYTHON, *through))
        yield host
    finally:
        if host is not None:
            host.close()
        namespace.close()


def python(program: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", program]


def violations(host: Host) -> list[dict[str, Any]]:
    found = [span["attributes"] for span in host.journal() if span["name"] == "ray_guard.violation"]
    return [{key.rpartition(".")[2]: value for key, value in each.items()} for each in found]


def tree_attributes(host: Host) -> dict[str, Any]:
    """Of the first process of the last call."""
    spans = [s for s in host.journal() if s["ended"] and "ray_guard.tree.processes" in s["attributes"]]
    attributes: dict[str, Any] = max(spans, key=lambda span: span["start"])["attributes"]
    return attributes


class Watch(threading.Thread):
    """The most processes with ``mark`` in their command line that there ever are at once, zombies left out."""

    def __init__(self, mark: str, measure: Callable[[int], int] = lambda _pid: 1) -> None:
        super().__init__(daemon=True)
        self._mark = mark.encode()
        self._measure = measure
        self._over = threading.Event()
        self.now = self.most = 0

    def run(self) -> None:
        while not self._over.is_set():
            found = 0
            for name in os.listdir("/proc"):
                with contextlib.suppress(OSError):
                    if name.isdigit() and self._mark in Path(f"/proc/{name}/cmdline").read_bytes():
                        found += self._measure(int(name))
            self.now = found
            self.most = max(self.most, found)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


# ---------------------------------------------------------------------------------------------------------------------
# processes

BOMB = """
import os, time  # MARK
over = time.monotonic() + 1.5
while time.monotonic() < over:
    os.fork()
    time.sleep(PAUSE)
"""


def test_a_fork_bomb_ends_with_its_call(tmp_path: Path) -> None:
    """Every process forks another each 20 ms (and as fast as it can where it is held)."""
    with Watch("bomb-loose") as watch:
        # Five times only, and then they wait for an end.
        loose = BOMB.replace("while time.monotonic() < over:", "for _ in range(5):") + "os.read(0, 1)"
        loose = loose.replace("MARK", "bomb-loose").replace("PAUSE", "0.02")
        with subprocess.Popen(python(loose), stdin=subprocess.PIPE) as bomb:
            wait(lambda: watch.most > 20, "the bomb does not even work unconfined", 30)
            bomb.communicate()
    with limited(tmp_path, call={"processes": 16}) as host:
        for pause in ("0.02", "0"):
            mark = f"bomb-held-{pause}"
            with Watch(mark) as watch:
                outcome = host.run("call", python(BOMB.replace("MARK", mark).replace("PAUSE", pause)))
                wait(lambda: watch.now == 0, "the bomb goes on")
            assert outcome.status == -signal.SIGKILL
            assert outcome.seconds < 1.0
            violation = violations(host)[-1]
            assert (violation["kind"], violation["limit"]) == ("processes", 16)
            print(
                f"a fork every {pause} s: {violation['value']} were counted, {watch.most} seen; {outcome.seconds:.2f} s"
            )
            assert 16 < violation["value"] < (40 if pause != "0" else 2000)
        assert host.run("call", ["sh", "-c", "true; true; echo fine"]).stdout == "fine\n", "the next call has its own"


def test_zombies_take_up_room_threads_do_not(tmp_path: Path) -> None:
    threads = """
import threading
over = threading.Event()
made = [threading.Thread(target=over.wait) for _ in range(60)]
[thread.start() for thread in made]
over.wait(0.1)
over.set()
"""
    zombies = """
import os, time
for _ in range(20):
    if os.fork() == 0: os._exit(0)
time.sleep(5)
"""
    with limited(tmp_path, call={"processes": 8}) as host:
        assert host.run("call", python(threads)).status == 0
        assert violations(host) == []
        assert host.run("call", python(zombies)).status == -signal.SIGKILL
        assert [violation["kind"] for violation in violations(host)] == ["processes"]


def test_ordinary_work_at_the_limit_goes_on(tmp_path: Path) -> None:
    """``sh`` forks while its first child ends: a fork that were notified would fail with EINTR."""
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do (true | true | /bin/true) || exit 1; done; echo done"
    killed = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 30 & kill -9 $!; wait $! 2>/dev/null; done; echo done"
    with limited(tmp_path, call={"processes": 5}) as host:
        for each in (script, killed) * 3:
            outcome = host.run("call", ["sh", "-c", each])
            assert outcome.stdout == "done\n", outcome
        assert violations(host) == []


def test_limits_of_calls_are_independent_and_those_around_them_hold_over_all(tmp_path: Path) -> None:
    code = """
import subprocess, threading
said = {}
def one(n, count):
    with ray_guard.tool_call(f'{n}', {}):
        script = 'i=0; while [ $i -lt ' + str(count) + ' ]; do sleep 1 & i=$((i+1)); done; wait; echo all'
        said[str(n)] = ray_guard.run(['sh', '-c', script], capture_output=True, text=True).stdout.strip()
threads = [threading.Thread(target=one, args=(n, count)) for n, count in enumerate(counts)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
result = said
"""
    with limited(tmp_path / "a", call={"processes": 8}) as host:
        assert host.inside(code, counts=[7, 7, 7, 12]) == {"0": "all", "1": "all", "2": "all", "3": ""}
    for scope in ("actor", "job"):
        with limited(tmp_path / scope, **{scope: {"processes": 8}}) as host:
            assert list(host.inside(code, counts=[5, 5]).values()).count("all") == 1
            assert {violation["type"] for violation in violations(host)} == {f"{scope} budget"}


def test_two_tools_of_one_call_share_its_limit(tmp_path: Path) -> None:
    code = """
with ray_guard.tool_call('two', {}):
    first = ray_guard.Popen(['sleep', '30'])
    second = ray_guard.Popen(['sleep', '30'])
    try: ray_guard.run(['true']); result = 'started'
    except ray_guard.BudgetExceeded as error: result = [error.kind, error.value, error.limit, error.scope]
    first.kill(); first.wait()
    result.append(ray_guard.run(['true']).returncode)
"""
    with limited(tmp_path, call={"processes": 2}) as host:
        assert host.inside(code) == ["processes", 3, 2, "call", 0]


# ---------------------------------------------------------------------------------------------------------------------
# memory

ALLOCATE = """
import mmap, time  # MARK
blocks = []
try:
    while True:
        block = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_FLAGS | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        blocks.append(block)
        if len(blocks) > 40: break
except OSError as error:
    print(error)
    time.sleep(1)
"""


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("kind", ["PRIVATE", "SHARED"])
@MEASURES
def test_a_fast_allocator_is_ended_with_its_call(tmp_path: Path, without: str, kind: str) -> None:
    program = ALLOCATE.replace("FLAGS", kind)
    assert subprocess.run(python(program)).returncode == 0
    limit = 192 * MIB
    with limited(tmp_path, ("-c", WITHOUT, without), call={"memory": limit}) as host:
        with Watch(f"allocate-{kind}", resident) as watch:
            outcome = host.run("call", python(program.replace("MARK", f"allocate-{kind}")))
        assert outcome.status == -signal.SIGKILL
        (violation,) = violations(host)
        assert (violation["kind"], violation["limit"]) == ("memory", limit)
        assert violation["value"] > limit
        over = max(watch.most, violation["value"]) / limit
        print(f"{kind}: {over:.2f} times the limit")
        assert over < 2.0
        assert host.run("call", ["true"]).status == 0


FILES = {
    "memfd": "file = open(os.memfd_create('x'), 'wb', buffering=0)",
    "of a child": "file = open(os.memfd_create('x'), 'wb', buffering=0)\nif os.fork(): time.sleep(5); os._exit(0)",
    "/dev/shm": "file = open('/dev/shm/ray_guard-test', 'wb', buffering=0); os.unlink(file.name)",
}
WRITE = """
import os, time
FILE
block = b'x' * (4 << 20)
for _ in range(COUNT): file.write(block)
print('all written', flush=True)
time.sleep(HOLD)
"""


@pytest.mark.parametrize("where", FILES)
@MEASURES
def test_files_in_memory_count(tmp_path: Path, without: str, where: str) -> None:
    """Nobody maps them, so they are in no process's resident size."""
    program = WRITE.replace("FILE", FILES[where]).replace("HOLD", "0.6")
    assert subprocess.run(python(program.replace("COUNT", "160")), capture_output=True).returncode == 0
    limit = 192 * MIB
    with limited(tmp_path, ("-c", WITHOUT, without), call={"memory": limit}) as host:
        assert host.run("call", python(program.replace("COUNT", "40"))).status == 0, "160 MiB are within the limit"
        assert violations(host) == []
        assert host.run("call", python(program.replace("COUNT", "160"))).status == -signal.SIGKILL
        (violation,) = violations(host)
        assert (violation["kind"], violation["limit"]) == ("memory", limit)
        print(f"{where}: {violation['value'] / limit:.2f} times the limit")
        assert 1 < violation["value"] / limit < 2


@MEASURES
def test_a_file_in_memory_that_is_mapped_counts_once(tmp_path: Path, without: str) -> None:
    program = """
import mmap, os, time
descriptor = os.memfd_create('x')
os.truncate(descriptor, 120 << 20)
blocks = [mmap.mmap(descriptor, 120 << 20) for _ in range(2)]
for block in blocks: block[::4096] = b'x' * (120 << 8)
if os.fork() == 0: sum(blocks[0][::4096])
time.sleep(0.6)
"""
    with limited(tmp_path, ("-c", WITHOUT, without), call={"memory": 192 * MIB}) as host:
        assert host.run("call", python(program)).status == 0
        assert violations(host) == []


@pytest.mark.skipif(not memory_group.place(), reason="missing: a memory group of version 1")
def test_the_kernel_stops_what_nobody_had_time_to_see(tmp_path: Path) -> None:
    """The supervisor is stopped meanwhile: a System V segment, of which no process's size tells, is filled."""
    segment = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
time.sleep(0.5)
for _ in range(10):
    number = libc.shmget(0, 64 << 20, 0o600 | 0o1000)
    at = libc.shmat(number, None, 0)
    ctypes.memset(at, 1, 64 << 20)
    libc.shmdt(ctypes.c_void_p(at))
time.sleep(0.5)
"""
    assert subprocess.run(["unshare", "-i", *python(segment)]).returncode == 0, "positive control"
    limit = 192 * MIB
    with limited(tmp_path, call={"memory": limit}) as host:
        resume = threading.Timer(2.0, lambda: os.kill(host.supervisor, signal.SIGCONT))
        stop = threading.Timer(0.3, lambda: os.kill(host.supervisor, signal.SIGSTOP))
        for timer in (stop, resume):
            timer.start()
        outcome = host.run("call", python(segment))
        assert outcome.status == -signal.SIGKILL
        (violation,) = violations(host)
        assert (violation["kind"], violation["limit"]) == ("memory", limit)
        print(f"{violation['value'] / limit:.2f} times the limit, while nobody looked")
        assert limit < violation["value"] <= memory_group.ceiling(limit)


@MEASURES
def test_memory_is_summed_over_the_tree_and_shared_pages_counted_once(tmp_path: Path, without: str) -> None:
    forks = """
import os, time
block = bytearray(80 << 20)
for _ in range(5):
    if os.fork() == 0:
        if WRITE: block[::4096] = b'x' * len(block[::4096])
        time.sleep(1); os._exit(0)
[os.wait() for _ in range(5)]
"""
    with limited(tmp_path, ("-c", WITHOUT, without), call={"memory": 240 * MIB}) as host:
        assert host.run("call", python(forks.replace("WRITE", "0"))).status == 0
        assert violations(host) == []
        assert host.run("call", python(forks.replace("WRITE", "1"))).status == -signal.SIGKILL
        assert [violation["kind"] for violation in violations(host)] == ["memory"]


# ---------------------------------------------------------------------------------------------------------------------
# CPU time

SPIN = "while True: pass"
SWARM = """
import os, signal, time  # processes that replace each other, and that nobody waits for
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def burn(seconds):
    over = time.process_time() + seconds
    while time.process_time() < over: pass
over = time.monotonic() + 14
while time.monotonic() < over:
    burn(0.01)
    if os.fork(): END
"""


def test_a_spinner_is_ended_at_its_limit(tmp_path: Path) -> None:
    with limited(tmp_path, call={"cpu_seconds": 0.5}) as host:
        outcome = host.run("call", ["sh", "-c", f"{PYTHON} -I -S -c '{SPIN}' & wait"])
        assert outcome.status == -signal.SIGKILL
        assert outcome.seconds < 3
        (violation,) = violations(host)
        assert (violation["kind"], violation["limit"]) == ("cpu_seconds", 0.5)
        print(f"ended at {violation['value']:.3f} of 0.5 CPU seconds")
        assert 0.5 < violation["value"] < 0.6
        assert tree_attributes(host)["ray_guard.process.cpu_seconds"] < 0.7


@pytest.mark.parametrize(
    ("clock", "without"), [pytest.param("cgroup", "", marks=LEAVES), ("perf", "cgroup"), ("none", "cgroup perf")]
)
@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "THREAD_EXIT"])
def test_a_swarm_that_nobody_waits_for_is_charged(tmp_path: Path, end: str, clock: str, without: str) -> None:
    """``none``: where perf_event_open is refused, what ends unmeasured is charged an upper bound, and marked."""
    if without:
        skip_without("mount namespaces")
    last = "__import__('ctypes').CDLL(None).syscall(60, 0)"  # exit(2), not exit_group(2)
    program = SWARM.replace("END", end.replace("THREAD_EXIT", last))
    with limited(tmp_path, ("-c", WITHOUT, without), call={"cpu_seconds": 1.0}) as host:
        outcome = host.run("call", ["sh", "-c", f"trap '' CHLD; {PYTHON} -I -S -c \"$0\"; sleep 15", program])
        assert outcome.status == -signal.SIGKILL, outcome
        (violation,) = violations(host)
        assert violation["kind"] == "cpu_seconds"
        about = tree_attributes(host)
        bound = about.get("ray_guard.process.cpu_bound_seconds", 0)
        print(f"{end}, {clock}: ended after {outcome.seconds:.2f} s, {bound:.2f} s of it bounds")
        assert outcome.seconds < 12
        assert bound == 0 if clock != "none" else bound < 0.9 if end == "os._exit(0)" else bound >= 0.5


def test_children_that_have_ended_count(tmp_path: Path) -> None:
    burn = "import os\nwhile os.times().user < 0.1: pass"
    script = f"i=0; while [ $i -lt 30 ]; do {PYTHON} -I -S -c '{burn}'; i=$((i+1)); done"
    with limited(tmp_path, call={"cpu_seconds": 1}) as host:
        assert host.run("call", ["sh", "-c", script]).status == -signal.SIGKILL
        assert 1 < violations(host)[0]["value"] < 1.5


def test_a_limit_around_the_call_stops_further_ones(tmp_path: Path) -> None:
    code = """
burn = "import time\\nwhile time.process_time() < 0.4: pass"
def attempt():
    try: return ray_guard.run([python, '-I', '-S', '-c', burn]).returncode
    except ray_guard.BudgetExceeded as error: return [error.kind, error.scope]
result = []
for number in range(2):
    with ray_guard.episode(id=f'e{number}', group='g', iteration=1):
        for _ in range(4):
            with ray_guard.tool_call('burn', {}): result.append(attempt())
"""
    with limited(tmp_path / "a", episode={"cpu_seconds": 0.6}) as host:
        refused = ["cpu_seconds", "episode"]
        assert host.inside(code, python=PYTHON) == [0, -9, refused, refused] * 2
    with limited(tmp_path / "b", actor={"cpu_seconds": 0.6}) as host:
        refused = ["cpu_seconds", "actor"]
        assert host.inside(code, python=PYTHON) == [0, -9, *[refused] * 6]


def test_a_policy_that_only_reports_ends_nothing(tmp_path: Path) -> None:
    namespace = Namespace()
    limits = {"cpu_seconds": 0.1, "processes": 2, "memory": MIB, "wall_seconds": 0.2}
    policy = {"mode": "report", "egress": {"allow": []}, "budgets": {"call": limits}}
    host = Host(policy, tmp_path / "evidence", namespace)
    try:
        burn = f"{PYTHON} -I -S -c 'import time\nwhile time.process_time() < 0.3: pass'"
        assert host.run("call", ["sh", "-c", f"{burn} & {burn} & wait; echo done"]).stdout == "done\n"
        wait(lambda: len(violations(host)) >= 4, "not all were reported")
        assert sorted(violation["kind"] for violation in violations(host)) == sorted(limits)
    finally:
        host.close()
        namespace.close()


# ---------------------------------------------------------------------------------------------------------------------
# elapsed time


def test_term_at_the_limit_and_kill_a_second_later(tmp_path: Path) -> None:
    with limited(tmp_path, call={"wall_seconds": 0.5}) as host:
        outcome = host.run("call", ["sh", "-c", "trap 'echo term; exit 7' TERM; sleep 20 & wait"])
        assert (outcome.status, outcome.stdout) == (7, "term\n")
        assert 0.45 < outcome.seconds < 1.2
        outcome = host.run("call", ["sh", "-c", "trap 'echo term' TERM; while :; do sleep 20 & wait; done"])
        assert outcome.status == -signal.SIGKILL
        assert outcome.stdout.startswith("term\n")
        assert 1.4 < outcome.seconds < 2.2
        found = violations(host)
        assert [(violation["kind"], violation["limit"]) for violation in found] == [("wall_seconds", 0.5)] * 2
        assert 0.5 <= found[0]["value"] < 1.2


def test_time_counts_from_the_beginning_of_the_call_and_of_the_episode(tmp_path: Path) -> None:
    code = """
import time
def attempt():
    began = time.monotonic()
    try: ended = ray_guard.run(['sleep', '5']).returncode
    except ray_guard.BudgetExceeded as error: ended = f'{error.scope} {error.kind}'
    return [ended, round(time.monotonic() - began, 1)]
with ray_guard.episode(id='e', group='g', iteration=1):
    with ray_guard.tool_call('first', {}):
        time.sleep(0.3)
        result = [attempt(), attempt()]
    with ray_guard.tool_call('second', {}):
        result += [attempt(), attempt()]
"""
    with limited(tmp_path, call={"wall_seconds": 0.6}, episode={"wall_seconds": 1.0}) as host:
        first, refused, second, over = host.inside(code)
        assert first[0] == -signal.SIGTERM
        assert 0.2 <= first[1] <= 0.5
        assert refused[0] == "call wall_seconds"
        assert second[0] == -signal.SIGTERM
        assert 0.2 <= second[1] <= 0.6
        assert over[0] == "episode wall_seconds"


@pytest.mark.parametrize("scope", ["actor", "job"])
def test_time_of_an_actor_and_of_a_job_ends_its_tools_and_starts_no_more(tmp_path: Path, scope: str) -> None:
    code = """
result = []
while not result or not isinstance(result[-1], str):
    with ray_guard.tool_call('t', {}):
        try: result.append(ray_guard.run(['sleep', '60']).returncode)
        except ray_guard.BudgetExceeded as error: result.append(f'{error.scope} {error.kind}')
"""
    with limited(tmp_path, **{scope: {"wall_seconds": 2}}) as host:
        assert host.inside(code) == [-signal.SIGTERM, f"{scope} wall_seconds"]
        found = violations(host)
        assert [(each["kind"], each["type"], each["limit"]) for each in found] == [
            ("wall_seconds", f"{scope} budget", 2)
        ] * 2


def test_memory_of_a_job_is_that_of_all_its_calls(tmp_path: Path) -> None:
    hold = "m = bytearray(b'x') * (60 << 20); print(flush=True); input()"
    code = """
import select
one, two = ray_guard.tool_call('one', {}), ray_guard.tool_call('two', {})
one.__enter__()
first = ray_guard.Popen([python, '-I', '-S', '-c', hold], stdin=-1, stdout=-1)
first.stdout.readline()
alone = first.poll()
two.__enter__()
second = ray_guard.Popen([python, '-I', '-S', '-c', hold], stdin=-1, stdout=-1)
ended = select.poll()
for each in (first, second): ended.register(each.stdout, select.POLLHUP)
ended.poll(10_000)
for each in (first, second): each.stdin.close()
result = [alone, sorted([first.wait(), second.wait()])]
"""
    with limited(tmp_path, job={"memory": 100 * MIB}) as host:
        alone, ended = host.inside(code, python=PYTHON, hold=hold)
        assert alone is None
        assert ended[0] == -signal.SIGKILL
        assert violations(host)[0]["type"] == "job budget"


@pytest.mark.parametrize(
    ("limits", "script", "status"),
    [
        ({"wall_seconds": 0.3}, "exec sleep 20", 128 + 15),
        ({"cpu_seconds": 0.2}, "while :; do :; done", 128 + 9),
        ({"processes": 0}, "true", 125),
    ],
)
def test_the_command_says_why(tmp_path: Path, limits: dict[str, float], script: str, status: int) -> None:
    (kind,) = limits
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"version: 1\nbudgets: {{call: {{{kind}: {limits[kind]}}}}}\n")
    command = [
        str(Path(sys.executable).with_name("ray-guard")),
        "run",
        "--policy",
        str(policy),
        "--",
        "sh",
        "-c",
        script,
    ]
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(tmp_path / "evidence")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("ray-guard: ")
    assert f"{kind} " in done.stderr

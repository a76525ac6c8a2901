"""Leaders serve one call after the other: nothing of a call reaches the next, and a leader's death costs one start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PYTHON, ROOT, CannotBuild, Host, Namespace, Stage, has_own_supervisors, wait

from ray_guard.kernel import procfs

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(not has_own_supervisors(), reason="needs a supervisor of its own")]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    namespace = Namespace()
    made = Host({"egress": {"allow": []}}, tmp_path / "evidence", namespace)
    try:
        yield made
    finally:
        made.close()
        namespace.close()


def leader(host: Host) -> int:
    """The process that leads a call made now."""
    return int(host.run("call", ["sh", "-c", "echo $PPID"]).stdout)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def zygote(host: Host) -> int:
    (found,) = children(host.supervisor)
    return found


def leaders(host: Host) -> list[int]:
    """Without other helpers, which lead no session."""
    return [each for each in children(zygote(host)) if os.getsid(each) == each]


def settled(host: Host) -> list[int]:
    """The idle leaders, each with the thread ready that will start its next tool."""
    wait(lambda: all(threads(each) == 2 for each in leaders(host)), "a leader is not ready again")
    return leaders(host)


def test_a_leader_serves_again(host: Host) -> None:
    served = set()
    for _ in range(12):
        served.add(leader(host))
        settled(host)
    assert len(served) <= 3
    assert served <= set(leaders(host))


def test_there_are_none_before_the_first_start(host: Host) -> None:
    assert leaders(host) == []


def test_as_many_as_calls_at_once_then_a_few(host: Host) -> None:
    host.inside(
        """
import threading
threads = [threading.Thread(target=lambda: ray_guard.run(["sleep", "0.4"])) for _ in range(14)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
result = None
"""
    )
    wait(lambda: len(leaders(host)) <= 8, "idle leaders are kept for ever", 5)
    assert len(settled(host)) == 8


def test_an_idle_leader_that_died_is_replaced(host: Host) -> None:
    leader(host)
    for each in settled(host):
        os.kill(each, signal.SIGKILL)
    wait(lambda: not leaders(host), "a killed leader lives on")
    assert host.run("call", ["echo", "here"]).stdout == "here\n"


def test_a_leader_that_dies_takes_its_tool_along_and_says_so(host: Host) -> None:
    status = host.inside(
        """
import os, pathlib, signal
process = ray_guard.Popen(["sleep", "60"])
stat = pathlib.Path(f"/proc/{process.pid}/stat")
os.kill(int(stat.read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
result = [process.wait(10), process.pid]
"""
    )
    assert status[0] == -signal.SIGKILL
    wait(lambda: procfs.is_zombie(status[1]) or not Path(f"/proc/{status[1]}").exists(), "the tool outlived its leader")
    assert host.run("call", ["echo", "here"]).stdout == "here\n"


DAEMONS = ["sh", "-c", "for i in 1 2 3; do (trap '' TERM; setsid sleep 61.5 & ); done; exec sleep 61.5"]


def sleepers() -> list[int]:
    return [pid for pid in procfs.processes() if procfs.command_line(pid) == ("sleep", "61.5")]


def test_what_a_lost_leader_has_led_is_ended_whatever_it_has_become(host: Host) -> None:
    status = host.inside(
        f"""
import os, pathlib, signal, time
process = ray_guard.Popen({DAEMONS!r})
time.sleep(0.3)
stat = pathlib.Path(f"/proc/{{process.pid}}/stat")
os.kill(int(stat.read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
result = process.wait(10)
"""
    )
    assert status == -signal.SIGKILL
    wait(lambda: not sleepers(), "a daemon outlived its leader", 2)


def test_supervisor_and_leader_killed_at_once_leave_nothing(host: Host) -> None:
    thread = threading.Thread(target=_run_daemons, args=(host,), daemon=True)
    thread.start()
    wait(lambda: len(sleepers()) == 4, "the tool does not start", 10)
    doomed = [host.supervisor, *leaders(host)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in doomed:
            os.kill(pid, number)
    wait(lambda: not sleepers(), "a tool outlived the supervisor and its leader", 2)
    thread.join(10)


def _run_daemons(host: Host) -> None:
    with contextlib.suppress(Exception):  # its target dies with the supervisor
        host.run("call", DAEMONS)


THREADS_OF_PARENT = r"""
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    char path[64];
    int others = 0;
    snprintf(path, sizeof path, "/proc/%d/task", getppid());
    DIR *threads = opendir(path);
    for (struct dirent *each; threads && (each = readdir(threads));)
        if (atoi(each->d_name) > 0 && atoi(each->d_name) != getppid())
            others++, syscall(SYS_tkill, atoi(each->d_name), SIGKILL);
    printf("%d\n", threads ? others : -1);
    return 0;
}
"""


def test_a_tool_never_runs_beside_the_thread_that_has_started_it(stage: Stage) -> None:
    """Both are in one domain: it could signal that thread, and with it end its leader."""
    try:
        program = stage.compile("threads of parent", THREADS_OF_PARENT, ("-static",))  # it begins at once
    except CannotBuild as error:
        pytest.skip(f"missing: {error}")
    beside = "import subprocess, sys, threading, time\n"
    beside += "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nsubprocess.run(sys.argv[1:])"
    control = subprocess.run([PYTHON, "-c", beside, program], capture_output=True, text=True, check=False)
    assert (control.returncode, control.stdout) == (-signal.SIGKILL, "1\n")
    code = "result = [ray_guard.run([program], capture_output=True, text=True).stdout for _ in range(60)]"
    assert stage.host().inside(code, program=program) == ["0\n"] * 60


def test_usage_is_each_calls_own(host: Host) -> None:
    """The peak and the CPU time of one call are not told again for the next of the same leader."""
    hog = "b = bytearray(80 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\nn = 0\nwhile n < 3_000_000: n += 1"
    host.run("call", [PYTHON, "-I", "-S", "-c", hog])
    settled(host)
    host.run("call", ["true"])

    def usage(name: str) -> list[dict[str, object]]:
        found = [span for span in host.journal() if span["name"].startswith(f"process {name}") and span["ended"]]
        return [span["attributes"] for span in found]

    wait(lambda: bool(usage("true")), "the end of a call is not in the journal")
    (first,), (second,) = usage("python"), usage("true")
    assert first["ray_guard.process.peak_memory"] > 80 << 20
    assert second["ray_guard.process.peak_memory"] < 40 << 20
    assert second["ray_guard.process.cpu_seconds"] < first["ray_guard.process.cpu_seconds"]


def test_no_leader_holds_anothers_pipes(host: Host) -> None:
    """A pipe ends with its call, though leaders that were forked meanwhile live on."""
    code = """
import subprocess, threading
held = []
slow = threading.Thread(target=lambda: held.append(ray_guard.Popen(["sleep", "300"])))
slow.start()
for _ in range(4):
    assert ray_guard.run(["echo", "x"], stdout=subprocess.PIPE, text=True).stdout == "x\\n"
slow.join()
result = held[0].poll()
held[0].kill()
held[0].wait()
"""
    assert host.inside(code) is None, "it was waited for"


@pytest.mark.skipif(not ROOT, reason="the supervisor is not dumpable: only root can count its descriptors")
def test_descriptors_of_a_call_do_not_stay(host: Host) -> None:
    """Standard ones, the line, what wakes it, its next thread's line, news and ruleset, control group: no more."""

    def held() -> dict[int, int]:
        return {each: len(os.listdir(f"/proc/{each}/fd")) for each in (zygote(host), *settled(host))}

    for _ in range(10):
        host.run("call", ["true"])
        settled(host)
    wait(lambda: max(held().values()) <= 11, "descriptors of calls are left", 5)


@pytest.mark.parametrize("program", ["/no/such/program", "/etc/passwd"])
def test_a_program_that_cannot_start_leaves_no_descriptor_open(host: Host, program: str) -> None:
    """Whoever reads its output would wait for ever: a leader waits for the next call."""
    said = host.inside(
        f"""
import os, select
reader, writer = os.pipe()
try:
    ray_guard.run([{program!r}], stdout=writer)
except OSError:
    pass
os.close(writer)
result = select.select([reader], [], [], 5)[0] == [reader] and os.read(reader, 1) == b""
"""
    )
    assert said is True


def test_survivors_of_a_call_are_not_the_next_ones(host: Host) -> None:
    """What the first call leaves running is dead before the leader serves again."""
    first = host.run("call", ["sh", "-c", "setsid -f sleep 60 >/dev/null 2>&1 </dev/null; echo $PPID"])
    settled(host)
    for _ in range(4):
        told = host.run("call", ["sh", "-c", "echo $PPID; cat /proc/$PPID/task/$PPID/children"]).stdout.split()
        if told[0] == first.stdout.strip():
            assert len(told) == 2, "more than the tool itself is below its leader"
            return
        settled(host)
    pytest.fail("the same leader did not serve again")

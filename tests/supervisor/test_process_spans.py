"""Every program that is executed in a call is a span: what it was, who started it, how it ended and what it used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Stage, run_unconfined, wait

pytestmark = pytest.mark.kernel


def spans_of(host: Host, tool: str) -> list[dict[str, Any]]:
    """The process spans below the tool call ``tool``, in order of their beginning, when all have ended."""

    def found() -> list[dict[str, Any]]:
        journal = host.journal()
        below = {span["id"] for span in journal if span["name"] == f"execute_tool {tool}"}
        spans = []
        for span in sorted(journal, key=lambda span: span["start"]):
            if span["parent"] in below and span["name"].startswith("process "):
                below.add(span["id"])
                spans.append(span)
        return spans if spans and all(span["ended"] for span in spans) else []

    return list(wait(found, f"no process of {tool} has ended"))


def named(spans: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [span for span in spans if span["name"] == f"process {name}"]
    return found


def test_each_exec_is_a_span_below_the_one_that_forked_it(stage: Stage) -> None:
    host = stage.host()
    script = "/bin/echo one two; sh -c 'env true; exit 4'; exit 3"
    assert host.run("call", ["sh", "-c", script], tool="tree").status == 3
    spans = spans_of(host, "tree")
    assert [span["name"].split()[1] for span in spans] == ["sh", "echo", "sh", "env", "true"]
    first, echo, inner, env, true = spans
    assert [span["parent"] for span in (echo, inner, env)] == [first["id"], first["id"], inner["id"]]
    assert true["parent"] == inner["id"], "env has executed it in its own process, which the inner shell forked"
    assert true["attributes"]["process.pid"] == env["attributes"]["process.pid"]
    about = echo["attributes"]
    assert about["process.command_args"] == ["/bin/echo", "one", "two"]
    assert about["ray_guard.arguments.sha256"] == hashlib.sha256(b"/bin/echo\0one\0two").hexdigest()
    assert about["process.executable.path"] == "/bin/echo"
    assert about["process.parent_pid"] == first["attributes"]["process.pid"]
    assert [span["attributes"].get("process.exit.code") for span in spans] == [3, 0, 4, None, 0]
    for span in spans:
        assert 0 <= span["attributes"]["ray_guard.process.cpu_seconds"] < 5
        assert span["attributes"]["ray_guard.source"] == "supervisor"
    assert about["ray_guard.process.peak_memory"] > 100_000
    assert first["attributes"]["ray_guard.tree.processes"] == 4
    assert first["attributes"]["ray_guard.tree.executions"] == 4


def test_secrets_of_commands_are_not_recorded(stage: Stage) -> None:
    host = stage.host()
    script = (
        "env PGPASSWORD=hunter2 true https://me:hunter3@host/; /bin/true --token hunter4 --verbose; "
        "/bin/true 'Cookie: a=hunter5'"
    )
    assert host.run("call", ["sh", "-c", script], tool="secretive").status == 0
    spans = spans_of(host, "secretive")
    told = named(spans, "env")["attributes"]
    assert told["process.command_args"] == ["env", "PGPASSWORD=[redacted]", "true", "https://me:[redacted]@host/"]
    whole = ["env", "PGPASSWORD=hunter2", "true", "https://me:hunter3@host/"]
    assert told["ray_guard.arguments.sha256"] == hashlib.sha256("\0".join(whole).encode()).hexdigest()
    assert ["/bin/true", "--token", "[redacted]", "--verbose"] in [
        each["attributes"]["process.command_args"] for each in spans
    ]
    assert b"hunter" not in b"".join(path.read_bytes() for path in host.evidence.glob("*.otlp.jsonl"))


def test_what_is_looked_for_along_the_path_and_not_found_is_no_span(stage: Stage) -> None:
    host = stage.host()
    argv = ["env", "PATH=/nonexistent:/etc:/usr/bin:/bin", "sh", "-c", "no-such-program; cat /dev/null"]
    assert host.run("call", argv, tool="path").status == 0
    assert [span["name"].split()[1] for span in spans_of(host, "path")] == ["env", "sh", "cat"]


def test_what_the_kernel_would_not_run_is_a_span_that_says_so(stage: Stage, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF" + b"x" * 100)
    for path, mode in ((broken, 0o755), (tmp_path, 0o777)):
        path.chmod(mode)
    program = f"""
import os
for how in ('once', 'then another'):
    if os.fork() == 0:
        try: os.execv({str(broken)!r}, ['broken', how])
        except OSError: pass
        if how == 'once': os._exit(3)
        os.execv('/bin/true', ['true', how])
    os.wait()
"""
    host = stage.host()
    assert host.run("call", [PYTHON, "-I", "-S", "-c", program], tool="broken").status == 0
    _, once, then, true = (span["attributes"] for span in spans_of(host, "broken"))
    for refused in (once, then):
        assert refused["ray_guard.ended_by"] == "supervisor"
        assert "process.exit.code" not in refused
    assert (true["process.command_args"], true["process.exit.code"]) == (["true", "then another"], 0)
    assert true["process.pid"] == then["process.pid"]


def test_a_child_that_outlives_its_parent_is_still_its_own(stage: Stage) -> None:
    """It executes when the one that forked it is gone, and was never heard of before."""
    parent = """
import os
r, w = os.pipe()
if os.fork() == 0:
    os.close(w)
    os.read(r, 1)
    os.execv('/bin/true', ['late'])
"""
    program = f"""
import os
r, w = os.pipe()
os.set_inheritable(w, True)
if os.fork() == 0:
    os.execv({PYTHON!r}, ['parent', '-I', '-S', '-c', {parent!r}])
os.close(w)
os.wait()
os.read(r, 1)  # the late one has it too
"""
    host = stage.host()
    assert host.run("call", [PYTHON, "-I", "-S", "-c", program], tool="orphan").status == 0
    _, parent_span, late = spans_of(host, "orphan")
    assert late["attributes"]["process.command_args"] == ["late"]
    assert late["parent"] == parent_span["id"]
    assert late["attributes"]["process.parent_pid"] == parent_span["attributes"]["process.pid"]


def test_cpu_and_memory_of_a_process_are_its_own(stage: Stage) -> None:
    burn = "import os; x = bytearray(60_000_000); t = os.times\nwhile t().user + t().system < 0.3: pass"
    script = f"{PYTHON} -I -S -c '{burn}'; {PYTHON} -I -S -c 'pass'"
    host = stage.host()
    assert host.run("call", ["sh", "-c", script], tool="burn").status == 0
    first, burnt, idle = (span["attributes"] for span in spans_of(host, "burn"))
    assert 0.3 <= burnt["ray_guard.process.cpu_seconds"] < 0.4
    assert idle["ray_guard.process.cpu_seconds"] < 0.2
    assert burnt["ray_guard.process.peak_memory"] > 60_000_000 > idle["ray_guard.process.peak_memory"]
    assert first["ray_guard.process.cpu_seconds"] >= 0.3, "the first process's span has the sum of the tree"


@pytest.mark.parametrize(
    ("script", "signal"), [("sleep 30 & sleep 0.3; kill -9 $!; wait", 9), ("sleep 30 & sleep 0.3; kill $!; wait", 15)]
)
def test_one_that_a_signal_ends_is_closed_by_the_supervisor(stage: Stage, script: str, signal: int) -> None:
    host = stage.host()
    assert host.run("call", ["sh", "-c", script], tool=f"signal {signal}").status == 0
    spans = spans_of(host, f"signal {signal}")
    (slept,) = [span["attributes"] for span in spans if span["attributes"]["process.command_args"] == ["sleep", "30"]]
    assert slept["ray_guard.ended_by"] == "supervisor"
    assert slept.get("process.exit.code") == 128 + signal
    assert slept.get("process.exit.signal") == signal


def test_what_a_call_leaves_behind_is_closed_at_its_end(stage: Stage) -> None:
    host = stage.host()
    assert host.run("call", ["sh", "-c", "setsid -f sleep 30 >/dev/null 2>&1; sleep 0.3"], tool="left").status == 0
    spans = spans_of(host, "left")
    (left,) = [span["attributes"] for span in spans if span["attributes"]["process.command_args"] == ["sleep", "30"]]
    assert left["ray_guard.ended_by"] == "supervisor"


def test_a_connection_hangs_under_the_process_that_made_it(stage: Stage) -> None:
    host = stage.host()
    port = stage.sinks.address("granted")
    script = f"true; bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; exec 3<&-; exec 3<>/dev/tcp/127.0.0.1/{port}'; true"
    assert host.run("call", ["sh", "-c", script], tool="connects").status == 0
    bash = named(spans_of(host, "connects"), "bash")
    flows = [span for span in host.journal() if span["parent"] == bash["id"] and span["name"] == "egress connect"]
    assert len(flows) == 2


def test_processes_of_two_calls_at_once_are_told_apart(stage: Stage) -> None:
    code = """
import threading
def one(n):
    with ray_guard.tool_call(f'apart {n}', {}):
        for _ in range(3):
            ray_guard.run(['sh', '-c', f'/bin/echo {n}; sleep 0.0{n}'], capture_output=True)
threads = [threading.Thread(target=one, args=(n,)) for n in range(1, 5)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    host = stage.host()
    host.inside(code)
    for number in range(1, 5):
        spans = spans_of(host, f"apart {number}")
        echoes = [s["attributes"]["process.command_args"] for s in spans if s["name"] == "process echo"]
        assert echoes == [["/bin/echo", str(number)]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# what is badly meant

BAD = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char *argv0[] = {"true", NULL}, *none[] = {NULL};
static char path[70000];

static void say(const char *what, long result) {
    printf("%s %ld %d\n", what, result, result < 0 ? errno : 0);
    fflush(stdout);
}

int main(int argc, char **argv) {
    char *wild = (char *)0x10, *kernel = (char *)0xffffffff81000000;
    say("wild path", execve(wild, argv0, none));
    say("null path", execve(NULL, argv0, none));
    say("kernel path", execve(kernel, argv0, none));
    say("wild argv", execve("/bin/true", (char **)wild, none));
    say("kernel argv", execve("/bin/true", (char **)kernel, none));
    char *pointers[] = {"true", wild, NULL};
    say("wild argument", execve("/bin/true", pointers, none));
    say("wild environment", execve("/bin/true", argv0, (char **)wild));
    memset(path, 'a', 4096);
    say("long path", execve(path, argv0, none));
    say("empty path", execve("", argv0, none));
    say("folder", execve("/tmp", argv0, none));
    say("no program", execve("/etc/passwd", argv0, none));
    say("absent", execve("/nonexistent", argv0, none));
    char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + 4096, 4096);
    memset(page + 4090, 'x', 6);
    say("unterminated path", execve(page + 4090, argv0, none));
    char **array = (char **)(page + 4096 - 16);
    array[0] = array[1] = "true";
    say("endless argv", execve("/bin/true", array, none));
    memset(path, 'a', sizeof path - 1);
    int many = 200000;
    char **big = calloc(many + 1, sizeof *big);
    for (int i = 0; i < many; i++) big[i] = path + 60000;
    say("too many", execve("/bin/true", big, none));
    char *huge = malloc(1 << 20);
    memset(huge, 'h', (1 << 20) - 1), huge[(1 << 20) - 1] = 0;
    char *one[] = {"true", huge, NULL};
    say("one too long", execve("/bin/true", one, none));
    say("bad descriptor", syscall(SYS_execveat, 77, "", argv0, none, AT_EMPTY_PATH));
    say("bad flags", syscall(SYS_execveat, AT_FDCWD, "/bin/true", argv0, none, 0x4000000));
    int status, memory = memfd_create("program", 0), file = open("/bin/true", O_RDONLY);
    long size;
    while ((size = read(file, huge, 1 << 20)) > 0) if (write(memory, huge, size) != size) return 9;
    if (fork() == 0) { syscall(SYS_execveat, memory, "", argv0, none, AT_EMPTY_PATH); _exit(99); }
    wait(&status), say("memory file", status);
    if (fork() == 0) { fexecve(file, argv0, none); _exit(99); }
    wait(&status), say("descriptor", status);
    if (fork() == 0) { execve("/bin/true", NULL, NULL); _exit(99); }
    wait(&status), say("no argv", status);
    if (vfork() == 0) { execve("/bin/true", argv0, none); _exit(99); }
    wait(&status), say("vfork", status);
    for (int i = 0; i < 1500; i++) big[i] = path + sizeof path - 500;
    big[1500] = NULL;
    if (fork() == 0) { execve("/bin/true", big, none); _exit(99); }
    wait(&status), say("many", status);
    return 0;
}
"""


def test_bad_calls_are_answered_as_the_kernel_does(stage: Stage) -> None:
    program = stage.compile("bad exec", BAD)
    plain = run_unconfined([program])
    host = stage.host()
    confined = host.run("call", [program], tool="bad")
    assert plain.status == 0
    assert len(plain.stdout.splitlines()) == 23
    assert (confined.status, confined.stdout) == (0, plain.stdout)
    spans = spans_of(host, "bad")
    ended = [span["attributes"].get("process.exit.code") for span in spans if span["name"] != "process bad_exec"]
    assert ended.count(0) == 5, ended
    many = [s["attributes"] for s in spans if s["attributes"].get("process.exit.code") == 0][-1]
    assert len(many["process.command_args"]) == 64
    assert all(len(argument) <= 257 for argument in many["process.command_args"])


def test_a_flood_of_execs_is_bounded_and_harms_nobody(stage: Stage, tmp_path: Path) -> None:
    """Programs the kernel will not run: each attempt is notified, and none costs the caller a process."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF" + b"x" * 100)
    broken.chmod(0o755)
    flood = f"""
import os
for _ in range(6000):
    try: os.execv({str(broken)!r}, ['broken'])
    except OSError: pass
"""
    code = """
import threading, time
done = []
def flood():
    with ray_guard.tool_call('flood', {}):
        done.append(ray_guard.run([python, '-I', '-S', '-c', program]).returncode)
thread = threading.Thread(target=flood)
thread.start()
slowest = 0
while thread.is_alive():
    began = time.monotonic()
    with ray_guard.tool_call('beside', {}):
        ray_guard.run(['true'])
    slowest = max(slowest, time.monotonic() - began)
result = [done, slowest]
"""
    tmp_path.chmod(0o777)
    host = stage.host()
    done, slowest = host.inside(code, python=PYTHON, program=flood)
    assert done == [0]
    assert slowest < 1.0
    spans = spans_of(host, "flood")
    assert len(spans) == 4097
    print(f"slowest call beside a flood: {slowest * 1e3:.0f} ms")


def test_a_process_that_floods_forks_harms_nobody(stage: Stage) -> None:
    flood = """
import os
for _ in range(1500):
    pid = os.fork()
    if not pid: os._exit(0)
    os.waitpid(pid, 0)
"""
    host = stage.host()
    assert host.run("call", [PYTHON, "-I", "-S", "-c", flood], tool="forks").status == 0
    (first,) = spans_of(host, "forks")
    assert first["attributes"]["ray_guard.tree.processes"] == 1501
    assert host.run("call", ["true"]).status == 0


def test_a_thread_that_executes_is_its_process(stage: Stage) -> None:
    program = "import os, threading; threading.Thread(target=os.execv, args=('/bin/echo', ['echo', 'thread'])).start()"
    host = stage.host()
    outcome = host.run("call", [PYTHON, "-I", "-S", "-c", program], tool="thread")
    assert outcome.stdout == "thread\n"
    first, echo = spans_of(host, "thread")
    assert echo["attributes"]["process.pid"] == first["attributes"]["process.pid"]
    assert echo["attributes"]["process.exit.code"] == 0

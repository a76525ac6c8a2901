"""The guard itself as a target: its supervisor, its zygote, a call's leader, the listener nobody may hold."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Attack, Stage, cases, escape, row, run_unconfined

pytestmark = pytest.mark.kernel


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _zygote(supervisor: int) -> int:
    """The supervisor's first child."""
    return int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])


def _state(pid: int) -> dict[str, Any]:
    try:
        stopped = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "TtZ"
        return {
            "stopped": stopped,
            "nice": os.getpriority(os.PRIO_PROCESS, pid),
            "policy": os.sched_getscheduler(pid),
            "affinity": sorted(os.sched_getaffinity(pid)),
            "processor": resource.prlimit(pid, resource.RLIMIT_CPU),
        }
    except (OSError, ProcessLookupError):
        return {"dead": True}


_before: dict[int, dict[str, Any]] = {}


def _harm(told: dict[str, Any]) -> str:
    pid = told["keeper"]
    after = _state(pid)
    before = _before[pid]
    with contextlib.suppress(OSError):  # the stage plays on
        os.killpg(os.getpgid(pid), signal.SIGCONT)
        os.setpriority(os.PRIO_PROCESS, pid, before["nice"])
        os.sched_setscheduler(pid, before["policy"], os.sched_param(0))
        os.sched_setaffinity(pid, before["affinity"])
        resource.prlimit(pid, resource.RLIMIT_CPU, before["processor"])
    return ", ".join(f"{key}: {before.get(key)} -> {value}" for key, value in after.items() if before.get(key) != value)


_BY = {
    "kill": "os.kill(K, 19)",
    "kill of its group": "os.kill(-os.getpgid(K), 19)",
    "tkill": "call(200, K, 19)",
    "tgkill": "call(234, K, K, 19)",
    "rt_sigqueueinfo": "call(129, K, 19, struct.pack('=iii', 19, 0, -1) + bytes(116))",
    "rt_tgsigqueueinfo": "call(297, K, K, 19, struct.pack('=iii', 19, 0, -1) + bytes(116))",
    "pidfd_send_signal": "call(424, os.pidfd_open(K), 19, 0, 0)",
    "pidfd_send_signal through /proc": "call(424, os.open('/proc/%d' % K, os.O_RDONLY), 19, 0, 0)",
    "F_SETOWN": "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 10, 19); fcntl.fcntl(a, 8, K); fcntl.fcntl(a, 4, 0o20000); b.send(b'x'); time.sleep(0.05)",
    "F_SETOWN of its group": "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 10, 19); fcntl.fcntl(a, 8, -os.getpgid(K)); fcntl.fcntl(a, 4, 0o20000); b.send(b'x'); time.sleep(0.05)",
    "F_SETOWN_EX": "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 10, 19); fcntl.fcntl(a, 15, struct.pack('=ii', 1, K)); fcntl.fcntl(a, 4, 0o20000); b.send(b'x'); time.sleep(0.05)",
    "FIOSETOWN": "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 10, 19); fcntl.ioctl(a, 0x8901, struct.pack('=i', K)); fcntl.fcntl(a, 4, 0o20000); b.send(b'x'); time.sleep(0.05)",
    "renice": "os.setpriority(0, K, 19)",
    "pin": "os.sched_setaffinity(K, {min(os.sched_getaffinity(0))})",
    "schedule last": "os.sched_setscheduler(K, os.SCHED_IDLE, os.sched_param(0))",
    "limit its time": "call(302, K, 0, struct.pack('=QQ', 600, 600), 0)",
}
"""How one may hold up another process. The supervisor stopped: nothing is counted or cut, and connections flow on."""

_FOR_GOOD = ("renice", "schedule last", "limit its time")
"""What only root can take back: others would leave the stage's supervisor like that."""

KEEPERS = [
    Attack(
        f"{whom}: {how}",
        f"def main():\n    K = A['keeper']\n    {body}\n",
        sink="",
        # the kernel takes what F_SETOWN says of anybody, and asks Landlock when the signal is due
        refused=() if "F_SETOWN" in how else ("EPERM", "ENOSYS"),
        rings=("actor", "call"),
        judge=_harm,
        privileged=how in _FOR_GOOD,
        elsewhere="it is the guard's own process",
    )
    for whom in ("supervisor", "zygote")
    for how, body in _BY.items()
]


@pytest.fixture
def keeper(stage: Stage, attack: Attack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    arguments = stage.arguments

    def with_keeper() -> dict[str, Any]:
        supervisor = stage.host().supervisor
        pid = supervisor if attack.name.startswith("supervisor") else _zygote(supervisor)
        _before[pid] = _state(pid)
        return {**arguments(), "keeper": pid}

    monkeypatch.setattr(stage, "arguments", with_keeper)
    yield
    for pid in _before:
        with contextlib.suppress(OSError):
            os.killpg(os.getpgid(pid), signal.SIGCONT)


@cases(KEEPERS, "the guard itself")
@pytest.mark.usefixtures("keeper")
def test_keeper(stage: Stage, attack: Attack, ring: str) -> None:
    escape(stage, attack, ring)


# ---------------------------------------------------------------------------------------------------------------------
# its memory


@pytest.mark.skipif(os.getuid() != 0, reason="for an ordinary user the kernel refuses it: the guard is not dumpable")
@pytest.mark.parametrize("ring", ["actor", "call"])
@pytest.mark.parametrize("whom", ["supervisor", "zygote"])
def test_its_memory_is_not_opened(stage: Stage, whom: str, ring: str) -> None:
    host = stage.host()
    pid = host.supervisor if whom == "supervisor" else _zygote(host.supervisor)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0):
        pass  # the positive control: root may
    program = (
        "import threading\n"
        "def main():\n"
        "    try: open('/proc/%d/mem' % A['pid'], 'r+b', buffering=0); return 'opened'\n"
        "    except OSError as error: return type(error).__name__\n"
        "import os, sys, json\nA = json.loads(sys.argv[1])\nresult = [main()]\n"
        "thread = threading.Thread(target=lambda: result.append(main())); thread.start(); thread.join()\n"
        "print(json.dumps(result))"
    )
    outcome = host.run(ring, [PYTHON, "-I", "-S", "-c", program, f'{{"pid": {pid}}}'])
    assert outcome.stdout == '["PermissionError", "PermissionError"]\n', outcome
    if ring == "actor":
        code = f"""
try: open('/proc/{pid}/mem', 'r+b', buffering=0); result = 'opened'
except OSError as error: result = type(error).__name__
"""
        assert host.inside(code) == "PermissionError"


# ---------------------------------------------------------------------------------------------------------------------
# sockets in the guard's own folders


def _no_socket(told: dict[str, Any]) -> str:
    made = Path(told["control"], told["token"])
    try:
        made.unlink()
    except FileNotFoundError:
        return ""
    return "a socket of the attack's lies where the guard's own are"


IN_ITS_FOLDER = [
    Attack(
        f"socket bound in {where} folder{how}",
        f"""
def main():
    folder = A['control']
    {prepare}
    socket.socket(AF_UNIX, {kind}).bind({path})
""",
        sink="",
        refused=("EACCES",),
        rings=("actor", "call"),
        judge=_no_socket,
        elsewhere="it is the guard's own folder",
    )
    for where in ("the supervisor's", "the evidence")
    for how, prepare, path, kind in (
        ("", "pass", "folder + '/' + A['token']", "STREAM"),
        (" through a link", "os.symlink(folder, A['folder'] + '/l')", "A['folder'] + '/l/' + A['token']", "SEQPACKET"),
        (", relative", "os.chdir(folder)", "A['token']", "STREAM"),
        (
            " through /proc",
            "d = os.open(folder, os.O_PATH)",
            "'/proc/self/fd/%d/' % d + A['token']",
            "STREAM",
        ),
    )
]


@cases(IN_ITS_FOLDER, "the guard itself")
def test_socket_in_its_folder(stage: Stage, attack: Attack, ring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is the guard's own."""
    arguments = stage.arguments
    code = "from ray_guard.kernel import rendezvous; result = str(rendezvous.folder())"
    supervisors = stage.host().inside(code)
    control = supervisors if "supervisor" in attack.name else str(stage.host().evidence)
    monkeypatch.setattr(stage, "arguments", lambda: {**arguments(), "control": control})
    escape(stage, attack, ring)


@row("the guard itself", "the supervisor's address: taken, or connected to")
@pytest.mark.parametrize("ring", ["actor", "call"])
def test_its_address_is_nobody_elses(stage: Stage, ring: str) -> None:
    """Who listened there would be taken for the supervisor by whoever is guarded next."""
    program = """
import json, socket, sys
said = {}
for how, address in (("bind", sys.argv[1] + ".next"), ("connect", sys.argv[1])):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try: getattr(sock, how)("\\0" + address); said[how] = 0
    except OSError as error: said[how] = error.errno
print(json.dumps(said))
"""
    address = stage.host().inside("from ray_guard.kernel import rendezvous; result = rendezvous.address()")
    argv = [PYTHON, "-I", "-S", "-c", program, address.removeprefix("\0")]
    assert run_unconfined(argv).said == {"bind": 0, "connect": 0}
    assert stage.host().run(ring, argv).said == {"bind": errno.EACCES, "connect": errno.EACCES}


# ---------------------------------------------------------------------------------------------------------------------
# a call's leader


@row("the guard itself", "signals from a tool to its leader, the zygote, the supervisor")
@pytest.mark.parametrize("whom", ["leader", "zygote", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_tool_cannot_signal_its_keepers(tmp_path: Path, stage: Stage, whom: str, number: signal.Signals) -> None:
    program = """
import os, sys, time
above = {"leader": os.getppid(), "supervisor": int(sys.argv[2])}
above["zygote"] = int(open("/proc/%d/stat" % above["leader"]).read().rsplit(")", 1)[1].split()[1])
if os.fork() == 0:  # whatever was stopped must go on
    time.sleep(1)
    try: os.kill(above[sys.argv[1]], 18)
    except OSError: pass
    os._exit(0)
try:
    os.kill(above[sys.argv[1]], int(sys.argv[3]))
except OSError as error:
    print('{"errno": %d, "pid": %d}' % (error.errno, above[sys.argv[1]]))
else:
    print('{"errno": 0, "pid": %d}' % above[sys.argv[1]])
"""
    host = stage.host()
    argv = [PYTHON, "-I", "-S", "-c", program, whom, str(host.supervisor), str(int(number))]
    outcome = host.run("call", argv)
    assert outcome.said.get("errno") == 1, outcome
    assert host.run("call", ["true"]).status == 0


# ---------------------------------------------------------------------------------------------------------------------
# the listener


@row("the guard itself", "a listener held within the tree")
@pytest.mark.parametrize("ring", ["actor", "call"])
def test_nobody_holds_a_listener(stage: Stage, ring: str) -> None:
    """Who holds the listener can answer its own calls."""
    program = "import os; print([os.readlink('/proc/self/fd/' + n) for n in os.listdir('/proc/self/fd') if os.path.islink('/proc/self/fd/' + n)])"
    assert "seccomp" not in stage.host().run(ring, [PYTHON, "-I", "-S", "-c", program]).stdout
    links = stage.host().inside(
        "import os\nresult = []\n"
        "for n in os.listdir('/proc/self/fd'):\n"
        "    try: result.append(os.readlink('/proc/self/fd/' + n))\n"
        "    except OSError: pass\n"
    )
    assert links
    assert not [link for link in links if "seccomp" in link]


@row("the guard itself", "descriptors left open in a tool")
def test_a_tool_has_no_descriptor_but_its_own(stage: Stage) -> None:
    program = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    # 3 is the directory being listed
    assert stage.host().run("call", [PYTHON, "-I", "-S", "-c", program]).stdout == "['0', '1', '2', '3']\n"


@row("the guard itself", "a second listener: answering one's own calls")
@pytest.mark.parametrize("ring", ["actor", "call"])
def test_a_second_listener_is_refused(stage: Stage, ring: str) -> None:
    program = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7fff0000), 8)
class Prog(ctypes.Structure): _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
prog = Prog(1, ctypes.addressof(code))
print(libc.syscall(317, 1, 8, ctypes.byref(prog)), ctypes.get_errno())
"""
    assert stage.host().run(ring, [PYTHON, "-I", "-S", "-c", program]).stdout == "-1 16\n"

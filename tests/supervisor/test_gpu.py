"""Who holds a GPU that it may not hold is told within a second and gone within two; what is used is counted."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gpu_host import GpuHost, gpu_host
from harness import PYTHON, Host, grants, wait
from standin import UNAVAILABLE

pytestmark = pytest.mark.kernel

_TOLD_S = 1.0
_ENDED_S = 2.0
GIB = 1 << 30
_NOBODY = (1 << 22) - 1
"""The last number that a process can have on a large machine."""

_HOLD = "import os, sys, time; print(os.getpid(), flush=True); os.open(sys.argv[1], os.O_RDONLY); time.sleep(8)"


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuHost]:
    with gpu_host(tmp_path_factory.mktemp("gpu")) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[GpuHost]:
    """With an NVML whose state is this test's alone."""
    with gpu_host(tmp_path) as made:
        yield made


@contextmanager
def confined(gpus: GpuHost, folder: Path, **policy: Any) -> Iterator[Host]:
    # A folder that is granted brings its devices along: what is opened all the same is found.
    host = Host({"files": grants(gpus.gpu.parent), **policy}, folder / "evidence", gpus.namespace)
    try:
        time.sleep(0.7)  # the helper has started, and made its first census
        yield host
    finally:
        host.close()


def violations(host: Host, kind: str) -> list[dict[str, Any]]:
    found = [span for span in host.journal() if span["name"] == "ray_guard.violation"]
    return [span for span in found if span["attributes"]["ray_guard.violation.kind"] == kind]


def helper_of(host: Host) -> int:
    """The pid of its supervisor's GPU helper; 0: there is none."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            above = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if above == host.supervisor and b"ray_guard.supervisor.gpu_helper" in words and not gone(int(name)):
            return int(name)
    return 0


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


_CHILD = """
import subprocess
child = subprocess.Popen([python, '-I', '-S', '-c', program, gpu], stdout=subprocess.PIPE, text=True)
result = int(child.stdout.readline())
"""

_ENGINE = """
import subprocess
from ray_guard.client import engine
child = subprocess.Popen([python, '-I', '-S', '-c', program, gpu], stdout=subprocess.PIPE, text=True)
engine.register(child.pid)
result = int(child.stdout.readline())
"""

_DAEMON = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print(os.getpid(), flush=True); os.open(sys.argv[1], os.O_RDONLY); time.sleep(8)
"""


@pytest.mark.parametrize("how", ["child", "daemon"])
def test_the_actor_ring(gpus: GpuHost, tmp_path: Path, how: str) -> None:
    program = _HOLD if how == "child" else _DAEMON
    bystander = gpus.python(program, str(gpus.gpu))
    assert bystander.stdout is not None
    free = int(bystander.stdout.readline())
    with confined(gpus, tmp_path) as host:
        pid = host.inside(_CHILD, python=PYTHON, program=program, gpu=str(gpus.gpu))
        began = time.monotonic()
        (told,) = wait(lambda: violations(host, "gpu_process"), "no violation", _TOLD_S)
        wait(lambda: gone(pid), "it still holds the GPU", _ENDED_S - (time.monotonic() - began))
        assert told["attributes"]["error.type"] == "gpu_none"
        assert f"pid {pid} " in told["attributes"]["ray_guard.violation.destination"]
        assert host.alive
        assert not gone(free), "a stranger was ended"
    os.kill(free, signal.SIGKILL)
    bystander.communicate()


def test_the_call_ring(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, gpu="engine") as host:
        outcome = host.run("call", [PYTHON, "-I", "-S", "-c", _HOLD, str(gpus.gpu)])
        assert outcome.status == -signal.SIGKILL
        assert outcome.seconds < _ENDED_S
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "tool"
        spans = {span["id"]: span for span in host.journal()}
        assert spans[told["parent"]]["name"].startswith("process python")


_CUDA = """
import json, os, socket, threading
def takes(name):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.bind(b"\\0" + name + b"\\0")
            sock.listen()
        except OSError as error:
            return error.errno
        return 0
def names(path):
    try:
        with open(path, "w") as file:
            file.write("cuda")
    except OSError as error:
        return error.errno
    return 0
own, end = b"cuda-uvmfd-%d-%d" % (os.stat("/proc/self/ns/pid").st_ino, os.getpid()), threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
task = f"task/{thread.native_id}/comm"
said = {"own": takes(own), "other": [takes(own[:-1] + b"x"), takes(own + b"0"), takes(b"cuda"), takes(b"")],
        "thread": [names("/proc/self/" + task), names(f"/proc/{os.getpid()}/{task}")],
        "name": open("/proc/self/" + task).read().strip(),
        "stranger": names(f"/proc/{os.getppid()}/task/{os.getppid()}/comm"), "file": names("/proc/self/comm")}
end.set()
print(json.dumps(said))
"""


@pytest.mark.parametrize("ring", ["actor", "call"])
@pytest.mark.parametrize("gpu", ["none", "engine", "any"])
def test_what_cuda_needs_to_start_is_granted_with_the_gpu(gpus: GpuHost, tmp_path: Path, ring: str, gpu: str) -> None:
    """Its driver binds an abstract socket named after the process, and names threads; it fails where it cannot."""
    free = gpus.python(_CUDA)
    said = json.loads(free.communicate()[0])
    assert (said["own"], said["other"][0], said["thread"]) == (0, 0, [0, 0]), "the control"
    with confined(gpus, tmp_path, gpu=gpu) as host:
        said = host.run(ring, [PYTHON, "-I", "-S", "-c", _CUDA]).said
    granted = gpu == "any" or (gpu, ring) == ("engine", "actor")
    assert said["own"] == (0 if granted else errno.EACCES)
    assert said["other"] == [errno.EACCES] * 4
    if ring == "call":
        assert said["thread"] == [0 if granted else errno.EACCES] * 2
        assert (said["name"] == "cuda") is granted
        assert (said["stranger"], said["file"]) == (errno.EACCES, errno.EACCES)


def test_a_grandchild_of_a_tool_whose_parent_is_gone(gpus: GpuHost, tmp_path: Path) -> None:
    program = """
import os, sys, time
if not os.fork():
    if os.fork(): os._exit(0)
    os.setsid(); os.open(sys.argv[1], os.O_RDONLY); time.sleep(8)
os.wait(); time.sleep(2.5)
"""
    with confined(gpus, tmp_path) as host:
        outcome = host.run("call", [PYTHON, "-I", "-S", "-c", program, str(gpus.gpu)])
        assert outcome.status == 0, "the tool itself holds nothing"
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "tool"
        (call,) = [span for span in host.journal() if span["name"].startswith("process python")]
        assert told["start"] - call["start"] < 1.5e9


_THREAD = """
import ctypes, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def hide():
    alone = libc.unshare(0x400) == 0 or libc.close_range(100, 101, 2) == 0
    print(os.getpid(), alone, flush=True)
    os.open(sys.argv[1], os.O_RDONLY); time.sleep(4)
thread = threading.Thread(target=hide); thread.start(); thread.join()
"""


def test_a_thread_cannot_hide_what_it_holds(gpus: GpuHost, tmp_path: Path) -> None:
    """With descriptors of its own it would be absent from /proc/PID/fd."""
    free = gpus.python(_THREAD, str(gpus.gpu))
    assert free.stdout is not None
    assert free.stdout.readline().split() == [str(free.pid), "True"], "the attack does not even work"
    time.sleep(0.1)
    assert all(os.readlink(f"/proc/{free.pid}/fd/{n}") != str(gpus.gpu) for n in os.listdir(f"/proc/{free.pid}/fd"))
    free.kill()
    free.communicate()
    with confined(gpus, tmp_path) as host:
        for ring in ("actor", "call"):
            outcome = host.run(ring, [PYTHON, "-I", "-S", "-c", _THREAD, str(gpus.gpu)])
            assert (outcome.stdout.split()[1], outcome.status) == ("False", -signal.SIGKILL)


def test_an_engine_may_and_its_neighbour_may_not(gpus: GpuHost, tmp_path: Path) -> None:
    code = """
import os, subprocess
from ray_guard.client import engine
os.open(gpu, os.O_RDONLY)  # the actor's own process is an engine of its own accord
pids = []
for registered in (True, False):
    child = subprocess.Popen([python, '-I', '-S', '-c', 'input();' + program, gpu], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    if registered: engine.register(child.pid)
    child.stdin.write('\\n'); child.stdin.flush()
    pids.append(int(child.stdout.readline()))
result = pids
"""
    with confined(gpus, tmp_path, gpu="engine") as host:
        registered, other = host.inside(code, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: gone(other), "whoever is not registered still holds the GPU", _ENDED_S)
        time.sleep(1.2)
        assert not gone(registered)
        assert host.alive
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "not_an_engine"


def test_the_actor_itself(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path) as host:
        code = "import os, threading; threading.Timer(0.1, os.open, (gpu, os.O_RDONLY)).start()"
        host.inside(code, gpu=str(gpus.gpu))  # it answers first: it may be gone at once
        assert host.wait(_ENDED_S) in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert len(violations(host, "gpu_process")) == 1


def test_report_mode_tells_and_ends_nothing(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, mode="report") as host:
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: violations(host, "gpu_process"), "no violation", _TOLD_S)
        time.sleep(1.2)
        assert not gone(pid)
        assert len(violations(host, "gpu_process")) == 1, "told once"


def test_gpu_seconds_run_out(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, budgets={"actor": {"gpu_seconds": 1.5}}) as host:
        pid = host.inside(_ENGINE, python=PYTHON, program=_HOLD, gpu=str(fresh.gpu))
        nvml.gpus[0].runs(pid)
        nvml.gpus[0].utilization = 60
        began = time.monotonic()
        while not gone(pid):
            nvml.gpus[0].samples = [(pid, time.time_ns() // 1000, 60)]
            nvml.write()
            assert time.monotonic() - began < 20, "its budget does not end it"
            time.sleep(0.1)
        assert time.monotonic() - began > 2.0, "1.5 GPU-seconds at 60 % take 2.5 s"
        (told,) = violations(host, "gpu_seconds")
        assert told["attributes"]["ray_guard.violation.limit"] == 1.5
        assert 1.5 < told["attributes"]["ray_guard.violation.value"] < 3.0
        assert {v["attributes"]["error.type"] for v in violations(host, "gpu_process")} == {"budget"}
    (usage,) = [span for span in host.journal() if span["name"] == "ray_guard.gpu"]
    found = usage["attributes"]
    assert found["ray_guard.gpu.method"] == ["process_utilization"]
    assert abs(found["ray_guard.gpu.seconds"] - told["attributes"]["ray_guard.violation.value"]) < 1.0
    assert 0 < found["ray_guard.gpu.seconds_error"] < 3
    assert found["ray_guard.gpu.memory_peak"] == GIB


def test_gpu_memory_is_held(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, gpu="engine", budgets={"actor": {"gpu_memory": "3GiB"}}) as host:
        pid = host.inside(_ENGINE, python=PYTHON, program=_HOLD, gpu=str(fresh.gpu))
        nvml.gpus[0].runs(pid, 2 * GIB)
        nvml.write()
        time.sleep(1.2)
        assert not gone(pid)
        nvml.gpus[0].runs(pid, 4 * GIB, kind="graphics")
        nvml.write()
        wait(lambda: gone(pid), "it keeps more than it may", _ENDED_S)
        (told,) = violations(host, "gpu_memory")
        assert told["attributes"]["ray_guard.violation.limit"] == 3 * GIB
        assert told["attributes"]["ray_guard.violation.value"] == 4 * GIB


def test_memory_that_nobody_limits_need_not_be_known(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, budgets={"actor": {"gpu_seconds": 100}}) as host:
        pid = host.inside(_ENGINE, python=PYTHON, program=_HOLD, gpu=str(fresh.gpu))
        nvml.gpus[0].runs(pid, UNAVAILABLE)
        nvml.errors = dict.fromkeys(("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"), 3)
        nvml.write()
        time.sleep(1.5)
        assert not gone(pid)
        assert violations(host, "gpu_process") == []


def test_a_context_without_a_descriptor_is_found(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path) as host:
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu="/dev/null")
        time.sleep(1.0)
        assert not gone(pid)
        nvml.gpus[0].runs(pid)
        nvml.write()
        wait(lambda: gone(pid), "it keeps its context", _ENDED_S)
        assert violations(host, "gpu_process")[0]["attributes"]["ray_guard.violation.destination"].endswith("a context")


def test_what_no_visible_process_explains_is_told(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, on_violation="kill_actor") as host:
        nvml.gpus[0].used = 20 * GIB
        nvml.write()
        (told,) = wait(lambda: violations(host, "gpu_hidden_tenant"), "nobody noticed", 4)
        assert told["attributes"]["error.type"] == "unexplained_memory"
        assert told["attributes"]["ray_guard.violation.value"] == 20 * GIB
        assert "GPU-00000000" in told["attributes"]["ray_guard.violation.destination"]
        assert host.alive, "nobody is ended for what a stranger does"


def test_an_engine_that_computes_without_a_request_is_told(fresh: GpuHost, tmp_path: Path) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    code = _ENGINE.replace(
        "engine.register(child.pid)",
        """
mine = engine.register(child.pid)
mine.enter(engine.Phase.ROLLOUT)
mine.answers_requests()
import builtins
builtins.asked = mine.request(); builtins.asked.__enter__()
""",
    )
    with confined(fresh, tmp_path, gpu="engine") as host:
        pid = host.inside(code, python=PYTHON, program=_HOLD.replace("sleep(8)", "sleep(20)"), gpu=str(fresh.gpu))
        nvml.gpus[0].runs(pid)
        nvml.gpus[0].utilization = 90

        def compute(seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until and not violations(host, "gpu_idle_use"):
                nvml.gpus[0].samples = [(pid, time.time_ns() // 1000, 90)]
                nvml.write()
                time.sleep(0.1)

        compute(3.5)
        assert violations(host, "gpu_idle_use") == [], "a request is in flight"
        host.inside("import builtins; builtins.asked.__exit__(None, None, None)")
        compute(8)
        (told,) = violations(host, "gpu_idle_use")
        assert told["attributes"]["ray_guard.violation.destination"].endswith("phase rollout")
        assert not gone(pid), "it is told, not ended: what an engine says of itself proves nothing"


@pytest.mark.parametrize("require", [True, False])
def test_without_nvml_what_must_be_measured_is_refused(tmp_path: Path, require: bool) -> None:
    with gpu_host(tmp_path, nvml=False) as gpus:
        if require:
            with pytest.raises(RuntimeError, match=r"require\.gpu.*no libnvidia-ml"):
                Host({"require": ["gpu"]}, tmp_path / "evidence", gpus.namespace)
            return
        with confined(gpus, tmp_path, budgets={"actor": {"gpu_seconds": 100}}) as host:
            pid = host.inside(_ENGINE, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
            wait(lambda: gone(pid), "it computes, and nobody can say how much", _ENDED_S)
            (told,) = violations(host, "gpu_process")
            assert told["attributes"]["error.type"] == "unmeasured"
            assert host.alive


@pytest.mark.parametrize("blind", ["no GPU", "another GPU", "pids of another namespace"])
def test_what_nvml_does_not_see_is_not_measured_as_nothing(fresh: GpuHost, tmp_path: Path, blind: str) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    if blind == "no GPU":
        nvml.gpus = []
    elif blind == "another GPU":
        nvml.gpus[0].minor = 77
    else:
        nvml.gpus[0].runs(_NOBODY, 2 * GIB)
    nvml.write()
    with confined(fresh, tmp_path, budgets={"actor": {"gpu_seconds": 100}}) as host:
        pid = host.inside(_ENGINE, python=PYTHON, program=_HOLD, gpu=str(fresh.gpu))
        wait(lambda: gone(pid), "it computes, and nobody can say how much", 6.0)
        (told,) = violations(host, "gpu_process")
        assert told["attributes"]["error.type"] == "unmeasured"
        assert len(violations(host, "gpu_hidden_tenant")) == (blind == "pids of another namespace")


def test_without_nvml_the_census_goes_on(tmp_path: Path) -> None:
    with gpu_host(tmp_path, nvml=False) as gpus, confined(gpus, tmp_path) as host:
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: gone(pid), "it still holds the GPU", _ENDED_S)


def test_a_library_that_does_not_fit_its_driver_refuses_by_name(fresh: GpuHost, tmp_path: Path) -> None:
    assert fresh.nvml is not None
    fresh.nvml.errors = {"nvmlInit": 18}
    fresh.nvml.write()
    with pytest.raises(RuntimeError, match=r"require\.gpu.*LIB_RM_VERSION_MISMATCH"):
        Host({"require": ["gpu"]}, tmp_path / "evidence", fresh.namespace)


def test_nvml_that_hangs_holds_up_neither_census_nor_calls(fresh: GpuHost, tmp_path: Path) -> None:
    assert fresh.nvml is not None
    with confined(fresh, tmp_path) as host:
        fresh.nvml.delays = {"nvmlDeviceGetProcessUtilization": 5000}
        fresh.nvml.write()
        time.sleep(0.6)
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu=str(fresh.gpu))
        wait(lambda: gone(pid), "it still holds the GPU", _ENDED_S)
        assert host.run("call", ["true"]).seconds < 1.0


def test_a_lost_helper_is_told_and_replaced(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, require=["gpu"]) as host:
        helper = wait(lambda: helper_of(host), "no helper", 8.0)  # 0 would be this very group
        os.kill(helper, signal.SIGSTOP)
        pid = host.inside(_CHILD, python=PYTHON, program=_HOLD, gpu=str(gpus.gpu))
        wait(lambda: gone(pid), "it still holds the GPU", 6.0)
        (told,) = violations(host, "gpu_census")
        assert told["attributes"]["error.type"] == "silent"
        wait(lambda: gone(helper), "the silent helper is still there", 1.0)
        wait(lambda: helper_of(host), "no other helper", 8.0)


def test_the_helper_knows_nothing_of_whoever_started_it(
    gpus: GpuHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LD_LIBRARY_PATH", str(tmp_path)), ("NVML_MPS_DEVICE_ENUMERATION", "1"),
                        ("CUDA_VISIBLE_DEVICES", ""), ("PYTHONPATH", str(tmp_path))):  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "pynvml.py").write_text("raise SystemExit")
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    with confined(gpus, tmp_path, require=["gpu"]) as host:
        environment = Path(f"/proc/{helper_of(host)}/environ").read_bytes().split(b"\0")
        assert {entry.split(b"=")[0] for entry in environment if entry} <= {b"PATH", b"LANG", b"LC_CTYPE"}


def test_without_a_gpu_driver_nothing_runs_and_budgets_hold(tmp_path: Path, stage: Any) -> None:
    """No driver is loaded, so no GPU can be opened: usage is zero for certain, and that is all it costs."""
    policy = {"require": ["gpu"], "budgets": {"actor": {"gpu_seconds": 1, "gpu_memory": 1}, "job": {"gpu_seconds": 5}}}
    host = Host(policy, tmp_path / "evidence", stage.namespace)
    try:
        time.sleep(1.2)
        assert helper_of(host) == 0
        assert host.run("call", ["true"]).status == 0
        with pytest.raises(AssertionError, match="a process that the actor has started"):
            host.inside("from ray_guard.client import engine; engine.register(1)")
    finally:
        host.close()


def test_gpu_none_has_no_engines(gpus: GpuHost, tmp_path: Path) -> None:
    with confined(gpus, tmp_path, gpu="none") as host:
        with pytest.raises(AssertionError, match="gpu: none has no engine processes"):
            host.inside("from ray_guard.client import engine; engine.register()")
        assert host.alive


def test_no_tool_is_an_engine(gpus: GpuHost, tmp_path: Path) -> None:
    """A tool's tree does not hang below its actor, so none of it can be registered, whoever asks."""
    code = """
import ray_guard
from ray_guard.client import engine
with ray_guard.tool_call('t', {}):
    tool = ray_guard.Popen([python, '-c', 'import time; time.sleep(5)'])
    engine.register(tool.pid)
"""
    with confined(gpus, tmp_path, gpu="engine") as host, pytest.raises(AssertionError, match="PolicyError"):
        host.inside(code, python=PYTHON)


def _computes(nvml: Any, pid: int, seconds: float, *, until_gone: bool) -> float:
    """NVML says that `pid` computes at 90 %, for so long or until it is gone; how long that was."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if until_gone and gone(pid):
            break
        nvml.gpus[0].samples = [(pid, time.time_ns() // 1000, 90)]
        nvml.write()
        time.sleep(0.1)
    nvml.gpus[0].samples = []
    return time.monotonic() - began


_CALLS = """
import builtins, ray_guard, subprocess
scopes = builtins.scopes = [ray_guard.episode(id='r'), ray_guard.tool_call('spends'), ray_guard.tool_call('idles')]
result = []
for scope in scopes:
    scope.__enter__()
    if scope.kind == 'tool':
        tool = ray_guard.Popen([python, '-I', '-S', '-c', program, gpu], stdout=subprocess.DEVNULL)
        result.append(tool.pid)
"""


@pytest.mark.parametrize("scope", ["call", "episode"])
def test_gpu_seconds_of_a_call_and_of_an_episode(fresh: GpuHost, tmp_path: Path, scope: str) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    program = _HOLD.replace("sleep(8)", "sleep(20)")
    with confined(fresh, tmp_path, gpu="any", budgets={scope: {"gpu_seconds": 1.0}}) as host:
        spends, idles = host.inside(_CALLS, python=PYTHON, program=program, gpu=str(fresh.gpu))
        nvml.gpus[0].utilization = 90
        nvml.gpus[0].runs(spends)
        nvml.gpus[0].runs(idles)
        took = _computes(nvml, spends, 8, until_gone=True)
        assert 1.0 < took < 5.0
        (told,) = violations(host, "gpu_seconds")
        assert told["attributes"]["error.type"] == f"{scope} budget"
        assert told["attributes"]["ray_guard.violation.limit"] == 1.0
        spans = {span["id"]: span for span in host.journal()}
        assert "spends" in spans[spans[told["parent"]]["parent"]]["name"]
        if scope == "episode":
            wait(lambda: gone(idles), "its episode has no GPU left, and it holds one", _ENDED_S)
        else:
            time.sleep(1.0)
            assert not gone(idles), "another call's budget ended it"
        assert host.alive


@pytest.mark.parametrize(("scope", "limit", "value"), [("call", 3, 4), ("episode", 5, 6), ("job", 5, 6)])
def test_gpu_memory_of_tools(fresh: GpuHost, tmp_path: Path, scope: str, limit: int, value: int) -> None:
    nvml = fresh.nvml
    assert nvml is not None
    with confined(fresh, tmp_path, gpu="any", budgets={scope: {"gpu_memory": limit * GIB}}) as host:
        program = _HOLD.replace("sleep(8)", "sleep(20)")
        greedy, modest = host.inside(_CALLS, python=PYTHON, program=program, gpu=str(fresh.gpu))
        nvml.gpus[0].runs(greedy, 2 * GIB)
        nvml.gpus[0].runs(modest, 2 * GIB)
        nvml.write()
        time.sleep(1.2)
        assert not gone(greedy)
        nvml.gpus[0].runs(greedy, 4 * GIB, kind="graphics")
        nvml.write()
        wait(lambda: gone(greedy), "it keeps more than it may", _ENDED_S)
        (told,) = violations(host, "gpu_memory")
        assert told["attributes"]["error.type"] == f"{scope} budget"
        assert told["attributes"]["ray_guard.violation.value"] == value * GIB
        if scope == "call":
            assert not gone(modest)
        else:
            wait(lambda: gone(modest), "together they hold more than they may", _ENDED_S)

"""What tools are for must go on working: the same programs unconfined, in the call ring, and in the actor ring."""

# ruff: noqa: E501 - programs within strings

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Host, Namespace, Outcome, run_unconfined, skip_without

pytestmark = pytest.mark.kernel

RINGS = pytest.mark.parametrize("ring", ["unconfined", "actor", "call"])
CALL = pytest.mark.parametrize("ring", ["unconfined", "call"])
_UPLOAD = 64 << 20


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"MISSING ON THIS MACHINE: {', '.join(missing)}")


# ---------------------------------------------------------------------------------------------------------------------
# outside: what the policy grants


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = hashlib.sha256(body).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class _Digest(socketserver.StreamRequestHandler):
    """Reads to the end of what is sent, and only then answers: who closes both sides at once hears nothing."""

    def handle(self) -> None:
        found, size = hashlib.sha256(), 0
        while data := self.rfile.read(1 << 16):
            found.update(data)
            size += len(data)
        self.wfile.write(f"{size} {found.hexdigest()}".encode())


class _Threads(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[int]:
    """A real SSH server that runs what it is asked; its one key lies in ``folder``."""
    asyncssh = pytest.importorskip("asyncssh", reason="MISSING: asyncssh")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "key")
    (folder / "key").chmod(0o600)
    (folder / "authorized").write_bytes(key.export_public_key())
    ready: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.new_event_loop()

    async def handle(process: Any) -> None:
        child = await asyncio.create_subprocess_shell(
            process.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None

        async def pass_on(source: Any, sink: Any) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()

        async def inward() -> None:
            await pass_on(process.stdin, child.stdin)
            child.stdin.close()

        feeding = asyncio.ensure_future(inward())
        await asyncio.gather(pass_on(child.stdout, process.stdout), pass_on(child.stderr, process.stderr))
        process.exit(await child.wait())
        feeding.cancel()

    async def serve() -> None:
        server = await asyncssh.create_server(
            asyncssh.SSHServer,
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=str(folder / "authorized"),
            process_factory=handle,
            encoding=None,
        )
        ready.put_nowait(server.sockets[0].getsockname()[1])
        await over.wait()
        server.close()

    over = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(ready.get(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


@dataclass(frozen=True)
class Place:
    """Where the programs run, and what they may reach."""

    folder: Path
    http: int
    digest: int
    ssh: int
    host: Host

    def run(self, ring: str, argv: list[str], folder: Path, timeout: float = 60.0) -> Outcome:
        """With the files that every tool has by default: above all, its working folder."""
        if ring == "unconfined":
            return run_unconfined(argv, timeout, str(folder))
        return self.host.run(ring, argv, timeout=timeout, folder=folder)

    def shell(self, ring: str, script: str, timeout: float = 60.0) -> str:
        """What ``script`` says, within a folder of its own; it must not fail."""
        folder = self.folder / ring / str(len(os.listdir(self.folder / ring)))
        folder.mkdir()
        outcome = self.run(ring, ["sh", "-euc", f"export HOME={folder}\n{script}"], folder, timeout)
        assert outcome.status == 0, f"{ring}: {outcome.stdout[-2000:]}{outcome.stderr[-3000:]}"
        return outcome.stdout

    def python(self, ring: str, program: str, *arguments: object) -> str:
        """What ``program`` says; written to a file, as multiprocessing needs it."""
        file = self.folder / ring / f"program{len(os.listdir(self.folder / ring))}.py"
        file.write_text(program)
        outcome = self.run(ring, [PYTHON, str(file), *map(str, arguments)], file.parent)
        assert outcome.status == 0, f"{ring}: {outcome.stdout[-2000:]}{outcome.stderr[-3000:]}"
        return outcome.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("work")
    for ring in ("unconfined", "actor", "call"):
        (folder / ring).mkdir()
    served = folder / "served"
    served.mkdir()
    (served / "hello").write_text("hello\n")
    _make_index(served)
    if shutil.which("git"):
        _make_repository(served)
    handler = lambda *a: _Quiet(*a, directory=str(served))  # noqa: E731 - a factory
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(serving(_Threads(("127.0.0.1", 0), handler)))
        digest = stack.enter_context(serving(_Threads(("127.0.0.1", 0), _Digest)))
        ssh = stack.enter_context(ssh_server(folder))
        namespace = Namespace()
        stack.callback(namespace.close)
        allow = [f"127.0.0.1:{port}" for port in (web, digest, ssh)]
        files = {"read": ["system", "env", "cwd", str(folder / "key")]}  # ssh's
        host = Host({"egress": {"allow": allow}, "files": files}, folder / "evidence", namespace)
        stack.callback(host.close)
        yield Place(folder, web, digest, ssh, host)


def _make_index(served: Path) -> None:
    """A package index with one package."""
    files = {
        "guarded_example/__init__.py": "print('imported')\n",
        "guarded_example-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: guarded-example\nVersion: 1.0\n",
        "guarded_example-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "guarded_example-1.0.dist-info/RECORD"
    project = served / "simple" / "guarded-example"
    project.mkdir(parents=True)
    name = "guarded_example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(project / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(record, "".join(f"{path},,\n" for path in (*files, record)))
    (project / "index.html").write_text(f'<a href="{name}">{name}</a>')


def _make_repository(served: Path) -> None:
    def git(*arguments: str, folder: Path) -> None:
        author = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, env={**os.environ, **author})

    work = served.parent / "repository"
    work.mkdir()
    git("init", "-b", "main", folder=work)
    (work / "file").write_text("content\n")
    git("add", "file", folder=work)
    git("commit", "-m", "first", folder=work)
    git("clone", "--bare", ".", str(served / "repository.git"), folder=work)
    git("update-server-info", folder=served / "repository.git")


# ---------------------------------------------------------------------------------------------------------------------
# the network


@RINGS
def test_pip_installs_from_an_index(place: Place, ring: str) -> None:
    said = place.shell(
        ring,
        f"""
export PIP_CONFIG_FILE=/dev/null
{PYTHON} -m pip install --quiet --disable-pip-version-check --no-cache-dir --target target \\
    --index-url http://127.0.0.1:{place.http}/simple guarded-example
PYTHONPATH=target {PYTHON} -c 'import guarded_example'
""",
    )
    assert said.splitlines()[-1] == "imported"


@needs("git")
@RINGS
def test_git_clones_over_http(place: Place, ring: str) -> None:
    url = f"http://127.0.0.1:{place.http}/repository.git"
    said = place.shell(
        ring,
        f"git clone -q {url} clone; cd clone; cat file; echo more >> file\n"
        "git -c user.name=t -c user.email=t@example.org commit -qam second; git log --oneline | wc -l",
    )
    assert said.split() == ["content", "2"]


def _ssh(place: Place) -> str:
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh -F none {options} -i {place.folder / 'key'} -p {place.ssh}"


@needs("ssh")
@RINGS
def test_ssh_to_an_allowed_host(place: Place, ring: str) -> None:
    assert place.shell(ring, f"{_ssh(place)} t@127.0.0.1 'echo from there; cat' < /dev/null") == "from there\n"
    assert place.shell(ring, f"head -c 3000000 /dev/zero | {_ssh(place)} t@127.0.0.1 'wc -c'").strip() == "3000000"


@needs("ssh", "git")
@RINGS
def test_git_clones_over_ssh(place: Place, ring: str) -> None:
    repository = f"t@127.0.0.1:{place.folder / 'served' / 'repository.git'}"
    assert place.shell(ring, f"GIT_SSH_COMMAND='{_ssh(place)}' git clone -q {repository} c; cat c/file") == "content\n"


@needs("ssh")
@RINGS
def test_ssh_shares_one_connection(place: Place, ring: str) -> None:
    """ControlMaster: a unix socket of one's own, and a process in the background."""
    ssh = f"{_ssh(place)} -o ControlPath=$folder/c"
    script = f"""
folder=$(mktemp -d)  # a name of few letters: ssh makes a longer one of it first
{ssh} -o ControlMaster=yes -fN t@127.0.0.1 >/dev/null 2>&1 </dev/null
for n in $(seq 100); do test -S $folder/c && break; sleep 0.05; done
{ssh} -o ControlMaster=no t@127.0.0.1 'echo by the same' </dev/null
{ssh} -O exit t@127.0.0.1
"""
    assert place.shell(ring, script) == "by the same\n"


@needs("curl")
@RINGS
def test_curl(place: Place, ring: str) -> None:
    url = f"http://127.0.0.1:{place.http}"
    script = f"curl -sS --noproxy '*' {url}/hello; head -c 5000000 /dev/zero > d; curl -sS --noproxy '*' --data-binary @d {url}/ | head -c 9"
    expected = hashlib.sha256(bytes(5_000_000)).hexdigest()[:9]
    assert place.shell(ring, script) == f"hello\n{expected}"


@needs("node")
@RINGS
def test_node(place: Place, ring: str) -> None:
    program = (
        f"require('http').get('http://127.0.0.1:{place.http}/hello', r => r.on('data', d => process.stdout.write(d)));"
        "require('child_process').exec('echo child', (e, o) => process.stdout.write(o));"
        "new (require('worker_threads').Worker)('0', {eval: true});"
    )
    assert sorted(place.shell(ring, f'node -e "{program}"').split()) == ["child", "hello"]


@RINGS
def test_http_clients(place: Place, ring: str) -> None:
    program = """
import asyncio, concurrent.futures, http.client, sys, urllib.request
port = int(sys.argv[1])
url = f'http://127.0.0.1:{port}/hello'
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def get(_): return opener.open(url).read()
with concurrent.futures.ThreadPoolExecutor(16) as pool: assert set(pool.map(get, range(64))) == {b'hello\\n'}
kept = http.client.HTTPConnection('127.0.0.1', port)
for _ in range(3): kept.request('GET', '/hello'); assert kept.getresponse().read() == b'hello\\n'
async def one():
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(b'GET /hello HTTP/1.0\\r\\n\\r\\n'); data = await reader.read(); writer.close(); await writer.wait_closed()
    return data.endswith(b'hello\\n')
async def all(): return await asyncio.gather(*(one() for _ in range(50)))
print(sum(asyncio.run(all())))
"""
    assert place.python(ring, program, place.http) == "50\n"


@RINGS
def test_half_close(place: Place, ring: str) -> None:
    program = """
import socket, sys
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
sock.sendall(b'x' * 100); sock.shutdown(socket.SHUT_WR)
print(sock.makefile().read())
"""
    assert place.python(ring, program, place.digest).startswith("100 ")


@pytest.mark.parametrize("ring", ["actor", "call"])
@pytest.mark.parametrize("how", ["send", "sendfile", "splice", "sendmsg", "nonblocking"])
def test_an_upload_of_64_mib_arrives_whole(place: Place, ring: str, how: str) -> None:
    program = """
import hashlib, os, select, socket, sys, tempfile
port, size, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
block = hashlib.sha256(b'seed').digest() * 2048
sock = socket.create_connection(('127.0.0.1', port))
if how in ('sendfile', 'splice'):
    file = tempfile.TemporaryFile()
    for _ in range(size // len(block)): file.write(block)
    file.flush(); file.seek(0)
    if how == 'sendfile': sock.sendfile(file)
    else:
        read, write = os.pipe()
        left = size
        while left:
            moved = os.splice(file.fileno(), write, min(left, 65536))
            left -= moved
            while moved: moved -= os.splice(read, sock.fileno(), moved)
elif how == 'nonblocking':
    sock.setblocking(False)
    poll = select.epoll(); poll.register(sock, select.EPOLLOUT)
    for _ in range(size // len(block)):
        view = memoryview(block)
        while view:
            poll.poll()
            try: view = view[sock.send(view):]
            except BlockingIOError: pass
    sock.setblocking(True)
elif how == 'sendmsg':
    for _ in range(size // len(block)):
        view = memoryview(block)
        while view: view = view[sock.sendmsg([view[:len(view) // 2], view[len(view) // 2:]]):]
else:
    for _ in range(size // len(block)): sock.sendall(block)
sock.shutdown(socket.SHUT_WR)
print(sock.makefile().read())
"""
    block = hashlib.sha256(b"seed").digest() * 2048
    expected = hashlib.sha256(block * (_UPLOAD // len(block))).hexdigest()
    assert place.python(ring, program, place.digest, _UPLOAD, how).split() == [str(_UPLOAD), expected]


# ---------------------------------------------------------------------------------------------------------------------
# processes, and what lies between them


@needs("gcc")
@RINGS
def test_gcc_compiles_and_what_it_made_runs(place: Place, ring: str) -> None:
    script = r"""
cat > a.c <<'END'
#include <pthread.h>
#include <stdio.h>
static void *work(void *p) { return p; }
int main(void) { pthread_t t; pthread_create(&t, 0, work, "compiled"); void *p; pthread_join(t, &p); puts(p); return 0; }
END
gcc -O2 -pthread -pipe -o a a.c; ./a
"""
    assert place.shell(ring, script) == "compiled\n"


@needs("make", "gcc")
@RINGS
def test_make_in_parallel(place: Place, ring: str) -> None:
    script = r"""
for n in 1 2 3 4 5 6; do echo "int f$n(void) { return $n; }" > $n.c; done
printf 'all: 1.o 2.o 3.o 4.o 5.o 6.o\n\tar rcs all.a $^\n' > Makefile
make -s -j4; ar t all.a | wc -l
"""
    assert place.shell(ring, script).split() == ["6"]


@RINGS
def test_pytest_with_subprocesses(place: Place, ring: str) -> None:
    script = f"""
cat > test_it.py <<'END'
import subprocess, sys, threading
def test_child(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import subprocess; print(subprocess.check_output(['echo', 'grandchild'], text=True))"], capture_output=True, text=True)
    assert done.stdout.strip() == "grandchild"
def test_pipes():
    first = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.communicate(b"x" * 300000)[0] == b"x" * 300000
def test_timeout():
    try: subprocess.run(["sleep", "10"], timeout=0.2)
    except subprocess.TimeoutExpired: pass
END
{PYTHON} -m pytest -q -p no:cacheprovider --rootdir . test_it.py | tail -1
"""
    assert "3 passed" in place.shell(ring, script)


@RINGS
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(place: Place, ring: str, method: str) -> None:
    program = """
import multiprocessing as mp, sys
def square(n): return n * n
def work(queue, lock, shared, connection):
    with lock: shared.value += 1
    queue.put('queued'); connection.send('sent'); connection.close()
if __name__ == '__main__':
    mp.set_start_method(sys.argv[1])
    with mp.Pool(2) as pool: print(pool.map(square, range(5)))
    queue, lock, shared = mp.Queue(), mp.Lock(), mp.Value('i', 0)
    ours, theirs = mp.Pipe()
    child = mp.Process(target=work, args=(queue, lock, shared, theirs)); child.start()
    print(queue.get(timeout=20), ours.recv()); child.join(); print(shared.value)
    with mp.Manager() as manager:
        kept = manager.dict(a=1); kept['b'] = 2; print(*sorted(kept.items()))
    from multiprocessing import shared_memory
    block = shared_memory.SharedMemory(create=True, size=100); block.buf[0] = 7; print(block.buf[0]); block.close(); block.unlink()
"""
    if ring == "call":
        skip_without("mount namespaces")  # and so a /dev/shm, for semaphores
    said = place.python(ring, program, method)
    assert said.splitlines() == ["[0, 1, 4, 9, 16]", "queued sent", "1", "('a', 1) ('b', 2)", "7"]


@RINGS
def test_unix_sockets_of_ones_own(place: Place, ring: str) -> None:
    program = """
import asyncio, os, socket, sys, tempfile
a, b = socket.socketpair(); a.sendall(b'pair'); print(b.recv(9).decode())
a, b = socket.socketpair(type=socket.SOCK_SEQPACKET); a.send(b'packet'); print(b.recv(9).decode())
read, write = os.pipe(); socket.send_fds(a, [b'x'], [write]); _, (passed,), _, _ = socket.recv_fds(b, 1, 1); os.write(passed, b'passed'); print(os.read(read, 9).decode())
async def main():
    with tempfile.TemporaryDirectory() as folder:
        async def answer(reader, writer): writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
        server = await asyncio.start_unix_server(answer, folder + '/s')
        reader, writer = await asyncio.open_unix_connection(folder + '/s')
        writer.write(b'hello\\n'); print((await reader.readline()).decode(), end=''); writer.close()
        server.close()
        process = await asyncio.create_subprocess_exec('echo', 'child', stdout=asyncio.subprocess.PIPE)
        print((await process.communicate())[0].decode(), end='')
asyncio.run(main())
"""
    assert place.python(ring, program).split() == ["pair", "packet", "passed", "HELLO", "child"]


@RINGS
def test_sqlite_files_and_threads(place: Place, ring: str) -> None:
    program = """
import concurrent.futures, fcntl, mmap, os, signal, sqlite3, tempfile, threading
with tempfile.TemporaryDirectory() as folder:
    path = folder + '/db'
    with sqlite3.connect(path) as base: base.execute('pragma journal_mode=wal'); base.execute('create table t (n integer)')
    def insert(n):
        with sqlite3.connect(path, timeout=30) as base: base.execute('insert into t values (?)', (n,))
    with concurrent.futures.ThreadPoolExecutor(8) as pool: list(pool.map(insert, range(40)))
    print(sqlite3.connect(path).execute('select count(*), sum(n) from t').fetchone())
    with open(folder + '/f', 'w+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX); file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096) as memory: memory[:3] = b'map'
        print(file.read(3).decode())
    os.mkfifo(folder + '/fifo')
    threading.Thread(target=lambda: open(folder + '/fifo', 'w').write('fifo')).start()
    print(open(folder + '/fifo').read())
seen = threading.Event(); signal.signal(signal.SIGUSR1, lambda *_: seen.set()); os.kill(os.getpid(), signal.SIGUSR1); print(seen.wait(5))
"""
    assert place.python(ring, program).splitlines() == ["(40, 780)", "map", "fifo", "True"]


@RINGS
def test_a_terminal_of_ones_own(place: Place, ring: str) -> None:
    program = """
import os, pty
pid, leader = pty.fork()
if pid == 0: os.execvp('sh', ['sh', '-c', 'test -t 0 && tty > /dev/null && stty size && echo on a terminal'])
data = b''
while True:
    try: more = os.read(leader, 1024)
    except OSError: break
    if not more: break
    data += more
os.waitpid(pid, 0)
print('on a terminal' in data.decode())
"""
    if ring == "call":
        skip_without("mount namespaces")  # and so a devpts
    assert place.python(ring, program) == "True\n"


@needs("gdb", "gcc")
@CALL
def test_gdb(place: Place, ring: str) -> None:
    script = r"""
printf 'int deep(int n) { return n ? deep(n - 1) : *(volatile int *)8; }\nint main(void) { return deep(3); }\n' > a.c
gcc -g -O0 -o a a.c
gdb -nx -batch -ex 'set debuginfod enabled off' -ex 'break deep' -ex run -ex 'print n' -ex delete -ex continue -ex backtrace ./a 2>&1
"""
    said = place.shell(ring, script)
    assert "$1 = 3" in said
    assert "SIGSEGV" in said
    assert "main ()" in said


@needs("strace")
@CALL
def test_strace(place: Place, ring: str) -> None:
    assert "execve" in place.shell(ring, "strace -f -o log sh -c 'true; (exit 0)'; cat log")


@CALL
def test_a_tool_of_a_tool(place: Place, ring: str) -> None:
    """A shell pipeline with everything in it: job control, traps, process substitution, here documents."""
    script = r"""
bash -c '
trap "echo trapped" TERM
sleep 100 & wait -n & kill %1; wait 2>/dev/null
diff <(seq 3) <(printf "1\n2\n3\n") && echo same
seq 1000 | xargs -P4 -n50 echo | wc -w
tar cf - /etc/hostname 2>/dev/null | tar tf - | wc -l
kill -TERM $$
timeout 0.2 sleep 5; echo $?
( ulimit -n 50; ulimit -n )
nice -n 5 nice
'
"""
    assert place.shell(ring, script).split() == ["same", "1000", "1", "trapped", "124", "50", "5"]


def test_what_is_not_granted_is_refused_all_the_same(place: Place) -> None:
    """The place is confined: what works above works because it is granted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        for ring in ("actor", "call"):
            assert "PermissionError" in place.run(ring, [PYTHON, "-c", program], place.folder / ring).stderr

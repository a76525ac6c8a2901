# ruff: noqa: E501 - an attack a line
"""Files, devices and metadata: what a tool must not read, write, change or open, and what it needs all the same.

Every attack is run unconfined first, where it must work, then as a tool. The judge looks at the files themselves, and
for what was read at a token that only the secret holds.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peers
import pytest
from harness import (
    EPILOGUE,
    PRELUDE,
    PYTHON,
    ROOT,
    Host,
    Namespace,
    Outcome,
    Stage,
    lacks,
    launcher,
    needs,
    row,
    run_unconfined,
    skip_refused,
    wait,
)
from table import PEERS, TABLE, Cell, Column, Verdict, column

import ray_guard
from ray_guard.kernel import mounting

pytestmark = pytest.mark.kernel

_OLD = 1_000_000_000
"""Time stamps of victims: whatever touches one is seen."""


class Ground:
    """A folder to fight over.

    ``work`` may be written; in it ``secret`` and ``secrets/`` are hidden, ``repo/.git/hooks/`` is protected, ``cache``
    is a compile cache. ``readable`` may be read. ``outside`` is not granted. ``home`` is HOME, and may be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token = secrets.token_hex(16)
        self.paths = {
            "work": root / "work",
            "secret": root / "work/secret",
            "key": root / "work/secrets/key",
            "token_file": root / "work/token",
            "hooks": root / "work/repo/.git/hooks",
            "hook": root / "work/repo/.git/hooks/pre-commit",
            "cache": root / "work/cache",
            "readable": root / "readable/file",
            "victim": root / "outside/victim",
            "home": root / "home",
            "bashrc": root / "home/.bashrc",
            "site": Path(sysconfig.get_path("purelib")),
            "package": Path(ray_guard.__file__).parent,
        }
        self.readable = str(root / "readable")
        self.hidden = [str(self.paths["secret"]), str(root / "work/secrets")]

    def grant(self) -> peers.Grant:
        """What the policy grants, as far as other sandboxes can express it."""
        writable = [str(self.paths[name]) for name in ("work", "home")]
        readable = [*peers.programs(), self.readable]
        return peers.Grant(readable, writable, [], self.hidden, [str(self.paths["hooks"])])

    def reset(self) -> None:
        for name in ("work", "readable", "outside", "home"):
            _clear(self.root / name)
        for name in ("secret", "key", "token_file", "hook", "readable", "victim", "bashrc"):
            path = self.paths[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.token)
            path.chmod(0o644)
            os.utime(path, (_OLD, _OLD))
        self.paths["cache"].mkdir()
        (self.paths["work"] / "repo/.git/config").write_text("")
        (self.paths["work"] / "mine").write_text("mine")

    def harm(self, name: str) -> str:
        """What was done to a victim; empty: nothing."""
        path = self.paths[name]
        try:
            status = path.lstat()
            content = path.read_text()
        except OSError as error:
            return f"{name} is gone: {error}"
        if content != self.token or not stat.S_ISREG(status.st_mode):
            return f"{name} holds something else"
        if stat.S_IMODE(status.st_mode) != 0o644:
            return f"{name} has mode {stat.S_IMODE(status.st_mode):o}"
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            return f"{name} belongs to {status.st_uid}:{status.st_gid}"
        if status.st_mtime != _OLD:
            return f"{name} has another time"
        if status.st_nlink != 1:
            return f"{name} has another name too"
        if os.listxattr(path):
            return f"{name} has attributes"
        return ""


def _clear(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != "evidence":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def ground(stage: Stage) -> Ground:
    found = Ground(stage.folder / "ground")  # not below /tmp: see the stage
    found.root.mkdir()
    found.reset()
    return found


@pytest.fixture(scope="module")
def host(ground: Ground) -> Iterator[Host]:
    paths = {name: str(path) for name, path in ground.paths.items()}
    policy = {
        "egress": {"allow": []},
        "files": {
            "read": ["system", "env", ground.readable],
            "write": ["scratch", paths["work"], paths["home"]],
            "hide": ground.hidden,
            "protect": [paths["hooks"]],
        },
    }
    namespace = Namespace()
    more = {"HOME": "home", "TORCHINDUCTOR_CACHE_DIR": "cache", "RAY_AUTH_TOKEN_PATH": "token_file"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in more.items():
            patched.setenv(name, paths[value])
        try:
            made = Host(policy, ground.root / "work/evidence", namespace)
        except BaseException:
            namespace.close()
            raise
    try:
        yield made
    finally:
        made.close()
        namespace.close()


# ---------------------------------------------------------------------------------------------------------------------
# attacks


@dataclass(frozen=True)
class Attack:
    """``body`` is Python after prelude.py; A holds the paths. ``harm`` looks at what became of them.

    Args:
        reads: what counts is whether the token was printed.
        privileged: only root can do this unconfined.
    """

    name: str
    body: str
    harm: Callable[[Ground], str] | None = None
    reads: bool = False
    privileged: bool = False

    def __str__(self) -> str:
        return self.name


def _of(name: str) -> Callable[[Ground], str]:
    return lambda ground: ground.harm(name)


def _exists(path: Callable[[Ground], Path]) -> Callable[[Ground], str]:
    def harm(ground: Ground) -> str:
        found = path(ground)
        if not os.path.lexists(found):
            return ""
        if found.is_dir() and not found.is_symlink():
            found.rmdir()
        else:
            found.unlink()
        return f"{found} was made"

    return harm


def _reading(name: str, body: str, **more: Any) -> Attack:
    return Attack(name, body, reads=True, **more)


SHOW = "print(open({}).read(), flush=True)"
READS = [
    _reading("a hidden file", SHOW.format("A['secret']")),
    _reading("a file in a hidden folder", SHOW.format("A['key']")),
    _reading("a hidden file by a symbolic link", "os.symlink(A['secret'], A['work'] + '/s')\n" + SHOW.format("A['work'] + '/s'")),
    _reading("a hidden file by a hard link", "os.link(A['secret'], A['work'] + '/h')\n" + SHOW.format("A['work'] + '/h'")),
    _reading("a hidden file, renamed", "os.rename(A['secret'], A['work'] + '/r')\n" + SHOW.format("A['work'] + '/r'")),
    _reading("a hidden folder, renamed", "os.rename(A['work'] + '/secrets', A['work'] + '/r')\n" + SHOW.format("A['work'] + '/r/key'")),
    _reading("by /proc/self/root", SHOW.format("'/proc/self/root' + A['secret']")),
    _reading("by /proc/self/cwd", "os.chdir(A['work'])\n" + SHOW.format("'/proc/self/cwd/secret'")),
    _reading("by a descriptor of the folder", "at = os.open(A['work'], os.O_PATH)\nprint(os.read(os.open('secret', os.O_RDONLY, dir_fd=at), 99).decode(), flush=True)"),
    _reading("by an O_PATH descriptor opened again", "pin = os.open(A['secret'], os.O_PATH)\n" + SHOW.format("'/proc/self/fd/%d' % pin")),
    _reading("by another process's root", SHOW.format("'/proc/%d/root%s' % (A['stranger'], A['victim'])")),
    _reading("by another process's folder", SHOW.format("'/proc/%d/cwd/victim' % A['stranger']")),
    _reading("by another process's descriptor", SHOW.format("'/proc/%d/fd/0' % A['stranger']")),
    _reading("a token file", SHOW.format("A['token_file']")),
    _reading("a file that is not granted", SHOW.format("A['victim']")),
    _reading("a file above what is granted", "os.chdir(A['work'])\n" + SHOW.format("'../outside/victim'")),
    _reading("a dotfile", "os.chdir(A['home'])\nos.chdir('..')\n" + SHOW.format("A['victim']")),
    _reading("a mapping of a hidden file", "import mmap\nf = open(A['secret'], 'rb')\nprint(mmap.mmap(f.fileno(), 0, prot=1)[:].decode(), flush=True)"),
    _reading("a hidden file as a program's input", "print(subprocess.run(['cat'], stdin=open(A['secret']), capture_output=True, text=True).stdout, flush=True)"),
    _reading("a hidden file, copied by another program", "subprocess.run(['cp', A['secret'], A['work'] + '/c'])\n" + SHOW.format("A['work'] + '/c'")),
]  # fmt: skip

CHANGES = [
    Attack("overwrite", "open(A['victim'], 'w').write('x')", _of("victim")),
    Attack("append", "open(A['victim'], 'a').write('x')", _of("victim")),
    Attack("overwrite what may be read", "open(A['readable'], 'w').write('x')", _of("readable")),
    Attack("truncate", "os.truncate(A['victim'], 0)", _of("victim")),
    Attack("truncate what may be read", "os.truncate(A['readable'], 0)", _of("readable")),
    Attack("truncate by opening", "os.open(A['readable'], os.O_RDONLY | os.O_TRUNC)", _of("readable")),
    Attack("by a symbolic link", "os.symlink(A['victim'], A['work'] + '/s')\nopen(A['work'] + '/s', 'w').write('x')", _of("victim")),
    Attack("hard link", "os.link(A['readable'], A['work'] + '/h')", _of("readable")),
    Attack("hard link, then write", "os.link(A['victim'], A['work'] + '/h')\nopen(A['work'] + '/h', 'w').write('x')", _of("victim")),
    Attack("rename away", "os.rename(A['victim'], A['work'] + '/v')", _of("victim")),
    Attack("rename over", "os.rename(A['work'] + '/mine', A['victim'])", _of("victim")),
    Attack("exchange", "call(316, -100, ctypes.c_char_p((A['work'] + '/mine').encode()), -100, ctypes.c_char_p(A['victim'].encode()), 2)", _of("victim")),
    Attack("unlink", "os.unlink(A['victim'])", _of("victim")),
    Attack("by /proc/self/root", "open('/proc/self/root' + A['victim'], 'w').write('x')", _of("victim")),
    Attack("by a descriptor opened again", "fd = os.open(A['readable'], os.O_RDONLY)\nopen('/proc/self/fd/%d' % fd, 'w').write('x')", _of("readable")),
    Attack("by another process's root", "open('/proc/%d/root%s' % (A['stranger'], A['victim']), 'w').write('x')", _of("victim")),
    Attack("by another process's descriptor", "open('/proc/%d/fd/0' % A['stranger'], 'w').write('x')", _of("victim")),
    Attack("remove the folder", "import shutil\nshutil.rmtree(os.path.dirname(A['victim']))", _of("victim")),
    Attack("rename the folder", "os.rename(os.path.dirname(A['victim']), A['work'] + '/o')", _of("victim")),
    # what is protected below a grant
    Attack("a protected file", "open(A['hook'], 'w').write('x')", _of("hook")),
    Attack("a protected file's mode", "os.chmod(A['hook'], 0o755)", _of("hook")),
    Attack("unlink a protected file", "os.unlink(A['hook'])", _of("hook")),
    Attack("a new file in a protected folder", "open(A['hooks'] + '/post-merge', 'w').write('x')", _exists(lambda g: g.paths["hooks"] / "post-merge")),
    Attack("a protected folder, replaced", "os.rename(A['hooks'], A['work'] + '/old')\nos.mkdir(A['hooks'])\nopen(A['hook'], 'w').write('x')", _of("hook")),
    Attack("above a protected folder", "os.rename(A['work'] + '/repo/.git', A['work'] + '/old')\nos.makedirs(A['hooks'])\nopen(A['hook'], 'w').write('x')", _of("hook")),
    Attack("far above a protected folder", "os.rename(A['work'] + '/repo', A['work'] + '/old')\nos.makedirs(A['hooks'])\nopen(A['hook'], 'w').write('x')", _of("hook")),
    Attack("a protected file by a hard link", "os.link(A['hook'], A['work'] + '/h')\nopen(A['work'] + '/h', 'w').write('x')", _of("hook")),
    Attack("a protected file from its folder", "os.chdir(A['hooks'])\nopen('pre-commit', 'w').write('x')", _of("hook")),
    Attack("a hidden file", "open(A['secret'], 'w').write('x')", _of("secret")),
    Attack("a hidden file's mode", "os.chmod(A['secret'], 0o777)", _of("secret")),
    Attack("a hidden file, removed", "os.unlink(A['secret'])", _of("secret")),
    Attack("a hidden folder's file", "open(A['key'], 'w').write('x')", _of("key")),
    Attack("a token file", "open(A['token_file'], 'w').write('x')", _of("token_file")),
    # what something unconfined runs or reads later
    Attack("~/.bashrc", "open(A['bashrc'], 'a').write('x')", _of("bashrc")),
    Attack("~/.bashrc by rename", "os.rename(A['work'] + '/mine', A['bashrc'])", _of("bashrc")),
    Attack("a new ~/.bash_profile", "open(A['home'] + '/.bash_profile', 'w').write('x')", _exists(lambda g: g.paths["home"] / ".bash_profile")),
    Attack("~/.gitconfig", "open(A['home'] + '/.gitconfig', 'w').write('[core]\\n  hooksPath = /x\\n')", _exists(lambda g: g.paths["home"] / ".gitconfig")),
    Attack("a new ~/.ssh", "os.mkdir(A['home'] + '/.ssh')", _exists(lambda g: g.paths["home"] / ".ssh")),
    Attack("a .pth in site-packages", "open(A['site'] + '/ray_guard_escape.pth', 'w').write('#')", _exists(lambda g: g.paths["site"] / "ray_guard_escape.pth")),
    Attack("a module of ray_guard", "open(A['package'] + '/escape.py', 'w').write('#')", _exists(lambda g: g.paths["package"] / "escape.py")),
    Attack("a compile cache", "open(A['cache'] + '/kernel.so', 'w').write('x')", _exists(lambda g: g.paths["cache"] / "kernel.so")),
    Attack("Ray's runtime environments", "os.makedirs('/tmp/ray/ray_guard_escape')", _exists(lambda _: Path("/tmp/ray/ray_guard_escape"))),
    Attack("/dev/shm", "open('/dev/shm/ray_guard_escape', 'w').write('x')", _exists(lambda _: Path("/dev/shm/ray_guard_escape"))),
    Attack("cron", "open('/etc/cron.d/ray_guard_escape', 'w').write('#')", _exists(lambda _: Path("/etc/cron.d/ray_guard_escape")), privileged=True),
    Attack("/etc", "open('/etc/ray_guard_escape', 'w').write('#')", _exists(lambda _: Path("/etc/ray_guard_escape")), privileged=True),
    Attack("/usr/local/bin", "open('/usr/local/bin/ray_guard_escape', 'w').write('#')", _exists(lambda _: Path("/usr/local/bin/ray_guard_escape")), privileged=True),
    Attack("a unix socket where nothing may be made", "s = socket.socket(AF_UNIX)\ns.bind(os.path.dirname(A['victim']) + '/s')", _exists(lambda g: g.paths["victim"].parent / "s")),
    Attack("a unix socket in a protected folder", "s = socket.socket(AF_UNIX)\ns.bind(A['hooks'] + '/s')", _exists(lambda g: g.paths["hooks"] / "s")),
    Attack("a fifo", "os.mkfifo(os.path.dirname(A['victim']) + '/f')", _exists(lambda g: g.paths["victim"].parent / "f")),
    Attack("a folder", "os.mkdir(os.path.dirname(A['victim']) + '/d')", _exists(lambda g: g.paths["victim"].parent / "d")),
    Attack("a symbolic link", "os.symlink('x', os.path.dirname(A['victim']) + '/l')", _exists(lambda g: g.paths["victim"].parent / "l")),
    Attack("a device", "os.mknod(A['work'] + '/n', 0o666 | 0o020000, os.makedev(1, 3))", _exists(lambda g: g.paths["work"] / "n"), privileged=True),
    Attack("a block device", "os.mknod(A['work'] + '/n', 0o666 | 0o060000, os.makedev(7, 0))", _exists(lambda g: g.paths["work"] / "n"), privileged=True),
]  # fmt: skip

_CHMODS = {
    "chmod": "os.chmod(P, 0o777)",
    "fchmod": "os.fchmod(os.open(P, os.O_RDONLY), 0o777)",
    "fchmodat": "at = os.open(os.path.dirname(P), os.O_PATH)\nos.chmod(os.path.basename(P), 0o777, dir_fd=at)",
    "fchmodat2": "call(452, -100, ctypes.c_char_p(P.encode()), 0o777, 0)",
    "chmod by a symbolic link": "os.symlink(P, A['work'] + '/s')\nos.chmod(A['work'] + '/s', 0o777)",
    "chmod by /proc/self/fd": "os.chmod('/proc/self/fd/%d' % os.open(P, os.O_RDONLY), 0o777)",
    "chmod by /dev/fd": "os.chmod('/dev/fd/%d' % os.open(P, os.O_RDONLY), 0o777)",
    "chmod by /proc/self/root": "os.chmod('/proc/self/root' + P, 0o777)",
    "chmod from within": "os.chdir(os.path.dirname(P))\nos.chmod(os.path.basename(P), 0o777)",
    "chmod over ..": "os.chdir(A['work'])\nos.chmod('../' + os.path.relpath(P, os.path.dirname(A['work'])), 0o777)",
    "utime": "os.utime(P, (1, 1))",
    "utime to now": "call(280, -100, ctypes.c_char_p(P.encode()), 0, 0)",
    "futimens": "os.utime(os.open(P, os.O_RDONLY), (1, 1))",
    "old utime": "call(132, ctypes.c_char_p(P.encode()), struct.pack('=qq', 1, 1))",
    "old utimes": "call(235, ctypes.c_char_p(P.encode()), struct.pack('=4q', 1, 0, 1, 0))",
    "futimesat": "call(261, -100, ctypes.c_char_p(P.encode()), struct.pack('=4q', 1, 0, 1, 0))",
    "setxattr": "os.setxattr(P, 'user.x', b'x')",
    "fsetxattr": "os.setxattr(os.open(P, os.O_RDONLY), 'user.x', b'x')",
    "setxattrat": (
        "value = ctypes.create_string_buffer(b'x')\n"
        "args = struct.pack('=QII', ctypes.addressof(value), 1, 0)\n"
        "call(463, -100, ctypes.c_char_p(P.encode()), 0, ctypes.c_char_p(b'user.x'), args, 16)"
    ),
}
_CHOWNS = {
    "chown": "os.chown(P, 1, 1)",
    "lchown": "os.lchown(P, 1, 1)",
    "fchown": "os.fchown(os.open(P, os.O_RDONLY), 1, 1)",
    "fchownat": "call(260, os.open(P, os.O_RDONLY), ctypes.c_char_p(b''), 1, 1, 0x1000)",
}
METADATA = [
    Attack(f"{name} of {where}", f"P = A['{where}']\n{body}", _of(where), privileged=body in _CHOWNS.values())
    for where in ("victim", "readable", "hook")
    for name, body in {**_CHMODS, **_CHOWNS}.items()
    if where != "victim" or "O_RDONLY" not in body  # it cannot even be opened
]


def _argv(ground: Ground, attack: Attack, stranger: int) -> list[str]:
    told = {"token": "", "stranger": stranger, **{name: str(path) for name, path in ground.paths.items()}}
    lines = "\n".join("    " + line for line in attack.body.splitlines())
    return [PYTHON, "-I", "-S", "-c", f"{PRELUDE}\ndef main():\n{lines}\n{EPILOGUE}", json.dumps(told)]


@contextmanager
def _stranger(ground: Ground) -> Iterator[int]:
    """A process of the same user that stands in the victim's folder and has the victim open."""
    with ground.paths["victim"].open("r+") as victim:
        process = subprocess.Popen(["sleep", "1000"], stdin=victim, cwd=ground.paths["victim"].parent)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _untold(attack: Attack, peer: Column) -> str:
    """Why ``peer`` cannot be blamed for what it lets happen; "": it was told."""
    used = set(re.findall(r"A\['(\w+)'\]", attack.body))
    if used & {"bashrc", "cache", "home", "token_file"}:
        return "what the guard refuses by itself below a grant: no other sandbox was told of it"
    if used & {"hook", "hooks"} and peer is Column.SANDLOCK:
        return "sandlock cannot be told of anything below a grant that may not be changed"
    if attack.reads and "victim" in attack.body and peer is not Column.SANDLOCK:
        return "bubblewrap is given all of / to read"
    return ""


def _try(family: str, attack: Attack, ring: str, *, stage: Stage, host: Host, ground: Ground) -> None:
    """As :func:`harness.escape`: unconfined and in ``ring``, judged and noted; what a peer lets happen fails nothing."""
    where = column(ring)
    note = partial(TABLE.note, family, attack.name)
    needed = [ground.paths[name] for name in ("site", "package") if f"A['{name}']" in attack.body]
    needed += [place for place in ("/tmp/ray",) if f"'{place}/" in attack.body and os.path.exists(place)]
    why = "needs root even unconfined" if attack.privileged and not ROOT else ""
    if not all(os.access(place, os.W_OK) for place in needed):
        why = "not this user's even unconfined"
    if why:
        note(where, Cell(Verdict.INAPPLICABLE, why))
        pytest.skip(f"{attack.name}: {why}")
    if where in PEERS:
        stage.require_peer(where)
        if untold := _untold(attack, where):
            note(where, Cell(Verdict.INAPPLICABLE, untold))
            return

    def once(run: Callable[[list[str]], Outcome]) -> tuple[Outcome, str]:
        ground.reset()
        with _stranger(ground) as stranger:
            outcome = run(_argv(ground, attack, stranger))
        if attack.reads:
            return outcome, "it was read" if ground.token in outcome.stdout else ""
        assert attack.harm is not None
        return outcome, attack.harm(ground)

    free, harm = once(run_unconfined)
    missing = str(free.said["errno"]) if free.said.get("errno") in ("ENOSYS", "EOPNOTSUPP") else ""
    assert missing or harm, f"the attack does not even work unconfined: {free.said or free.stderr}"
    unproved = Cell(Verdict.INAPPLICABLE, f"unconfined: {missing}")
    note(Column.UNCONFINED, unproved if missing else Cell(Verdict.WORKS))
    if where in PEERS:
        held, harm = once(lambda argv: run_unconfined(peers.command(where, argv, ground.grant())))
    else:
        held, harm = once(lambda argv: host.run("call", argv))
    said = str(held.said.get("errno", ""))
    note(where, Cell(Verdict.ESCAPED, harm) if harm else unproved if missing else Cell(Verdict.BLOCKED, said))
    if where in PEERS:
        return
    assert not harm, f"ESCAPED: {harm}; {held.said or held.stderr}"
    assert held.said or held.stderr, held  # it ran
    if missing:
        pytest.skip(f"{attack.name}: refused, but proves nothing here: unconfined it says {missing}")


everywhere = pytest.mark.parametrize("ring", ["call", *PEERS])


@everywhere
@pytest.mark.parametrize("attack", READS, ids=str)
def test_reading(stage: Stage, host: Host, ground: Ground, attack: Attack, ring: str) -> None:
    _try("files: reading", attack, ring, stage=stage, host=host, ground=ground)


@everywhere
@pytest.mark.parametrize("attack", CHANGES, ids=str)
def test_changing(stage: Stage, host: Host, ground: Ground, attack: Attack, ring: str) -> None:
    _try("files: changing", attack, ring, stage=stage, host=host, ground=ground)


@everywhere
@pytest.mark.parametrize("attack", METADATA, ids=str)
def test_metadata(stage: Stage, host: Host, ground: Ground, attack: Attack, ring: str) -> None:
    _try("files: mode, owner, times, attributes", attack, ring, stage=stage, host=host, ground=ground)


# ---------------------------------------------------------------------------------------------------------------------
# the guard's own files


OWN = [
    _reading("the evidence", "[print(open(A['evidence'] + '/' + n).read(), flush=True) for n in os.listdir(A['evidence'])]"),
    Attack("the evidence, appended to", "[open(A['evidence'] + '/' + n, 'a').write('x') for n in A['segments']]"),
    Attack("the evidence, cut short", "[os.truncate(A['evidence'] + '/' + n, 0) for n in A['segments']]"),
    Attack("the evidence, removed", "[os.unlink(A['evidence'] + '/' + n) for n in A['segments']]"),
    Attack("the evidence, moved", "os.rename(A['evidence'], A['work'] + '/elsewhere')"),
    Attack("above the evidence", "os.rename(A['work'], A['home'] + '/elsewhere')"),
    Attack("the evidence's mode", "os.chmod(A['evidence'], 0o777)"),
    Attack("the supervisor's folder", "print(os.listdir(A['supervisor']))"),
    Attack("the supervisor's log", "[open(A['supervisor'] + '/' + n, 'a').write('x') for n in A['logs']]"),
]  # fmt: skip


@pytest.mark.parametrize(
    "attack", [pytest.param(each, marks=row("the guard's files", each.name), id=each.name) for each in OWN]
)
def test_the_guards_own_files(host: Host, ground: Ground, attack: Attack) -> None:
    """Its evidence lies below what this policy lets be written. Not tried unconfined: that would work, and be missed."""
    assert host.run("call", ["true"]).status == 0  # there is evidence
    supervisor = Path(f"/tmp/ray_guard-{os.geteuid()}")
    segments = sorted(path.name for path in host.evidence.glob("*.otlp.jsonl"))
    assert segments
    logs = sorted(path.name for path in supervisor.glob("*.log"))
    assert logs
    told = {"token": "", **{name: str(path) for name, path in ground.paths.items()}}
    told |= {"evidence": str(host.evidence), "supervisor": str(supervisor), "segments": segments, "logs": logs}
    lines = "\n".join("    " + line for line in attack.body.splitlines())
    program = f"{PRELUDE}\ndef main():\n{lines}\n{EPILOGUE}"
    sizes = {name: (host.evidence / name).stat().st_size for name in segments}
    assert all(sizes.values())
    mode = host.evidence.stat().st_mode
    outcome = host.run("call", [PYTHON, "-I", "-S", "-c", program, json.dumps(told)])
    assert "traceId" not in outcome.stdout
    assert ".sock" not in outcome.stdout
    assert {name: (host.evidence / name).stat().st_size >= size for name, size in sizes.items()} == dict.fromkeys(
        sizes, True
    )
    assert not any((host.evidence / name).read_bytes().endswith(b"x") for name in segments)
    assert not any((supervisor / name).read_bytes().endswith(b"x") for name in logs)
    assert host.evidence.stat().st_mode == mode
    assert attack.reads or "errno" in outcome.said or "Error" in outcome.stderr, outcome


# ---------------------------------------------------------------------------------------------------------------------
# devices


def _device(host: Host | None, path: str, flags: str) -> Outcome:
    program = f"{PRELUDE}\ndef main(): os.open({path!r}, os.{flags})\n{EPILOGUE}"
    argv = [PYTHON, "-I", "-S", "-c", program, '{"token": ""}']
    return run_unconfined(argv) if host is None else host.run("call", argv)


DEVICES = ["/dev/kmsg", "/dev/loop-control", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/vda"]


@pytest.mark.parametrize("path", [pytest.param(path, marks=row("files: devices", path), id=path) for path in DEVICES])
def test_a_device_that_is_not_granted(host: Host, path: str) -> None:
    """Any of them stands for a GPU here: nodes are granted one by one, by what is behind them."""
    if _device(None, path, "O_RDONLY").said.get("done") is None:
        pytest.skip(f"{path} cannot be opened unconfined")
    assert _device(host, path, "O_RDONLY").said.get("errno") == "EACCES"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"])
def test_a_device_that_everybody_needs(host: Host, path: str) -> None:
    assert _device(host, path, "O_RDWR").said["done"] is True


_IOCTL = """
import errno, fcntl, sys
for number in sys.argv[2:]:
    try: fcntl.ioctl(int(sys.argv[1]), int(number), bytes(64))
    except OSError as error: print(errno.errorcode[error.errno])
    else: print('done')
"""
GPU_CALLS = {
    "NV_ESC_RM_ALLOC": 0xC030462B,
    "NV_ESC_REGISTER_FD": 0xC00446C9,
    "UVM_INITIALIZE": 0x30000001,
    "DRM_IOCTL_VERSION": 0xC0406400,
    "AMDKFD_IOC_GET_VERSION": 0x80084B01,
}


@row("files: devices", "a GPU's ioctl on a descriptor that was passed on")
def test_a_gpu_descriptor_that_was_passed_on_does_nothing(host: Host) -> None:
    """The number of the call decides, whatever it is made on: unconfined a pipe says that it knows no such call."""
    numbers = [str(number) for number in GPU_CALLS.values()]
    argv = [PYTHON, "-I", "-S", "-c", _IOCTL, "0", *numbers]
    free = subprocess.run(argv, capture_output=True, text=True, check=True, input="")
    assert free.stdout.split() == ["ENOTTY"] * len(numbers)
    assert host.run("call", argv).stdout.split() == ["EPERM"] * len(numbers)


def test_what_others_use_of_the_same_magic_stays(host: Host) -> None:
    # KDGKBTYPE, asked of a terminal to learn whether it is the console; TCGETS
    argv = [PYTHON, "-I", "-S", "-c", _IOCTL, "0", str(0x4B33), str(0x5401)]
    assert host.run("call", argv).stdout.split() == ["ENOTTY", "ENOTTY"]


@pytest.mark.parametrize(("gpu", "said"), [("none", "EPERM"), ("any", "ENOTTY")])
def test_gpus_are_granted_by_the_policy(tmp_path: Path, gpu: str, said: str) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"version: 1\nrole: tool\ngpu: {gpu}\negress: {{allow: []}}\n")
    command = [*launcher.prefix(), PYTHON, "-m", "ray_guard.cli", "run", "--policy", str(policy), "--evidence",
               str(tmp_path / "evidence"), "--", PYTHON, "-I", "-S", "-c", _IOCTL, "0", str(0xC030462B)]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    skip_refused(done.stderr)
    assert done.stdout.split() == [said], done.stderr


def test_a_device_is_not_passed_on(host: Host) -> None:
    code = """
import os
try:
    descriptor = os.open(path, os.O_RDONLY)
except OSError as error:
    result = f'missing {error}'
else:
    try: ray_guard.run(['true'], pass_fds=[descriptor])
    except (ValueError, ray_guard.NotEnforced) as error: result = str(error)
    else: result = 'passed on'
    os.close(descriptor)
"""
    said = host.inside(code, path="/dev/kmsg")
    if said.startswith("missing"):
        pytest.skip(said)
    assert "device 1:11" in said
    assert host.inside(code, path="/dev/null") == "passed on"


def test_a_file_that_was_passed_on_keeps_its_mode(host: Host, ground: Ground) -> None:
    """The descriptor is the tool's, to read or write; mode and owner are not its to change."""
    ground.reset()
    code = """
with open(victim) as file:
    result = ray_guard.run([python, '-I', '-S', '-c', program], stdin=file, capture_output=True, text=True).stdout
"""
    program = """
import os
for change in (lambda: os.fchmod(0, 0o777), lambda: os.utime(0, (1, 1)), lambda: os.setxattr(0, 'user.x', b'x'),
               lambda: os.chmod('/proc/self/fd/0', 0o777), lambda: os.chmod('/dev/stdin', 0o777),
               lambda: open('/dev/stdin', 'w')):
    try: change(); print('changed')
    except PermissionError: print('refused')
print(len(open('/dev/stdin').read()))
"""
    said = host.inside(code, victim=str(ground.paths["victim"]), program=program, python=PYTHON)
    assert said.split() == ["refused"] * 6 + [str(len(ground.token))]
    assert ground.harm("victim") == ""


_SHARED = [
    ("chmod", "os.chmod(P, 0o777)"),
    ("chmod by a symbolic link", "os.symlink(P, F + '/link'); os.chmod(F + '/link', 0o777)"),
    ("chmod by dots", "os.chmod('/dev/./shm/../shm/' + N, 0o777)"),
    ("chmod from within", "os.chdir('/dev/shm'); os.chmod(N, 0o777)"),
    ("utime", "os.utime(P, (1, 1))"),
    ("setxattr", "os.setxattr(P, 'user.left', b'behind')"),
    ("chmod of the folder", "os.chmod('/dev/shm', 0o755)"),
]


@pytest.mark.parametrize(("name", "program"), [pytest.param(*each, id=each[0]) for each in _SHARED])
def test_shared_memory_of_the_host_is_not_changed(stage: Stage, folder: Path, name: str, program: str) -> None:
    """A call has a /dev/shm of its own, and who changes modes on its behalf sees the host's: the engine's buffers."""
    victim = Path(f"/dev/shm/ray_guard_victim_{folder.name}")

    def state() -> tuple[object, ...]:
        found, above = victim.stat(), victim.parent.stat()
        return found.st_mode, found.st_mtime_ns, sorted(os.listxattr(victim)), above.st_mode

    argv = [
        PYTHON,
        "-I",
        "-S",
        "-c",
        f"import os, sys\nP, N, F = sys.argv[1:]\n{program}",
        str(victim),
        victim.name,
        str(folder),
    ]
    victim.write_text("the engine's")
    before = state()
    mode = before[-1]
    try:
        stage.host().run("call", argv)
        assert state() == before
        (folder / "link").unlink(missing_ok=True)
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode and ("not supported" in done.stderr or "not permitted" in done.stderr):
            pytest.skip(f"{name}: does not work unconfined either: {done.stderr.splitlines()[-1]}")
        assert state() != before, f"the attack does not even work unconfined: {done}"
    finally:
        if victim.parent.stat().st_mode != mode:
            victim.parent.chmod(mode)
        victim.unlink()


@pytest.mark.parametrize("by", ["P", "F + '/link'"])
def test_a_file_in_memory_of_another_process_is_not_changed(stage: Stage, folder: Path, by: str) -> None:
    """An engine's memfd: its descriptor cannot be opened from within a call, but it has a path."""
    program = "import os, time; number = os.memfd_create('x'); os.fchmod(number, 0o600); print(number, flush=True); time.sleep(600)"
    victim = subprocess.Popen([PYTHON, "-I", "-S", "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout is not None
        path = f"/proc/{victim.pid}/fd/{int(victim.stdout.readline())}"
        attack = f"import os, sys\nP, F = sys.argv[1:]\nos.symlink(P, F + '/link')\nos.chmod({by}, 0o666)"
        argv = [PYTHON, "-I", "-S", "-c", attack, path, str(folder)]
        stage.host().run("call", argv)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        (folder / "link").unlink()
        subprocess.run(argv, check=True)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    finally:
        victim.kill()
        victim.communicate()


def test_a_call_changes_modes_of_its_own_files_in_memory(stage: Stage) -> None:
    program = "import os\nn = os.memfd_create('x')\nos.fchmod(n, 0o600)\nos.chmod(f'/proc/self/fd/{n}', 0o640)\nos.chmod(f'/proc/{os.getpid()}/fd/{n}', 0o644)\nprint(oct(os.fstat(n).st_mode))"
    assert stage.host().run("call", [PYTHON, "-I", "-S", "-c", program]).stdout == "0o100644\n"


def test_a_call_changes_modes_in_its_own_shared_memory(stage: Stage) -> None:
    program = "import os\nopen('/dev/shm/own', 'w').close()\nos.chmod('/dev/shm/own', 0o640)\nos.utime('/dev/shm/own', (1, 1))\nprint(oct(os.stat('/dev/shm/own').st_mode), os.stat('/dev/shm/own').st_mtime)"
    if lacks("mount namespaces") or not mounting.works():
        pytest.skip("mount namespaces missing: calls have no /dev/shm")
    assert stage.host().run("call", [PYTHON, "-I", "-S", "-c", program]).stdout == "0o100640 1.0\n"


# ---------------------------------------------------------------------------------------------------------------------
# what must work


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Path]]:
    """A process that stands in a folder of its own, under the defaults."""
    folder = tmp_path_factory.mktemp("bench")
    namespace = Namespace()
    work = folder / "work"
    work.mkdir()
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(folder / "home"))
        patched.setenv("PATH", f"{Path(PYTHON).parent}:{os.environ['PATH']}")
        (folder / "home").mkdir()
        (folder / "home/.gitconfig").write_text("[user]\n  name = T\n  email = t@example.org\n")
        try:
            host = Host({"egress": {"allow": []}}, folder / "evidence", namespace)
        except BaseException:
            namespace.close()
            raise
    host.inside(f"import os; os.chdir({str(work)!r})")
    assert os.getcwd() == before
    yield host, work
    host.close()
    namespace.close()


def _has(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not here")


WORKS = {
    "git": """
git init -q repo && cd repo && echo one > file && git add . && git commit -qm one && git checkout -qb other
echo two > file && git commit -qam two && git checkout -q - && git merge -q other && git stash list
git clone -q . ../clone && git clone -q --no-hardlinks . ../copy && cd ../clone && git log --oneline | wc -l | grep -qx 2
git gc -q && git config user.name x && rm -rf ../copy""",
    "compilers": """
mkdir -p c && cd c && printf '#include <stdio.h>\\nint main(void) { puts("hello"); }\\n' > hello.c
gcc -O1 -o hello hello.c && ./hello | grep -q hello && printf 'all: ; @echo made\\n' > Makefile && make | grep -q made""",
    "venv and pip": """
python -m venv --without-pip made && test -x made/bin/python && made/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
mkdir -p src/thing && echo 'x = 1' > src/thing/__init__.py
python - <<'END'
import zipfile
with zipfile.ZipFile('thing-1-py3-none-any.whl', 'w') as wheel:
    wheel.writestr('thing.py', 'x = 41 + 1')
    wheel.writestr('thing-1.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: thing\\nVersion: 1\\n')
    wheel.writestr('thing-1.dist-info/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')
    wheel.writestr('thing-1.dist-info/RECORD', '')
END
python -m pip --version && python -m pip install -q --no-index --target installed ./thing-1-py3-none-any.whl
PYTHONPATH=installed python -c 'import thing; assert thing.x == 42'""",
    "pytest": """
mkdir -p t && cd t && printf 'import subprocess, tempfile\\ndef test_it(tmp_path):\\n    (tmp_path / "x").write_text("x")\\n    subprocess.run(["true"], check=True)\\n' > test_it.py
python -m pytest -q test_it.py | grep -q '1 passed'""",
    "node": """
node -e "const fs = require('fs'), os = require('os'), path = require('path');
fs.writeFileSync('n.txt', 'x'); const d = fs.mkdtempSync(path.join(os.tmpdir(), 'n')); fs.writeFileSync(d + '/x', 'y');
require('child_process').execFileSync('true'); console.log(fs.readFileSync('n.txt', 'utf8'))" | grep -qx x""",
    "archives": """
mkdir -p a/b && echo x > a/b/f && chmod 640 a/b/f && touch -d 2001-01-01 a/b/f && tar czf a.tgz a && rm -r a && tar xzpf a.tgz
test "$(stat -c %a.%Y a/b/f)" = "640.$(date -d 2001-01-01 +%s)" && cp -a a c2 && mv c2 c3 && ln a/b/f hard && ln -s a soft
test -x "$(command -v rsync)" && rsync -a a/ r/; rm -rf a c3 r hard soft""",
    "shell": """
cat > here <<'END'
line
END
sort -S 1K here > sorted && sed -i s/line/word/ here && grep -q word here && mkfifo pipe && (echo x > pipe & read y < pipe; test "$y" = x)
diff <(echo 1) <(echo 1) && echo out > /dev/stdout && echo err > /dev/stderr && head -c 9 /dev/urandom > /dev/null
printf '#!/bin/sh\\necho ran\\n' > script && chmod +x script && ./script | grep -qx ran""",
    "unix sockets": """
python - <<'END'
import os, socket, sys, tempfile
for folder in ('.', tempfile.mkdtemp(), *sys.argv[1:]):
    server = socket.socket(socket.AF_UNIX); server.bind(folder + '/sock'); server.listen()
    assert server.getsockname() == folder + '/sock'
    client = socket.socket(socket.AF_UNIX); client.connect(folder + '/sock'); client.send(b'x')
    assert server.accept()[0].recv(1) == b'x'
    os.chmod(folder + '/sock', 0o600); os.unlink(folder + '/sock')
END""",
    "sqlite": """
python -c "import sqlite3; c = sqlite3.connect('d.db'); c.execute('pragma journal_mode=wal'); c.execute('create table t (x)'); c.commit(); c.close()" """,
}
_NEEDED = {"git": "git", "compilers": "gcc", "node": "node"}


@pytest.mark.parametrize("what", WORKS)
def test_what_must_work(bench: tuple[Host, Path], what: str) -> None:
    if shutil.which(_NEEDED.get(what, "bash")) is None:
        pytest.skip(f"{_NEEDED[what]} is not here")
    host, _ = bench
    outcome = host.run("call", ["bash", "-ec", WORKS[what]], timeout=60)
    assert outcome.status == 0, outcome.stdout + outcome.stderr


@pytest.mark.skipif(not mounting.works(), reason="needs mounts of the call's own")
@needs("mount namespaces")
def test_what_works_with_mounts(bench: tuple[Host, Path]) -> None:
    """POSIX semaphores and shared memory need /dev/shm, terminals /dev/pts: a call has its own."""
    program = """
import multiprocessing, multiprocessing.shared_memory, os
with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, 2]))
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
memory.unlink()
print(os.ttyname(os.openpty()[1]), os.listdir('/dev/shm'))
open('/dev/shm/left', 'w')
import socket
server = socket.socket(socket.AF_UNIX); server.bind('/dev/shm/sock'); server.listen()
socket.socket(socket.AF_UNIX).connect('/dev/shm/sock')
"""
    host, _ = bench
    for _ in range(2):  # what a call leaves there is not the next one's
        outcome = host.run("call", [PYTHON, "-c", program])
        assert outcome.stdout == "[1, 2]\n/dev/pts/0 []\n", outcome
    assert not Path("/dev/shm/left").exists()


def test_scratch(bench: tuple[Host, Path]) -> None:
    """A call's processes share it, other calls have another, and nothing is left."""
    code = """
import os, ray_guard
def tell(script): return ray_guard.run(['bash', '-c', script], capture_output=True, text=True, check=True).stdout.strip()
result = []
with ray_guard.tool_call('one', {}):
    result.append(tell('mkdir -p $TMPDIR/a/b; echo x > $TMPDIR/a/b/f; chmod 0 $TMPDIR/a; echo $TMPDIR'))
    result.append(tell('ls $TMPDIR'))
with ray_guard.tool_call('two', {}):
    result.append(tell('echo $TMPDIR; ls $TMPDIR'))
result.append(tell('echo $TMPDIR; ls $TMPDIR; mktemp > /dev/null'))
"""
    host, _ = bench
    first, held, second, third = host.inside(code)
    assert held == "a"
    assert len({first, second, third}) == 3
    for path in (first, second, third):
        wait(lambda path=path: not os.path.lexists(path), f"{path} is still there")


def test_a_very_deep_folder_in_scratch_is_removed(bench: tuple[Host, Path]) -> None:
    host, _ = bench
    program = "import os\nos.chdir(os.environ['TMPDIR'])\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\nprint(os.environ['TMPDIR'])"
    path = host.run("call", [PYTHON, "-I", "-S", "-c", program]).stdout.strip()
    wait(lambda: not os.path.lexists(path), f"{path} is still there", 20)


def test_the_working_folder_holds_what_is_never_writable(tmp_path: Path) -> None:
    """A project with its environment in it, the common case: all may be made beside it, nothing in it."""
    project = tmp_path / "project"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(project / ".venv")], check=True)
    policy = tmp_path / "policy.json"
    policy.write_text('{"version": 1, "egress": {"allow": []}}')
    outer = Path(ray_guard.__file__).parents[1]
    script = "touch .venv/bin/x .venv/x; mv .venv gone; rm -rf .venv/bin/python; echo made > new; mkdir -p d && mv new d/; cat d/new"
    paths = [str(outer), *(path for path in sys.path if path.endswith("site-packages"))]
    command = [*launcher.prefix(), str(project / ".venv/bin/python"), "-m", "ray_guard.cli", "run", "--policy", str(policy),
               "--evidence", str(project / "evidence"), "--", "bash", "-c", script]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": ":".join(paths)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    skip_refused(done.stderr)
    assert (project / ".venv/bin/python").exists(), done
    assert not (project / ".venv/x").exists()
    assert not (project / ".venv/bin/x").exists()
    if mounting.works() and not lacks("mount namespaces"):
        assert done.stdout == "made\n", done


@pytest.fixture
def making(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Host]]:
    """Hosts with a policy of their own."""
    namespace = Namespace()
    made: list[Host] = []

    def make(policy: dict[str, Any]) -> Host:
        made.append(Host(policy, tmp_path / f"evidence{len(made)}", namespace))
        return made[-1]

    yield make
    for host in made:
        host.close()
    namespace.close()


def test_report_mode_blocks_nothing(making: Callable[[dict[str, Any]], Host], tmp_path: Path) -> None:
    host = making({"mode": "report", "egress": {"allow": []}})
    script = f"cd {tmp_path}; touch new && chmod 600 new && touch -d 2001-01-01 new && ls"
    outcome = host.run("call", ["bash", "-ec", script])
    assert "new" in outcome.stdout, outcome
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_a_second_policy_narrows_the_view(making: Callable[[dict[str, Any]], Host], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def policy(*, read: list[str], write: list[str]) -> dict[str, Any]:
        return {"egress": {"allow": []}, "files": {"read": ["system", "env", *read], "write": ["scratch", *write]}}

    host = making(policy(read=[], write=[str(tmp_path / "a"), str(tmp_path / "b")]))
    script = f"for n in a b; do (touch {tmp_path}/$n/new) 2>/dev/null && chmod 600 {tmp_path}/$n/new && echo $n; done; echo ok > $TMPDIR/x; cat $TMPDIR/x"
    assert host.run("call", ["bash", "-c", script]).stdout == "a\nb\nok\n"
    second = policy(read=[str(tmp_path)], write=[str(tmp_path / "a")])
    host.inside("ray_guard.confine(policy)", policy=second)
    assert host.run("call", ["bash", "-c", script]).stdout == "a\nok\n"
    assert host.run("call", ["ls", str(tmp_path)]).status != 0, "the first policy does not let it be read"

"""Views as tables: policy and surroundings in, grants and covers out; and properties that hold for every tree."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import NotEnforced, PolicyError
from ray_guard.policy.files import (
    HIDE,
    LIST,
    PIN,
    PROTECT,
    READ,
    WRITE,
    Files,
    Grant,
    Looking,
    Places,
    Plan,
    Surroundings,
    may_change,
    places_from_wire,
    plan,
    system_grants,
)

TREE = """
/etc/passwd /etc/shadow /usr/bin/ls /dev/null /dev/kmsg /dev/shm/
/home/me/.bashrc /home/me/notes /home/me/.ssh/id
/home/me/project/main.py /home/me/project/.venv/bin/python /home/me/project/.git/config
/home/me/project/.git/hooks/post-merge /home/me/project/secret /home/me/project/sub/file
/opt/python/bin/python /opt/python/lib/os.py /opt/guard/ray_guard/gate.py
/tmp/evidence/a.otlp.jsonl /tmp/work/file /tmp/ray/session_1/logs/x
/tmp/ray/session_1/runtime_resources/working_dir_files/pkg/task.py /srv/data/file
""".split()
PLACES = Places(
    homes=("/home/me",),
    environment=("/opt/python/lib", "/"),
    prefixes=("/opt/python",),
    never=("/opt/guard/ray_guard", "/home/me/project/.venv"),
    hidden=("/tmp/evidence",),
    ray=("/tmp/ray",),
)
SYSTEM = (Grant("/usr", READ), Grant("/etc", READ))


def exists(path: str) -> bool:
    return any(each == path or each.startswith(path.rstrip("/") + "/") for each in TREE)


def listed(folder: str) -> list[str]:
    inner = folder.rstrip("/") + "/"
    names = {each[len(inner) :].split("/")[0] for each in TREE if each.startswith(inner) and each != inner}
    if not names and not any(each == inner for each in TREE):
        raise NotADirectoryError(folder)
    return sorted(names)


LOOK = Looking(listed, lambda path: path, exists)


def planned(files: Files, cwd: str = "/srv/data", *, mounts: bool = False, path: Iterable[str] = ()) -> Plan:
    return plan(files, Surroundings(PLACES, SYSTEM, cwd, tuple(path), mounts=mounts), LOOK)


def rights(found: Plan, path: str) -> set[str]:
    """What the kernel would make of it: the rights of every rule on the way up."""
    above = ["/"] + ["/".join(path.split("/")[:n]) for n in range(2, path.count("/") + 2)]
    granted = {letter for grant in found.grants for letter in grant.rights if grant.path in above}
    if found.system:
        granted |= {letter for grant in SYSTEM for letter in grant.rights if grant.path in above}
    covers = [cover for cover in found.covers if cover.path in above]
    if any(cover.how == HIDE for cover in covers):
        return set()
    return granted - {WRITE} if any(cover.how == PROTECT for cover in covers) else granted


@pytest.mark.parametrize("mounts", [False, True])
@pytest.mark.parametrize(
    ("files", "cwd", "path", "may"),
    [
        # defaults
        ({}, "/srv/data", "/usr/bin/ls", "r"),
        ({}, "/srv/data", "/etc/passwd", "r"),
        ({}, "/srv/data", "/srv/data/file", "rw"),
        ({}, "/srv/data", "/srv/other", ""),
        ({}, "/srv/data", "/home/me/notes", ""),
        ({}, "/srv/data", "/tmp/work/file", ""),
        ({}, "/srv/data", "/opt/python/lib/os.py", "r"),
        ({}, "/srv/data", "/home/me/.ssh/id", ""),
        ({}, "/srv/data", "/dev/kmsg", ""),
        # a working folder with things in it
        ({}, "/home/me/project", "/home/me/project/main.py", "rw"),
        ({}, "/home/me/project", "/home/me/project/.git/config", "rw"),
        ({}, "/home/me/project", "/home/me/project/.venv/bin/python", "r"),
        # folders that are none to work in
        ({}, "/", "/srv/data/file", ""),
        ({}, "/", "/etc/passwd", "r"),
        ({}, "/home/me", "/home/me/notes", "rw"),
        ({}, "/home/me", "/home/me/.bashrc", ""),
        ({}, "/home/me", "/home/me/.ssh/id", ""),
        ({}, "/home", "/home/me/.bashrc", ""),
        ({}, "/etc", "/etc/passwd", "r"),
        ({}, "/opt/python", "/opt/python/lib/os.py", "r"),
        ({}, "/tmp", "/tmp/evidence/a.otlp.jsonl", ""),
        ({}, "/tmp", "/tmp/work/file", "rw"),
        ({}, "/tmp/evidence", "/tmp/evidence/a.otlp.jsonl", ""),
        ({}, "/dev", "/dev/kmsg", ""),
        # Ray's packages are read where they are worked in
        ({}, "/tmp", "/tmp/ray/session_1/logs/x", ""),
        ({}, "/tmp/ray/session_1/logs", "/tmp/ray/session_1/logs/x", ""),
        (
            {},
            "/tmp/ray/session_1/runtime_resources/working_dir_files/pkg",
            "/tmp/ray/session_1/runtime_resources/working_dir_files/pkg/task.py",
            "r",
        ),
        # what a policy lists
        ({"read": ["/srv"]}, "/tmp/work", "/srv/data/file", "r"),
        ({"read": ["/srv"]}, "/tmp/work", "/etc/passwd", ""),
        ({"read": ["/"]}, "/tmp/work", "/srv/data/file", "r"),
        ({"read": ["/"]}, "/tmp/work", "/tmp/evidence/a.otlp.jsonl", ""),
        ({"read": ["/"]}, "/tmp/work", "/dev/kmsg", ""),
        ({"read": ["~"]}, "/tmp/work", "/home/me/.ssh/id", "r"),
        ({"write": ["/srv"]}, "/tmp/work", "/srv/data/file", "rw"),
        ({"write": ["/"]}, "/tmp/work", "/etc/passwd", "r"),
        ({"write": ["/etc"]}, "/tmp/work", "/etc/passwd", "rw"),
        ({"write": ["/etc/passwd"]}, "/tmp/work", "/etc/passwd", "rw"),
        ({"write": ["~"]}, "/tmp/work", "/home/me/.bashrc", ""),
        ({"write": ["~"]}, "/tmp/work", "/home/me/notes", "rw"),
        ({"write": ["~/.bashrc"]}, "/tmp/work", "/home/me/.bashrc", "rw"),
        ({"write": ["/opt/python/lib"]}, "/tmp/work", "/opt/python/lib/os.py", "rw"),
        ({"write": ["/opt"]}, "/tmp/work", "/opt/python/lib/os.py", "r"),
        ({"write": ["/opt/guard"]}, "/tmp/work", "/opt/guard/ray_guard/gate.py", "r?"),
        ({"write": ["/tmp/evidence"]}, "/tmp/work", "/tmp/evidence/a.otlp.jsonl", ""),
        # exceptions win, above and below
        ({"hide": ["~/project/secret"]}, "/home/me/project", "/home/me/project/secret", ""),
        ({"hide": ["~/project/.git"]}, "/home/me/project", "/home/me/project/.git/config", ""),
        ({"hide": ["/etc/passwd"]}, "/home/me/project", "/etc/passwd", ""),
        ({"hide": ["/"]}, "/home/me/project", "/home/me/project/main.py", ""),
        ({"protect": ["~/project/.git/hooks"]}, "/home/me/project", "/home/me/project/.git/hooks/post-merge", "r"),
        ({"protect": ["~/project/.git/hooks"]}, "/home/me/project", "/home/me/project/.git/config", "rw"),
        ({"protect": ["~"]}, "/home/me/project", "/home/me/project/main.py", "r"),
        ({"write": ["/srv"], "protect": ["/srv"]}, "/tmp/work", "/srv/data/file", ""),
    ],
)
def test_what_a_call_may_do(files: dict[str, list[str]], cwd: str, path: str, may: str, mounts: bool) -> None:
    found = planned(Files(**{key: tuple(value) for key, value in files.items()}), cwd, mounts=mounts)
    got = rights(found, path) - {LIST}
    if may == "r?":  # read where writing covers it, nothing where it was gone around
        assert WRITE not in got
    else:
        assert got == set(may), found


def test_with_mounts_a_working_folder_is_granted_whole() -> None:
    found = planned(Files(protect=("~/project/.git/hooks",)), "/home/me/project", mounts=True)
    assert Grant("/home/me/project", "rw") in found.grants
    assert [(cover.path, cover.how) for cover in found.covers if cover.path.startswith("/home")] == [
        ("/home/me/project/.git", PIN),
        ("/home/me/project/.venv", PROTECT),
        ("/home/me/project/.git/hooks", PROTECT),
    ]
    assert found.exact


def test_without_mounts_nothing_can_be_made_beside_an_exception() -> None:
    found = planned(Files(), "/home/me/project", mounts=False)
    assert WRITE not in rights(found, "/home/me/project/new")
    assert not found.exact


@pytest.mark.parametrize("mounts", [False, True])
def test_what_is_protected_and_does_not_exist_yet_cannot_be_made(mounts: bool) -> None:
    found = planned(Files(protect=("~/project/.envrc",)), "/home/me/project", mounts=mounts)
    assert WRITE not in rights(found, "/home/me/project/.envrc")
    assert WRITE in rights(found, "/home/me/project/sub/file")


def test_names_in_a_hidden_folder_are_hidden_too() -> None:
    found = planned(Files(hide=("~/project/.git",)), "/home/me/project", mounts=False)
    assert LIST not in rights(found, "/home/me/project")
    found = planned(Files(hide=("~/project/secret",)), "/home/me/project", mounts=False)
    assert LIST in rights(found, "/home/me/project"), "a file's own name is no secret"


def test_the_word_system_leaves_secrets_out() -> None:
    free = system_grants(listed, lambda path: path, mounts=False)
    assert Grant("/etc/passwd", READ) in free
    assert all(grant.path not in ("/etc/shadow", "/etc") or grant.rights == LIST for grant in free)
    covered = planned(Files(), mounts=True)
    assert ("/etc/shadow", HIDE) in covered.covers
    assert ("/etc/shadow", HIDE) not in planned(Files(read=("system", "/etc/shadow")), mounts=True).covers


def test_programs_on_the_path_and_what_belongs_to_them() -> None:
    path = ("/home/me/.nvm/v20/bin", "/home/me/.cargo/bin", "/home/me/.pyenv/shims", "/home/me/bin")
    around = Surroundings(PLACES, SYSTEM, "/srv/data", path, mounts=False)
    found = plan(Files(), around, Looking(listed, lambda each: each, lambda _path: True))
    granted = {grant.path for grant in found.grants}
    assert {"/home/me/.nvm/v20", "/home/me/.cargo/bin", "/home/me/.pyenv", "/home/me/bin"} <= granted
    assert not {"/home/me/.cargo", "/home/me", "/"} & granted


def test_too_many_entries_are_refused() -> None:
    look = Looking(lambda _folder: [str(n) for n in range(5000)], lambda path: path, lambda _path: False)
    around = Surroundings(PLACES._replace(never=("/srv/data/x",)), SYSTEM, "/srv/data", (), mounts=False)
    with pytest.raises(NotEnforced, match="/srv/data has too many entries"):
        plan(Files(), around, look)


@pytest.mark.parametrize("path", ["/sys/fs/cgroup", "/sys/fs/cgroup/unified/job"])
def test_control_groups_are_never_writable(path: str) -> None:
    around = Surroundings(PLACES, SYSTEM, "/tmp/work", (), mounts=True)
    with pytest.raises(PolicyError, match="could leave its call's"):
        plan(Files(write=(path,)), around, Looking(listed, str, exists))


def test_may_change() -> None:
    writable = frozenset({"/a/b", "/c"})
    assert [may_change(writable, path) for path in ("/a/b", "/a/b/x/y", "/a/bc", "/a", "/", "/c/..")] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"read": []}, {"read": [1], "write": [], "hide": [], "protect": []},
     {"read": ["relative"], "write": [], "hide": [], "protect": []},
     {"read": ["/a\0b"], "write": [], "hide": [], "protect": []},
     {"read": [], "write": ["system"], "hide": [], "protect": []}],
)  # fmt: skip
def test_malformed_files_are_refused(value: object) -> None:
    with pytest.raises(PolicyError):
        Files.from_wire(value)


@pytest.mark.parametrize("value", [None, [], {"homes": "x"}, {"homes": [1]}, {"never": ["relative"]}])
def test_malformed_places_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="places"):
        places_from_wire(value)


_PATHS = st.sampled_from(
    sorted({"/", "~", *(each.rstrip("/") for each in TREE), *(p.rsplit("/", 1)[0] or "/" for p in TREE)})
)


_FILES = st.builds(
    Files,
    read=st.lists(_PATHS | st.sampled_from(["system", "env", "cwd"]), max_size=3).map(tuple),
    write=st.lists(_PATHS | st.just("cwd"), max_size=3).map(tuple),
    hide=st.lists(_PATHS, max_size=2).map(tuple),
    protect=st.lists(_PATHS, max_size=2).map(tuple),
)


@given(files=_FILES, cwd=_PATHS.filter(lambda path: path != "~"), mounts=st.booleans())
def test_no_policy_reaches_what_is_excepted(files: Files, cwd: str, mounts: bool) -> None:
    found = planned(files, cwd, mounts=mounts)
    for path in TREE:
        got = rights(found, path.rstrip("/")) - {LIST}
        above = [path[:n] for n in range(1, len(path) + 1) if n == len(path) or path[n] == "/"] + ["/"]
        hidden = [*PLACES.hidden, *(each.replace("~", "/home/me") for each in files.hide)]
        assert not got or not set(hidden) & set(above), (path, got)
        protected = [each.replace("~", "/home/me") for each in files.protect]
        assert WRITE not in got or not set(protected) & set(above), (path, got)
        if path.startswith("/home/me/.") and not any(each.startswith(("~/.", "/home/me/.")) for each in files.write):
            assert WRITE not in got, (path, got)

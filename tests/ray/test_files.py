"""A tool in a Ray cluster: the session, its sockets and its token are out of reach; a job's own packages are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

import ray_guard

READ = """
import os, sys
session = sys.argv[1]
for path in (session, session + '/logs', session + '/sockets'):
    try: print('listed', len(os.listdir(path)))
    except OSError as error: print('refused', error.errno)
for path in sys.argv[2:]:
    try: print('read', len(open(path).read()))
    except OSError as error: print('refused', error.errno)
try: open(session + '/logs/escape', 'w'); print('written')
except OSError as error: print('refused', error.errno)
"""


class Reader:
    def plain(self, argv: list[str]) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    @ray_guard.tool
    def confined(self, argv: list[str]) -> str:
        done = ray_guard.run(argv, capture_output=True, text=True)
        return str(done.stdout)


def test_the_session_is_out_of_reach_whatever_is_granted(cluster: Any, tmp_path: Path) -> None:
    session = cluster.address_info["session_dir"]
    secrets = [next(Path(session, "logs").glob("*.log")), *Path("~/.ray").expanduser().glob("auth_token")]
    argv = [sys.executable, "-I", "-S", "-c", READ, session, *map(str, secrets)]
    free = ray.remote(Reader).remote()
    said = ray.get(free.plain.remote(argv)).splitlines()
    assert [line.split()[0] for line in said] == ["listed"] * 3 + ["read"] * len(secrets) + ["written"]
    os.unlink(f"{session}/logs/escape")
    files = {"read": ["system", "env", "cwd", "/tmp", "~"], "write": ["/tmp", "scratch"]}
    held = ray_guard.guard({"files": files})(ray.remote(Reader)).remote()
    said = ray.get(held.confined.remote(argv)).splitlines()
    assert len(said) == 4 + len(secrets)
    assert not [line for line in said if line.startswith(("read", "written"))], said
    assert not os.path.exists(f"{session}/logs/escape")
    # the positive side: all around it is granted
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("x")
    assert ray.get(held.confined.remote(["cat", str(ordinary)])) == "x"


def test_a_working_dir_is_read_and_not_written(cluster: Any, tmp_path: Path) -> None:
    """Ray keeps it in its session, for every task of the job: a tool that changed it would change theirs."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "data").write_text("content")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "package")
    environment = {"working_dir": f"file://{archive}"}
    guarded = ray_guard.guard(allow=[])(ray.remote(Reader)).options(runtime_env=environment).remote()
    said = ray.get(
        guarded.confined.remote(["sh", "-c", "cat data; echo x > data || echo kept; touch $TMPDIR/x && echo made"])
    )
    assert said == "contentkept\nmade\n"

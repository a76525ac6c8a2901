"""Other sandboxes, set up as their users do, so that the same attacks can be run in them: sandlock and bubblewrap.

Both get what the guard's policy grants and can be expressed in theirs: read everything that programs need, write the
attack's own folder, reach the granted destination. What they cannot express is left at their defaults, or, for the
network of bubblewrap, shown twice: with the host's network (which it needs to reach anything) and with none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from table import Column

ROOT_FOLDER = Path(__file__).parents[2]
SANDLOCK_PYTHON = ROOT_FOLDER / ".venv-bench" / "bin" / "python"
_SANDLOCKED = Path(__file__).with_name("sandlocked.py")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a peer is told to allow.

    Args:
        readable: folders beside the system's that programs need (the interpreter's, compiled attacks).
        writable: the attack's own; the first is where it begins.
        destinations: ``tcp://ADDRESS:PORT`` or ``udp://…``.
        hidden: below what is granted, and not to be reached.
        protected: below what may be written, and not to be changed. sandlock cannot express that.
    """

    readable: Sequence[str]
    writable: Sequence[str]
    destinations: Sequence[str]
    hidden: Sequence[str] = ()
    protected: Sequence[str] = ()


def command(peer: Column, argv: Sequence[str], grant: Grant) -> list[str]:
    """``argv``, run within ``peer``."""
    if peer is Column.SANDLOCK:
        told = {
            "readable": list(grant.readable),
            "writable": list(grant.writable),
            "denied": list(grant.hidden),
            "net_allow": list(grant.destinations),
        }
        return [str(SANDLOCK_PYTHON), str(_SANDLOCKED), json.dumps(told), *argv]
    network = ["--share-net"] if peer is Column.BUBBLEWRAP else []
    mounts = [word for folder in grant.writable for word in ("--bind", folder, folder)]
    mounts += [word for path in grant.protected for word in ("--ro-bind", path, path)]
    for path in grant.hidden:
        mounts += ["--tmpfs", path] if os.path.isdir(path) else ["--ro-bind", "/dev/null", path]
    return [
        "bwrap", "--unshare-all", *network, "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
        *mounts, "--chdir", grant.writable[0], "--", *argv,
    ]  # fmt: skip


def missing(peer: Column, grant: Grant) -> str:
    """Why nothing can be run within ``peer`` here; "": it can."""
    if peer is Column.SANDLOCK:
        if not SANDLOCK_PYTHON.exists():
            return "not installed (make env-bench)"
    elif shutil.which("bwrap") is None:
        return "not installed (apt-get install bubblewrap)"
    argv = command(peer, [sys.executable, "-I", "-S", "-c", "print('here')"], grant)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "does not work here: no answer"
    if done.stdout != "here\n":
        return f"does not work here: {(done.stderr or done.stdout).strip()[-200:]}"
    return ""


def programs() -> list[str]:
    """Folders the interpreter of this suite needs."""
    return sorted({sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), str(ROOT_FOLDER)})

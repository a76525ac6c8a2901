"""Starting a supervisor: as a new interpreter, or by becoming it. Runs in target and driver, and in ``ray-guard run``.

A supervisor knows nothing of whoever happens to start it but what is handed over here: the listening socket, its log, a
few variables, and where to import from. What its starter has loaded, opened or patched is no part of it:

- :func:`spawn` starts an interpreter of its own, without start-up files and ``PYTHON*`` variables;
- :func:`fork` goes on with this one, which is there already: half of what a cold ``ray-guard run`` would wait for. Only
  for a process that has not begun anything else (:func:`may_fork`).
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, Self

from ray_guard.errors import NotEnforced
from ray_guard.kernel import procfs, rendezvous

Main = Callable[[int, int], None]
_LISTENER: Final = 3
"""The number at which a new supervisor finds its listening socket."""
_BOOT: Final = (
    "import os,sys\n"
    "if os.fork(): os._exit(0)\n"  # the starter reaps this; the supervisor belongs to nobody
    "os.setsid()\n"
    "os.chdir('/')\n"
    "os.closerange({socket} + 1, 1 << 30)\n"
    "sys.path[:] = {path!r}\n"
    "from ray_guard.supervisor.__main__ import main\n"
    "main({socket}, {prepared})\n"
)
#: what a supervisor may know of the environment of whoever happened to start it
_KEPT_ENVIRONMENT: Final = ("LANG", "LC_", "TZ", "PATH", "HOME", "RAY_GUARD_NFTABLES")
_NAME: Final = b"ray_guard.supervisor"
_STANDARD: Final = os.path.dirname(os.__file__)
_OWN: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_IMPORTLIB: Final = ("_frozen_importlib", "_frozen_importlib_external")
_PACKAGES: Final = frozenset({"site-packages", "dist-packages"})
_ALTERING: Final = ("PYTHON", "LD_", "MALLOC_", "GLIBC_")
#: where modules may come from is looked at one by one
_HARMLESS: Final = frozenset({"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONUNBUFFERED"})
#: what start-up files of packaging tools load: they look for modules, and are left behind with ``sys.meta_path``
_FINDERS: Final = ("_distutils_hack", "_virtualenv", "__editable__")


def import_path(given: Iterable[str]) -> list[str]:
    """Where a supervisor imports from, of its starter's ``given`` path: the standard library before all else.

    Then packages of this Python, then what this package lies in. Nothing else: a folder of scripts, or the working
    folder, is where tools may write.
    """
    packages = [entry for entry in given if os.path.isabs(entry) and not _PACKAGES.isdisjoint(entry.split("/"))]
    return list(dict.fromkeys([_STANDARD, f"{_STANDARD}/lib-dynload", *packages, os.path.dirname(_OWN)]))


def spawn(listener: socket.socket, prepared: int) -> int:
    """Starts one in an interpreter of its own; the pid of a process that ends once it stands alone.

    Args:
        listener: where it will listen.
        prepared: how many tools are going to be started at once.

    Raises:
        NotEnforced: it cannot be started.
    """
    try:
        with _Opened(listener) as opened:
            code = _BOOT.format(path=import_path(sys.path), socket=_LISTENER, prepared=prepared)
            # Not by subprocess, which takes longer to load than the rest of this module.
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-S", "-E", "-c", code],
                {key: value for key, value in os.environ.items() if key.startswith(_KEPT_ENVIRONMENT)},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, opened.log, 1),
                    (os.POSIX_SPAWN_DUP2, opened.log, 2),
                    (os.POSIX_SPAWN_DUP2, opened.listener, _LISTENER),
                ],
                setsigmask=(),
                setsigdef=(signal.SIGCHLD,),  # ignored, it would be so there too, and no child's end be told
            )
    except OSError as error:
        raise NotEnforced(["supervisor"], f"it cannot be started: {error}") from error


def may_fork() -> bool:
    """Whether this process has done nothing that a supervisor must not inherit: :func:`fork` would be clean.

    No other thread, no options and variables that change how Python or the loader works, and no module but the standard
    library's and our own: a start-up file of the user's may have patched anything.
    """
    altered = sys.warnoptions or sys.flags.dev_mode or sys.gettrace() or sys.getprofile()
    if altered or any(name.startswith(_ALTERING) and name not in _HARMLESS for name in os.environ):
        return False
    return len(os.listdir("/proc/self/task")) == 1 and all(map(_is_known, list(sys.modules.items())))


def _is_known(loaded: tuple[str, object]) -> bool:
    name, module = loaded
    file = getattr(module, "__file__", None)
    if file is None:
        return name.partition(".")[0] in sys.stdlib_module_names or name == "__main__"
    if name == "__main__" or name.startswith(_FINDERS) or file.startswith(f"{_OWN}/"):
        return True
    return file.startswith(f"{_STANDARD}/") and _PACKAGES.isdisjoint(file.removeprefix(_STANDARD).split("/"))


def fork(listener: socket.socket, prepared: int, supervise: Main) -> int:
    """:func:`spawn` by a copy of this process, where it :func:`may_fork`. It returns in this one alone.

    Args:
        supervise: the supervisor's ``main``.
    """
    try:
        with _Opened(listener) as opened:
            pid = os.fork()
            if pid == 0:
                _become(opened, prepared, supervise)
            return pid
    except OSError as error:
        raise NotEnforced(["supervisor"], f"it cannot be started: {error}") from error


def _become(opened: _Opened, prepared: int, supervise: Main) -> NoReturn:
    """The child's way to be nothing but a supervisor."""
    status = 1
    try:
        if os.fork() != 0:
            os._exit(0)  # the starter reaps this; the supervisor belongs to nobody
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((null, opened.log, opened.log, opened.listener)):
            os.dup2(descriptor, number)
        os.closerange(_LISTENER + 1, 1 << 30)
        sys.stdin = sys.stdout = None  # as the starter has them they may hold what it has read or not written
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)) or number == signal.SIGCHLD:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        kept = {key: value for key, value in os.environ.items() if key.startswith(_KEPT_ENVIRONMENT)}
        os.environ.clear()
        os.environ.update(kept)
        sys.argv[:] = [os.fsdecode(_NAME)]
        procfs.overwrite_arguments(_NAME)
        sys.dont_write_bytecode = False
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ in _IMPORTLIB]
        sys.path[:] = import_path(sys.path)
        supervise(_LISTENER, prepared)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        os._exit(status)


class _Opened:
    """A supervisor's listening socket and its log, above the numbers that it will find them at."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, _LISTENER + 1)
        try:
            log = os.open(rendezvous.log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                self.log = fcntl.fcntl(log, fcntl.F_DUPFD_CLOEXEC, _LISTENER + 1)
            finally:
                os.close(log)
        except BaseException:
            os.close(self.listener)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.listener)
        os.close(self.log)

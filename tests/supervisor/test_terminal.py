"""``ray-guard run`` on a real terminal: a session of its own for the tool, and the user's terminal as it was before."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

COMMAND = str(Path(sys.executable).with_name("ray-guard"))


class Screen:
    """A terminal with something running on it, and a user who types."""

    def __init__(self, argv: Sequence[str], folder: Path, size: tuple[int, int] = (30, 100)) -> None:
        self.master, self.slave = os.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        self.shown = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *argv],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=folder,
            env={**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence"), "TERM": "dumb", "PS1": "$ "},
        )

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def await_text(self, pattern: str, seconds: float = 15.0) -> re.Match[str]:
        """Waits until ``pattern`` is shown; what was shown up to its end is then forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                raise AssertionError(f"{pattern!r} is not shown, but {self.shown!r}")
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.shown = self.shown[found.end() :]
        return found

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def await_raw(self) -> None:
        deadline = time.monotonic() + 10
        while not self.is_raw:
            assert time.monotonic() < deadline, "keys do not come through"
            time.sleep(0.01)

    def end(self, seconds: float = 15.0) -> int:
        """Waits for the end; the terminal must be as it was."""
        status = self.process.wait(seconds)
        assert termios.tcgetattr(self.slave) == self.before
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy.json").write_text('{"version": 1, "egress": {"allow": []}}')
    return tmp_path


@pytest.fixture
def screens(folder: Path) -> Iterator[list[Screen]]:
    made: list[Screen] = []
    yield made
    for screen in made:
        screen.close()


def run(screens: list[Screen], folder: Path, *command: str, before: Sequence[str] = ()) -> Screen:
    screens.append(Screen([*before, COMMAND, "run", "--policy", "policy.json", "--", *command], folder))
    return screens[-1]


def test_the_tool_has_a_terminal_of_its_own_of_the_same_size(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "sh", "-c", "tty; stty size; echo to the tty > /dev/tty; exit 7")
    own = os.ttyname(screen.slave)
    # Where the call has terminals of its own (a mount namespace) this one has no name there.
    shown = screen.await_text(r"(/dev/pts/\d+|not a tty)\s+30 100\s+to the tty")
    assert shown[1] != own
    assert screen.end() == 7


def test_control_c_interrupts_the_tool_and_nothing_else(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "sh", "-c", 'trap "echo caught; exit 3" INT; echo ready; while :; do sleep 0.1; done')
    screen.await_text("ready")
    screen.await_raw()
    screen.type("\x03")
    screen.await_text("caught")
    assert screen.end() == 3


def test_a_tool_killed_by_control_c_ends_with_130(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "cat")
    screen.await_raw()
    screen.type("hello\n")
    screen.await_text("hello\r\n.*hello")
    screen.type("\x03")
    assert screen.end() == 128 + signal.SIGINT


def test_control_d_ends_its_input(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "sh", "-c", "wc -c; exit 4")
    screen.await_raw()
    screen.type("12345\n\x04")
    screen.await_text(r"\b6\s")
    assert screen.end() == 4


def test_it_follows_the_size(screens: list[Screen], folder: Path) -> None:
    program = 'trap "stty size" WINCH; echo ready; while :; do sleep 0.05; done'
    screen = run(screens, folder, "sh", "-c", program)
    screen.await_text("ready")
    screen.await_raw()
    screen.resize(41, 123)
    screen.await_text("41 123")
    screen.type("\x03")
    assert screen.end() == 128 + signal.SIGINT


def test_a_tool_may_change_its_terminal_and_dies_without_leaving_a_trace(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "sh", "-c", "stty -echo -icanon; echo set; kill -KILL $$")
    screen.await_text("set")
    assert screen.end() == 128 + signal.SIGKILL


def test_control_z_suspends_it_and_fg_resumes_it(screens: list[Screen], folder: Path) -> None:
    """Typed to a real shell with job control."""
    screens.append(Screen(["bash", "--norc", "--noprofile", "-i"], folder))
    screen = screens[-1]
    screen.await_text(r"\$ ")
    program = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.1; done"
    screen.type(f"{COMMAND} run --policy policy.json -- sh -c '{program}'\n")
    screen.await_text(r"tick 3\r\n")
    screen.type("\x1a")
    screen.await_text(r"Stopped")
    screen.await_text(r"\$ ")
    screen.shown = ""
    time.sleep(0.4)
    assert not select.select([screen.master], [], [], 0)[0], "it goes on though it is stopped"
    screen.type("echo the shell has its $((6*7)) keys\n")
    screen.await_text("the shell has its 42 keys")
    screen.type("fg\n")
    screen.await_text(r"tick \d+\r\n")
    screen.type("\x03")
    screen.await_text(r"\$ ")
    screen.type("echo status=$?\n")
    screen.await_text("status=130")


def test_a_shell_within_has_job_control(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "bash", "--norc", "--noprofile", "-i")
    screen.await_text(r"\$ ")
    assert "job control" not in screen.shown
    screen.type("sleep 100\n")
    time.sleep(0.3)
    screen.type("\x1a")  # the shell's job, not the shell, and not ray-guard
    screen.await_text("Stopped")
    screen.await_text(r"\$ ")
    screen.type("kill -KILL %1\n")
    screen.type("while jobs %1 2>/dev/null | grep -q Stopped; do sleep 0.1; done; echo no job is $((40+2))\n")
    screen.await_text("no job is 42")
    screen.type("exit 5\n")
    assert screen.end() == 5


def test_in_a_pipeline_the_terminal_stays_as_it_is(screens: list[Screen], folder: Path) -> None:
    program = "read line; echo got $line; exit 6"
    pipeline = f"{COMMAND} run --policy policy.json -- sh -c '{program}' | cat; echo ${{PIPESTATUS[0]}}"
    screens.append(Screen(["bash", "-c", pipeline], folder))
    screen = screens[-1]
    time.sleep(0.5)
    assert not screen.is_raw
    screen.type("a line\n")
    screen.await_text(r"a line\r\n(?!a line)[^\n]*got a line\r\n.*6")
    screen.end()


def test_in_the_background_it_leaves_the_terminal_alone(screens: list[Screen], folder: Path) -> None:
    screens.append(Screen(["bash", "--norc", "--noprofile", "-i"], folder))
    screen = screens[-1]
    screen.await_text(r"\$ ")
    screen.type(f"{COMMAND} run --policy policy.json -- sh -c 'sleep 0.5; echo from behind' & wait; echo status=$?\n")
    screen.await_text("from behind")
    screen.await_text("status=0")


def test_a_terminal_that_is_hung_up_ends_it(screens: list[Screen], folder: Path) -> None:
    screen = run(screens, folder, "sh", "-c", "echo $$; sleep 60")
    pid = int(screen.await_text(r"(\d+)\r\n")[1])
    screen.await_raw()
    screen.process.send_signal(signal.SIGKILL)  # the session's leader: the kernel hangs the terminal up
    os.close(screen.master)
    screen.master = os.open(os.devnull, os.O_RDWR)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the tool outlives its terminal"
        time.sleep(0.02)

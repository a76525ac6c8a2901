"""The journal on a real file system, including a full one."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ray_guard.errors import NotEnforced, RayGuardError
from ray_guard.evidence.journal import Journal, JournalError


def test_a_segment_of_its_own_in_a_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "session" / "logs" / "ray_guard"
    with Journal(folder) as first, Journal(folder) as second:
        assert first.path != second.path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-[\w.]+-{os.getpid()}-[0-9a-f]{{8}}\.otlp\.jsonl", Path(first.path).name)
        for journal in (first, second):
            assert stat.S_IMODE(Path(journal.path).stat().st_mode) == 0o600
            assert not os.get_inheritable(journal.fileno())
        first.append(b"{}\n")
        first.append(b"{}\n{}\n")
        first.sync()
        assert first.size == 9
        assert Path(first.path).read_bytes() == b"{}\n{}\n{}\n"
        assert Path(second.path).read_bytes() == b""


def test_a_folder_reached_through_a_symlink_is_fine_but_not_one_that_is_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "session_1").mkdir()
    (tmp_path / "session_latest").symlink_to("session_1")
    with Journal(tmp_path / "session_latest" / "ray_guard") as journal:
        journal.append(b"x\n")
    assert list((tmp_path / "session_1" / "ray_guard").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "session_1" / "ray_guard")
    with pytest.raises(NotEnforced, match="it is a symlink"):
        Journal(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotEnforced, match="it is a symlink"):
        Journal(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e").chmod(mode)
    with pytest.raises(NotEnforced, match="others can write to it"):
        Journal(tmp_path / "e")
    (tmp_path / "e").chmod(0o755)
    Journal(tmp_path / "e").close()  # readable by others is the owner's business: segments are 0600


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "e").write_text("")
    with pytest.raises(NotEnforced, match="Not a directory"):
        Journal(tmp_path / "e")
    with pytest.raises(NotEnforced, match="evidence"):
        Journal(tmp_path / "e" / "below")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away to make the case")
def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    os.chown(tmp_path / "e", 65534, 65534)
    with pytest.raises(NotEnforced, match="belongs to uid 65534"):
        Journal(tmp_path / "e")


@pytest.mark.parametrize("line", [b"", b"{}", b"{}\n{"])
def test_only_whole_lines(tmp_path: Path, line: bytes) -> None:
    with Journal(tmp_path / "e") as journal:
        with pytest.raises(ValueError, match="whole lines"):
            journal.append(line)
        assert Path(journal.path).read_bytes() == b""


def test_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "e")
    journal.close()
    journal.close()
    with pytest.raises(JournalError):
        journal.append(b"{}\n")
    with pytest.raises(JournalError):
        journal.sync()


def test_a_full_file_system_is_an_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel do what a full disk does: a short write first, then an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = b"x" * 99 + b"\n"
    with Journal(tmp_path / "e") as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
        try:
            journal.append(line)
            journal.append(line)
            for _ in range(2):
                with pytest.raises(JournalError, match="cannot be written") as caught:
                    journal.append(line)
                assert isinstance(caught.value, RayGuardError)
                assert caught.value.filename == journal.path
                assert Path(journal.path).read_bytes() == line * 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append(line)  # there is room again
        assert Path(journal.path).read_bytes() == line * 3
        assert journal.size == 300


def test_what_is_postponed_comes_before_what_is_appended_after_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(b"1\n")
        journal.postpone(b"2\n")
        journal.postpone(b"3\n")
        assert Path(journal.path).read_bytes() == b"1\n"
        journal.append(b"4\n")
        assert Path(journal.path).read_bytes() == b"1\n2\n3\n4\n"
        journal.postpone(b"5\n")
        journal.flush()
        assert Path(journal.path).read_bytes() == b"1\n2\n3\n4\n5\n"
        for number in range(5000):  # they do not pile up
            journal.postpone(b"%d\n" % number)
        assert len(Path(journal.path).read_bytes().splitlines()) > 4000
    assert Path(journal.path).read_bytes().splitlines()[5:] == [b"%d" % number for number in range(5000)]


def test_what_is_postponed_outlasts_a_full_file_system(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "e") as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
        try:
            journal.postpone(b"first\n")
            for _ in range(2):
                with pytest.raises(JournalError, match="cannot be written"):
                    journal.flush()
                with pytest.raises(JournalError, match="cannot be written"):
                    journal.append(b"x\n")  # although it alone would have room: nothing overtakes
            assert Path(journal.path).read_bytes() == b""
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append(b"second\n")
        assert Path(journal.path).read_bytes() == b"first\nsecond\n"
        assert journal.size == 13


def test_what_was_appended_survives_sigkill(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from ray_guard.evidence.journal import Journal
        journal = Journal(sys.argv[1])
        for number in range(300):
            journal.append(b"%d\\n" % number)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "e")], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    (segment,) = (tmp_path / "e").iterdir()
    assert segment.read_bytes().split() == [b"%d" % number for number in range(300)]


def test_the_supervisors_part_imports_the_standard_library_only() -> None:
    program = (
        "import sys; import ray_guard.evidence.journal, ray_guard.evidence.otlp;"
        "print([m for m in ('opentelemetry', 'pydantic', 'yaml', 'asyncio', 'ray') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"

"""The journal on a real file system, including a full one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sealed import Signer

from ray_guard.errors import NotEnforced, RayGuardError
from ray_guard.evidence.journal import Bounds, Journal, JournalError
from ray_guard.evidence.reader import Quarantine, read
from ray_guard.evidence.verify.check import Kind, State, check

UNRESERVED = Bounds(reserve=0)


def content(journal: Journal) -> bytes:
    """The current segment's, after the line in which it says what it is."""
    header, _, rest = Path(journal.path).read_bytes().partition(b"\n")
    assert b'"ray_guard.journal.schema","value":{"intValue":"1"}' in header
    return rest


def test_a_segment_of_its_own_in_a_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "session" / "logs" / "ray_guard"
    with Journal(folder) as first, Journal(folder) as second:
        assert first.path != second.path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert re.fullmatch(
            rf"\d{{8}}T\d{{6}}Z-[\w.]+-{os.getpid()}-[0-9a-f]{{8}}-000001\.otlp\.jsonl", Path(first.path).name
        )
        for journal in (first, second):
            assert stat.S_IMODE(Path(journal.path).stat().st_mode) == 0o600
            assert not os.get_inheritable(journal.fileno())
        first.append(b"{}\n")
        first.append(b"{}\n{}\n")
        first.sync()
        assert first.size == Path(first.path).stat().st_size
        assert first.records == 4
        assert content(first) == b"{}\n{}\n{}\n"
        assert content(second) == b""


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
        assert content(journal) == b""


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
    with Journal(tmp_path / "e", UNRESERVED) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 250, hard))
        try:
            journal.append(line)
            journal.append(line)
            for _ in range(2):
                with pytest.raises(JournalError, match="cannot be written") as caught:
                    journal.append(line)
                assert isinstance(caught.value, RayGuardError)
                assert caught.value.filename == journal.path
                assert content(journal) == line * 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append(line)  # there is room again
        assert content(journal) == line * 3


def test_what_is_postponed_comes_before_what_is_appended_after_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "e", UNRESERVED) as journal:
        journal.append(b"1\n")
        journal.postpone(b"2\n")
        journal.postpone(b"3\n")
        assert content(journal) == b"1\n"
        journal.append(b"4\n")
        assert content(journal) == b"1\n2\n3\n4\n"
        journal.postpone(b"5\n")
        journal.flush()
        assert content(journal) == b"1\n2\n3\n4\n5\n"
        for number in range(5000):  # they do not pile up
            journal.postpone(b"%d\n" % number)
        assert len(content(journal).splitlines()) > 4000
    assert content(journal).splitlines()[5:] == [b"%d" % number for number in range(5000)]


def test_what_is_postponed_outlasts_a_full_file_system(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "e", UNRESERVED) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 3, hard))
        try:
            journal.postpone(b"first\n")
            for _ in range(2):
                with pytest.raises(JournalError, match="cannot be written"):
                    journal.flush()
                with pytest.raises(JournalError, match="cannot be written"):
                    journal.append(b"x\n")  # although it alone would have room: nothing overtakes
            assert content(journal) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append(b"second\n")
        assert content(journal) == b"first\nsecond\n"


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
    (segment,) = (tmp_path / "e").glob("*.otlp.jsonl")
    assert segment.read_bytes().split(b"\n")[1:-1] == [b"%d" % number for number in range(300)]


def test_the_supervisors_part_imports_the_standard_library_only() -> None:
    program = (
        "import sys; import ray_guard.evidence.journal, ray_guard.supervisor.sealing;"
        "heavy = ('cryptography', 'opentelemetry', 'pydantic', 'yaml', 'asyncio', 'ray');"
        "print([name for name in heavy if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


# -- a bounded journal -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs one of its own, and mounting is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> Path:
    """Leaves not a block."""
    path = place / "filler"
    with path.open("wb", buffering=0) as filler:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while filler.write(b"\0" * size) == size:
                    pass
    return path


def until_refused(write: Callable[[bytes], None], line: bytes, most: int = 10_000) -> tuple[int, JournalError]:
    for count in range(most):
        try:
            write(line)
        except JournalError as error:
            return count, error
    raise AssertionError(f"{most} records were taken")


def test_a_full_disk_keeps_denials_writable(small_disk: Path, signer: Signer) -> None:
    line = b"x" * 999 + b"\n"
    with Journal(small_disk / "e", Bounds(reserve=1 << 20)) as journal:
        journal.append(line)
        filler = fill(small_disk)
        granted, error = until_refused(journal.append, line)
        assert error.errno == errno.ENOSPC
        assert journal.refused is error
        reported, _ = until_refused(journal.report, line)  # what a target says uses half of the reserve
        assert 500 < reported < 600
        kept = 0
        while Path(journal.path).stat().st_size == journal.size and not journal._postponed:
            journal.keep(line)
            kept += 1
        assert 1000 < reported + kept < 1100
        assert signer.seal(journal) is not None  # the seal has space set aside as well
        for _ in range(100):  # and then memory
            journal.keep(b"y\n")
        with pytest.raises(JournalError):
            journal.append(line)
        filler.unlink()
        journal.append(b"z\n")
        written = content(journal)
        assert written == line * (1 + granted + reported + kept) + b"y\n" * 100 + b"z\n"
        assert journal.lost == 0
        signer.seal(journal, last=True)
    (report,) = check(small_disk / "e")
    assert report.findings == []


def test_what_memory_has_no_room_for_is_counted(small_disk: Path) -> None:
    with Journal(small_disk / "e", Bounds(reserve=0)) as journal:
        filler = fill(small_disk)
        until_refused(journal.keep, b"x" * 5000 + b"\n")
        assert journal.lost == 1
        assert len(journal._postponed) == 1024
        filler.unlink()
        journal.flush()
        assert journal._postponed == []


def test_what_was_set_aside_is_given_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(b"x\n")
        path = Path(journal.path)
        if path.stat().st_blocks * 512 < 1 << 20:
            pytest.skip(f"{tmp_path} is on a file system that sets nothing aside")
    assert path.stat().st_blocks * 512 < 1 << 16


def test_the_folder_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir(mode=0o700)
    former = tmp_path / "e" / "former.otlp.jsonl"
    former.write_bytes(b"x" * 50_000)
    line = b"x" * 999 + b"\n"
    with Journal(tmp_path / "e", Bounds(reserve=10_000, total=100_000)) as journal:
        _, error = until_refused(journal.append, line)
        assert "has reached its limit of 100000 bytes: move finished logs away" in str(error)
        assert 38_000 < journal.size < 40_000
        for _ in range(9):
            journal.keep(line)
        former.unlink()
        journal.cut()
        journal.append(line)


def test_segments(tmp_path: Path, signer: Signer) -> None:
    with Journal(tmp_path / "e", Bounds(segment=3000, reserve=0)) as journal:
        paths = []
        for number in range(10):
            journal.append(b"%0999d\n" % number)
            if Path(journal.path) not in paths:
                paths.append(Path(journal.path))
            signer.seal(journal)
        signer.seal(journal, last=True)
    assert [path.name[-18:] for path in paths] == [f"-{number:06d}.otlp.jsonl" for number in range(1, len(paths) + 1)]
    assert 4 <= len(paths) <= 6
    for number, path in enumerate(paths, 1):
        (about,) = (json.loads(path.read_bytes().splitlines()[0])["resourceSpans"],)
        said = {each["key"]: next(iter(each["value"].values())) for each in about[0]["resource"]["attributes"]}
        assert said["ray_guard.journal.schema"] == "1"
        assert said["ray_guard.journal.segment"] == str(number)
    (report,) = check(tmp_path / "e")
    assert (report.state, report.findings, report.segments) == (State.ENDED, [], len(paths))
    assert list(read([tmp_path / "e"], quarantine := Quarantine())) == []
    assert quarantine.counts == {"malformed": 10}  # the records of this test; what the journal says of itself is OTLP


@pytest.mark.parametrize("how", ["cut", "grown", "removed", "replaced"])
def test_what_others_do_to_the_segment_is_noticed(tmp_path: Path, signer: Signer, how: str) -> None:
    with Journal(tmp_path / "e") as journal:
        for number in range(3):
            journal.append(b"%d\n" % number)
        assert journal.altered() is None
        first = Path(journal.path)
        if how == "cut":
            os.truncate(first, 100)
        elif how == "grown":
            with first.open("ab") as file:
                file.write(b"foreign\n")
        else:
            content = first.read_bytes()
            first.unlink()
            if how == "replaced":
                first.write_bytes(content)
        found = journal.altered()
        assert found is not None
        assert found.startswith(first.name)
        with pytest.raises(JournalError):
            journal.append(b"refused\n")
        journal.keep(b"told\n")
        signer.seal(journal)
        assert Path(journal.path) != first  # it goes on elsewhere
        assert journal.altered() is None
        journal.append(b"last\n")
        signer.seal(journal, last=True)
    (report,) = check(tmp_path / "e")
    kinds = [finding.kind for finding in report.findings]
    expected = {
        "cut": [Kind.REMOVED],
        "grown": [Kind.INSERTED],
        "removed": [Kind.MISSING, Kind.REMOVED],
        "replaced": [],
    }
    assert kinds == expected[how]


def test_names_that_others_take_are_passed_over(tmp_path: Path, signer: Signer) -> None:
    with Journal(tmp_path / "e", Bounds(segment=500, reserve=0)) as journal:
        for number in (2, 3):
            Path(journal.path.replace("000001", f"{number:06d}")).write_bytes(b"foreign %d\n" % number)
        journal.append(b"x" * 500 + b"\n")
        signer.seal(journal)
        assert journal.path.endswith("-000004.otlp.jsonl")
        signer.seal(journal, last=True)
    (report,) = check(tmp_path / "e")
    assert [finding.kind for finding in report.findings] == [Kind.INSERTED, Kind.INSERTED]


@pytest.mark.parametrize("how", ["cut", "grown", "removed"])
def test_what_others_do_to_the_seal_is_noticed(tmp_path: Path, signer: Signer, how: str) -> None:
    with Journal(tmp_path / "e") as journal:
        signer.seal(journal)
        assert journal.seal_altered() is None
        seal = tmp_path / "e" / f"{journal.log}.seal.jsonl"
        if how == "cut":
            os.truncate(seal, 100)
        elif how == "grown":
            with seal.open("ab") as file:
                file.write(b"{}\n")
        else:
            seal.unlink()
        assert seal.name in (journal.seal_altered() or "")
        journal.renew()
        assert journal.seal_altered() is None


def test_a_log_whose_signer_is_gone_is_vouched_for_by_the_next(tmp_path: Path, signer: Signer) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(b"x\n")
        journal.append(b"y\n")
        signer.seal(journal)
        journal.append(b"tail\n")
        before = journal.log
        journal.renew()
        assert journal.log != before
        journal.append(b"z\n")
        signer.seal(journal, last=True)
    new, old = sorted(check(tmp_path / "e"), key=lambda report: report.log == before)
    assert (old.log, old.state, old.findings) == (before, State.RECOVERED, [])
    assert (new.log, new.state, new.findings) == (journal.log, State.ENDED, [])
    segment = tmp_path / "e" / f"{before}-000001.otlp.jsonl"
    whole = segment.read_bytes()
    segment.write_bytes(whole.replace(b"tail", b"nail"))
    new, old = sorted(check(tmp_path / "e"), key=lambda report: report.log == before)
    assert [finding.kind for finding in old.findings] == [Kind.DIFFERENT]
    segment.write_bytes(whole.replace(b"y\n", b"Y\n"))
    new, old = sorted(check(tmp_path / "e"), key=lambda report: report.log == before)
    assert new.findings == []
    assert [finding.kind for finding in old.findings] == [Kind.EDITED]

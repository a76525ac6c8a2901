"""Whatever is done to a log is found, and named."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed import Signer

from ray_guard.cli.__main__ import main
from ray_guard.evidence.journal import Bounds, Journal
from ray_guard.evidence.note import BadNote, Checkpoint, Key, Note
from ray_guard.evidence.reader import NotEvidence, Quarantine, read
from ray_guard.evidence.verify.check import Finding, Kind, LogReport, State, check
from ray_guard.evidence.verify.seals import read_checkpoints, read_keys

COUNT = 12


def record(number: int) -> bytes:
    return (
        b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"%032x","spanId":"%016x","name":"r%d",'
        % (
            7,
            number + 1,
            number,
        )
        + b'"startTimeUnixNano":"5"}]}]}]}\n'
    )


RECORDS = [record(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of five segments, with one more record in front of each."""
    folder = tmp_path_factory.mktemp("log") / "e"
    Signer().write(folder, RECORDS, bounds=Bounds(segment=900, reserve=0))
    assert len(segments(folder)) == 5
    return folder


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.otlp.jsonl"))


def seal_of(folder: Path) -> Path:
    (found,) = folder.glob("*.seal.jsonl")
    return found


def lines_of(folder: Path) -> list[tuple[Path, int, bytes]]:
    return [
        (path, number, line)
        for path in segments(folder)
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1)
    ]


def write_lines(lines: Sequence[tuple[Path, int, bytes]], folder: Path) -> None:
    for path in segments(folder):
        path.write_bytes(b"".join(line for where, _, line in lines if where == path))


def the_only(folder: Path) -> LogReport:
    (report,) = check(folder)
    return report


def first(folder: Path) -> Finding:
    return the_only(folder).findings[0]


def test_a_whole_log(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = the_only(original)
    assert (report.state, report.findings, report.notes) == (State.ENDED, [], [])
    assert (report.segments, report.records, report.sealed, report.checkpoints) == (5, COUNT + 5, COUNT + 5, 5)
    assert main(["verify", str(original)]) == 0
    assert "complete and unaltered: 1 log, 17 records" in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_single_change_is_found_and_named(original: Path, data: st.DataObject) -> None:
    lines = lines_of(original)
    count = len(lines)
    kind = data.draw(st.sampled_from(["edit", "remove", "duplicate", "swap", "move", "insert", "cut"]))
    at = data.draw(st.integers(0, count - 1))
    path, number, line = lines[at]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "e")
        shutil.copytree(original, folder)
        lines = [(folder / each.name, number, line) for each, number, line in lines]
        expected: set[Kind]
        if kind == "edit":
            place = data.draw(st.integers(0, len(line) - 2))
            byte = data.draw(st.integers(0, 255).filter(lambda each: each not in (line[place], 10)))
            lines[at] = (folder / path.name, number, line[:place] + bytes([byte]) + line[place + 1 :])
            expected = {Kind.EDITED}
        elif kind == "remove":
            del lines[at]
            expected = {Kind.REMOVED, Kind.TRUNCATED}
        elif kind == "duplicate":
            to = data.draw(st.integers(0, count))
            lines.insert(to, (lines[min(to, count - 1)][0], 0, line))
            expected = {Kind.DUPLICATED, Kind.INSERTED}  # after the log's end it is told as added there
            at = to + 1 if to == at else to
        elif kind in ("swap", "move"):
            other = data.draw(st.integers(0, count - 1).filter(lambda each: each != at))
            if kind == "swap":
                a, b = lines[at], lines[other]
                lines[at], lines[other] = (a[0], 0, b[2]), (b[0], 0, a[2])
            else:
                content = [each[2] for each in lines]
                content.insert(other, content.pop(at))
                lines = [(where, 0, each) for (where, _, _), each in zip(lines, content, strict=True)]
            expected = {Kind.REORDERED}
            at = min(at, other)
        elif kind == "insert":
            lines.insert(at, (lines[at][0], 0, data.draw(st.sampled_from([b"\n", b"{}\n", b"\0\xff\n", record(99)]))))
            expected = {Kind.INSERTED}
        else:
            lines = lines[:at]
            expected = {Kind.TRUNCATED}
        write_lines(lines, folder)
        report = the_only(folder)
        assert report.findings, kind
        finding = report.findings[0]
        assert finding.kind in expected
        now = lines_of(folder)
        where = (Path(finding.position.path), finding.position.line)
        if at < len(now):
            assert where == now[at][:2], (kind, str(finding))
            before = b"".join(each for path, _, each in now[:at] if path == now[at][0])
            assert finding.position.offset == len(before)
        elif now:
            assert where[1] >= 1
        if kind != "duplicate":
            assert len(report.findings) <= 2  # what was swapped is two records


def test_what_is_named(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    (first_segment, _, _), *_ = lines = lines_of(folder)
    write_lines([lines[0], *lines[3:]], folder)
    finding = first(folder)
    assert str(finding) == (
        f"removed: {first_segment}:2 (byte {len(lines[0][2])}) (r2 0000000000000003): 2 records are gone between "
        f"{first_segment}:1 (byte 0) (the journal's own record) and here, from record 2 on"
    )


def test_records_in_another_file(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    one, two, *_ = segments(folder)
    lines = two.read_bytes().splitlines(keepends=True)
    one.write_bytes(one.read_bytes() + lines[0])
    two.write_bytes(b"".join(lines[1:]))
    found = the_only(folder).findings
    assert [(each.kind, each.position.path) for each in found] == [
        (Kind.REORDERED, str(one)),
        (Kind.REORDERED, str(two)),
    ]


def test_a_segment_is_gone(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    gone = segments(folder)[1]
    gone.unlink()
    found = the_only(folder).findings
    assert [each.kind for each in found] == [Kind.MISSING, Kind.REMOVED]
    assert found[0].position.path == str(gone)
    for path in segments(folder):
        path.unlink()
    assert first(folder).kind is Kind.MISSING


def test_a_hash_cannot_be_forged_in_the_seal(original: Path, tmp_path: Path) -> None:
    """Whoever edits a record and its short hash is found all the same, and between which checkpoints."""
    folder = shutil.copytree(original, tmp_path / "e")
    lines = lines_of(folder)
    path, number, line = lines[6]
    lines[6] = (path, number, line.replace(b'"5"', b'"6"'))
    write_lines(lines, folder)
    seal = seal_of(folder)
    content = [json.loads(each) for each in seal.read_text().splitlines()]
    for each in content:
        each.pop("leaves", None)
    seal.write_text("".join(json.dumps(each) + "\n" for each in content))
    found = the_only(folder).findings
    assert found[0].kind is Kind.SEAL
    assert "not those signed" in found[0].text
    (different,) = [each for each in found if each.kind is Kind.DIFFERENT]
    assert "records 5 to 8 of the log" in different.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [lines[0], *lines[2:]], "no key to verify it with"),
        (lambda lines: [lines[0], lines[1], *lines[3:]], "checkpoints are missing before this one"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "stands twice"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "stands after a later one"),
        (lambda lines: [*lines[:2], "rubbish\n", *lines[2:]], "not a JSON object"),
        (lambda lines: [*lines[:2], "{}\n", *lines[2:]], "neither key nor checkpoint"),
        (lambda lines: [lines[0].replace('"schema":1', '"schema":2'), *lines[1:]], "this version of ray-guard reads 1"),
        (lambda lines: [*lines[:3], lines[3].replace("\\nsegment", "\\nsegmant"), *lines[4:]], "not signed by"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "a second key"),
    ],
)
def test_the_seal_is_altered(original: Path, tmp_path: Path, change: object, says: str) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    lines = seal_of(folder).read_text().splitlines(keepends=True)
    seal_of(folder).write_text("".join(change(lines)))  # type: ignore[operator]
    found = the_only(folder).findings
    assert {each.kind for each in found} <= {Kind.SEAL, Kind.UNSEALED}  # the records themselves are still proven
    assert any(says in each.text for each in found)


def test_a_log_cut_back_to_an_older_checkpoint(signer: Signer, tmp_path: Path) -> None:
    """Such a cut cannot be seen from the folder alone; a checkpoint kept elsewhere shows it."""
    with Journal(tmp_path / "e") as journal:
        journal.append(RECORDS[0])
        signer.seal(journal)
        segment, seal = Path(journal.path).read_bytes(), seal_of(tmp_path / "e").read_bytes()
        journal.append(RECORDS[1])
        note = signer.seal(journal)
        assert note is not None
        live = the_only(tmp_path / "e")
        assert (live.state, live.findings) == (State.LIVE, [])
        path = Path(journal.path)
    path.write_bytes(segment)
    seal_of(tmp_path / "e").write_bytes(seal)
    assert [each.kind for each in the_only(tmp_path / "e").findings] == [Kind.UNSEALED]
    (tmp_path / "kept").write_text(note)
    (report,) = check(tmp_path / "e", checkpoints=read_checkpoints(tmp_path / "kept"))
    assert report.findings[0].kind is Kind.TRUNCATED
    assert "knows of 3 records, and 2 are left" in report.findings[0].text


def test_a_replaced_log_is_told_by_its_key(tmp_path: Path) -> None:
    mine, foreign = Signer(), Signer()
    log = mine.write(tmp_path / "e", RECORDS)
    assert check(tmp_path / "e", keys=[mine.key(log)])[0].findings == []
    (report,) = check(tmp_path / "e", keys=[foreign.key(log)])
    assert report.findings[0].kind is Kind.SEAL
    assert "is none of those given" in report.findings[0].text
    with Journal(tmp_path / "other") as journal:
        note = foreign.seal(journal)
    assert note is not None
    forged = Note.parse(note.replace(journal.log, log))
    (report,) = check(tmp_path / "e", checkpoints=[(forged, None)])
    assert "is not signed by its key" in report.findings[0].text


def test_a_log_that_is_gone_is_told_by_who_names_it(signer: Signer, tmp_path: Path) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(RECORDS[0])
        note = signer.seal(journal, last=True)
    assert note is not None
    (tmp_path / "kept").write_text(json.dumps({"key": str(signer.key(journal.log)), "checkpoint": note}) + "\n")
    for path in (tmp_path / "e").iterdir():
        path.unlink()
    log = signer.write(tmp_path / "e", RECORDS)
    reports = check(tmp_path / "e", checkpoints=read_checkpoints(tmp_path / "kept"))
    assert {report.log: [each.kind for each in report.findings] for report in reports} == {
        log: [],
        journal.log: [Kind.MISSING],
    }


@pytest.mark.parametrize("sealed", [True, False])
def test_a_tail_that_nobody_sealed(signer: Signer, tmp_path: Path, sealed: bool) -> None:
    with Journal(tmp_path / "e") as journal:
        journal.append(RECORDS[0])
        if sealed:
            signer.seal(journal)
        journal.append(RECORDS[1])
        report = the_only(tmp_path / "e")
        assert report.state is State.LIVE
        assert report.findings == []
        assert f"{1 if sealed else 3} record" in report.notes[0]
        assert "not sealed yet" in report.notes[0]
    report = the_only(tmp_path / "e")
    assert report.state is State.KILLED
    (finding,) = report.findings
    assert finding.kind is Kind.UNSEALED
    assert finding.position.line == (3 if sealed else 1)
    assert "an unsealed tail of" in finding.text
    # What the zygote adds for a killed supervisor is a segment more, and not one that took records from the first.
    (only,) = segments(tmp_path / "e")
    only.with_name(only.name.replace("-000001.", "-000002.")).write_bytes(RECORDS[2])
    assert [each.kind for each in the_only(tmp_path / "e").findings] == [Kind.UNSEALED]


def test_a_lock_does_not_make_an_old_tail_live(signer: Signer, tmp_path: Path) -> None:
    """Whoever holds the lock of a killed log's seal could have it pass for one that is being written."""
    with Journal(tmp_path / "e") as journal:
        signer.seal(journal)
        journal.append(RECORDS[0])
        assert the_only(tmp_path / "e").findings == []
        os.utime(journal.path, (0, 0))
        (finding,) = the_only(tmp_path / "e").findings
        assert finding.kind is Kind.UNSEALED
        assert finding.position.line == 2


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_said = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("schema", "log", "key", "checkpoint", "leaves"), _json)
) | st.builds(
    lambda lines: {"checkpoint": "\n".join(lines), "leaves": "AAAAAAAAAAA="},
    st.lists(
        st.sampled_from(
            [
                "ray_guard/x",
                "ray_guard/\ud800",
                "1",
                "99999999999999999999",
                "A" * 43 + "=",
                "segment ../x 3",
                "end",
                "",
                "leaves " + "A" * 43 + "=",
                "time 1 2",
                "time 1",
                "\u2014 ray_guard/x AAAAAAAAAAA=",
                "\u2014 x",
            ]
        ),
        max_size=10,
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_said.map(json.dumps).map(str.encode) | st.binary(max_size=40), max_size=6), st.booleans())
def test_no_seal_at_all_ends_the_verifier(original: Path, lines: list[bytes], after: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "e")
        shutil.copytree(original, folder)
        seal = seal_of(folder)
        whole = seal.read_bytes().splitlines(keepends=True)
        added = [line.replace(b"\n", b" ") + b"\n" for line in lines]
        seal.write_bytes(b"".join([*whole, *added] if after else [*whole[:1], *added, *whole[1:]]))
        report = the_only(folder)
        assert bool(report.findings) == bool(added)


def test_a_forged_seal_names_no_file_outside(original: Path, tmp_path: Path) -> None:
    """Who has a key can sign anything: also names of segments that are none."""
    folder = shutil.copytree(original, tmp_path / "e")
    forger = Signer()
    log = the_only(folder).log
    root = the_only(folder)
    checkpoint = Checkpoint(log, root.records, bytes(32), (("../../etc/passwd", 1),), bytes(32), 1, 2, ended=True)
    note = checkpoint.signed(forger.key(log), forger.sign(checkpoint.text()))
    said = [{"schema": 1, "log": log}, {"key": str(forger.key(log))}, {"checkpoint": note, "leaves": ""}]
    seal_of(folder).write_text("".join(json.dumps(each) + "\n" for each in said))
    assert "is not the name of a segment" in first(folder).text


def test_names_do_not_reach_the_terminal(signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = record(0).replace(b"r0", b"\\u001b[2Jr0")
    signer.write(tmp_path / "e", [record(1)])
    (path,) = segments(tmp_path / "e")
    with path.open("ab") as file:
        file.write(evil)
    assert main(["verify", str(tmp_path / "e")]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2Jr0" in out


def test_torn_binary_and_huge_lines(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    last = segments(folder)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole + b'{"resourceSp')
    finding = first(folder)  # of a log that has ended: nobody was writing
    assert (finding.kind, finding.position.offset) == (Kind.INSERTED, len(whole))
    assert finding.position.line == whole.count(b"\n") + 1
    assert "12 bytes without the end of a line" in finding.text
    last.write_bytes(whole + b"\0" * 4096)
    assert first(folder).kind is Kind.INSERTED
    last.write_bytes(whole + record(99)[:-1])  # readers would take it for a record
    assert first(folder).kind is Kind.INSERTED
    quarantine = Quarantine()
    assert f"{100:016x}" not in {entry.span.span_id for entry in read([folder], quarantine)}
    assert quarantine.counts == {"torn": 1}
    last.write_bytes(whole + b"x" * (40 << 20) + b"\n")
    assert first(folder).kind is Kind.INSERTED
    last.write_bytes(whole[:-20])
    report = the_only(folder)
    assert [each.kind for each in report.findings] == [Kind.TRUNCATED]


def test_segments_without_a_seal(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "e")
    seal_of(folder).unlink()
    reports = check(folder)
    assert [(report.state, report.findings[0].kind) for report in reports] == [(State.UNSEALED, Kind.UNSEALED)] * 5


def test_folders_that_are_no_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotEvidence, match="it holds no"):
        check(tmp_path)
    (tmp_path / "file").write_text("x")
    for path, says in (
        (tmp_path, "it holds no"),
        (tmp_path / "file", "neither a folder of evidence nor a proof"),
        (tmp_path / "no", "no such"),
    ):
        assert main(["verify", str(path)]) == 2
        assert says in capsys.readouterr().err


def test_keys_and_checkpoints_that_are_none(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = json.loads(seal_of(original).read_text().splitlines()[1])["key"]
    (tmp_path / "key").write_text(f"{key}\n")
    assert read_keys(tmp_path / "key") == read_keys(key) == [Key.parse(key)]
    assert main(["verify", "--key", key, str(original)]) == 0
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "rubbish").write_text("rubbish\n")
    for name in ("empty", "binary", "rubbish", "missing"):
        for option in ("--key", "--checkpoint"):
            assert main(["verify", option, str(tmp_path / name), str(original)]) == 2
            assert name in capsys.readouterr().err
    with pytest.raises(BadNote, match="misspelled"):
        Key.parse(key.replace("+", "+0", 1))
    with pytest.raises(BadNote, match="not the verifier key of an Ed25519"):
        Key.parse("name+00000000+AAAA")


def test_json(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", str(original)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["ok"], said["logs"][0]["state"]) == (1, True, "ended")

"""Single records are proven to whoever has the key, and nothing else is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sealed import Signer

from ray_guard.cli.__main__ import main
from ray_guard.evidence.note import Note
from ray_guard.evidence.verify.proof import NotProven, Proof, hold, prove, read_proofs
from ray_guard.evidence.verify.seals import read_checkpoints, read_seal

COUNT = 12


def record(number: int) -> bytes:
    span = f'"traceId":"{7:032x}","spanId":"{number // 2 + 1:016x}","name":"r{number}","startTimeUnixNano":"5"'
    return f'{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{{{span}}}]}}]}}]}}\n'.encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log in which each span has two records."""
    Signer().write(tmp_path / "e", map(record, range(COUNT)))
    return tmp_path / "e"


@pytest.fixture
def key(folder: Path) -> str:
    (path,) = folder.glob("*.seal.jsonl")
    return str(read_seal(path).key)


@pytest.fixture
def older(folder: Path, tmp_path: Path) -> list[Path]:
    """Every checkpoint of the log, in a file of its own."""
    (path,) = folder.glob("*.seal.jsonl")
    seal = read_seal(path)
    paths = []
    for number, each in enumerate(seal.sealed):
        paths.append(tmp_path / f"checkpoint-{number}")
        paths[-1].write_text(json.dumps({"key": str(seal.key), "checkpoint": each.note.whole}))
    return paths


def span(number: int) -> str:
    return f"{number + 1:016x}"


def test_every_record_is_proven(folder: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(COUNT // 2):
        out = tmp_path / "proof.json"
        assert main(["prove", str(folder), "--span", span(number), "--out", str(out)]) == 0
        assert f"2 records of span {span(number)}" in capsys.readouterr().out
        assert main(["verify", str(out), "--key", key]) == 0
        said = capsys.readouterr().out
        assert all(record(each).decode() in said for each in (2 * number, 2 * number + 1))


def test_an_older_checkpoint_is_continued(
    folder: Path, key: str, older: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever size; and who kept it asks for that."""
    out = tmp_path / "proof.json"
    for kept in older:
        assert main(["prove", str(folder), "--span", span(0), "--checkpoint", str(kept), "--out", str(out)]) == 0
        assert main(["verify", str(out), "--checkpoint", str(kept)]) == 0
        assert "continues its checkpoint" in capsys.readouterr().out
    assert main(["prove", str(folder), "--span", span(0), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--checkpoint", str(older[0])]) == 1
    assert "says nothing of the checkpoint" in capsys.readouterr().out


def test_a_log_that_was_replaced_continues_nothing(tmp_path: Path) -> None:
    signer = Signer()
    key = signer.key(signer.write(tmp_path / "e", map(record, range(COUNT))))
    (path,) = (tmp_path / "e").glob("*.seal.jsonl")
    then = read_seal(path).sealed[0].note.checkpoint
    for wrong in (then._replace(root=bytes(32)), then._replace(size=COUNT + 9)):
        note = Note.parse(wrong.signed(key, signer.sign(wrong.text())))
        with pytest.raises(NotProven, match="is no continuation"):
            prove(tmp_path / "e", span(1), since=[(note, key)])
    with pytest.raises(NotProven, match="is not signed by its key"):
        prove(tmp_path / "e", span(1), since=[(Note.parse(then.signed(key, bytes(64))), key)])


def test_nothing_else_is_proven(folder: Path, key: str, older: list[Path]) -> None:
    """Neither another record, index, root or key, nor another way up."""
    (proof,) = prove(folder, span(2), since=read_checkpoints(older[0]))
    (known,) = {key for _, key in read_checkpoints(older[0]) if key}
    assert hold(proof, [known]).checkpoint.size > COUNT
    said = json.dumps(proof.as_json())
    (other,) = prove(folder, span(3))
    wrong = [
        said.replace("r4", "r9"),
        said.replace('"index": 5', '"index": 6'),
        said.replace(proof.as_json()["records"][0]["path"][0], other.as_json()["records"][0]["path"][1]),
        said.replace(proof.as_json()["since"][0]["path"][0], other.as_json()["records"][0]["path"][1]),
        said.replace("\\n\\n", "\\nsegment x 1\\n\\n", 1),
        said.replace(json.dumps(read_checkpoints(older[0])[0][0].whole), json.dumps(other.checkpoint)),
    ]
    for text in wrong:
        assert text != said
        with pytest.raises(NotProven):
            hold(Proof.of_json(json.loads(text)), [known])
    with pytest.raises(NotProven, match="none of those given"):
        hold(proof, [Signer().key("another")])


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"schema": 9, "proofs": []}', '{"schema": 1, "proofs": [{}]}', "\0"]
)
def test_what_is_no_proof(content: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    assert main(["verify", str(path), "--key", key]) == 2
    assert re.search("not a proof|neither a folder of evidence nor a proof|schema 9", capsys.readouterr().err)
    with pytest.raises(NotProven):
        read_proofs(path)


def test_what_cannot_be_proven(folder: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "proof.json"
    assert main(["prove", str(folder), "--span", "no such"]) == 2
    assert "no record is about span 'no such'" in capsys.readouterr().err
    assert main(["prove", str(tmp_path / "nowhere"), "--span", span(0)]) == 2
    assert "there is no seal" in capsys.readouterr().err
    assert main(["prove", str(folder), "--span", span(0), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 2
    assert "give --key KEY" in capsys.readouterr().err
    segment = next(path for path in folder.iterdir() if path.name.endswith(".otlp.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"r5"', b'"r6"'))
    assert main(["prove", str(folder), "--span", span(0)]) == 2
    assert "is not what was sealed" in capsys.readouterr().err
    Signer().write(tmp_path / "open", map(record, range(5)), end=False)
    with pytest.raises(NotProven, match="no checkpoint covers"):
        prove(tmp_path / "open", span(2))

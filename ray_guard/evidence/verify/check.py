"""Holds records against their seals and names those that differ. Runs later, on any machine.

On the good path every line is hashed once and nothing is parsed. Only where a root differs are the short hashes of the
seal used, to say which records are not what was written.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Final

from ray_guard.evidence.layout import BEFORE, SEAL_SUFFIX, SHORT, SUFFIX, VOUCHES, log_of
from ray_guard.evidence.merkle import EMPTY, Tree
from ray_guard.evidence.note import BadNote, Key, Note, verified
from ray_guard.evidence.otlp import LINE_LIMIT, NotOtlp, decode
from ray_guard.evidence.reader import NotEvidence, Position, open_segment, scan, segments_of
from ray_guard.evidence.verify.align import Change, Difference, differences
from ray_guard.evidence.verify.seals import Seal, read_seal

_BLOCK: Final = 1 << 22
_SEALED_WITHIN_S: Final = 60.0
"""Of a log that is being written: far more than a slow disk takes."""
_NAMED: Final = 20
"""Differences of one log that are named."""


class State(StrEnum):
    """How a log stands."""

    ENDED = "ended"
    LIVE = "live"
    KILLED = "killed"
    RECOVERED = "recovered"
    """Its writer was killed; a later log vouches for what was found of it."""
    UNSEALED = "unsealed"
    """It has no seal."""


class Kind(StrEnum):
    EDITED = "edited"
    REMOVED = "removed"
    INSERTED = "inserted"
    REORDERED = "reordered"
    DUPLICATED = "duplicated"
    TRUNCATED = "truncated"
    MISSING = "missing"
    DIFFERENT = "different"
    SEAL = "seal"
    UNSEALED = "unsealed"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was written.

    ``position``: line 0 is the file as a whole. ``span``: which one the record is about, where that can be read.
    """

    kind: Kind
    position: Position
    text: str
    span: str = ""

    def __str__(self) -> str:
        where = str(self.position) if self.position.line else self.position.path
        return f"{self.kind.value}: {where}{f' ({self.span})' if self.span else ''}: {self.text}"


@dataclass(slots=True)
class LogReport:
    log: str
    state: State
    key: Key | None = None
    segments: int = 0
    records: int = 0
    sealed: int = 0
    checkpoints: int = 0
    size: int = 0
    """Bytes that were read."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no alteration."""


@dataclass(frozen=True, slots=True)
class Known:
    """That a log had this root at this size, from outside the log."""

    log: str
    size: int
    root: bytes
    by: str
    """Who says so."""
    key: Key | None = None
    note: Note | None = None
    """Signed, to be verified with the log's own key."""
    whole: bool = False
    """It is all there was of a log that nobody could seal to its end."""
    torn: int = 0
    """Then also: bytes of lines without their ends."""


@dataclass(slots=True)
class _Content:
    """What is found of a log's records."""

    seal: Path
    hashes: bytearray = field(default_factory=bytearray)
    roots: dict[int, bytes] = field(default_factory=dict)
    starts: list[tuple[Path, int]] = field(default_factory=list)
    """Each file, and the index of its first record."""
    torn: list[tuple[Position, int]] = field(default_factory=list)
    """Lines without their ends, each a file's last, and how many bytes of one."""
    before: list[bytes] = field(default_factory=list)
    """Lines that vouch for other logs."""
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    size: int = 0

    @property
    def count(self) -> int:
        return len(self.hashes) // SHORT


@dataclass(slots=True)
class _Log:
    seal: Seal
    segments: list[Path]
    content: _Content


def check(
    evidence: str | os.PathLike[str], *, keys: Sequence[Key] = (), checkpoints: Sequence[tuple[Note, Key | None]] = ()
) -> list[LogReport]:
    """Every log in the folder (at any depth), oldest first.

    Args:
        keys: the only keys that are believed; empty: those that the seals name.
        checkpoints: kept elsewhere; what they speak of must still be there.

    Raises:
        NotEvidence: there is none.
    """
    found, loose = _find(Path(evidence))
    known = [_outside(note, key) for note, key in checkpoints]
    reports: list[LogReport] = []
    logs: list[_Log] = []
    for path in found:
        try:
            seal = read_seal(path, keys)  # before its segments are listed: they then hold all that is sealed
        except OSError as error:
            why = f"the seal cannot be read: {error.strerror}"
            reports.append(_unsealed(path.name.removesuffix(SEAL_SUFFIX), Kind.SEAL, path, why))
            continue
        sizes = {each.checkpoint.size for each in seal.sealed} | {each.size for each in known if each.log == seal.log}
        segments = segments_of(path.parent, seal.log)
        content = _read(path, segments, sizes)
        known += _vouched(seal.log, content.before)
        logs.append(_Log(seal, segments, content))
    for log in logs:
        said = [each for each in known if each.log == log.seal.log]
        if any(each.size not in log.content.roots and each.size <= log.content.count for each in said):
            log.content = _read(log.seal.path, log.segments, {*log.content.roots, *(each.size for each in said)})
        reports.append(_judge(log, said))
    reports += [_unsealed(path.name, Kind.UNSEALED, path, "no seal speaks of this file") for path in loose]
    have = {report.log for report in reports}
    for each in known:
        if each.log not in have:
            have.add(each.log)
            why = f"the whole log of {each.size} records is gone: {each.by} names it"
            reports.append(_unsealed(each.log, Kind.MISSING, Path(evidence), why))
    return sorted(reports, key=lambda report: report.log)


# -- reading -----------------------------------------------------------------------------------------------------------


def _find(evidence: Path) -> tuple[list[Path], list[Path]]:
    """The seals below a folder, and the segments without one."""
    if not evidence.is_dir():
        why = "verify needs the folder, where the seals are" if evidence.exists() else "no such folder"
        raise NotEvidence(str(evidence), why)
    seals: list[Path] = []
    loose: list[Path] = []
    for folder, _, names in os.walk(evidence):
        logs = {name.removesuffix(SEAL_SUFFIX) for name in names if name.endswith(SEAL_SUFFIX)}
        seals += [Path(folder, f"{log}{SEAL_SUFFIX}") for log in logs]
        segments = [name for name in names if name.endswith(SUFFIX)]
        loose += [Path(folder, name) for name in segments if (log_of(name) or ("", 0))[0] not in logs]
    if not seals and not loose:
        raise NotEvidence(str(evidence), f"not an evidence folder: it holds no *{SUFFIX} segment and no seal")
    return sorted(seals), sorted(loose)


def _read(seal: Path, segments: Sequence[Path], sizes: set[int]) -> _Content:
    """Hashes the records of a log, and takes the root at each of these sizes and at the end."""
    content = _Content(seal)
    tree = Tree()
    ahead = sorted(sizes)
    content.roots[0] = EMPTY
    for path in segments:
        content.starts.append((path, tree.size))
        try:
            for lines in _lines(path, content):
                hashes = [sha256(b"\0" + line).digest() for line in lines]
                content.hashes += b"".join([each[:SHORT] for each in hashes])
                at = 0
                while ahead and ahead[0] <= tree.size + len(hashes) - at:
                    step = ahead.pop(0) - tree.size
                    tree.extend(hashes[at : at + step])
                    at += step
                    content.roots[tree.size] = tree.root()
                tree.extend(hashes[at:])
        except OSError as error:
            content.unreadable.append((path, error.strerror or str(error)))
    content.roots[tree.size] = tree.root()
    return content


def _lines(path: Path, content: _Content) -> Iterator[list[bytes]]:
    """The whole lines of a file, without their newlines, many at a time and in bounded memory."""
    with open_segment(path) as file:
        rest = b""
        size = end = count = 0  # of what was read, of the last whole line, of whole lines
        while block := file.read(_BLOCK):
            size += len(block)
            content.size += len(block)
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            if lines:
                end, count = size - (len(block) - 1 - block.rfind(b"\n")), count + len(lines)
            if len(rest) > LINE_LIMIT:
                rest = rest[: LINE_LIMIT + 1]  # nobody wrote that: what counts is that it differs
            if lines:
                if VOUCHES in block or VOUCHES in lines[0]:
                    content.before += [line for line in lines if line.startswith(VOUCHES)]
                yield lines
        if rest:
            content.torn.append((Position(str(path), count + 1, end), size - end))


def _outside(note: Note, key: Key | None) -> Known:
    checkpoint = note.checkpoint
    if key is not None and not verified(note, key):
        raise BadNote(
            f"the given checkpoint of {checkpoint.log} over {checkpoint.size} records is not signed by its key"
        )
    return Known(checkpoint.log, checkpoint.size, checkpoint.root, "a checkpoint given", key, note)


def _vouched(by: str, lines: Sequence[bytes]) -> Iterator[Known]:
    """What the records of one log say of others."""
    for line in lines:
        try:
            said = json.loads(line)["resourceSpans"][0]["resource"]["attributes"]
            about = {each["key"].removeprefix(BEFORE).lstrip("."): next(iter(each["value"].values())) for each in said}
            log = str(about[""])
            if int(about.get("records", -1)) >= 0:
                root = bytes.fromhex(str(about["root"]))
                torn = int(about.get("torn_bytes", 0))
                yield Known(log, int(about["records"]), root, f"log {by}", whole=True, torn=torn)
            if "checkpoint" in about:
                note = Note.parse(str(about["checkpoint"]))
                key = Key.parse(str(about["key"]))
                if verified(note, key):
                    yield Known(log, note.checkpoint.size, note.checkpoint.root, f"log {by}", key)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration, RecursionError):
            continue  # altered: that log's own root tells


# -- judging -----------------------------------------------------------------------------------------------------------


def _unsealed(log: str, kind: Kind, path: Path, why: str) -> LogReport:
    return LogReport(log, State.UNSEALED, findings=[Finding(kind, Position(str(path), 0, 0), why)])


def _judge(log: _Log, said: Sequence[Known]) -> LogReport:
    seal, content = log.seal, log.content
    report = LogReport(
        seal.log,
        _state(seal, said),
        seal.key,
        segments=len(log.segments),
        records=content.count,
        sealed=seal.size,
        checkpoints=len(seal.sealed),
        size=content.size,
    )
    findings = report.findings
    findings += [Finding(Kind.SEAL, Position(str(seal.path), *place), why) for *place, why in seal.problems]
    findings += [Finding(Kind.MISSING, Position(str(path), 0, 0), why) for path, why in content.unreadable]
    here = {path.name for path in log.segments}
    for name, lines in seal.segments().items():
        if name not in here:
            text = f"the segment is gone, and with it {lines} sealed records"
            findings.append(Finding(Kind.MISSING, Position(str(seal.path.with_name(name)), 0, 0), text))
    consumed = seal.size
    if any(content.roots.get(each.checkpoint.size) != each.checkpoint.root for each in seal.sealed):
        altered, consumed = _altered(log)
        findings += altered
    elif not findings:
        findings += _shifted(log)
    findings += _contradicted(log, said, altered=bool(findings))
    _judge_tail(log, report, consumed, [each for each in said if each.whole])
    if not findings:
        findings += _unfinished(log, report.state, said)
    if not findings or report.state is not State.ENDED:
        names = [(Path(position.path).name, size) for position, size in content.torn]
        report.notes += [f"{name} ends in {size} bytes of an unfinished line" for name, size in names]
        if seal.torn:
            report.notes.append(f"the seal ends in {seal.torn} bytes of a checkpoint that was being written")
    return report


def _unfinished(log: _Log, state: State, said: Sequence[Known]) -> Iterator[Finding]:
    """Bytes behind the last whole line that nobody can have been writing: no tree holds them."""
    content = log.content
    allowed = {
        State.ENDED: 0,
        State.RECOVERED: max((each.torn for each in said if each.whole), default=0),
        State.LIVE: sum(size for position, size in content.torn if Path(position.path) == log.segments[-1]),
    }.get(state)
    if allowed is not None and sum(size for _, size in content.torn) > allowed:
        for position, size in content.torn:
            text = f"{size} bytes without the end of a line, which the log's writer did not leave"
            yield Finding(Kind.INSERTED, position, text)
    if state is State.ENDED and log.seal.torn:
        text = f"it goes on for {log.seal.torn} bytes behind the log's end"
        yield Finding(Kind.SEAL, Position(str(log.seal.path), 0, 0), text)


def _state(seal: Seal, said: Sequence[Known]) -> State:
    if seal.ended:
        return State.ENDED
    if seal.live:
        return State.LIVE
    return State.RECOVERED if any(each.whole for each in said) else State.KILLED


def _altered(log: _Log) -> tuple[list[Finding], int]:
    """What is not as it was sealed, and how many of the records found stand for sealed ones."""
    content, hashes = log.content, log.seal.hashes()
    found, consumed = ([], log.seal.size) if hashes is None else differences(bytes(content.hashes), hashes, _NAMED)
    if found:
        return _named(content, found), consumed
    # The short hashes are gone, or somebody found a record with the same ones: between two checkpoints, then.
    good = 0
    for each in log.seal.sealed:
        size = each.checkpoint.size
        if content.roots.get(size) != each.checkpoint.root:
            text = (
                f"records {good + 1} to {size} of the log are not those that were sealed; the seal does not say which"
            )
            position = _places(content, [good])[good][0]
            return [Finding(Kind.DIFFERENT, position, text)], min(size, content.count)
        good = size
    return [], consumed


def _shifted(log: _Log) -> Iterator[Finding]:
    """Files that hold the right records, but not each its own."""
    sealed, starts = log.seal.segments(), log.content.starts
    for number, (path, start) in enumerate(starts[:-1]):
        lines = starts[number + 1][1] - start
        own = sealed.get(path.name, lines)
        # Where the sealed records end, unsealed ones follow: those of a supervisor that was killed, and then, in the
        # next segment, what its zygote had not seen it read.
        unsealed_follow = start + own == log.seal.size and lines > own
        if lines != own and not unsealed_follow:
            text = f"it holds {lines} records, and was sealed with {own}: some are in another segment now"
            yield Finding(Kind.REORDERED, Position(str(path), 0, 0), text)


def _named(content: _Content, found: Sequence[Difference]) -> list[Finding]:
    asked = {
        index for each in found for index in (each.at, each.at - 1, each.other) if index is not None and index >= 0
    }
    places = _places(content, sorted(asked))
    findings: list[Finding] = []
    for each in found:
        position, span = places[each.at]
        other = str(places[each.other][0]) if each.other is not None else ""
        many = "a record is" if each.records == 1 else f"{each.records} records are"
        kind = Kind(each.change.value)
        if each.change is Change.EDITED:
            text = f"this is not what was written as record {each.written + 1} of the log"
        elif each.change is Change.INSERTED:
            text = "this was never written"
        elif each.change is Change.DUPLICATED:
            text = f"a copy of {other}"
        elif each.change is Change.REORDERED:
            text = f"the record that belongs here is at {other}"
        elif each.at >= content.count:
            kind = Kind.TRUNCATED
            text = f"{many} missing at the end of the log, from record {each.written + 1} on"
        else:
            after = f"{places[each.at - 1][0]} ({places[each.at - 1][1]})" if each.at else "the log's begin"
            text = f"{many} gone between {after} and here, from record {each.written + 1} on"
        findings.append(Finding(kind, position, text, span))
    return findings


def _contradicted(log: _Log, said: Sequence[Known], *, altered: bool) -> Iterator[Finding]:
    """What others know of the log and it does not bear out."""
    content, seal = log.content, log.seal
    end = Position(str(seal.path), 0, 0)
    for each in said:
        mine = seal.key
        if each.key is not None and mine is not None and each.key.public != mine.public:
            yield Finding(Kind.SEAL, end, f"its key is {mine}, and by {each.by} it is {each.key}: it was replaced")
        elif each.key is None and each.note is not None and (mine is None or not verified(each.note, mine)):
            yield Finding(Kind.SEAL, end, f"{each.by} over {each.size} records is not signed by its key")
        elif each.size > content.count:
            text = f"{each.by} knows of {each.size} records, and {content.count} are left"
            yield Finding(Kind.TRUNCATED, _places(content, [content.count])[content.count][0], text)
        elif content.roots.get(each.size) != each.root and not altered:
            text = f"the first {each.size} records are not those of which {each.by} knows"
            yield Finding(Kind.DIFFERENT, end, text)


def _judge_tail(log: _Log, report: LogReport, consumed: int, whole: Sequence[Known]) -> None:
    """What stands after the last checkpoint."""
    content = log.content
    count = max(0, content.count - consumed)
    vouched = max((each.size for each in whole), default=0)
    many = "1 record" if count == 1 else f"{count} records"
    if report.state is State.LIVE:
        idle = _idle_s(log)
        if count and idle < _SEALED_WITHIN_S:
            report.notes.append(f"{many} not sealed yet: the log is being written")
        elif count:  # somebody holds its lock, and it may not be its supervisor
            position, span = _places(content, [consumed])[consumed]
            text = f"{many} written {idle:.0f} s ago and not sealed, though somebody holds the log as its writer would"
            report.findings.append(Finding(Kind.UNSEALED, position, text, span))
        return
    if report.state is State.RECOVERED and content.count <= vouched:
        late = f"; {many} after its last checkpoint were sealed late" if count else ""
        report.notes.append(f"its supervisor was killed, and {whole[0].by} vouches for what it left{late}")
        return
    if report.state is State.KILLED and not count:
        text = "it has no end: the supervisor was killed, or what it wrote last was removed"
        report.findings.append(Finding(Kind.UNSEALED, Position(str(log.seal.path), 0, 0), text))
        return
    if not count:
        return
    first = max(consumed, vouched)
    position, span = _places(content, [first])[first]
    if report.state is State.KILLED:
        text = f"an unsealed tail of {many}: the supervisor was killed before it had sealed them"
        report.findings.append(Finding(Kind.UNSEALED, position, text, span))
    else:
        text = f"{content.count - first} records were added here, after the log's end"
        report.findings.append(Finding(Kind.INSERTED, position, text, span))


def _idle_s(log: _Log) -> float:
    """Seconds since it was last written to."""
    return time.time() - max((path.stat().st_mtime for path in log.segments), default=0.0)


def _places(content: _Content, indexes: Sequence[int]) -> dict[int, tuple[Position, str]]:
    """Where records (by index, in order) stand, and what they are. One after the last is where the log ends."""
    places: dict[int, tuple[Position, str]] = {}
    if not content.starts:  # all files are gone
        return dict.fromkeys(indexes, (Position(str(content.seal), 0, 0), ""))
    begins = [start for _, start in content.starts]
    by_file: dict[int, list[int]] = {}
    for index in indexes:
        by_file.setdefault(max(0, bisect_right(begins, min(index, content.count - 1)) - 1), []).append(index)
    for number, wanted in by_file.items():
        path, start = content.starts[number]
        line_numbers = {index - start + 1: index for index in wanted}
        last = Position(str(path), 0, 0)
        try:
            with open_segment(path) as file:
                for line in scan(file):
                    last = Position(str(path), line.number, line.offset)
                    if line.number in line_numbers:
                        places[line_numbers.pop(line.number)] = (last, _about(line.content))
                    if not line_numbers:
                        break
                    last = Position(str(path), line.number + 1, line.end)
        except OSError:
            pass
        for index in line_numbers.values():
            places[index] = (last, "")
    return places


def _about(content: bytes | None) -> str:
    """Which span a record is about."""
    try:
        spans = decode(content or b"")
    except NotOtlp:
        return ""
    return ", ".join(f"{span.name} {span.span_id}" for _, span in spans[:3]) or "the journal's own record"

"""``ray-guard verify EVIDENCE``: proves that evidence is complete and unaltered, or says which record is not.

Runs later, on any machine: needs nothing but the evidence, and whatever was kept elsewhere. In place of the evidence it
takes a proof of single records, as ``ray-guard prove`` writes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_guard.cli.output import failed, say
from ray_guard.evidence.note import BadNote, Key, Note
from ray_guard.evidence.reader import NotEvidence
from ray_guard.evidence.verify.check import Finding, LogReport, State, check
from ray_guard.evidence.verify.proof import NotProven, hold, read_proofs
from ray_guard.evidence.verify.seals import read_checkpoints, read_keys
from ray_guard.report.text import printable

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``verify`` to the command's parsers."""
    parser = subparsers.add_parser(
        "verify",
        help="prove that evidence is complete and unaltered",
        description="Holds every record of an evidence folder against the signed checkpoints beside it. Names each "
        "record that was edited, removed, reordered, duplicated or added, and logs that were cut. Exit status 0: "
        "nothing is; 1: something is, or cannot be proven; 2: there is nothing to verify. Of a PROOF it says whether "
        "its records are in the log of the given key.",
    )
    parser.add_argument(
        "evidence",
        metavar="EVIDENCE",
        help="evidence folder, with the seals beside the segments; or a PROOF that `ray-guard prove` has written",
    )
    parser.add_argument(
        "--key",
        metavar="KEY",
        action="append",
        default=[],
        help="believe seals of this public key alone (as the seal spells it, or a file with one a line); repeatable. "
        "Without it the keys in the folder are believed, which whoever replaced a whole log can have replaced too",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        action="append",
        default=[],
        help="checkpoints that were kept elsewhere: the logs they speak of must be in the folder; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints what was found. 0: complete and unaltered; 1: not; 2 with a line on stderr: nothing to verify."""
    began = time.monotonic()
    try:
        keys = [key for each in args.key for key in read_keys(each)]
        checkpoints = [each for path in args.checkpoint for each in read_checkpoints(path)]
        if Path(args.evidence).is_file():
            return _of_proof(args, keys, checkpoints)
        logs = check(args.evidence, keys=keys, checkpoints=checkpoints)
    except (BadNote, NotEvidence, NotProven) as error:
        return failed("verify", str(error))
    sound = not any(log.findings for log in logs)
    if args.json:
        say(json.dumps(_as_json(args.evidence, logs, sound=sound), indent=1) + "\n")
    else:
        seconds = time.monotonic() - began
        lines = _text(logs, seconds, sound=sound, believed=bool(keys or checkpoints))
        say("".join(f"{printable(line)}\n" for line in lines))
    return 0 if sound else 1


def _of_proof(args: argparse.Namespace, keys: Sequence[Key], kept: Sequence[tuple[Note, Key | None]]) -> int:
    """Says whether a proof holds. 0: it does; 1: not. Raises NotProven: it is none; BadNote: no key to believe."""
    proofs = read_proofs(args.evidence)
    believed = [*keys, *(key for _, key in kept if key is not None)]
    if not believed:
        raise BadNote("a proof is worth what its key is: give --key KEY, or --checkpoint FILE as it was exported")
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    sound = True
    for proof in proofs:
        try:
            note = hold(proof, believed, [note for note, _ in kept])
        except NotProven as error:
            sound = False
            lines.append(f"NOT PROVEN: {error}")
            found.append({"key": str(proof.key), "ok": False, "text": str(error)})
            continue
        log, size = note.checkpoint.log, note.checkpoint.size
        found.append({"key": str(proof.key), "ok": True, "log": log, "records": [each.index for each in proof.records]})
        for each in proof.records:
            lines += [f"{log}: record {each.index} of {size} is proven:", f"  {each.record.decode()}"]
        lines += [f"  {log} continues its checkpoint over {size} records" for size in proof.continued]
    if args.json:
        said = {"schema": 1, "evidence": args.evidence, "ok": sound, "proofs": found}
        say(json.dumps(said, indent=1) + "\n")
    else:
        say("".join(f"{printable(line)}\n" for line in lines))
    return 0 if sound else 1


def _text(logs: Sequence[LogReport], seconds: float, *, sound: bool, believed: bool) -> list[str]:
    lines: list[str] = []
    for log in logs:
        sealed = (
            f"{log.sealed} sealed by {log.checkpoints} checkpoint{'s' if log.checkpoints != 1 else ''}"
            if log.state is not State.UNSEALED
            else ""
        )
        lines.append(f"{log.log}  {log.state.value}" + (f": {log.records} records, {sealed}" if sealed else ""))
        lines += [f"  {finding}" for finding in log.findings]
        lines += [f"  note: {note}" for note in log.notes]
    records, size = sum(log.records for log in logs), sum(log.size for log in logs)
    many = (
        f"{len(logs)} log{'s' if len(logs) != 1 else ''}, {records} records, {size / 2**20:.1f} MiB in {seconds:.2f} s"
    )
    found = sum(len(log.findings) for log in logs)
    findings = f"{found} finding{'s' if found != 1 else ''}"
    lines.append(f"complete and unaltered: {many}" if sound else f"NOT PROVEN, {findings}: {many}")
    if sound and not believed:
        lines.append(
            "the keys are the folder's own: --key or --checkpoint, kept elsewhere, proves that no log was replaced"
        )
    return lines


def _as_json(evidence: str, logs: Sequence[LogReport], *, sound: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "evidence": evidence,
        "ok": sound,
        "logs": [
            {
                "log": log.log,
                "state": log.state.value,
                "key": None if log.key is None else str(log.key),
                "segments": log.segments,
                "records": log.records,
                "sealed": log.sealed,
                "checkpoints": log.checkpoints,
                "bytes": log.size,
                "findings": [_finding(finding) for finding in log.findings],
                "notes": log.notes,
            }
            for log in logs
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.value,
        "file": finding.position.path,
        "line": finding.position.line,
        "byte_offset": finding.position.offset,
        "span": finding.span,
        "text": finding.text,
    }

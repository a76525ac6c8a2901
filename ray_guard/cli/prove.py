"""``ray-guard prove EVIDENCE --span ID``: a proof of single records, for somebody who is not given the evidence.

Runs later, on any machine. ``ray-guard verify PROOF --key KEY`` holds it against the log's public key.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ray_guard.cli.output import failed, say
from ray_guard.evidence.note import BadNote
from ray_guard.evidence.reader import NotEvidence
from ray_guard.evidence.verify.proof import NotProven, prove, written
from ray_guard.evidence.verify.seals import read_checkpoints

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``prove`` to the command's parsers."""
    parser = subparsers.add_parser(
        "prove",
        help="prove single records to somebody who is not given the evidence",
        description="Writes the records about a span with the signed checkpoint over them and the hashes that lead "
        "there (RFC 9162). `ray-guard verify PROOF --key KEY` checks it without the evidence. Exit status 0: written; "
        "2: it cannot be proven.",
    )
    parser.add_argument("evidence", metavar="EVIDENCE", help="evidence folder, with the seals beside the segments")
    parser.add_argument("--span", metavar="ID", required=True, help="the span: 16 hexadecimal digits")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        action="append",
        default=[],
        help="older checkpoints that were kept elsewhere: the log is also shown to have only grown since; repeatable",
    )
    parser.add_argument("--out", metavar="PROOF", help="the file to write (default: standard output)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the proof. 0: written; 2 with a line on stderr: it cannot be proven, or not be written."""
    try:
        since = [each for path in args.checkpoint for each in read_checkpoints(path)]
        proofs = prove(args.evidence, args.span, since=since)
        content = written(args.span, proofs)
        if args.out is None:
            say(content)
            return 0
        Path(args.out).write_text(content, encoding="utf-8")
    except (BadNote, NotEvidence, NotProven) as error:
        return failed("prove", str(error))
    except OSError as error:
        return failed("prove", f"{error.filename}: {error.strerror}")
    records = sum(len(proof.records) for proof in proofs)
    say(f"{args.out}: {records} record{'s' if records != 1 else ''} of span {args.span}\n")
    for proof in proofs:
        say(f"to be checked with: ray-guard verify {args.out} --key {proof.key}\n")
    return 0

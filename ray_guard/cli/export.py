"""``ray-guard export EVIDENCE``: evidence for other tools, and flagged trajectories as training data.

Runs later, on any machine: needs nothing but the evidence.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ray_guard.cli.output import failed
from ray_guard.evidence.reader import NotEvidence, Quarantine, merge, read
from ray_guard.report.export import FORMATS, export
from ray_guard.report.index import Index
from ray_guard.report.trajectories import unplaced

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``export`` to the command's parsers."""
    parser = subparsers.add_parser(
        "export",
        help="evidence as OTLP, Parquet or labelled training data",
        description="Writes one file. otlp: a span a line, as OTLP JSON. parquet: a span a row. sft: a JSON line for "
        "each rollout in which something was violated, with its tool calls as chat messages and its violations by "
        "category.",
    )
    parser.add_argument("evidence", metavar="EVIDENCE", help="evidence folder, or one *.otlp.jsonl file")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--out", metavar="PATH", type=Path, required=True, help="the file; replaced when all is written"
    )
    parser.add_argument("--clean", action="store_true", help="sft: also the rollouts in which nothing was violated")
    return parser


def run(args: argparse.Namespace) -> int:
    """Writes the file. 0; 2 with a line on stderr when there is no evidence to read or PATH cannot be written."""
    if args.clean and args.format != "sft":
        return failed("export", f"--clean says which rollouts are written, and --format {args.format} writes spans")
    quarantine = Quarantine()
    try:
        entries = list(merge(read([args.evidence], quarantine)).values())
        if not entries and quarantine.first:
            none = quarantine.first[0]
            return failed(
                "export", f"{args.evidence}: no span in it can be read; first: {none.reason} at {none.position}"
            )
        count = export(entries, args.format, args.out, clean=args.clean)
    except NotEvidence as error:
        return failed("export", str(error))
    except OSError as error:
        return failed("export", f"{args.out} cannot be written: {error.strerror or error}")
    what = "trajectories" if args.format == "sft" else "spans"
    said = [f"{count} {what}"]
    if args.format == "otlp" and (opened := sum(entry.span.end_ns is None for entry in entries)):
        said.append(f"{opened} left out that never ended")
    if args.format == "sft" and (outside := unplaced(Index(entries))):
        said.append(f"{outside} violations outside any rollout left out")
    if quarantine.total:
        said.append(f"{quarantine.total} lines could not be read: first {quarantine.first[0].position}")
    sys.stderr.write(f"ray-guard export: {args.out}: {'; '.join(said)}\n")
    return 0

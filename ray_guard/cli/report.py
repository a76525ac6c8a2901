"""``ray-guard report EVIDENCE``: what a job used, was refused and violated.

Runs later, on any machine: needs nothing but the evidence.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ray_guard.cli.output import failed, say
from ray_guard.evidence.reader import NotEvidence, Quarantine, merge, read, segments
from ray_guard.report import html, tables, terminal
from ray_guard.report.index import Index
from ray_guard.report.summary import summarise

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``report`` to the command's parsers."""
    parser = subparsers.add_parser(
        "report",
        help="usage, denials and violations of a job; reward against violation",
        description="Reads an evidence folder (or one segment) and says who tried what, what was refused and why, how "
        "many bytes went where, what was left open or killed, and whether violating rollouts were rewarded.",
    )
    parser.add_argument("evidence", metavar="EVIDENCE", help="evidence folder, or one *.otlp.jsonl file")
    parser.add_argument("--html", metavar="OUT", type=Path, help="also write the report, with all rows, to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the report. 0; 2 with a line on stderr when there is no evidence to read or OUT cannot be written."""
    quarantine = Quarantine()
    try:
        files = segments([args.evidence])
        index = Index(merge(read([args.evidence], quarantine)).values())
    except NotEvidence as error:
        return failed("report", str(error))
    if not len(index) and quarantine.total:
        first = quarantine.first[0]
        return failed(
            "report", f"{args.evidence}: no span in it can be read; first: {first.reason} at {first.position}"
        )
    summary = summarise(index)
    report = tables.report(summary, quarantine, str(args.evidence), len(files))
    # Written first: a closed pipe must not cost the file.
    if args.html is not None:
        try:
            args.html.write_text(html.render(report, summary.iterations), encoding="utf-8", newline="\n")
        except OSError as error:
            return failed("report", f"{args.html} cannot be written: {error.strerror}")
    wide = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else None
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    say(terminal.render(report, columns=wide, colour=colour))
    if args.html is not None:
        say(f"\nwritten: {args.html}\n")
    return 0

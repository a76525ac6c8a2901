"""``ray-guard attribute``: which rollout, turn and tool call caused each alert.

Runs later, on any machine: needs nothing but traces and logs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ray_guard.attribution.attribute import Options, Result, attribute
from ray_guard.attribution.document import document
from ray_guard.attribution.sources import FORMATS
from ray_guard.attribution.sources.reader import NotAlerts
from ray_guard.evidence.reader import NotEvidence

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``attribute`` to the command's parsers."""
    parser = subparsers.add_parser(
        "attribute",
        help="from alerts of firewalls and sensors to the tool call that caused each",
        description="Joins alerts with traces: aligns each log's clock, finds the calls that may have caused each "
        "record and says how sure that is, or that it was nobody in this job.",
    )
    parser.add_argument(
        "--traces", metavar="PATH", nargs="+", required=True, help="evidence folders, OTLP JSON lines, Parquet"
    )
    parser.add_argument("--alerts", metavar="PATH", nargs="+", required=True, help="logs, or folders of logs")
    parser.add_argument(
        "--format", metavar="NAME", default="auto", choices=["auto", *FORMATS], help=f"auto, {', '.join(FORMATS)}"
    )
    parser.add_argument("--nat", metavar="PATH", nargs="+", default=[], help="conntrack, FortiGate, PAN-OS or CSV")
    parser.add_argument("--tz", metavar="ZONE", help="time zone of times that say none, such as Asia/Shanghai")
    parser.add_argument("--year", metavar="YYYY", type=int, help="year of dates that say none")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the answer to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints a summary. 0; 2 with a line on stderr when there is nothing to read or OUT cannot be written."""
    try:
        zone = ZoneInfo(args.tz) if args.tz else None
    except (ZoneInfoNotFoundError, ValueError):
        return _failed(f"--tz {args.tz}: no such time zone; give a name such as Europe/Berlin, or UTC")
    options = Options(None if args.format == "auto" else args.format, zone, args.year)
    begun = time.monotonic()

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{time.monotonic() - begun:6.1f} s  {what}", end="", file=sys.stderr, flush=True)

    try:
        result = attribute(args.traces, args.alerts, maps=args.nat, options=options, progress=progress)
    except (NotEvidence, NotAlerts) as error:
        return _failed(str(error))
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(document(result), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return _failed(f"{args.json} cannot be written: {error.strerror}")
    _summary(result)
    return 0


def _summary(result: Result) -> None:
    for source in result.sources:
        clock = source.clock
        skew = f"{clock.skew_ns / 1e9:+.1f} s" if clock.identifiable else "not identifiable"
        left = source.report.quarantined.total()
        print(f"{source.path}: {source.format}, {source.records} records, {left} quarantined, clock skew {skew}")
    counts: dict[str, int] = {}
    for alert in result.alerts:
        if not alert.informational:
            counts[alert.verdict] = counts.get(alert.verdict, 0) + 1
    quiet = sum(alert.informational for alert in result.alerts)
    named = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "no alerts"
    print(f"{named}; {quiet} informational records")
    for alert in result.alerts:
        if alert.informational or not alert.candidates:
            continue
        first = alert.candidates[0]
        about = first.about
        print(
            f"{alert.source.path}:{alert.record}  {alert.verdict} {first.confidence:.2f} ({first.tier})  "
            f"iteration {about.get('iteration')} rollout {about.get('rollout')} turn {about.get('turn')} "
            f"{about.get('tool')} {about.get('call_id') or ''}".rstrip()
        )


def _failed(why: str) -> int:
    print(f"ray-guard: {why}", file=sys.stderr)
    return 2

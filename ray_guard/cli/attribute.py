"""``ray-guard attribute``: which rollout, turn and tool call caused each alert.

Runs later, on any machine: needs nothing but traces and logs.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ray_guard import __version__
from ray_guard.attribution import document, findings, store
from ray_guard.attribution.attribute import Result, Spread, attribute
from ray_guard.attribution.intake import Options
from ray_guard.attribution.sources import FORMATS
from ray_guard.attribution.sources.reader import NotAlerts
from ray_guard.cli.output import failed, say
from ray_guard.evidence.layout import SUFFIX
from ray_guard.evidence.reader import NotEvidence
from ray_guard.report import causes, verdicts

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers

_EVERY_S: Final = 10.0
_YEARS: Final = (1970, 2261)
"""That Unix nanoseconds in 64 bits can tell."""


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
    parser.add_argument("--year", metavar="YYYY", type=_year, help="year of dates that say none")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="auto",
        help="arrange the traces on this Ray cluster (auto: the one at hand); every node must see the paths",
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the answer to this file")
    parser.add_argument("--html", metavar="OUT", type=Path, help="write a report to hand on to this file")
    return parser


def _year(said: str) -> int:
    if not (said.isascii() and said.isdecimal() and _YEARS[0] <= int(said) <= _YEARS[1]):
        raise argparse.ArgumentTypeError(f"{said!r} is no year from {_YEARS[0]} to {_YEARS[1]}")
    return int(said)


def run(args: argparse.Namespace) -> int:
    """Prints a summary. 0; 2 with a line on stderr when there is nothing to read or to write to; 130 after Ctrl-C."""
    try:
        zone = ZoneInfo(args.tz) if args.tz else None
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return failed("attribute", f"--tz {args.tz}: no such time zone; give a name such as Europe/Berlin, or UTC")
    options = Options(None if args.format == "auto" else args.format, zone, args.year)
    progress = _Progress()
    gc.freeze()  # what is loaded by now stays: among millions of records it would be looked through again and again
    try:
        _refuse_same(args)
        spread = None if args.ray is None else _ray(args.ray)
        written = args.json is not None or args.html is not None
        result = attribute(
            args.traces,
            args.alerts,
            maps=args.nat,
            options=options,
            progress=progress,
            spread=spread,
            meanwhile=findings.prepare if written else lambda _: None,
        )
        if written:
            progress("writing")
            _write(args, result)
    except (NotEvidence, NotAlerts, _NotWritten, _NoRay) as error:
        return failed("attribute", str(error))
    except KeyboardInterrupt:
        failed("attribute", "interrupted; what was not written whole was not written at all")
        return 128 + signal.SIGINT
    finally:
        progress.end()
    for part in verdicts.summary(result):
        say(part)
    return 0


class _Progress:
    """What is being done, on stderr: rewritten in place on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._begun = self._said = time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r\033[K{now - self._begun:6.1f} s  {what}", end="", file=sys.stderr, flush=True)
        elif now - self._said >= _EVERY_S:
            self._said = now
            print(f"ray-guard attribute: {now - self._begun:.0f} s: {what}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)


class _NotWritten(Exception):
    pass


class _NoRay(Exception):
    pass


def _ray(address: str) -> Spread:
    try:
        from ray_guard.integrations import ray_data

        ray_data.join(address)
    except ImportError as error:
        raise _NoRay(f"--ray needs ray-guard[data]: {error}") from error
    except ConnectionError as error:
        raise _NoRay(f"--ray {address}: no such cluster ({error}); `ray start --head` starts one") from error
    return ray_data.spread


class _Hashed:
    """Bytes that are hashed as they go into a file, or nowhere."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self._hash = sha256()

    def write(self, text: bytes | memoryview) -> None:
        self._hash.update(text)
        if self._file is not None:
            self._file.write(text)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write(args: argparse.Namespace, result: Result) -> None:
    with (
        _whole(args.json) if args.json is not None else nullcontext() as file,
        ThreadPoolExecutor(1) as beside,
    ):
        # Mostly the store's work: alerts are written meanwhile.
        found, out = beside.submit(document.found, result), _Hashed(file)
        document.write(result, out, found.result)
    if args.html is not None:
        if args.ray is not None:
            store.look_again(result.db, args.traces)
        page = _page(args, result, found.result(), out.hexdigest())
        with _whole(args.html) as file:
            file.write(page.encode())


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is there when all of it is: what ends before (a full disk, Ctrl-C) leaves what was there before."""
    try:
        if path.exists() and not path.is_file():  # a pipe, /dev/stdout; a folder is refused by its name
            with path.open("wb") as file:
                yield file
            return
        path = path.resolve()  # where a link leads to, the link stays
        beside = path.with_name(f".{path.name[:200]}.{os.getpid()}")
        try:
            with beside.open("xb") as file:
                yield file
            if path.exists():
                beside.chmod(path.stat().st_mode & 0o7777)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise _NotWritten(f"{path} cannot be written: {error.strerror}") from error


def _refuse_same(args: argparse.Namespace) -> None:
    """Raises _NotWritten where an answer would be written over what it is made of, or both to one file."""
    said = [(f"--{name}", path) for name in ("json", "html") if (path := getattr(args, name)) is not None]
    for name, path in said:
        if not path.is_file():
            continue
        for given in (*args.traces, *args.alerts, *args.nat):
            read = Path(given)
            # A folder of logs is read whole, an answer of last time in it too; of evidence the segments alone.
            inside = read.is_dir() and read.resolve() in path.resolve().parents
            if (read.exists() and path.samefile(read)) or (
                inside and (given in args.alerts or path.name.endswith(SUFFIX))
            ):
                raise _NotWritten(f"{name} {path} is one of the files to read; write the answer elsewhere")
    if len(said) == 2 and said[0][1].resolve() == said[1][1].resolve() and not said[0][1].is_char_device():
        raise _NotWritten(f"--json and --html both name {said[0][1]}; give each a file of its own")


def _page(args: argparse.Namespace, result: Result, found: dict[str, Any], digest: str) -> str:
    # Only here: who does not ask for a page need not wait for what draws it.
    from ray_guard.report import attribution

    versions = [
        ("ray-guard", __version__),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in ("duckdb", "numpy", "pyarrow")),
    ]
    bundle = attribution.Bundle(
        shlex.join(_command(args)),
        causes.inputs(result, args.traces, args.nat),
        digest,
        versions,
    )
    return attribution.render(causes.gather(result, found), bundle)


def _command(args: argparse.Namespace) -> list[str]:
    """The command that gives this answer: what was typed, in one order, defaults left out."""
    words = ["ray-guard", "attribute", "--traces", *args.traces, "--alerts", *args.alerts]
    if args.nat:
        words += ["--nat", *args.nat]
    given = {"format": None if args.format == "auto" else args.format, "tz": args.tz, "year": args.year}
    for name, value in (*given.items(), ("json", args.json), ("html", args.html)):
        if value is not None:
            words += [f"--{name}", str(value)]
    return words

"""``ray-guard detect``: judges command lines, the first bytes of connections, or recorded evidence.

Runs later, on any machine. One line out for each line in; of evidence, one for each finding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_guard.cli.output import failed, say
from ray_guard.detect import commands, payloads
from ray_guard.evidence.cases import Cases
from ray_guard.evidence.reader import NotEvidence, is_sealed, open_segment, scan, segments

if TYPE_CHECKING:
    from ray_guard.cli.output import Subparsers
    from ray_guard.detect.sigma import Rule


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Adds ``detect`` to the command's parsers."""
    parser = subparsers.add_parser(
        "detect",
        help="which command lines, or first bytes, tunnel, mine, probe or leak",
        description="Reads JSON lines and answers each with one: whether it is flagged, as what, and by which rule.",
    )
    parser.add_argument("--commands", metavar="FILE", type=Path, help='lines {"command": "…"}')
    parser.add_argument("--payloads", metavar="FILE", type=Path, help='lines {"hex": "…", "direction": "sent"}')
    parser.add_argument("--traces", metavar="PATH", nargs="+", help="evidence: its processes and flows, as live")
    parser.add_argument("--rules", metavar="PATH", type=Path, nargs="+", default=[], help="Sigma rules beside our own")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the answers there instead of to stdout")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answers. 0; 1 where a line could not be judged (it is answered with its error); 2 where a file cannot be used."""
    if args.commands is None and args.payloads is None and args.traces is None:
        return failed("detect", "nothing to judge: give --commands FILE, --payloads FILE or --traces PATH")
    rules: list[Rule] = []
    if args.rules:
        from ray_guard.detect import sigma

        try:
            rules = sigma.load(args.rules)
        except sigma.BadRule as error:
            return failed("detect", str(error))
    answers: list[dict[str, Any]] = []
    for path, judge in ((args.commands, _command(rules)), (args.payloads, _payload)):
        if path is None:
            continue
        try:
            answers.extend(_answers(path, judge))
        except OSError as error:
            return failed("detect", f"{path} cannot be read: {error.strerror}")
    if args.traces is not None:
        try:
            answers.extend(_findings(args.traces, args.rules))
        except (NotEvidence, OSError) as error:
            return failed("detect", str(error))
    text = "".join(json.dumps(each) + "\n" for each in answers)
    if args.json is None:
        say(text)
    else:
        try:
            args.json.write_text(text, encoding="utf-8")
        except OSError as error:
            return failed("detect", f"{args.json} cannot be written: {error.strerror}")
    bad = sum("error" in each for each in answers)
    if bad:
        sys.stderr.write(f"ray-guard detect: {bad} of {len(answers)} lines could not be judged; see their errors\n")
    return 1 if bad else 0


def _answers(path: Path, judge: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                asked = json.loads(line)
                if not isinstance(asked, dict):
                    raise ValueError("not a JSON object")
                yield judge(asked)
            except (ValueError, RecursionError) as error:
                yield {"flagged": False, "error": f"line {number}: {error}"}


def _findings(paths: list[str], rules: list[Path]) -> Iterator[dict[str, Any]]:
    """What is found in evidence. Raises NotEvidence, OSError."""
    cases = Cases()
    for each in rules:
        cases.take(str(each))  # they were read before without complaint
    for path in segments(paths):
        before = cases.spans
        sealed = is_sealed(path)
        with open_segment(path) as file:
            for line in scan(file):
                if sealed and not line.complete:
                    continue
                for case in cases.of(line.content or b""):
                    told = {key: case[key] for key in ("kind", "rule", "trace", "span", "call")}
                    yield {"flagged": True, **told, **case["identity"]}
        if cases.spans == before and path.stat().st_size:
            raise NotEvidence(str(path), "no line of it is a span; give an evidence folder, or OTLP JSON lines")


def _command(rules: list[Rule]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def judge(asked: dict[str, Any]) -> dict[str, Any]:
        text = asked.get("command")
        if isinstance(text, list) and all(isinstance(word, str) for word in text):
            text = " ".join(text)
        if not isinstance(text, str):
            raise ValueError('no "command" that is a text')
        found = commands.judge(text)
        if found is not None:
            return {"flagged": True, "kind": found.kind.value, "rule": found.rule}
        if rules:
            from ray_guard.detect import sigma

            for event in sigma.events(text):
                for rule in rules:
                    if rule.matches(event):
                        return {
                            "flagged": True,
                            "kind": None if rule.kind is None else rule.kind.value,
                            "rule": rule.name,
                        }
        return {"flagged": False}

    return judge


def _payload(asked: dict[str, Any]) -> dict[str, Any]:
    written, direction = asked.get("hex"), asked.get("direction", "sent")
    if not isinstance(written, str):
        raise ValueError('no "hex" that is a text')
    if direction not in ("sent", "received"):
        raise ValueError(f'"direction" is sent or received, not {direction!r}')
    found = payloads.judge(bytes.fromhex(written), direction)
    return {"flagged": False} if found is None else {"flagged": True, "kind": found.kind.value, "rule": found.rule}

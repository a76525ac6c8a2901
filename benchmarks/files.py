"""What confinement costs a tool that works with files, beside a plain process and sandlock.

    python benchmarks/files.py [--rounds 15] [--count 2000] [--json OUT]

The tool creates, writes and deletes ``--count`` files in its working folder, and clones a local git repository of 400
files; it measures itself, so its start does not count (see start.py for that). Each contestant must first be able to
write in its folder and be refused outside it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent / "contestants"
_GOAL = 1.10


def milliseconds(client: harness.Driven, line: str) -> list[float]:
    return [nanoseconds / 1e6 for nanoseconds in client.ask(line)[0]]


def repository(folder: Path, files: int = 400) -> None:
    """A git repository with that many files in some folders."""
    for number in range(files):
        path = folder / f"part{number % 20}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n" * 100)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


def main() -> None:
    options = harness.arguments(__doc__ or "", rounds=15, count=2000).parse_args()
    report = harness.Report(options)
    peers = harness.require_peers()
    with harness.scratch() as folder, ExitStack() as stack:
        environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(folder / "evidence")}
        clients = []
        for kind, python in (("plain", sys.executable), ("guard", sys.executable), ("sandlock", peers)):
            work = folder / kind
            work.mkdir()
            repository(work / "source")
            each = harness.Driven(kind, [python, HERE / "filer.py", kind, work], environment)
            stack.callback(each.close)
            inside, outside = (each.ask(f"try {path}")[0][0] for path in (work / "allowed", folder / f"outside-{kind}"))
            if inside != 0 or (outside == 0) is (kind != "plain"):
                raise harness.NotConfining(f"{kind}: writing gives {inside} inside its folder and {outside} outside it")
            clients.append(each)
        for line, title in ((f"files {options.count}", f"{options.count} files"), ("clone", "git clone of 400 files")):
            runs = [harness.Contestant(each.name, functools.partial(milliseconds, each, line)) for each in clients]
            outcomes = harness.compare(runs, options.rounds)
            report.add(title, "ms", outcomes, ("plain", "sandlock"))
            by_name = {outcome.name: outcome for outcome in outcomes}
            report.goal(f"{title} × plain", harness.ratios(by_name["guard"], by_name["plain"])[0], _GOAL)
    report.close()


if __name__ == "__main__":
    main()

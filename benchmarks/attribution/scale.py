"""What ``ray-guard attribute`` takes for large jobs (scale_job.py): whole, the join alone, plain joins beside it.

    python benchmarks/attribution/scale.py [--sizes 10000x100000 100000x1000000 1000000x10000000] [--folder DIR]

Sizes are log lines by spans. Each figure is of a process of its own: wall clock, CPU time, peak resident memory.
``kernel`` is what of the join grows with the job: the product's own statement that finds the calls open when an alert
fell, over as many calls as there are spans (eight at once on each machine), of tables that are in DuckDB already.
``join`` is the whole ladder on the job's own tables. ``containment`` (a hash join on machine and 30 s bucket) and
``as-of`` are DuckDB alone, over the same spans, with alert times and addresses that are parsed and right already: the
least that any answer from this evidence takes. The goals are for two cores: the kernel ≤ 2 s and ≤ 2 GiB, end to end
≤ 60 s and ≤ 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import dropwhile, islice, takewhile
from pathlib import Path

import pyarrow.parquet as pq
from scale_job import write

LOGS = ("suricata.log", "fortigate.log", "nftables.log")

PLAIN = """
import sys, time, duckdb
db = duckdb.connect(config={"memory_limit": "3GB", "preserve_insertion_order": False})
db.execute("CREATE TABLE call AS SELECT host_ips[1] AS ip, start_ns, end_ns, span_id FROM 'spans.parquet'"
           " WHERE name LIKE 'execute_tool%'")
db.execute("CREATE TABLE alert AS SELECT row_number() OVER () AS alert, ip, at_ns FROM 'truth.parquet'")
begun, used = time.perf_counter(), time.process_time()
if sys.argv[1] == "containment":
    db.execute('''CREATE TABLE found AS SELECT a.alert, c.span_id FROM
      (SELECT *, at_ns // 30000000000 AS bucket FROM alert) a JOIN
      (SELECT *, unnest(generate_series(start_ns // 30000000000, end_ns // 30000000000)) AS bucket FROM call) c
      ON a.ip = c.ip AND a.bucket = c.bucket AND a.at_ns BETWEEN c.start_ns AND c.end_ns''')
else:
    db.execute('''CREATE TABLE found AS SELECT a.alert, c.span_id FROM alert a
      ASOF JOIN call c ON a.ip = c.ip AND a.at_ns >= c.start_ns''')
print(time.perf_counter() - begun, time.process_time() - used, file=sys.stderr)
"""
JOIN = """
import sys, time
from ray_guard.attribution import attribute, candidates
join = candidates.join
def timed(db):
    begun, used = time.perf_counter(), time.process_time()
    join(db)
    print(time.perf_counter() - begun, time.process_time() - used, file=sys.stderr)
candidates.join = timed
attribute.attribute(["spans.parquet"], sys.argv[1:])
"""
INTERVALS = """
import sys, time
from ray_guard.attribution import candidates, store
alerts, calls, second = int(sys.argv[1]), int(sys.argv[2]), 10**9
nodes = max(4, round(calls * 1024 / 10**7))
db = store.connect()
db.execute(f'''CREATE TABLE alive AS SELECT i AS call, i % {nodes} AS node,
    i // {nodes * 8} * {15 * second} + CAST(hash(i) % {second} AS BIGINT) AS start_ns,
    start_ns + {second} // 2 + CAST(hash(i, 1) % {14 * second} AS BIGINT) AS end_ns FROM range({calls}) r(i)''')
((last,),) = db.execute("SELECT max(end_ns) FROM alive").fetchall()
db.execute(f'''CREATE TABLE timed AS SELECT i AS alert, CAST(hash(i) % {last} AS BIGINT) AS start_ns,
    start_ns + 1000 AS end_ns, {second} AS slack_ns FROM range({alerts}) r(i)''')
db.execute(f'''CREATE TABLE place AS SELECT i AS alert, CAST(hash(i, 1) % {nodes} AS BIGINT) AS node
    FROM range({alerts}) r(i)''')
begun, used = time.perf_counter(), time.process_time()
candidates.by_interval(db)
print(time.perf_counter() - begun, time.process_time() - used, file=sys.stderr)
"""


def measured(folder: Path, argv: list[str]) -> tuple[float, float, float, str]:
    """(wall s, CPU s, peak MiB, stderr) of a command and its children."""
    with tempfile.TemporaryFile("w+") as said, open(os.devnull, "w") as nowhere:
        import time

        begun = time.perf_counter()
        process = subprocess.Popen(argv, cwd=folder, stdout=nowhere, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        said.seek(0)
        text = said.read()
        if status:
            raise SystemExit(f"{argv}: status {status}\n{text}")
        return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text


def alerts_of(path: Path) -> Iterator[dict]:
    """The rows of an answer, one at a time: whole, that of a million lines takes more memory than it took to make."""
    with path.open() as answer:
        lines = dropwhile(lambda line: not line.startswith(' "alerts"'), answer)
        row: list[str] = []
        for line in islice(takewhile(lambda line: not line.startswith(" ]"), lines), 1, None):
            row.append(line)
            if line.startswith("  }"):
                yield json.loads("".join(row).rstrip(",\n"))
                row = []


def right(folder: Path) -> tuple[float, int]:
    """(share of the recorded sockets' alerts whose call is first, their number)."""
    truth = pq.read_table(folder / "truth.parquet").to_pydict()
    cause = dict(zip(zip(truth["path"], truth["byte_offset"], strict=True), truth["span_id"], strict=True))
    hits = count = 0
    for alert in alerts_of(folder / "answer.json"):
        first = alert["candidates"][0] if alert["candidates"] else {}
        if first.get("tier") == "socket":
            count += 1
            hits += first["span_id"] == cause[alert["source"], alert["byte_offset"]]
    return hits / max(count, 1), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["10000x100000", "100000x1000000", "1000000x10000000"])
    parser.add_argument("--folder", type=Path, help="kept, and used again where it holds the job already")
    parser.add_argument("--check", action="store_true", help="whether sockets name the call (reads the answer)")
    chosen = parser.parse_args()
    print(f"{'lines x spans':>20} {'what':12} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9}", flush=True)
    for size in chosen.sizes:
        alerts, spans = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as made:
            folder = (chosen.folder or Path(made)) / size
            if not (folder / "truth.parquet").exists():
                write(folder, spans, alerts, 1)
            command = [sys.executable, "-m", "ray_guard.cli.__main__", "attribute", "--traces", "spans.parquet"]
            wall, cpu, peak, _ = measured(folder, [*command, "--alerts", *LOGS, "--json", "answer.json"])
            print(f"{size:>20} {'end to end':12} {wall:8.1f} {cpu:8.1f} {peak:9.0f}", flush=True)
            runs = {
                "kernel": [INTERVALS, str(alerts), str(spans)],
                "join": [JOIN, *LOGS],
                "containment": [PLAIN, "containment"],
                "as-of": [PLAIN, "asof"],
            }
            for name, (program, *arguments) in runs.items():
                _, _, peak, text = measured(folder, [sys.executable, "-c", program, *arguments])
                wall, cpu = map(float, text.splitlines()[-1].split())
                print(f"{size:>20} {name:12} {wall:8.2f} {cpu:8.2f} {peak:9.0f}", flush=True)
            if chosen.check:
                share, count = right(folder)
                print(f"{size:>20} sockets: {count} alerts, first is the cause in {share:.4f}", flush=True)


if __name__ == "__main__":
    main()

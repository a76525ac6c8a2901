"""The same answer, to the byte, whether one machine arranges the traces or a Ray cluster does."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_guard.evidence import columns
from ray_guard.evidence.reader import Quarantine, read
from tests.attribution.test_known_causes import generate

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]  # two nodes start: minutes where others want the cores too


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Half of the lines as segments, in which lines of one trace lie apart, one torn; the other half as Parquet."""
    generate.generate(tmp_path, generate.replace(generate.SCENARIOS["socket-lost"], minutes=10, guilty=0.02), 3)
    lines = (tmp_path / "traces.otlp.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "traces.otlp.jsonl").unlink()
    random.Random(1).shuffle(lines)
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    for number in range(3):
        (evidence / f"{number}.otlp.jsonl").write_text("".join(lines[number : len(lines) // 2 : 3]))
    rest = tmp_path / "rest.otlp.jsonl"
    rest.write_text("".join(lines[len(lines) // 2 :]))
    batches = columns.batches(read([rest], Quarantine()))
    pq.write_table(pa.Table.from_batches(batches), tmp_path / "rest.parquet", row_group_size=1000)
    with (evidence / "2.otlp.jsonl").open("a") as torn:
        torn.write('{"resourceSpans": [')
    return tmp_path


def attribute(
    job: Path, out: str, *more: str, traces: tuple[str, ...] = ("evidence", "rest.parquet")
) -> subprocess.CompletedProcess[str]:
    logs = sorted(path.name for path in job.glob("*.log"))
    argv = ["attribute", "--traces", *traces, "--alerts", *logs, "--json", out, *more]
    return subprocess.run(
        [sys.executable, "-m", "ray_guard.cli.__main__", *argv],
        cwd=job,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
    )


def test_two_nodes_give_the_same_bytes_as_one_machine(job: Path, two_nodes: str) -> None:
    alone = attribute(job, "answer.json", "--html", "report.html")
    by_one = {name: (job / name).read_bytes() for name in ("answer.json", "report.html")}
    spread = attribute(job, "answer.json", "--html", "report.html", "--ray", two_nodes)
    assert alone.returncode == 0, alone.stderr
    assert spread.returncode == 0, spread.stderr
    assert spread.stdout == alone.stdout
    assert {name: (job / name).read_bytes() for name in by_one} == by_one
    answer = json.loads(by_one["answer.json"])
    assert answer["traces"]["quarantined"] == {"torn": 1}
    assert sum(alert["verdict"] == "attributed" for alert in answer["alerts"]) >= 20
    assert answer["recurrence"]


def test_traces_of_one_kind_are_spread_as_well(job: Path, two_nodes: str) -> None:
    (job / "rest.parquet").unlink()
    whole = [attribute(job, "answer.json", *more, traces=("evidence",)) for more in ((), ("--ray", two_nodes))]
    assert whole[1].returncode == 0, whole[1].stderr
    assert whole[0].stdout == whole[1].stdout


def test_an_address_where_no_cluster_answers_is_named_soon(job: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = f"127.0.0.1:{mute.getsockname()[1]}"
        begun = time.monotonic()
        tried = attribute(job, "a.json", "--ray", silent)
    assert time.monotonic() - begun < 60  # Ray itself tries for more than two minutes
    refused = attribute(job, "a.json", "--ray", silent)
    for each in (tried, refused):
        assert each.returncode == 2
        assert f"--ray {silent}: no such cluster (" in each.stderr
    assert not (job / "a.json").exists()

"""``ray-guard attribute`` over a log of damaged lines: it ends well, and what is whole keeps its answer."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SEEDS = (ROOT / "tests" / "unit" / "attribution" / "lines" / "every_format.log").read_bytes().splitlines()


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


generate = _module(ROOT / "benchmarks" / "attribution" / "generate.py")


def damaged(count: int) -> bytes:
    """Lines with one to four bytes changed, removed or doubled; the same ones every time."""
    chance = random.Random(20261125)
    lines = []
    for _ in range(count):
        line = bytearray(chance.choice(SEEDS))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(line))
            line[at : at + 1] = chance.choice(
                [b"", b"\xff", b'"', b"9999999999999999999999", b"{", line[at:], b"\\ud800"]
            )
        lines.append(bytes(line).replace(b"\n", b""))
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("words", [(), ("--tz", "Asia/Shanghai", "--year", "2026")])
def test_damage_is_counted_and_costs_the_rest_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    generate.generate(tmp_path, replace(generate.SCENARIOS["socket"], minutes=6, guilty=0.02), 3)
    logs = sorted(tmp_path.glob("*.log"))
    (tmp_path / "damaged.log").write_bytes(damaged(3000))
    out = tmp_path / "answer.json"
    command = [
        sys.executable,
        "-m",
        "ray_guard.cli.__main__",
        "attribute",
        "--traces",
        str(tmp_path / "traces.otlp.jsonl"),
    ]
    command += ["--alerts", *map(str, logs), str(tmp_path / "damaged.log"), "--json", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr

    found = json.loads(out.read_text())
    spoilt = [source for source in found["sources"] if source["path"].endswith("damaged.log")]
    assert sum(source["records"] for source in spoilt) > 500
    assert spoilt[0]["quarantined"] > 500
    rows = [alert for alert in found["alerts"] if alert["source"].endswith("damaged.log")]
    assert [alert["record"] for alert in rows] == list(range(len(rows)))
    for alert in rows:
        assert alert["unobserved"] + sum(each["confidence"] for each in alert["candidates"]) == pytest.approx(
            1, abs=1e-3
        )
    if not words:
        whole = [alert for alert in found["alerts"] if not alert["source"].endswith("damaged.log")]
        assert sum(alert["verdict"] == "attributed" for alert in whole) >= 5

"""The compose example was not run. Its files parse, and the metrics they name are ones that ray_guard sends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "jaeger"
DOCUMENTED = re.compile(r"`((?:gen_ai|ray_guard)\.[a-z_.]+)`")


def queries() -> list[str]:
    dashboard = json.loads((EXAMPLE / "grafana/dashboards/ray_guard.json").read_text())
    alerts = yaml.safe_load((EXAMPLE / "alerts.yaml").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return shown + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("path", sorted(EXAMPLE.rglob("*.yaml")), ids=lambda path: path.name)
def test_it_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_what_is_mounted_is_there() -> None:
    services: dict[str, Any] = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())]
    assert mounted
    assert all((EXAMPLE / each).exists() for each in mounted)
    ports = [port for each in services.values() for port in each["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_it_asks_for_metrics_and_labels_that_there_are() -> None:
    """docs/traces.md lists them; tests/evidence/test_metrics.py holds what is sent against the same names."""
    names = {each.replace(".", "_") for each in DOCUMENTED.findall((ROOT / "docs" / "traces.md").read_text())}
    suffixes = [unit + kind for unit in ("", "_seconds", "_bytes") for kind in ("", "_total", "_bucket", "_sum")]
    there = {name + suffix for name in names for suffix in suffixes}
    asked = {word for query in queries() for word in re.findall(r"(?:gen_ai|ray_guard)_[a-z_]+", query)}
    assert asked
    assert asked <= there

"""docs/policy.md: its example loads and is enforced by this version, its claims are the code's."""

from __future__ import annotations

import re
from pathlib import Path

from ray_guard.policy.budgets import KINDS, Scope
from ray_guard.policy.enforcement import unenforced
from ray_guard.policy.model import Policy

DOCS = Path(__file__).parents[3] / "docs" / "policy.md"


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert match is not None
    return match.group(1)


def test_the_example_loads_and_is_enforced(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(block("yaml"))
    policy = Policy.load(path)
    assert len(policy.egress.rules) == 6
    assert policy.budgets.call.egress_bytes == 5 << 20
    assert unenforced(policy.to_wire()) == ()


def test_the_shorthand_is_read() -> None:
    calls = re.findall(r"^guard\((allow=.*?)\)\s+#", block("python"), re.MULTILINE)
    assert len(calls) == 2
    for arguments in calls:
        policy = eval(f"read({arguments})", {"read": Policy.from_shorthand})
        assert policy.egress.rules


def test_the_table_of_limits_is_the_codes() -> None:
    rows = re.findall(r"^\| (`[^|]*) \| *(✓?) *\| *(✓?) *\| *(✓?) *\| *(✓?) *\|$", DOCS.read_text(), re.MULTILINE)
    documented = {
        kind: {
            scope
            for scope, tick in zip((Scope.CALL, Scope.EPISODE, Scope.ACTOR, Scope.JOB), ticks, strict=True)
            if tick
        }
        for names, *ticks in rows
        for kind in re.findall(r"`(\w+)`", names)
    }
    assert documented == {kind: set(Scope) for kind in KINDS}

"""How a confined program ends: by itself, with its own status; and where it cannot be judged, not confined at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFINE = "import ray_guard; ray_guard.confine({'egress': {'allow': []}})"
DENY = """
import errno, os, platform, sys
from ray_guard.kernel import seccomp
rule = seccomp.Rule(sys.argv[1], seccomp.refuse(errno.EPERM))
seccomp.stack_on_thread(seccomp.assemble([rule], platform.machine()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def _python(*arguments: str, evidence: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_GUARD_EVIDENCE": str(evidence)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("status", [0, 7])
def test_a_confined_program_ends_with_its_own_status(tmp_path: Path, status: int) -> None:
    # The interpreter closes its sockets before the process ends: that must not look like a line that was cut.
    for _ in range(3):
        done = _python("-c", f"{CONFINE}; import sys; sys.exit({status})", evidence=tmp_path / "e")
        assert done.returncode == status, done.stderr


def test_where_calls_cannot_be_judged_nothing_is_confined_and_the_reason_is_named(tmp_path: Path) -> None:
    # (Where only pidfd_getfd is refused they can: tests/hosts.)
    program = f"try:\n {CONFINE}\nexcept ray_guard.NotEnforced as e: print('refused', e)\nelse: print('confined')"
    done = _python("-c", DENY, "seccomp", "-c", program, evidence=tmp_path / "e")
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert "seccomp" in done.stdout

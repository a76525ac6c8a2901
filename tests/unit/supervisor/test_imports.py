"""What the zygote loads, every leader and every tool's first process is a copy of."""

from __future__ import annotations

import subprocess
import sys


def test_the_zygote_is_small() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import ray_guard.supervisor.zygote; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ray_guard.supervisor.zygote" in loaded
    heavy = {"dataclasses", "inspect", "logging", "pathlib", "subprocess", "ipaddress", "hashlib", "ray_guard.records"}
    assert not loaded & heavy

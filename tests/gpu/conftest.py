"""Every test here needs a GPU that torch can use, and says so loudly where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

for name in ("gpu_standin", "escapes"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))

from ray_guard.kernel import gpu_majors  # noqa: E402
from ray_guard.kernel.gpu_majors import Kind  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if Kind.NVIDIA not in gpu_majors.known_majors().values():
        pytest.skip("NOT TESTED ON A GPU: no NVIDIA driver is loaded here")
    torch = pytest.importorskip("torch", reason="NOT TESTED ON A GPU: no torch")
    if not torch.backends.cuda.is_built():
        pytest.skip("NOT TESTED ON A GPU: this torch has no CUDA")
    probe = "import torch; torch.zeros(1, device='cuda')"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        pytest.skip("NOT TESTED ON A GPU: torch cannot use the one that is here")

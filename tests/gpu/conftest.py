from __future__ import annotations

import sys
from pathlib import Path

for name in ("gpu_standin", "escapes"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sealed import Signer


@pytest.fixture
def signer() -> Signer:
    return Signer()

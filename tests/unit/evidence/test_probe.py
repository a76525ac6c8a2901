"""What doctor says of evidence on this host."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from ray_guard.evidence import probe
from ray_guard.kernel import libc


def test_the_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Ed25519" in probe.seal()
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(OSError, match="pip install cryptography"):
        probe.seal()


def test_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.reserve(tmp_path / "not" / "made" / "yet").endswith(f"on the file system of {tmp_path}")

    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "fallocate: Operation not supported")

    monkeypatch.setattr(libc, "fallocate", unsupported)
    with pytest.raises(OSError, match=f"denials go to memory: {tmp_path}: .*not supported"):
        probe.reserve(tmp_path)
    monkeypatch.setattr(libc, "fallocate", lambda *_: None)
    with pytest.raises(OSError, match="sets nothing aside"):
        probe.reserve(tmp_path)

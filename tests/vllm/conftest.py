"""A small Qwen3-MoE, made once; programs that serve it with vLLM, confined; and what the evidence says of them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_guard.evidence.reader import NotEvidence, Quarantine, merge, read
from ray_guard.records import SpanRecord

pytest.importorskip("vllm", reason="vLLM is not installed: make env installs it")

HERE = Path(__file__).parent


_small = runpy.run_path(str(HERE.parents[1] / "examples" / "rome" / "model.py"), run_name="rome.model")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, eight experts of which two are chosen, a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "qwen3-moe-tiny"
    made: Path = _small["build"](folder, ["the quick brown fox", "jumps over the lazy dog"])
    return made


class Served:
    """A program of ``programs/`` while it runs."""

    def __init__(self, name: str, model: Path, folder: Path, *arguments: str) -> None:
        self.evidence = folder / "evidence"
        self._said = folder / "said.jsonl"
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "programs" / f"{name}.py"), str(model), str(self._said), *arguments],
            env={**os.environ, **_small["ENVIRONMENT"], "RAY_GUARD_EVIDENCE": str(self.evidence)},
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip

    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-8000:]

    def ends(self, within: float = 150) -> dict[str, Any]:
        """What it said, by name, when it has ended well."""
        status = self.process.wait(timeout=within)
        assert status == 0, f"exit status {status}\n{self.log()}"
        return self.said()

    def says(self, name: str, within: float = 150) -> Any:
        """Waits until it has said that."""
        deadline = time.monotonic() + within
        while name not in (said := self.said()):
            assert self.process.poll() is None, f"exit status {self.process.returncode}\n{self.log()}"
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)
        return said[name]

    def said(self) -> dict[str, Any]:
        lines = self._said.read_text().splitlines() if self._said.exists() else []
        return dict(map(json.loads, lines))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its tree goes with it: the guard sees to that
            self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def serve(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(name: str, *arguments: str) -> Served:
        started.append(Served(name, model, tmp_path_factory.mktemp(name), *arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture(scope="session")
def spans() -> Callable[[Path], list[SpanRecord]]:
    """The spans of an evidence folder, each as it was last written."""

    def found(evidence: Path) -> list[SpanRecord]:
        try:
            return [entry.span for entry in merge(read([evidence], Quarantine())).values()]
        except NotEvidence:
            return []

    return found

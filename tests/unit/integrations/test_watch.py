"""The hook is put in place when vLLM's modules are loaded, whenever that is, and only where they are as expected."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_guard.client import confine
from ray_guard.errors import NotEnforced
from ray_guard.integrations.vllm import points, watch

MODULE = "vllm.v1.engine.output_processor"

GOOD = """
class IncrementalDetokenizer:
    def num_output_tokens(self):
        return 0
class RequestState:
    def __init__(self):
        self.prompt_len = self.num_cached_tokens = 0
        self.detokenizer = IncrementalDetokenizer()
class OutputProcessor:
    def __init__(self):
        self.request_states = {}
    def add_request(self, request, prompt, parent_req=None, request_index=0, queue=None):
        return "added"
    def process_outputs(self, engine_core_outputs, engine_core_timestamp=None, iteration_stats=None):
        return "processed"
    def _update_stats_from_finished(self, req_state, finish_reason, iteration_stats):
        pass
    def abort_requests(self, request_ids, internal):
        return []
    def propagate_error(self, e):
        pass
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name with one module of it, in place of the real one."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}
    folder = tmp_path / "vllm" / "v1" / "engine"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder / "output_processor.py"
    watch.remove()
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(kept)


def hooked(name: str) -> bool:
    return hasattr(getattr(sys.modules[MODULE].OutputProcessor, name), "_ray_guard_original")  # type: ignore[attr-defined]


def test_nothing_is_loaded_by_waiting() -> None:
    program = (
        "import sys; from ray_guard.integrations.vllm.watch import install; install(); "
        "dear = ('vllm', 'torch', 'pydantic', 'ray', 'importlib.resources'); "
        "print([name for name in sys.modules if name in dear or name.split('.')[0] in dear])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_patched_when_it_is_loaded(vllm: Path) -> None:
    vllm.write_text(GOOD)
    watch.install()
    module = importlib.import_module(MODULE)
    assert hooked("add_request")
    assert hooked("abort_requests")
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader", "the module is as any other afterwards"


def test_patched_where_it_is_loaded_already_and_once(vllm: Path) -> None:
    vllm.write_text(GOOD)
    module = importlib.import_module(MODULE)
    original = module.OutputProcessor.add_request
    watch.install()
    watch.install()
    assert module.OutputProcessor.add_request._ray_guard_original is original
    watch.remove()
    assert module.OutputProcessor.add_request is original


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("def abort_requests(self, request_ids, internal)", "def drop_requests(self, request_ids)"),
        ("def add_request(self, request, prompt,", "def add_request(self, prompt, request,"),
        ("class OutputProcessor", "class Processor"),
        ("self.num_cached_tokens", "self.tokens_of_the_cache"),
        ("def num_output_tokens", "def count"),
    ],
)
def test_another_vllm_is_not_hooked_and_says_so(
    vllm: Path, good: str, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.write_text(GOOD.replace(good, bad))
    watch.install()
    with caplog.at_level(logging.WARNING):
        module: Any = importlib.import_module(MODULE)
    assert "neither charged nor traced" in caplog.text
    owner = getattr(module, "OutputProcessor", None)
    assert owner is None or not hasattr(owner.process_outputs, "_ray_guard_original"), "all of it or nothing"


@pytest.mark.parametrize(("mode", "kind"), [("enforce", "tokens"), ("enforce", "flops"), ("report", "tokens")])
def test_another_vllm_is_refused_where_its_tokens_are_limited(
    vllm: Path, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.write_text(GOOD.replace("abort_requests", "drop_requests"))
    monkeypatch.setattr(confine, "_policies", [{"mode": mode, "budgets": {"actor": {kind: 1000}}}])
    watch.install()
    if mode == "report":
        importlib.import_module(MODULE)
        return
    with pytest.raises(NotEnforced) as caught:
        importlib.import_module(MODULE)
    assert caught.value.features == (f"budgets.actor.{kind}",)
    assert "OutputProcessor.abort_requests" in caught.value.detail


def test_every_module_that_is_waited_for_has_points() -> None:
    assert set(points.POINTS) == set(watch.MODULES)

"""vLLM's own ``OutputProcessor`` under the hook, without an engine: every way in and out of it, each settled once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ray_guard.client import channel
from ray_guard.errors import BudgetExceeded, NotEnforced

pytest.importorskip("vllm", reason="vLLM is not installed: make env installs it")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import PrefillStats

from ray_guard.integrations.vllm import install, points, requests
from ray_guard.integrations.vllm.watch import remove

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each settlement, in place of the supervisor's books."""
    found: list[int] = []

    class Reservation:
        scope = "actor"

        def settle(self, *, tokens: int, flops: float | None = None) -> None:
            found.append(tokens)

        def release(self) -> None:
            found.append(0)

    monkeypatch.setattr(requests, "reserve", lambda **asked: Reservation())
    return found


@pytest.fixture
def processor(settled: list[int]) -> Iterator[Any]:
    install()
    yield OutputProcessor(None, log_stats=False)
    remove()


def request(name: str, prompt: int = 4, **more: Any) -> Any:
    return EngineCoreRequest(
        request_id=name, external_req_id=name, prompt_token_ids=[1] * prompt, mm_features=None,
        sampling_params=SamplingParams(max_tokens=8, detokenize=False, output_kind=RequestOutputKind.DELTA),
        pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        **more,
    )  # fmt: skip


def output(name: str, *tokens: int, finished: Any = None, prefilled: bool = False) -> Any:
    stats = PrefillStats()
    if prefilled:
        stats.set(num_prompt_tokens=4, num_local_cached_tokens=2, num_external_cached_tokens=0)
    return EngineCoreOutput(
        request_id=name, new_token_ids=list(tokens), finish_reason=finished, prefill_stats=stats if prefilled else None
    )


def test_finished(processor: Any, settled: list[int]) -> None:
    processor.add_request(request("a"), None)
    processor.process_outputs([output("a", 7, prefilled=True)])
    assert settled == []
    processor.process_outputs([output("a", 8, 9, finished=FinishReason.LENGTH)])
    assert settled == [7]
    processor.abort_requests(["a"], internal=True)
    processor.propagate_error(RuntimeError("late"))
    assert settled == [7]


@pytest.mark.parametrize(("name", "internal"), [("a", True), ("a", False)])
def test_aborted(processor: Any, settled: list[int], name: str, internal: bool) -> None:
    processor.add_request(request("a"), None)
    processor.process_outputs([output("a", 7, prefilled=True)])
    assert processor.abort_requests([name], internal) == ["a"]
    processor.process_outputs([output("a", 8)])  # what the core had on its way
    assert settled == [5]


async def test_the_engine_is_dead(processor: Any, settled: list[int]) -> None:
    collectors = {name: RequestOutputCollector(RequestOutputKind.DELTA, name) for name in "ab"}
    for name, collector in collectors.items():
        processor.add_request(request(name), None, None, 0, collector)
    processor.process_outputs([output("a", 7, prefilled=True)])
    processor.propagate_error(ConnectionError("dead"))
    assert sorted(settled) == [4, 5]
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(collectors["b"].get(), 1)


def test_not_taken(processor: Any, settled: list[int]) -> None:
    bad = request("a")
    bad.external_req_id = None
    with pytest.raises(AssertionError):
        processor.add_request(bad, None)
    assert settled == [0]
    assert len(points.ledger_of(processor)) == 0


def test_a_prompt_in_pieces(processor: Any, settled: list[int]) -> None:
    processor.add_request(request("a", resumable=True), None)
    processor.process_outputs([output("a", 7, prefilled=True, finished=FinishReason.LENGTH)])
    processor.add_request(request("a", prompt=3, resumable=True), None)
    processor.process_outputs([output("a", 8, finished=FinishReason.LENGTH)])
    assert settled == []
    processor.add_request(request("a", prompt=1), None)  # vLLM's way of saying that it was the last
    assert settled == [0, 9]


def test_the_processor_is_gone(processor: Any, settled: list[int]) -> None:
    other = OutputProcessor(None, log_stats=False)
    other.add_request(request("a"), None)
    del other
    assert settled == [4]


def test_refused_is_not_known_to_vllm(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**asked: Any) -> Any:
        raise BudgetExceeded("tokens", 12, 10, "actor", "a")

    monkeypatch.setattr(requests, "reserve", refuse)
    with pytest.raises(BudgetExceeded) as caught:
        processor.add_request(request("a"), None)
    assert caught.value.http_status == 429  # type: ignore[attr-defined]
    assert processor.get_num_unfinished_requests() == 0


def test_a_process_without_a_line_admits_nothing(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GUARD_VLLM", "limited")
    assert channel.current() is None
    with pytest.raises(NotEnforced, match="one API server process"):
        processor.add_request(request("a"), None)
    monkeypatch.setenv("RAY_GUARD_VLLM", "")
    processor.add_request(request("a"), None)


def test_all_points_fit_the_installed_vllm() -> None:
    import importlib

    for name, found in points.POINTS.items():
        module = importlib.import_module(name)
        assert [each for each in found if points._lacks(getattr(module, each.owner, None), each)] == []


def test_an_engine_that_was_built_before_the_hook(settled: list[int]) -> None:
    from types import SimpleNamespace

    from vllm.v1.engine.llm_engine import LLMEngine

    hf = SimpleNamespace(to_dict=lambda: {"model_type": "odd"})
    served = SimpleNamespace(served_model_name="early", model="m", max_model_len=64, hf_config=hf)
    engine = object.__new__(LLMEngine)
    engine.output_processor = OutputProcessor(None, log_stats=False)
    engine.vllm_config = SimpleNamespace(model_config=served)
    install()
    try:
        with pytest.raises(TypeError, match="request_id must be a string"):
            engine.add_request(7, "prompt", None)
        assert points.ledger_of(engine.output_processor).model.name == "early"
    finally:
        remove()

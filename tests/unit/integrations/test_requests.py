"""A request's way through the ledger: what is reserved, what is settled, and that it is settled once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import opentelemetry.trace  # noqa: F401 - vLLM loads it too: its current span is another way to be somebody's child
import pytest

from ray_guard import episode, turn
from ray_guard.client import carry, quota
from ray_guard.compute.moe import cost
from ray_guard.errors import BudgetExceeded, NotEnforced
from ray_guard.integrations.vllm import requests, versions
from ray_guard.integrations.vllm.requests import PLACE, Ledger, Model, Place, model_of

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256,
    "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
PRICE = cost(CONFIG)
MODEL = Model("tiny", 100, PRICE, experts=8)


class Book:
    """Stands for the supervisor: what was reserved, for whom, and what became of it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.settled: list[tuple[int, float | None]] = []
        self.paid: list[str | None] = []
        self.refuse: Exception | None = None

    def reserve(
        self,
        *,
        tokens: int,
        flops: float | None = None,
        context: Any = None,
        paid: str | None = None,
        often: bool = False,
    ) -> Any:
        node = carry.current()
        self.asked.append({"tokens": tokens, "flops": flops, "context": context, "above": node and node.span})
        self.paid.append(paid)
        if self.refuse is not None:
            raise self.refuse
        book = self

        class Reservation:
            scope = "episode"
            done = False

            def settle(self, *, tokens: int, flops: float | None = None) -> None:
                if not self.done:
                    book.settled.append((tokens, flops))
                self.done = True

            def release(self) -> None:
                self.settle(tokens=0, flops=0)

        return Reservation()


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    found = Book()
    monkeypatch.setattr(requests, "reserve", found.reserve)
    yield found
    versions.policy_version(None)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], BaseException | None]]:
    """The spans that ended, with their attributes and what they ended with."""
    found: list[tuple[str, dict[str, Any], BaseException | None]] = []
    leave = requests.ChatSpan.__exit__

    def noted(self: Any, kind: Any, error: Any, trace: Any) -> None:
        found.append((self.name, dict(self._attributes), error))
        leave(self, kind, error, trace)

    monkeypatch.setattr(requests.ChatSpan, "__exit__", noted)
    return found


def request(name: str, prompt: int = 10, most: int | None = 5, **more: Any) -> Any:
    return SimpleNamespace(
        request_id=name, external_req_id=name, prompt_token_ids=[0] * prompt, prompt_embeds=None,
        sampling_params=SimpleNamespace(max_tokens=most, **more),
    )  # fmt: skip


def state(prompt: int, output: int, cached: int = 0, **more: Any) -> Any:
    detokenizer = SimpleNamespace(num_output_tokens=lambda: output)
    return SimpleNamespace(prompt_len=prompt, detokenizer=detokenizer, num_cached_tokens=cached, stats=None, **more)


def test_most_is_reserved_and_what_was_used_is_settled(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    assert (book.asked[0]["tokens"], book.asked[0]["flops"]) == (15, PRICE.flops(15, 0))
    ledger.running("a", state(10, 3, cached=4))
    ledger.finished("a", "stop")
    assert book.settled == [(13, PRICE.flops(9, 4))]
    ((name, attributes, error),) = closed
    assert (name, error) == ("chat tiny", None)
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 4
    assert attributes["ray_guard.flops"] == PRICE.flops(9, 4)
    ledger.finished("a", "stop")
    ledger.failed(RuntimeError("late"))
    ledger.close()
    assert len(book.settled) == len(closed) == 1


@pytest.mark.parametrize(("prompt", "most", "output"), [(10, None, 90), (10, 500, 90), (100, 5, 0)])
def test_the_context_bounds_what_can_be_generated(
    book: Book, closed: list[Any], prompt: int, most: int | None, output: int
) -> None:
    Ledger(MODEL).admit(request("a", prompt, most))
    assert book.asked[0]["tokens"] == prompt + output


def test_a_refusal_is_raised_and_ends_the_span(book: Book, closed: list[Any]) -> None:
    book.refuse = BudgetExceeded("tokens", 15, 10, "episode", "e")
    ledger = Ledger(MODEL, lambda error: KeyError(str(error)))
    with pytest.raises(KeyError, match="exceeds the limit"):
        ledger.admit(request("a"))
    assert len(ledger) == 0
    assert closed[0][2] is book.refuse
    assert carry.current() is None


def test_several_sequences_pay_at_once_and_end_together(book: Book, closed: list[Any]) -> None:
    busy: list[bool] = []
    ledger = Ledger(MODEL, busy=busy.append)
    parent = SimpleNamespace(request_id="p", sampling_params=SimpleNamespace(n=3))
    for at in range(3):
        ledger.admit(request(f"{at}_p"), parent, at)
    assert [each["tokens"] for each in book.asked] == [10 + 3 * 5]
    assert book.asked[0]["flops"] == 3 * PRICE.flops(15, 0)
    for at, (output, cached) in enumerate([(5, 0), (2, 8), (1, 8)]):
        ledger.running(f"{at}_p", state(10, output, cached))
    ledger.finished("2_p", "stop")
    ledger.finished("0_p", "length")
    assert (book.settled, busy) == ([], [True])
    ledger.finished("1_p", "abort")
    assert book.settled == [(18, PRICE.flops(15, 0) + PRICE.flops(4, 8) + PRICE.flops(3, 8))]
    assert busy == [True, False]
    assert closed[0][1]["gen_ai.response.finish_reasons"] == ["length", "abort", "stop"]
    assert closed[0][1]["gen_ai.usage.cache_read.input_tokens"] == 0


def test_what_vllm_did_not_take_costs_nothing(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    ledger.failed(ValueError("bad"), ["a", "never heard of"])
    assert book.settled == [(0, 0)]
    assert isinstance(closed[0][2], ValueError)


def test_the_engine_dies_and_what_is_known_is_charged(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    for name, output in (("a", 0), ("b", 4)):
        ledger.admit(request(name))
        ledger.running(name, state(10, output))
    ledger.failed(ConnectionError("dead"))
    assert book.settled == [(10, PRICE.flops(10, 0)), (14, PRICE.flops(14, 0))]
    assert len(ledger) == 0


def test_the_engine_ends_one_with_an_error(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    ledger.running("a", state(10, 2))
    ledger.finished("a", "error")
    assert book.settled == [(12, PRICE.flops(12, 0))]
    assert isinstance(closed[0][2], RuntimeError)


def test_flops_of_an_unknown_architecture(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(Model("odd", 100, None, "model_type: 'odd' is not usable"))
    ledger.admit(request("a"))
    assert book.asked[0]["flops"] is None
    ledger.running("a", state(10, 3))
    ledger.finished("a", "stop")
    assert book.settled == [(13, None)]
    assert "ray_guard.flops" not in closed[0][1]
    assert closed[0][1]["ray_guard.flops.unknown"] == "model_type: 'odd' is not usable"
    book.refuse = NotEnforced(["budgets.actor.flops"])
    with pytest.raises(NotEnforced):
        ledger.admit(request("b"))


def test_a_preempted_request_is_computed_again(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    ledger.running("a", state(10, 3))
    event = SimpleNamespace(type=SimpleNamespace(name="PREEMPTED"))
    ledger.saw([SimpleNamespace(request_id="a", prefill_stats=None, events=[event])])
    ledger.finished("a", "stop")
    assert book.settled == [(13, 2 * PRICE.flops(13, 0))]
    assert closed[0][1]["ray_guard.preemptions"] == 1


def test_a_prompt_in_pieces_is_one_bill(book: Book, closed: list[Any]) -> None:
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    ledger.extend(request("a", 20))
    assert [each["tokens"] for each in book.asked] == [15, 25]
    ledger.running("a", state(30, 8))
    ledger.finished("a", "stop")
    assert sorted(book.settled) == [(0, 0), (38, PRICE.flops(38, 0))]


def test_whose_it_is(book: Book, closed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    enter = requests.ChatSpan.__enter__

    def noted(self: Any) -> Any:
        enter(self)
        seen.append((self.episode, self.parent, self.identity.get("rl.policy.version")))
        return self

    monkeypatch.setattr(requests.ChatSpan, "__enter__", noted)
    ledger = Ledger(MODEL)
    with episode(id="e", policy_version="3") as e, turn(1) as t:
        ledger.admit(request("a"))
        assert carry.current() is t, "the caller's place is as it was"
        versions.policy_version(4)
        ledger.admit(request("b"))
        ledger.version = "w5"
        ledger.admit(request("c"))
        token = PLACE.set(Place(None, is_http=True, paid="word"))
        ledger.admit(request("d"))
        PLACE.reset(token)
    assert seen == [(e.span, t.span, "3"), (e.span, t.span, "4"), (e.span, t.span, "w5"), (None, None, "w5")]
    assert [each["context"] for each in book.asked] == [None, None, None, {"trace": None, "span": None}]
    assert book.paid == [None, None, None, "word"]


def test_a_server_with_no_room_left(book: Book) -> None:
    ledger = Ledger(MODEL, lambda error: KeyError(str(error)))
    ledger.require_room()
    assert (book.asked[0]["tokens"], book.settled) == (1, [(0, 0)])
    book.refuse = BudgetExceeded("tokens", 11, 10, "actor", "a")
    with pytest.raises(KeyError):
        ledger.require_room()


@pytest.mark.parametrize(("served", "name"), [("one", "one"), (["two", "three"], "two"), (None, "/models/four")])
def test_the_model_by_the_configuration_that_vllm_runs(served: Any, name: str) -> None:
    hf = SimpleNamespace(to_dict=lambda: json.loads(json.dumps(CONFIG)))
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            served_model_name=served, model="/models/four", max_model_len=100, hf_config=hf, get_num_experts=lambda: 8
        )
    )
    names = (name, *served[1:]) if isinstance(served, list) else (name,)
    assert model_of(config) == Model(name, 100, PRICE, "", 8, names=names)
    hf.to_dict = lambda: {**CONFIG, "model_type": "other"}
    unknown = model_of(config)
    assert unknown.cost is None
    assert "model_type" in unknown.unknown


def test_an_unguarded_process_reserves_nothing() -> None:
    assert requests.reserve is quota.reserve
    ledger = Ledger(MODEL)
    ledger.admit(request("a"))
    ledger.running("a", state(10, 3))
    ledger.finished("a", "stop")
    assert len(ledger) == 0

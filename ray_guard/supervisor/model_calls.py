"""Calls of a model through the relay: admitted, charged, recorded. Runs in the supervisor.

Order of work as for every request: reserve → journal the ``chat`` span → only then does the engine see it. Afterwards
it is settled by what the engine itself says it took; where that was never heard, by what was reserved.

Each admitted request carries a one-time word to the engine (:data:`RESERVATION`). An engine whose hook reports to this
supervisor gives it back with its own reservation, and does not charge again whom the relay has charged:
:attr:`Paid.payers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

from ray_guard.egress.relay.model.admission import RELEASED, Plan, Price, plan
from ray_guard.evidence.journal import JournalError
from ray_guard.ids import new_span_id, new_trace_id
from ray_guard.kernel.seqpacket import BadPacket
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy.bill import Bill
from ray_guard.policy.budgets import UNLIMITED, Account, Amount, Exceeded, Unlimited
from ray_guard.policy.decide import Endpoint
from ray_guard.policy.destination import canonical_address, is_address, is_loopback, parse_address
from ray_guard.records import AttributeValue, SpanKind, SpanRecord, StatusCode
from ray_guard.supervisor import fields
from ray_guard.supervisor.segments import links_of
from ray_guard.supervisor.target import Origin, Target

if TYPE_CHECKING:
    from ray_guard.supervisor.ring import Ring

log = logger("ray_guard.model_calls")

RESERVATION: Final = "x-ray-guard-reservation"
TOKENS: Final = "tokens"
FLOPS: Final = "flops"
_MODELS_LIMIT: Final = 64
Message = dict[str, Any]
_LOST: Final[Message] = {
    "status": None,
    "input": None,
    "output": None,
    "cached": None,
    "final": False,
    "reasons": [],
    "answered_as": {},
    "first_ns": None,
    "error": "lost",
}


def speech(model: Endpoint, address: str, *, enforced: bool) -> Message:
    """What may be spoken, for a :class:`~ray_guard.egress.relay.model.dialogue.Dialogue`; ``address``: the server's."""
    host, port = model
    hosts = {host, address}
    if is_loopback(parse_address(address)):
        hosts.add("localhost")
    if is_address(host):
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        hosts.add(canonical_address(host))
    else:
        authority = f"{host}:{port}"
    return {"model": {"hosts": sorted(hosts), "port": port, "authority": authority, "enforced": enforced}}


class Paid(NamedTuple):
    """A request that is with the engine: its span, and the accounts that its tokens are charged to."""

    trace_id: str
    span_id: str
    payers: tuple[Account, ...]


class _Call(NamedTuple):
    number: int
    record: SpanRecord
    bill: Bill
    reserved: int
    copies: int
    choices: int
    again: float
    """FLOPs of computing the prompt once more for each further choice, at most; reserved beside the tokens'."""
    price: Price | None
    word: str


class ModelCalls:
    """Of one connection.

    Args:
        ring: where it was made.
        origin: whose doing it is.
        span: of the connection.
        model: the endpoint.
    """

    def __init__(self, ring: Ring, origin: Origin, span: str, model: Endpoint) -> None:
        self._ring = ring
        self._target: Target = ring.target
        self._paid: dict[str, Paid] = ring.node.paid
        self._origin = origin
        self._span = span
        self._model = model
        self._where = f"http://{model[0]}:{model[1]}" if ":" not in model[0] else f"http://[{model[0]}]:{model[1]}"
        self._asking: int | None = None
        """The question that is not answered yet."""
        self._call: _Call | None = None

    def heard(self, message: Message, answer: Callable[[Message], None]) -> None:
        """What the relay says of the dialogue.

        Args:
            answer: takes the answer where it asks, now or a little later.
        """
        if message["op"] == "ask":
            self._asked(message, answer)
            return
        try:
            if message["op"] == "called":
                self._settle(message)
            else:
                self._refused(message)
        except JournalError:
            log.exception("a model call could not be journaled")

    # -- before --------------------------------------------------------------------------------------------------------

    def _asked(self, message: Message, answer: Callable[[Message], None]) -> None:
        number = self._asking = int(message["call"])

        def admit() -> None:
            if self._asking != number:
                return  # it was given up meanwhile
            self._asking = None
            try:
                answer({"call": number, **self._admit(message)})
            except JournalError:
                log.exception("a model call could not be journaled")
                answer({"call": number, **_error(503, "server_error", "no evidence can be written")})

        leases, price = self._ring.node.leases, self._price(message)
        most = _plan(message, UNLIMITED).reserve
        flops = 0 if price is None else price.flops(most) + _again(message, price)
        amounts: dict[str, Amount] = {TOKENS: most, FLOPS: flops}
        account = self._origin.account
        payers = () if account.closed else Bill([account]).payers
        if account.limits_any((TOKENS, FLOPS)):
            self._ring.node.quotas.collect(payers)  # what is left for this request is what nobody uses
        lacking = [each for payer in payers for each in leases.lacking(payer, amounts)]
        if lacking:
            leases.wait(lacking, admit)
        else:
            admit()

    def _price(self, message: Message) -> Price | None:
        return self._ring.node.prices.get((self._target.run_id, str(message["model"])))

    def _admit(self, message: Message) -> Message:
        self._abandon()  # there is one at a time
        account = self._origin.account
        if account.closed or account.barred:
            return _error(403, "ended", "its call has ended: nothing more is granted to it")
        bill, price = Bill([account]), self._price(message)
        again = 0.0 if price is None else _again(message, price)
        room = account.room(TOKENS)
        if price is not None:
            if (flops := account.room(FLOPS)) is not UNLIMITED:
                affordable = price.tokens(max(0.0, flops - again))
                room = affordable if room is UNLIMITED else min(room, affordable)
            # An engine that says its price looks whether its job has room for one token, before it reads whose it is.
            room = room if room is UNLIMITED else max(0, room - 1)
        planned = _plan(message, room)
        reserved = planned.reserve if account.limits_any((TOKENS, FLOPS)) else 0
        record = self._opened(message, reserved, planned.fill)
        if price is None and (limiting := bill.limiting(FLOPS)) is not None:
            text = f"the {limiting.scope.value} has a limit of {FLOPS}, and what this model costs is not known"
            self._target.violation(self._origin, record.span_id, FLOPS, reason="unmeasured", destination=self._where)
            self._target.write(_failed(record, FLOPS, text), self._origin.identity)
            return _error(429, "insufficient_quota", text)
        exceeded = bill.reserve({TOKENS: reserved, FLOPS: 0 if price is None else price.flops(reserved) + again})
        if exceeded is not None:
            if not exceeded.report_only:
                text = str(exceeded.error())
                self._exceeded(record.span_id, exceeded)
                self._target.write(_failed(record, exceeded.kind, text), self._origin.identity)
                return _error(429, "insufficient_quota", text)
            self._exceeded(record.span_id, exceeded)
        word = new_trace_id()
        try:
            self._target.write(record, self._origin.identity, grants=True)
        except JournalError:
            bill.release()
            raise
        copies, choices = int(message["copies"]), int(message["choices"])
        self._call = _Call(int(message["call"]), record, bill, reserved, copies, choices, again, price, word)
        self._paid[word] = Paid(record.trace_id, record.span_id, bill.payers)
        return {
            "fill": planned.fill,
            "reservation": word,
            "traceparent": f"00-{record.trace_id}-{record.span_id}-01",
        }

    def _opened(self, message: Message, reserved: int, fill: int | None) -> SpanRecord:
        model = str(message["model"])
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion" if message["path"] == "/v1/completions" else "chat",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": int(message["copies"]),
            "server.address": self._model[0],
            "server.port": self._model[1],
            "url.path": str(message["path"]),
            "ray_guard.model_endpoint": True,
            "ray_guard.stream": bool(message["stream"]),
        }
        output = message["output"] if message["output"] is not None else fill
        if output is not None:
            attributes["gen_ai.request.max_tokens"] = int(output)
        if reserved:
            attributes["ray_guard.tokens.reserved"] = reserved
        if message["dropped"]:
            attributes["ray_guard.request.dropped"] = tuple(map(str, message["dropped"]))
        return SpanRecord(
            trace_id=self._origin.trace_id,
            span_id=new_span_id(),
            parent_id=self._origin.parent_id,
            name=f"chat {model[:128]}".rstrip(),
            kind=SpanKind.CLIENT,
            start_ns=time.time_ns(),
            end_ns=None,
            attributes=attributes,
            links=links_of(self._origin.link),
        )

    # -- after ---------------------------------------------------------------------------------------------------------

    def _settle(self, message: Message) -> None:
        if self._asking == message["call"]:
            self._asking = None
        call = self._call
        if call is None or call.number != message["call"]:
            return
        self._call = None
        self._paid.pop(call.word, None)
        if message.get("never"):
            call.bill.release()
            self._target.write(_failed(call.record, "cancelled", "given up before it was sent"), self._origin.identity)
            return
        attributes: dict[str, AttributeValue] = dict(call.record.attributes)
        status = message["status"]
        taken, output, bound = message["input"], message["output"], "exact"
        if taken is None and status in RELEASED and not message["error"]:
            actual = 0
        elif taken is None:
            actual, bound = call.reserved, "reserved"
        else:
            actual, bound = taken + output, "exact" if message["final"] else "lower"
            attributes |= {"gen_ai.usage.input_tokens": taken, "gen_ai.usage.output_tokens": output}
        attributes |= {"ray_guard.tokens.charged": actual, "ray_guard.tokens.bound": bound}
        flops = 0.0
        if call.price is not None:
            flops = _cost(call, call.price, actual, taken, output)
            attributes["ray_guard.flops"] = flops
        if message["cached"] is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = message["cached"]
        if message["reasons"]:
            attributes["gen_ai.response.finish_reasons"] = tuple(message["reasons"])
        for key, value in message["answered_as"].items():
            attributes[f"gen_ai.response.{key}"] = str(value)
        if message["first_ns"] is not None:
            attributes["gen_ai.latency.time_to_first_token"] = (message["first_ns"] - call.record.start_ns) / 1e9
        if status is not None:
            attributes["http.response.status_code"] = status
        text = message["error"] or (f"HTTP {status}" if status is not None and status >= 400 else "")
        if text:
            attributes["error.type"] = str(status) if not message["error"] else "cut"
        # Before anything can fail: what was computed is charged whatever becomes of the record.
        exceeded = call.bill.settle({TOKENS: actual, FLOPS: flops})
        ended = call.record._replace(
            end_ns=time.time_ns(),
            attributes=attributes,
            status=StatusCode.ERROR if text else StatusCode.UNSET,
            status_message=text,
        )
        try:
            if exceeded is not None:
                self._exceeded(call.record.span_id, exceeded)
        finally:
            self._target.write(ended, self._origin.identity)

    def _refused(self, message: Message) -> None:
        where = f"{self._where} ({message['text']})"
        self._origin.account.count_refused()
        self._target.violation(
            self._origin, self._span, "model_endpoint", reason=str(message["reason"]), destination=where
        )

    def _exceeded(self, span_id: str, exceeded: Exceeded) -> None:
        self._target.exceeded(self._origin, span_id, exceeded, self._where)

    def _abandon(self) -> None:
        """Nobody will say what a call took: it is charged as reserved."""
        if self._call is not None:
            self._settle({**_LOST, "call": self._call.number})

    def close(self) -> None:
        """The connection has ended."""
        self._asking = None
        try:
            self._abandon()
        except JournalError:
            log.exception("the end of a model call could not be journaled")


def announced(run_id: str, message: Message) -> dict[tuple[str, str], Price]:
    """What a policy actor says that its models cost. Raises BadPacket."""
    numbers = [message.get(key) for key in ("per_token", "per_context_token")]
    per_token, per_context_token = (each if isinstance(each, (int, float)) else math.nan for each in numbers)
    if not (0 < per_token < math.inf and 0 <= per_context_token < math.inf):
        raise BadPacket(f"no price: {numbers!r:.80}")
    models = message.get("models")
    if not isinstance(models, list) or len(models) > _MODELS_LIMIT:
        raise BadPacket(f"not the names of a few models: {models!r:.80}")
    return {(run_id, fields.text(name, 256)): Price(per_token, per_context_token) for name in models}


def _plan(message: Message, room: Amount | Literal[Unlimited.UNLIMITED]) -> Plan:
    return plan(int(message["prompt"]), int(message["copies"]), message["output"], message["length"], room)


def _again(message: Message, price: Price) -> float:
    return max(0, int(message["choices"]) - 1) * price.flops(int(message["prompt"]))


def _cost(call: _Call, price: Price, charged: int, taken: int | None, output: int) -> float:
    """FLOPs of what an engine has told it took, else of the tokens that are charged for it."""
    if taken is not None:
        return price.answers(taken, output, call.copies, call.choices)
    return price.flops(charged) + (call.again if charged else 0.0)


def _error(status: int, code: str, text: str) -> Message:
    return {"status": status, "code": code, "error": text}


def _failed(record: SpanRecord, kind: str, text: str) -> SpanRecord:
    attributes: dict[str, AttributeValue] = {**record.attributes, "error.type": kind}
    return record._replace(end_ns=time.time_ns(), attributes=attributes, status=StatusCode.ERROR, status_message=text)

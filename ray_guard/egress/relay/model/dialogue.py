"""One connection of a tool to the model endpoint: what is answered, what goes on, what it took. No I/O; in the mover.

    idle ──head──▶ body ──ask──▶ asked ──admitted──▶ sent ──answer──▶ idle
                                                      (or the relay answers itself)

One request is with the engine at a time; what a client sends ahead waits. The supervisor admits each before the engine
sees any of it, and is told afterwards what it took: exactly once for each that it admitted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Final

from ray_guard.egress.relay.model.answers import ANSWER_LIMIT, AnswerHead, Answers
from ray_guard.egress.relay.model.bodies import Ask, BadRequest, compose, read
from ray_guard.egress.relay.model.framing import Malformed, encode_head
from ray_guard.egress.relay.model.requests import CALLS, MODELS, Head, NotAllowed, Requests, Server
from ray_guard.egress.relay.model.usage import Stream, Usage, lengths

_AHEAD: Final = 1 << 16
"""Bytes that a client may send before its last request is answered."""
_UNSENT: Final = 1 << 18
"""Bytes of an answer that wait for the client, before more is read."""
_KNOWN_S: Final = 300.0
_KNOWN_ANEW_S: Final = 1.0
_SAYS_OR_NEVER: Final = (200, 404, 405)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_TEXT: Final = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    413: "Content Too Large",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
_ERROR_TYPES: Final = {403: "permission_error", 405: "permission_error", 429: "insufficient_quota"}
Message = dict[str, Any]


class Catalogue:
    """Which models a server has, as it said itself: shared by all connections to it."""

    def __init__(self) -> None:
        self._lengths: dict[str, int | None] = {}
        self._learnt = float("-inf")

    def learn(self, found: Mapping[str, int | None]) -> None:
        self._lengths, self._learnt = dict(found), time.monotonic()

    def knows(self, model: str) -> bool:
        """Whether it need not be asked because of ``model``."""
        age = time.monotonic() - self._learnt
        return age < (_KNOWN_S if not model or model in self._lengths or not self._lengths else _KNOWN_ANEW_S)

    def has(self, model: str) -> bool:
        """Whether the server has it; a server that does not say has every one."""
        return not model or not self._lengths or model in self._lengths

    def length(self, model: str) -> int | None:
        """The most tokens that one request may have, prompt and answer; an adapter has its base model's."""
        said = [each for each in self._lengths.values() if each is not None]
        own = self._lengths.get(model)
        return own if own is not None else max(said, default=None)


class Dialogue:
    """See the module. Whoever moves the bytes takes them out of :attr:`to_tool` and :attr:`to_engine`.

    Args:
        told: ``hosts``, ``port``, ``authority`` and ``enforced``, see :mod:`ray_guard.supervisor.model_calls`.
        catalogue: the server's.
    """

    def __init__(self, told: Mapping[str, Any], catalogue: Catalogue) -> None:
        self._authority = str(told["authority"])
        self._enforced = bool(told["enforced"])
        self._catalogue = catalogue
        server = Server(frozenset(told["hosts"]), int(told["port"]))
        self._requests = Requests(server, keeps=not self._enforced)
        self._answers = Answers()
        self.to_tool = bytearray()
        self.to_engine = bytearray()
        self.messages: list[Message] = []
        """For the supervisor, in order."""
        self.closing = False
        """Nothing more is read of the client; the connection ends when it has what is in :attr:`to_tool`."""
        self._transparent = False
        """Nothing is refused (mode ``report``), and something came that is no call of a model."""
        self._last = False
        """The connection ends with the answer that is on its way."""
        self._state = "idle"
        self._head: Head | None = None
        self._ask: Ask | None = None
        self._numbers = 0
        self._open = False
        """The supervisor has admitted a call and was not told what it took."""
        self._usage = Usage()
        self._answer: AnswerHead | None = None
        self._stream: Stream | None = None
        self._collected: bytearray | None = None
        self._first_ns: int | None = None

    # -- what may be read ----------------------------------------------------------------------------------------------

    @property
    def hears_tool(self) -> bool:
        """Whether more of the client can be taken. (While it waits for an answer too: its end must be noticed.)"""
        if self._transparent:
            return len(self.to_engine) < _UNSENT
        reading = self._state in ("idle", "body")  # a head or a body has a limit of its own, and is refused beyond it
        return not self.closing and (reading or self._requests.size < _AHEAD)

    @property
    def hears_engine(self) -> bool:
        """Whether more of the server can be taken."""
        return len(self.to_tool) < _UNSENT

    @property
    def size(self) -> int:
        """Bytes that are held for this connection."""
        return (
            self._requests.size
            + self._answers.size
            + len(self.to_tool)
            + len(self.to_engine)
            + len(self._collected or b"")
        )

    # -- the client ----------------------------------------------------------------------------------------------------

    def from_tool(self, data: bytes) -> None:
        if self._transparent:
            self.to_engine += data
            return
        self._requests.feed(data)
        self._go_on()

    def tool_ended(self) -> bool:
        """The client has closed, or half of it: the engine, too, takes that for one that has gone away.

        Whether it has left a request behind.
        """
        leaves = self._state != "idle"
        if leaves:
            self.abandon()
        self.closing = True
        return leaves

    def _go_on(self) -> None:
        """Reads requests as far as the client's turn goes."""
        try:
            while not self.closing and not self._transparent:
                if self._state == "idle":
                    self._head = self._requests.head()
                    if self._head is None:
                        return
                    self._state = "body"
                    if self._head.expects and self._head.length != 0:
                        self.to_tool += _CONTINUE
                elif self._state == "body":
                    body = self._requests.body()
                    if body is None:
                        return
                    self._asks(body)
                else:
                    return
        except Malformed as fault:
            self._refuse(413 if fault.reason == "body_too_large" else 400, fault.reason, str(fault), last=True)
        except NotAllowed as fault:
            self._refuse(405 if fault.reason == "method_not_allowed" else 403, fault.reason, str(fault), last=True)

    def _asks(self, body: bytes) -> None:
        """A request is whole."""
        head = self._now()
        self._ask = None
        if head.path not in CALLS:
            self._send_on(head, b"")
            return
        try:
            self._ask = read(head.path, body)
        except BadRequest as fault:
            if self._enforced:
                self._error(400, "invalid_request_error", str(fault), param=fault.param)
            else:
                self._refuse(400, "unreadable", str(fault), last=False)
            return
        except NotAllowed as fault:
            self._refuse(403, fault.reason, str(fault), last=False)
            return
        if self._catalogue.knows(self._ask.model):
            self._seek_admission(self._ask)
        else:
            self._state = "learning"
            self._write_request("GET", MODELS, head, b"")

    def _seek_admission(self, ask: Ask) -> None:
        if self._enforced and not self._catalogue.has(ask.model):  # a server may load what it is asked for
            self._error(404, "model_not_found", f"the server has no model {ask.model!r}", param="model")
            return
        self._state = "asked"
        self._numbers += 1
        message = {"op": "ask", "call": self._numbers, "path": ask.path, "model": ask.model, "stream": ask.stream}
        limits = {"prompt": ask.prompt, "choices": ask.choices, "copies": ask.copies, "output": ask.output}
        found = {"length": self._catalogue.length(ask.model), "dropped": list(ask.dropped)}
        self.messages.append({**message, **limits, **found})

    def answered(self, answer: Message) -> None:
        """The supervisor's answer to the last request."""
        if self._state != "asked" or self._ask is None or answer.get("call") != self._numbers:
            return  # it was abandoned meanwhile
        if "error" in answer:
            self._error(int(answer["status"]), str(answer["code"]), str(answer["error"]))
            self._go_on()
            return
        self._open = True
        self._usage = Usage()
        fill = answer["fill"]
        more = {"traceparent": str(answer["traceparent"]), "x-ray-guard-reservation": str(answer["reservation"])}
        self._send_on(self._now(), compose(self._ask, fill), more)

    def _now(self) -> Head:
        assert self._head is not None  # noqa: S101 - for the type checker
        return self._head

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _send_on(self, head: Head, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self._state = "sent"
        self._write_request(head.method, head.path, head, body, more)

    def _write_request(
        self, method: str, path: str, head: Head, body: bytes, more: Mapping[str, str] | None = None
    ) -> None:
        """Every byte of it is ours: the method and path are of the list, the body was written anew."""
        named = {"Host": self._authority, "User-Agent": "ray-guard", "Accept-Encoding": "identity", "Accept": "*/*"}
        if head.authorization is not None:
            named["Authorization"] = head.authorization.decode("latin-1")
        if method == "POST":
            named |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.to_engine += encode_head(f"{method} {path} HTTP/1.1", {**named, **(more or {})}) + body

    def from_engine(self, data: bytes) -> None:
        if self._transparent:
            self.to_tool += data
            return
        self._answers.feed(data)
        try:
            self._hear_engine()
        except Malformed as fault:
            self._broken(str(fault))
        self._go_on()

    def _hear_engine(self) -> None:
        if self._state not in ("sent", "learning"):
            raise Malformed("malformed_answer", "the server answers what was not asked")
        if self._answer is None:
            self._answer = self._answers.head()
            if self._answer is None:
                return
            self._begin_answer(self._answer)
        self._take_body(self._answers.body())
        if self._answers.done:
            self._end_answer(self._answer)

    def _begin_answer(self, answer: AnswerHead) -> None:
        ask = self._ask
        streams = answer.content_type.startswith("text/event-stream")
        if self._state == "sent" and streams and ask is not None:
            self._stream = Stream(self._usage, keep_last=ask.usage, keep_each=ask.each_usage)
            self._write_head(answer, None)
        else:
            self._collected = bytearray()

    def _take_body(self, data: bytes) -> None:
        if self._stream is not None:
            passed = self._stream.feed(data)
            if self._stream.begun and self._first_ns is None:
                self._first_ns = time.time_ns()
            self._write_part(passed)
        elif self._collected is not None:
            self._collected += data
            if len(self._collected) > ANSWER_LIMIT:
                raise Malformed("malformed_answer", f"an answer has at most {ANSWER_LIMIT} bytes")

    def _end_answer(self, answer: AnswerHead) -> None:
        self._answers.next()
        collected, self._collected = bytes(self._collected or b""), None
        if self._state == "learning":
            self._learnt(answer, collected)
            return
        if self._stream is not None:
            self._write_part(self._stream.rest())
            self._write_end()
        else:
            if self._ask is not None:
                self._usage.body(collected)
            elif self._now().path == MODELS and answer.status == 200:
                self._catalogue.learn(lengths(collected))
            self._write_head(answer, len(collected))
            self.to_tool += collected
        self._called(answer.status)
        self._next()

    def _learnt(self, answer: AnswerHead, collected: bytes) -> None:
        """The server has said which models it has, or that it does not say."""
        self._answer = None
        assert self._ask is not None  # noqa: S101 - for the type checker
        if answer.status in _SAYS_OR_NEVER:
            self._catalogue.learn(lengths(collected) if answer.status == 200 else {})
            if answer.keep:
                self._seek_admission(self._ask)
                return
        # Nothing is concluded from any other answer: a client that gives a wrong key must not make a server a blank.
        self.closing = self.closing or not answer.keep
        status = answer.status if answer.status >= 400 and answer.keep else 503
        self._error(status, "server_error", f"asked for its models, the server answers {answer.status}: try again")

    def engine_ended(self) -> None:
        """The server has closed."""
        if self._state == "asked":
            self.abandon()
        if self._answer is not None and self._answers.close():
            self._end_answer(self._answer)
        if self._state in ("sent", "learning"):
            self._broken("the engine's server closed the connection")
        self.closing = True

    def _broken(self, why: str) -> None:
        """The server's answer cannot be passed on to its end."""
        begun = self._stream is not None
        self._called(None, error=why)
        if not begun:
            self._error(502, "bad_gateway", why)
        self.closing = True  # a stream is cut short: its last chunk is missing

    # -- answers to the client -----------------------------------------------------------------------------------------

    def _write_head(self, answer: AnswerHead, length: int | None) -> None:
        """``length`` None: chunked, or to the end of the connection where the client is old."""
        head = self._now()
        named = {"Content-Type": answer.content_type}
        if length is not None:
            named["Content-Length"] = str(length)
        elif head.version == b"HTTP/1.1":
            named["Transfer-Encoding"] = "chunked"
        else:
            self._last = True
        if answer.retry_after is not None:
            named["Retry-After"] = answer.retry_after
        if self._ask is not None and self._ask.dropped:
            named["x-ray-guard-dropped"] = ", ".join(each for each in self._ask.dropped if _is_plain(each))
        self._last = self._last or not (head.keep and answer.keep)
        if self._last:
            named["Connection"] = "close"
        self.to_tool += encode_head(f"HTTP/1.1 {answer.status} {_STATUS_TEXT.get(answer.status, 'Answer')}", named)

    def _write_part(self, data: bytes) -> None:
        if data:
            chunked = self._now().version == b"HTTP/1.1"
            self.to_tool += b"%x\r\n%b\r\n" % (len(data), data) if chunked else data

    def _write_end(self) -> None:
        if self._now().version == b"HTTP/1.1":
            self.to_tool += b"0\r\n\r\n"

    def _error(self, status: int, code: str, text: str, *, param: str | None = None) -> None:
        """The relay's own answer, as the OpenAI API words errors."""
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error = {"message": f"ray_guard: {text}", "type": kind, "param": param, "code": code}
        body = json.dumps({"error": error}).encode()
        named = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if status == 429:
            named["x-should-retry"] = "false"  # it would not be another answer
        self.closing = self.closing or self._head is None or not self._head.keep
        if self.closing:
            named["Connection"] = "close"
        self.to_tool += encode_head(f"HTTP/1.1 {status} {_STATUS_TEXT.get(status, 'Error')}", named) + body
        self._next()

    def _refuse(self, status: int, reason: str, text: str, *, last: bool) -> None:
        """Answers, and says so to the supervisor; ``last``: what follows on the connection is not read."""
        self.messages.append({"op": "refused", "reason": reason, "text": text[:300]})
        if not self._enforced:  # from here on nobody reads along
            self._transparent = True
            self.to_engine += self._requests.give_up()
            return
        self.closing = self.closing or last
        self._error(status, reason, text)

    def refuse_busy(self) -> None:
        """There is no memory for what it sends."""
        self.closing = True
        if self._state in ("idle", "body"):
            self._error(503, "server_error", "too much is held for model calls: try again")
        else:
            self.abandon()

    def _next(self) -> None:
        self._requests.next()
        self.closing = self.closing or self._last
        self._state, self._head, self._ask, self._answer = "idle", None, None, None
        self._stream, self._collected, self._first_ns = None, None, None

    # -- what it took --------------------------------------------------------------------------------------------------

    def _called(self, status: int | None, *, error: str = "") -> None:
        if not self._open:
            return
        self._open = False
        usage, ask = self._usage, self._ask
        single = ask is not None and ask.copies <= 1024 and (ask.path != "/v1/completions" or ask.copies == 1)
        seen = usage.final or (usage.input is not None and single)
        self.messages.append(
            {
                "op": "called",
                "call": self._numbers,
                "status": status if status is not None or self._answer is None else self._answer.status,
                "input": usage.input if seen else None,
                "output": usage.output if seen else None,
                "cached": usage.cached,
                "final": usage.final,
                "reasons": usage.reasons,
                "answered_as": usage.answered_as,
                "first_ns": self._first_ns,
                "error": error,
            }
        )

    def abandon(self) -> None:
        """Nobody waits for the answer any more, or nobody may."""
        if self._state == "asked":  # it may be admitted at this moment
            self.messages.append({"op": "called", "call": self._numbers, "never": True})
        self._called(None, error="cut")
        self._state = "over"
        self.closing = True


def _is_plain(name: str) -> bool:
    return name.isascii() and name.isidentifier()

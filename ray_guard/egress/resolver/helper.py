"""The helper that reads and writes DNS messages and asks upstream: a process of its own, under the supervisor.

Runs in the resolver's helper. The supervisor holds no dnspython, and decides: a query comes as bytes, goes back as a
question, and only what the supervisor then says is done with it. Each line is one packet of JSON:

    supervisor → helper   read {id, message}                          bytes that a target sent
    helper → supervisor   question {id, name, type}                   what they ask
                          answer {id, message}                        they are no question; message null: say nothing
    supervisor → helper   resolve {id, name, type, datagram}          ask upstream for the (canonical) name
                          forward {id, datagram}                      pass it on as it is, and the answer too
                          answer {id, rcode, addresses, datagram}     answer so, without asking anybody
    helper → supervisor   answer {id, message, addresses, ttl, cached}
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
import socket
import sys
from collections import OrderedDict
from typing import Any, Final

from ray_guard.egress.resolver import messages
from ray_guard.egress.resolver.upstream import Found, Upstream
from ray_guard.kernel import libc, seqpacket

log = logging.getLogger("ray_guard.resolver")

_QUESTIONS_KEPT: Final = 4096
_VERSIONS: Final = {"A": 4, "AAAA": 6}


class Helper:
    """See the module. ``line``: the socket to the supervisor; its end is this process's."""

    def __init__(self, line: socket.socket, upstream: Upstream) -> None:
        self._line = line
        self._upstream = upstream
        self._questions: OrderedDict[int, messages.Question] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Serves until the supervisor hangs up."""
        self._tell({"op": "ready", "search": self._upstream.search})
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line, self._ready)
        await self._over.wait()
        loop.remove_reader(self._line)

    def _ready(self) -> None:
        try:
            received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError, seqpacket.BadPacket):
            return
        except OSError:
            received = None
        if received is None:
            self._over.set()
            return
        message, descriptors = received
        seqpacket.close_all(descriptors)
        number = int(message["id"])
        if message["op"] == "read":
            self._read(number, base64.b64decode(message["message"]))
            return
        question = self._questions.pop(number, None)
        if question is None:
            return
        if message["op"] in ("resolve", "forward"):
            work = self._resolve if message["op"] == "resolve" else self._forward
            task = asyncio.ensure_future(work(number, question, message))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        else:
            given = tuple(str(address) for address in message["addresses"])
            self._found(number, question, Found(str(message["rcode"]), given, cached=True), message)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a query failed", exc_info=error)

    async def _resolve(self, number: int, question: messages.Question, message: dict[str, Any]) -> None:
        found = await self._upstream.resolve(message["name"], message["type"])
        self._found(number, question, found, message)

    async def _forward(self, number: int, question: messages.Question, message: dict[str, Any]) -> None:
        reply = await self._upstream.forward(question.message)
        if reply is None:
            self._found(number, question, Found("SERVFAIL", cached=True), message)
        else:
            self._answer(number, messages.fitted(question, reply.to_wire(), datagram=bool(message["datagram"])))

    def _found(self, number: int, question: messages.Question, found: Found, message: dict[str, Any]) -> None:
        version = _VERSIONS.get(question.type)
        addresses = [each for each in found.addresses if ipaddress.ip_address(each).version == version]
        wire = messages.answer(question, found.rcode, addresses, found.ttl, datagram=bool(message["datagram"]))
        self._answer(number, wire, addresses=addresses, ttl=found.ttl, cached=found.cached)

    def _read(self, number: int, data: bytes) -> None:
        question = messages.read(data)
        if not isinstance(question, messages.Question):
            self._answer(number, question)
            return
        self._questions[number] = question
        if len(self._questions) > _QUESTIONS_KEPT:
            self._questions.popitem(last=False)
        self._tell({"op": "question", "id": number, "name": question.name, "type": question.type})

    def _answer(self, number: int, wire: bytes | None, **more: Any) -> None:
        encoded = None if wire is None else base64.b64encode(wire).decode()
        self._tell({"op": "answer", "id": number, "message": encoded, **more})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            seqpacket.send(self._line, message)
        except OSError as error:
            log.warning("the supervisor was not told: %s", error)


def main() -> None:
    """Its one argument is the descriptor of its line; the first packet there is ``{resolv_conf}``, the file's text."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    libc.prctl(libc.PR_SET_DUMPABLE, 0)  # what it says makes an address an allowed name's: nobody may write its memory
    with socket.socket(fileno=int(sys.argv[1])) as line:
        told = seqpacket.receive(line)
        if told is not None:
            asyncio.run(Helper(line, Upstream(str(told[0]["resolv_conf"]))).run())


if __name__ == "__main__":
    main()

"""DNS messages: what a target asks, and what it is answered. Pure; runs in the resolver's helper, imports dnspython.

Whatever bytes a target sends, they lead to a question, to an answer that refuses them, or to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

_HEADER: Final = 12
_DATAGRAM: Final = 512
"""What every resolver takes in one datagram (RFC 1035); more where it says so (EDNS)."""
_QR: Final = 0x80


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a target.

    ``name`` is the name as text without its trailing dot, odd bytes escaped (``\\000``, ``\\.``); ``type`` is a
    mnemonic (``A``, ``TYPE65400``).
    """

    message: dns.message.Message
    name: str
    type: str


def read(data: bytes) -> Question | bytes | None:
    """The question in ``data``; an answer that says why there is none; or None: not to be answered at all."""
    if len(data) < _HEADER or data[2] & _QR:  # an answer to an answer could go on for ever
        return None
    if data[2] >> 3 != dns.opcode.QUERY:
        return failure(data, dns.rcode.NOTIMP)
    try:
        message = dns.message.from_wire(data)
        if len(message.question) != 1 or message.answer or message.authority:
            return failure(data, dns.rcode.FORMERR)
        asked = message.question[0]
        if message.edns > 0:
            return _answer(message, dns.rcode.BADVERS, [])
        if asked.rdclass != dns.rdataclass.IN:
            return _answer(message, dns.rcode.REFUSED, [])
        return Question(message, asked.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(asked.rdtype))
    except Exception:  # noqa: BLE001 - hostile bytes: whatever goes wrong over them, they are malformed
        return failure(data, dns.rcode.FORMERR)


def failure(data: bytes, rcode: int) -> bytes:
    """A bare answer to a query that was not understood: its id and opcode, and why not."""
    return data[:2] + bytes([_QR | data[2] & 0x79, _QR | rcode & 0xF]) + bytes(8)


def answer(question: Question, rcode: str, addresses: Sequence[str], ttl: int, *, datagram: bool) -> bytes:
    """The answer to ``question``: these addresses under the very name that was asked for, whatever aliases led there.

    Args:
        rcode: a mnemonic, ``NOERROR`` or ``NXDOMAIN``.
        addresses: of the family that was asked for.
        ttl: seconds.
        datagram: it goes as one; where it does not fit it says so (TC), and is asked for again by stream.
    """
    return fitted(question, _answer(question.message, dns.rcode.from_text(rcode), addresses, ttl), datagram=datagram)


def fitted(question: Question, wire: bytes, *, datagram: bool) -> bytes:
    """``wire``, or an answer that says it does not fit a datagram."""
    room = max(_DATAGRAM, question.message.payload) if question.message.edns >= 0 else _DATAGRAM
    if not datagram or len(wire) <= room:
        return wire
    return _answer(question.message, dns.rcode.NOERROR, [], truncated=True)


def _answer(
    message: dns.message.Message, rcode: int, addresses: Sequence[str], ttl: int = 0, *, truncated: bool = False
) -> bytes:
    reply = dns.message.make_response(message, recursion_available=True)
    reply.set_rcode(dns.rcode.Rcode(rcode))
    if truncated:
        reply.flags |= dns.flags.TC
    if addresses:
        asked = message.question[0]
        reply.answer.append(dns.rrset.from_text_list(asked.name, ttl, "IN", asked.rdtype, list(addresses)))
    return reply.to_wire(max_size=0xFFFF)

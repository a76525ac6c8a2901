"""target: what a span is made of (ids, attribute values, hashes) and the two messages that carry it to the supervisor.

Our spans are plain messages, not OpenTelemetry SDK spans, for three reasons that were measured. A batch processor
loses everything queued when the process is killed (300 of 300), a sampler of the user's must not decide what is
evidence, and the SDK span alone costs more than both messages together. What OpenTelemetry gets to see is the business
of :mod:`ray_guard.client.mirror`.

Nothing in here raises because a value is bad: an attribute that cannot be written is written as what can be said about
it, and a span is never dropped for its attributes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from json.encoder import encode_basestring_ascii
from typing import Any

from ray_guard.evidence.redact import MARGIN, redact

TEXT_LIMIT = 8192
"""Characters kept of one text attribute (tool content included)."""

NAME_LIMIT = 256
"""Characters kept of a tool, model or agent name."""

EVENT_LIMIT = 128
"""Events kept of one span: the last ones."""

EVENT_ATTRIBUTE_LIMIT = 32
EVENT_TEXT_LIMIT = 1024

ATTRIBUTE_LIMIT = 128
"""Attributes kept of one span: the first ones."""

PACKET_LIMIT = 120_000
"""Bytes of one message; the channel's packets hold 128 KiB."""

ATTRIBUTES_LIMIT = 96_000
"""Bytes of the attributes in one ``open`` message, which leaves room for names, identity, links and budget."""

_LIST_LIMIT = 128
_CHUNK = 65_536
_INT64 = 2**63

Value = str | bool | int | float | list[str | bool | int | float]
Event = tuple[str, int, dict[str, Value]]
Ids = tuple[str, str]
"""Trace and span."""
Link = Ids | tuple[str, str, str]
"""Trace, span, and what the link leads to (:data:`ray_guard.records.LINK`) where that is not an iteration."""

logger = logging.getLogger("ray_guard")
_warned: set[str] = set()


def warn_once(topic: str, text: str) -> None:
    """Logs `text` with the exception being handled, the first time `topic` comes up in this process.

    Observers are switched off or carry on after a failure; they never break what they observe.
    """
    if topic not in _warned:
        _warned.add(topic)
        logger.warning(text, exc_info=True)  # noqa: LOG014 - called from handlers


def say_once(topic: str, text: str) -> None:
    """As :func:`warn_once`, where no exception is being handled."""
    if topic not in _warned:
        _warned.add(topic)
        logger.warning(text)


# --- attribute values ---------------------------------------------------------------------------------------------


def clean_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """`text` cut to `limit` characters and made writable as UTF-8 (lone surrogates become ``?``)."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def clean_event(attributes: Mapping[str, object] | None) -> dict[str, Value]:
    """An event's attributes: the first 32, texts cut to 1024 characters, because a span may hold many events."""
    if not attributes:
        return {}
    return {
        clean_text(str(key), NAME_LIMIT): clean_text(value, EVENT_TEXT_LIMIT)
        if isinstance(value, str)
        else clean(value)
        for key, value in islice(attributes.items(), EVENT_ATTRIBUTE_LIMIT)
    }


def clean(value: object) -> Value:
    """An attribute value that OTLP and JSON can carry, whatever was given.

    Numbers that JSON lacks become text (``"nan"``), integers beyond 64 bits too; NumPy and torch scalars become the
    number they hold; anything else becomes its type's name, because a ``repr`` can be huge, secret or raise.
    """
    if isinstance(value, (list, tuple)):
        return [_clean_scalar(item) for item in value[:_LIST_LIMIT]]
    return _clean_scalar(value)


def _clean_scalar(value: object) -> str | bool | int | float:
    if type(value) is str:
        return clean_text(value)
    if value is True or value is False:
        return value
    try:
        if isinstance(value, int):  # IntEnum and the like included
            number = int(value)
            return number if -_INT64 <= number < _INT64 else clean_text(str(number))
        if isinstance(value, float):
            real = float(value)
            return real if math.isfinite(real) else str(real)
        if isinstance(value, str):
            return clean_text(str.__str__(value))
        if isinstance(value, os.PathLike):
            return clean_text(os.fsdecode(value))
        item = getattr(value, "item", None)
        if callable(item) and getattr(value, "shape", None) == ():
            held = item()
            if isinstance(held, (bool, int, float, str)):
                return _clean_scalar(held)
    except Exception:  # noqa: BLE001
        # Digits beyond sys.int_info.str_digits_check_threshold, a broken __str__, a property that raises.
        return clean_text(type_name(type(value)), NAME_LIMIT)
    return clean_text(type_name(type(value)), NAME_LIMIT)


def type_name(kind: type) -> str:
    """``ValueError``, ``package.module.Name``: as in the attribute ``error.type``."""
    module = getattr(kind, "__module__", None)
    name = str(getattr(kind, "__qualname__", "unknown"))
    return name if module in (None, "builtins") else f"{module}.{name}"


def is_cancelled(error: BaseException) -> bool:
    """Whether `error` says that a task was cancelled."""
    asyncio = sys.modules.get("asyncio.exceptions")  # who has not loaded it has no tasks
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


def describe_exception(error: BaseException, time_ns: int) -> tuple[dict[str, Value], str, Event]:
    """Attributes, status message and the ``exception`` event of a span that ended by `error`."""
    name = clean_text(type_name(type(error)), NAME_LIMIT)
    try:
        message = clean_text(redact(str(error)[: TEXT_LIMIT + MARGIN]))
    except Exception:  # noqa: BLE001
        message = ""  # its __str__ raises; the type still says what it was
    details: dict[str, Value] = {"exception.type": name, "exception.message": message}
    try:
        # No source lines (lookup_lines) and no locals: reading files here would be work the tool pays for.
        summary = traceback.StackSummary.extract(
            traceback.walk_tb(error.__traceback__), limit=-16, lookup_lines=False, capture_locals=False
        )
        details["exception.stacktrace"] = clean_text(
            "".join(f'  File "{f.filename}", line {f.lineno}, in {f.name}\n' for f in summary) + name
        )
    except Exception:  # noqa: BLE001 - the span matters more
        warn_once("stacktrace", "ray_guard: no stack trace for an exception in a span")
    return {"error.type": name}, message, ("exception", time_ns, details)


# --- canonical arguments ------------------------------------------------------------------------------------------


def _by_type(value: object) -> object:
    """What stands for a value that JSON lacks: its content where that is bytes, else its type.

    Never its repr: that holds addresses, so that equal calls would hash differently.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return dict(value)
    return {"$type": type_name(type(value))}


def _encoder(*, sort_keys: bool, default: Callable[[Any], Any] | None) -> Callable[[Any], str]:
    """Compact ASCII JSON of a value, by ``json``'s own C encoder, made once.

    ``JSONEncoder.encode`` makes a new one for each value, which costs as much as encoding the few attributes of a span.
    """
    public = json.JSONEncoder(sort_keys=sort_keys, separators=(",", ":"), default=default, check_circular=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    try:
        # No set of markers: a cycle ends in RecursionError instead of ValueError.
        direct = make(None, public.default, encode_basestring_ascii, None, ":", ",", sort_keys, False, True)
        probe = {"b": [1, None, "é"], "a": 0.5}
        if "".join(direct(probe, 0)) != public.encode(probe):
            return public.encode
    except (TypeError, AttributeError):
        return public.encode  # another interpreter, or a later signature

    join = "".join

    def encode(value: Any) -> str:
        return join(direct(value, 0))

    return encode


_canonical = _encoder(sort_keys=True, default=_by_type)


def canonical(value: object) -> str:
    """Canonical JSON: ``json.dumps(value, sort_keys=True, separators=(",", ":"))``, for JSON values exactly that.

    Anything else inside stands by its type (see :func:`_by_type`); what cannot be walked at all (cycles, keys of mixed
    types, extreme depth) stands by the type of each top-level value.
    """
    try:
        return _canonical(value)
    except (TypeError, ValueError, RecursionError):
        pass  # not canonical JSON as a whole: say what can be said about each part
    if isinstance(value, Mapping):
        parts = []
        for key in sorted(value, key=str):
            try:
                part = _canonical(value[key])
            except (TypeError, ValueError, RecursionError):
                part = _canonical({"$type": type_name(type(value[key]))})
            parts.append(f"{encode_basestring_ascii(str(key))}:{part}")
        return "{" + ",".join(parts) + "}"
    return _canonical({"$type": type_name(type(value))})


def arguments_digest(arguments: object) -> str:
    """SHA-256, in hex, of the canonical JSON of a call's arguments.

    Reproducible anywhere for JSON arguments:
    ``sha256(json.dumps(arguments, sort_keys=True, separators=(",", ":")).encode()).hexdigest()``.
    A long text among the arguments is hashed in pieces of 64 KiB, not copied whole.
    """
    if isinstance(arguments, dict):
        for value in arguments.values():
            if isinstance(value, str) and len(value) > _CHUNK:
                digest = hashlib.sha256()
                for piece in _pieces(arguments):
                    digest.update(piece.encode("ascii"))
                return digest.hexdigest()
    return hashlib.sha256(canonical(arguments).encode("ascii")).hexdigest()


def _pieces(arguments: dict[Any, Any]) -> Iterator[str]:
    """:func:`canonical` of a dict whose top level holds long texts, piece by piece."""
    if not all(type(key) is str for key in arguments):
        yield canonical(arguments)
        return
    opening = "{"
    for key in sorted(arguments):
        value = arguments[key]
        yield f"{opening}{encode_basestring_ascii(key)}:"
        opening = ","
        if isinstance(value, str) and len(value) > _CHUNK:
            yield '"'
            for at in range(0, len(value), _CHUNK):
                yield encode_basestring_ascii(value[at : at + _CHUNK])[1:-1]
            yield '"'
        else:
            yield canonical(value)
    yield "}"


# --- messages -----------------------------------------------------------------------------------------------------

# Assembled by hand around cached fragments: json.dumps of the whole dict costs thrice as much, per message, under the
# GIL of an actor that may run a hundred episodes in threads. ids are hex and need no escaping.
to_json = _encoder(sort_keys=False, default=None)
"""Compact ASCII JSON of values that :func:`clean` made."""

quote = encode_basestring_ascii
"""A text as a JSON string, in ASCII."""


def open_message(
    *,
    span: str,
    trace: str,
    parent: str | None,
    scope: str,
    name: str,
    kind: int,
    start_ns: int,
    attributes_json: str,
    identity_json: str,
    links: Sequence[Link] = (),
    episode: str | None = None,
    budget: Mapping[str, Any] | None = None,
) -> bytes:
    """The ``open`` message: a span has begun."""
    return (
        f'{{"op":"open","span":"{span}","trace":"{trace}","parent":{_id(parent)},"scope":"{scope}",'
        f'"name":{quote(name)},"kind":{kind},"start":{start_ns},"attributes":{attributes_json},'
        f'"identity":{identity_json},"links":{to_json(links) if links else "[]"},"episode":{_id(episode)},'
        f'"budget":{to_json(budget) if budget else "null"}}}'
    ).encode("ascii")


def close_message(
    *,
    span: str,
    end_ns: int,
    attributes: Mapping[str, Value],
    status: int = 0,
    message: str = "",
    events: Sequence[Event] = (),
) -> bytes:
    """The ``close`` message: a span has ended; `attributes` are additions."""
    if not (attributes or events or status or message):  # most of them
        text = f'{{"op":"close","span":"{span}","end":{end_ns},"attributes":{{}},"status":0,"message":"","events":[]}}'
        return text.encode("ascii")

    def packet_of(attributes: Mapping[str, Value], message: str, events: Sequence[Event]) -> bytes:
        return (
            f'{{"op":"close","span":"{span}","end":{end_ns},"attributes":{to_json(attributes)},'
            f'"status":{status},"message":{quote(message)},"events":{to_json(events)}}}'
        ).encode("ascii")

    packet = packet_of(attributes, message, events)
    if len(packet) <= PACKET_LIMIT:
        return packet
    few = [(clean_text(name, 128), time_ns, shrink(details, 8)) for name, time_ns, details in events[-4:]]
    return packet_of(shrink(attributes), clean_text(message, 512), few)


def attributes_json(attributes: Mapping[str, Value]) -> str:
    """Attributes for :func:`open_message`, sure to fit into its packet with everything else."""
    text = to_json(attributes) if attributes else "{}"
    return text if len(text) <= ATTRIBUTES_LIMIT else to_json(shrink(attributes))


def _id(value: str | None) -> str:
    return "null" if value is None else f'"{value}"'


def shrink(attributes: Mapping[str, Value], count: int = 48) -> dict[str, Value]:
    """The first `count` attributes, texts cut to 128 characters, lists to their length: sure to fit, and says so."""
    small: dict[str, Value] = {}
    for key, value in list(attributes.items())[:count]:
        if isinstance(value, list):
            small[clean_text(key, 128)] = f"{len(value)} items"
        else:
            small[clean_text(key, 128)] = clean_text(value, 128) if isinstance(value, str) else value
    small["ray_guard.truncated"] = True
    return small

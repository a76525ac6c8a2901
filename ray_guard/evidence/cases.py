"""What the lines of a journal give cause to say: findings about their processes and flows. Runs in the judge.

Standard library only, but for Sigma rules, which pySigma reads where a policy names some. What is remembered of
processes, flows and findings is bounded.
"""

from __future__ import annotations

import functools
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ray_guard.detect import OTHER, UNJUDGED, Finding, Kind, commands
from ray_guard.detect.flows import Flow, Flows
from ray_guard.errors import RayGuardError
from ray_guard.evidence.otlp import NotOtlp, decode, resource_key
from ray_guard.records import IDENTITY, LINK, PARENT, AttributeValue, Resource, Source, SpanRecord

if TYPE_CHECKING:
    from ray_guard.detect.sigma import Rule

_TOLD: Final = (*IDENTITY, "ray_guard.source")
_PROGRAMS: Final = 1 << 16
_SAID: Final = 1 << 14
_JUDGED: Final = 1024

Case = dict[str, Any]
"""A finding as it is told to the supervisor: see :mod:`ray_guard.evidence.judge`."""


class _Program(NamedTuple):
    """``call``: the id of the innermost span above it that is no program's; ``image``: its path."""

    call: str
    image: str


class _Said(NamedTuple):
    """``rules``: the digest of the Sigma rules that say it; empty: one of our own does."""

    kind: str
    rule: str
    rules: str = ""


class Cases:
    """Judges line after line, and says everything once."""

    def __init__(self) -> None:
        self._flows = Flows()
        self._programs: OrderedDict[str, _Program] = OrderedDict()
        """By span."""
        self._said: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._rules: dict[str, list[Rule]] = {}
        """By their digest."""
        self._judge = self._judging()
        self.spans = 0
        """How many were read, whatever was said of them."""

    def take(self, path: str) -> dict[str, str]:
        """Has commands judged by the Sigma rules there too: their digest, or the error."""
        from ray_guard.detect import sigma  # pySigma, and few ask for it

        try:
            digest = sigma.digest(Path(path))
            rules = sigma.load([Path(path)])
        except RayGuardError as error:
            return {"error": str(error)}
        self._rules[digest] = rules
        self._judge = self._judging()
        return {"digest": digest}

    def of(self, line: bytes) -> Iterator[Case]:
        """What there is to say of a line."""
        for resource, record in _decoded(line):
            self.spans += 1
            if record.attributes.get("ray_guard.source") == Source.TARGET.value:
                continue  # what a target says of itself is no ground for anything
            if record.name.startswith("process "):
                yield from self._of_program(resource, record)
            elif record.name == "egress connect":
                yield from self._of_flow(resource, record)

    def _of_program(self, resource: Resource, record: SpanRecord) -> Iterator[Case]:
        if record.span_id in self._programs:
            return  # it was judged when it began
        words, path = (record.attributes.get(f"process.{key}") for key in ("command_args", "executable.path"))
        above = self._programs.get(_above(record))
        call = self._call_of(record)
        self._programs[record.span_id] = _Program(call, str(path or ""))
        if len(self._programs) > _PROGRAMS:
            self._programs.popitem(last=False)
        argv = tuple(map(str, words)) if isinstance(words, tuple | list) else ()
        for said in self._judge(argv, str(path or ""), "" if above is None else above.image):
            if self._is_new(record.span_id, said):
                yield _case(resource, record, said, call)

    def _of_flow(self, resource: Resource, record: SpanRecord) -> Iterator[Case]:
        call = self._call_of(record)
        found = self._flows.judge(call or record.trace_id, _flow(record)) or _offence(record)
        if found is None or not self._is_new(call or record.trace_id, said := _Said(found.kind.value, found.rule)):
            return
        above = _above(record)
        program = above if above in self._programs else ""
        yield {**_case(resource, record, said, call), "process": program}

    def of_command(self, asked: Mapping[str, Any]) -> Iterator[Case]:
        """What there is to say of a program that has no span: it is told below the one that its process had before."""
        for said in self._judge(tuple(map(str, asked["argv"])), str(asked["path"]), ""):
            if self._is_new(asked["call"] or asked["trace"], said):
                yield _unrecorded(asked, said)

    def unjudged(self, line: bytes) -> Iterator[Case]:
        """What there is to say of a line that could not be judged."""
        for resource, record in _decoded(line):
            said = _Said(UNJUDGED, UNJUDGED)
            if self._is_new(record.span_id, said):
                yield _case(resource, record, said, self._call_of(record))

    def unjudged_command(self, asked: Mapping[str, Any]) -> Iterator[Case]:
        """See :meth:`unjudged`."""
        yield _unrecorded(asked, _Said(UNJUDGED, UNJUDGED))

    def _judging(self) -> Callable[[Sequence[str], str, str], Sequence[_Said]]:
        """How commands are judged by the rules there are; an agent runs the same few over and over."""
        rules = dict(self._rules)
        return functools.lru_cache(_JUDGED)(functools.partial(_judged, rules))

    def _call_of(self, record: SpanRecord) -> str:
        above = _above(record)
        program = self._programs.get(above)
        return above if program is None else program.call

    def _is_new(self, whose: str, said: _Said) -> bool:
        key = (whose, said.rule, said.rules)
        if key in self._said:
            return False
        self._said[key] = None
        if len(self._said) > _SAID:
            self._said.popitem(last=False)
        return True


def _judged(rules: Mapping[str, Sequence[Rule]], argv: Sequence[str], image: str, above: str) -> Sequence[_Said]:
    text = shlex.join(argv) if argv else image
    found = commands.judge(text)
    said = [] if found is None else [_Said(found.kind.value, found.rule)]
    if rules:
        from ray_guard.detect import sigma

        told = {"Image": image, "CommandLine": " ".join(argv) or image, "ParentImage": above}
        events = [told, *sigma.events(text)]
        for digest, each in rules.items():
            hits = [rule for rule in each if any(map(rule.matches, events))]
            said += [_Said(OTHER if rule.kind is None else rule.kind.value, rule.name, digest) for rule in hits]
    return said


def _decoded(line: bytes) -> list[tuple[Resource, SpanRecord]]:
    try:
        return decode(line)
    except NotOtlp:
        return []


def _above(record: SpanRecord) -> str:
    """The span around it, which may lie in an earlier segment; empty: there is none."""
    linked = (link.span_id for link in record.links if link.attributes.get(LINK) == PARENT)
    return next(linked, record.parent_id or "")


def _flow(record: SpanRecord) -> Flow:
    said: Callable[[str], AttributeValue | None] = record.attributes.get
    address, name = str(said("network.peer.address") or ""), str(said("server.address") or "")
    return Flow(
        time_ns=record.start_ns,
        address=address,
        port=_number(said("network.peer.port")),
        name=name if name != address else "",
        in_vain=said("ray_guard.egress.decision") == "deny" or said("error.type") is not None,
        sent=_number(said("ray_guard.egress.bytes_sent")),
        received=_number(said("ray_guard.egress.bytes_received")),
        protocol=str(said("ray_guard.egress.protocol") or ""),
    )


def _offence(record: SpanRecord) -> Finding | None:
    """What the relay recognised in its first bytes."""
    kind, _, rule = str(record.attributes.get("ray_guard.egress.offence") or "").partition(": ")
    return Finding(Kind(kind), rule) if rule and kind in set(Kind) else None


def _number(value: AttributeValue | None) -> int:
    return value if isinstance(value, int) else 0


def _case(resource: Resource, record: SpanRecord, said: _Said, call: str) -> Case:
    identity = {key: record.attributes[key] for key in _TOLD if key in record.attributes}
    where = {"trace": record.trace_id, "span": record.span_id, "process": "", "call": call}
    whose = {"identity": identity, "resource": resource_key(resource.attributes)}
    return {**where, **said._asdict(), **whose, "ended": record.end_ns is not None}


def _unrecorded(asked: Mapping[str, Any], said: _Said) -> Case:
    where = {**{key: asked[key] for key in ("trace", "span", "call")}, "process": asked["span"]}
    return {**where, **said._asdict(), "identity": {}, "resource": "", "ended": True}

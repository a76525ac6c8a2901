"""What the judge finds: told on spans, recorded, and acted on as the policy's ``detect`` says. Runs in the supervisor.

The judge (:mod:`ray_guard.evidence.judge`) reads the journals of the targets whose policies ask for it. One that is
lost is started anew and goes on where it was, so nothing remains unjudged; where that does not help, or one makes no
headway, every call of a policy that acts on findings ends: nobody can say what it does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ray_guard.detect import UNJUDGED
from ray_guard.errors import NotEnforced
from ray_guard.evidence.journal import Journal, JournalError
from ray_guard.evidence.layout import log_of
from ray_guard.evidence.otlp import fragment
from ray_guard.ids import new_span_id
from ray_guard.kernel import seqpacket
from ray_guard.log import logger
from ray_guard.named import NamedTuple
from ray_guard.policy import detection
from ray_guard.records import SpanEvent, SpanKind, SpanRecord
from ray_guard.supervisor import arguments

if TYPE_CHECKING:
    from ray_guard.egress.made import Waiting
    from ray_guard.evidence.otlp import Fragment
    from ray_guard.supervisor.target import Origin, Target
    from ray_guard.supervisor.tools import Tool

log = logger("ray_guard.judging")

DETECTION: Final = "ray_guard.detection"
"""Name of the span and of the event that say what was found."""
_TICK_S: Final = 1.0
_AGAIN_S: Final = (0.1, 5.0)
"""Until one that was lost is started again: at first, and when it was lost again without any headway."""
_PATIENCE_S: Final = 10.0
"""How long it may make no headway."""
_LOSSES: Final = 3
"""After so many in a row without any headway nothing is judged."""
_LAST_S: Final = 2.0
"""How long it is waited for at the end."""
_BATCH: Final = 64
_LEFT: Final = 64
_UNSENT: Final = 256
_ROOM_S: Final = 0.01
"""When a judge that had no room is tried again."""
_DEEDS: Final = 4096


class Whose(NamedTuple):
    """A target, its tools, and the digests of the Sigma rules of its policy."""

    target: Target
    tools: Callable[[], Iterable[Tool]]
    rules: frozenset[str]

    def asks_for(self, message: dict[str, Any]) -> bool:
        """Whether that finding was made by rules of its policy's."""
        return not message["rules"] or message["rules"] in self.rules


class _Place(NamedTuple):
    """Before this all of a log is judged."""

    number: int
    offset: int


class Judging:
    """See the module.

    Args:
        start: starts a judge at that end of its line.
    """

    def __init__(self, loop: Waiting, start: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._start = start
        self._line: socket.socket | None = None
        self._pid = 0
        self._joined: dict[int, Whose] = {}
        self._left: deque[Whose] = deque(maxlen=_LEFT)
        """What is found out after a target has gone is recorded all the same."""
        self._journals: dict[str, Journal] = {}
        self._places: dict[tuple[str, str], _Place] = {}
        """By folder and log."""
        self._unsent: deque[dict[str, Any]] = deque()
        """What the judge is still to be told."""
        self._waits_for_room = False
        self._rules: dict[str, tuple[str, str]] = {}
        """By path, their digest, or why there is none."""
        self._held: set[str] = set()
        """The digests of the rules that this judge has read."""
        self._unread: set[str] = set()
        """Paths of those that the one before had, and that this one is still to read."""
        self._waiting: list[tuple[set[str], Callable[[], None]]] = []
        """Rules that are still to be read, and what is done when they are."""
        self._deeds: dict[tuple[str, str], None] = {}
        """By call (or trace) and rule, what was told of the call and acted on; the latest ones."""
        self._losses = 0
        self._headway = 0.0
        """When it has last shown any, or had nothing to do."""
        self._ticking = False

    def read_rules(self, paths: Iterable[str], then: Callable[[], None]) -> None:
        """Has the Sigma rules there read, and calls ``then`` when they are, or cannot be (:meth:`digests`)."""
        unread = set(paths)
        self._waiting.append((unread, then))
        if self._line is None:
            self._begin()
        else:
            self._tell(*map(_rules, unread))

    def digests(self, paths: Iterable[str]) -> frozenset[str]:
        """Of the rules there, as they were read last.

        Raises:
            NotEnforced: they could not be.
        """
        found = {path: self._rules.get(path, ("", "the judge is lost")) for path in paths}
        for digest, why in found.values():
            if not digest:
                raise NotEnforced(["detect.rules"], why)
        return frozenset(digest for digest, _why in found.values())

    def join(self, target: Target, tools: Callable[[], Iterable[Tool]]) -> None:
        """Has ``target`` judged from here on, where its policy asks for it."""
        try:
            rules = self.digests(target.policy.rules)
        except NotEnforced:  # it was taken over: a new one waits until its rules are read
            rules = frozenset()
            self.read_rules(target.policy.rules, partial(self._join_again, target, tools))
        self._joined[id(target)] = Whose(target, tools, rules)
        target.unseen = partial(self._ask, target)
        self._journals[target.journal.folder] = target.journal
        if self._line is None:
            self._begin()
        else:
            self._follow(target.journal)
        if not self._ticking:
            self._ticking = True
            self._headway = time.monotonic()
            self._loop.later(_TICK_S, self._tick)

    def _join_again(self, target: Target, tools: Callable[[], Iterable[Tool]]) -> None:
        if id(target) not in self._joined:
            return
        try:
            self._joined[id(target)] = Whose(target, tools, self.digests(target.policy.rules))
        except NotEnforced as error:
            self._give_up(str(error), (self._joined[id(target)],))

    def leave(self, target: Target) -> None:
        """It has gone."""
        whose = self._joined.pop(id(target), None)
        if whose is not None:
            self._left.append(whose)

    def close(self) -> None:
        """Takes in what is still to be found; the journals are closed next."""
        if self._line is None:
            return
        try:
            self._line.settimeout(_LAST_S)
            for message in (*self._unsent, {"op": "drain"}):
                seqpacket.send(self._line, message)
            while (received := seqpacket.receive(self._line)) is not None and received[0]["op"] != "drained":
                self._take(received[0])
        except (OSError, seqpacket.BadPacket) as error:
            log.warning("the judge did not finish: %s", error)
        self._line.close()

    # -- the judge -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._line is not None or not (self._joined or self._waiting):
            return
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._start(theirs)
            except OSError as error:
                log.warning("the judge cannot be started: %s", error)
        self._loop.watch(self._line.fileno(), select.EPOLLIN, lambda _events: self._ready())
        self._held.clear()
        self._unread = {path for whose in self._joined.values() for path in whose.target.policy.rules}
        asked = [_rules(path) for path in self._unread.union(*(paths for paths, _then in self._waiting))]
        asked += [_read(folder, name, place) for (folder, name), place in self._places.items()]
        self._unsent.extendleft(reversed(asked))  # before what the last one was not told of
        for journal in self._journals.values():
            self._follow(journal)
        if not self._waits_for_room:
            self._send()

    def _follow(self, journal: Journal) -> None:
        """Has the log read that the journal writes now, from where it is now."""
        segment = log_of(os.path.basename(journal.path))
        if segment is not None and (journal.folder, segment[0]) not in self._places:
            place = self._places[journal.folder, segment[0]] = _Place(segment[1], journal.size)
            self._tell(_read(journal.folder, segment[0], place))

    def _ask(self, target: Target, origin: Origin, span: str, argv: Sequence[str], path: str) -> None:
        """Has the judge told of a program that is not in the journal, or not with all its arguments."""
        if len(self._unsent) >= _UNSENT:  # what is behind this one nobody would know
            found = _Found(span, UNJUDGED, "too many programs were executed")
            if self._is_new(origin, found.rule):
                self._act(target, origin, found, _action(target, UNJUDGED) or detection.TAG)
            return
        where = {"folder": target.journal.folder, "trace": origin.trace_id, "span": span, "call": origin.call or ""}
        self._tell({"op": "command", "argv": arguments.judged(argv), "path": path, **where})

    def _tell(self, *messages: dict[str, Any]) -> None:
        """Tells the judge as soon as it has room: nobody waits for it."""
        self._unsent.extend(messages)
        if not self._waits_for_room:
            self._send()

    def _send(self) -> None:
        self._waits_for_room = False
        while self._unsent:
            try:
                if self._line is None:
                    return  # the next one is told
                seqpacket.send(self._line, self._unsent[0], flags=socket.MSG_DONTWAIT)
            except OSError:
                self._waits_for_room = True
                self._loop.later(_ROOM_S, self._send)
                return
            self._unsent.popleft()

    def _ready(self) -> None:
        for _ in range(_BATCH):
            if self._line is None:
                return
            try:
                received = seqpacket.receive(self._line, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, seqpacket.BadPacket):
                received = None
            if received is None:
                self._lost()
                return
            self._take(received[0])

    def _take(self, message: dict[str, Any]) -> None:
        operation = message["op"]
        if operation == "ready":
            self._pid, self._headway = int(message["pid"]), time.monotonic()
        elif operation == "drained":
            self._dismiss()
        elif operation == "at":
            self._places[str(message["folder"]), str(message["log"])] = _Place(
                int(message["number"]), int(message["offset"])
            )
            self._losses, self._headway = 0, time.monotonic()
        elif operation == "rules":
            self._losses = 0
            self._rules_read(str(message["path"]), str(message.get("digest", "")), str(message.get("error", "")))
        else:
            try:
                self._found(message)
            except JournalError:
                log.exception("what was found could not be journaled")

    def _rules_read(self, path: str, digest: str, why: str) -> None:
        self._rules[path] = (digest, why)
        self._held.add(digest)
        for unread, then in list(self._waiting):
            unread.discard(path)
            if not unread:
                self._waiting.remove((unread, then))
                then()
        if path in self._unread:
            self._unread.discard(path)
            if not self._unread:
                altered = [whose for whose in self._joined.values() if not whose.rules <= self._held]
                self._give_up("the Sigma rules are not those that were read at first", altered)

    def _lost(self) -> None:
        assert self._line is not None  # noqa: S101 - it is watched only while it is there
        self._loop.forget(self._line.fileno())
        self._line.close()
        self._line, self._pid = None, 0
        self._losses += 1
        log.warning("the judge is gone")
        if self._losses >= _LOSSES:
            self._give_up(f"the judge was lost {self._losses} times")
            waiting, self._waiting = self._waiting, []
            for _paths, then in waiting:
                then()
        self._loop.later(_AGAIN_S[self._losses >= _LOSSES], self._begin)

    def _dismiss(self) -> None:
        """All is judged that was to be; whoever comes next has a new judge."""
        if self._line is None or self._joined or self._waiting:
            return
        self._loop.forget(self._line.fileno())
        self._line.close()
        self._line, self._pid = None, 0
        self._places.clear()
        self._journals.clear()
        self._unsent.clear()

    def _tick(self) -> None:
        """Looks whether it makes headway, and whether journals have begun new logs."""
        if not self._joined:
            self._ticking = False
            self._tell({"op": "drain"})
            return
        self._loop.later(_TICK_S, self._tick)
        for journal in {id(whose.target.journal): whose.target.journal for whose in self._joined.values()}.values():
            self._follow(journal)
        if all(self._is_judged(journal) for journal in self._journals.values()):
            self._headway = time.monotonic()
        elif time.monotonic() - self._headway > _PATIENCE_S:
            self._headway = time.monotonic()
            self._give_up("the judge makes no headway")
            if self._pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)

    def _is_judged(self, journal: Journal) -> bool:
        segment = log_of(os.path.basename(journal.path))
        return segment is None or self._places.get((journal.folder, segment[0])) == (segment[1], journal.size)

    def _give_up(self, why: str, of: Iterable[Whose] | None = None) -> None:
        """Ends every call that nobody can judge and whose policy wants something done about what is found.

        Args:
            of: whose; None: of all.
        """
        log.warning("%s", why)
        for target, tools, _rules in list(self._joined.values() if of is None else of):
            found = _Found("", UNJUDGED, why)
            action = _action(target, UNJUDGED) or detection.TAG
            origins = [tool.origin for tool in tools() if tool.running]
            for origin in origins or [target.own_origin()]:
                try:
                    self._act(target, origin, found, action)
                except JournalError:
                    log.exception("a violation could not be journaled")

    # -- what it finds -------------------------------------------------------------------------------------------------

    def _found(self, message: dict[str, Any]) -> None:
        whose = self._whose(message)
        if whose is None:
            return  # of none that asked for it
        target, origin = whose
        found = _Found(str(message["span"]), str(message["kind"]), str(message["rule"]))
        action = _action(target, found.kind)
        if action is None:
            return
        record = _record(origin.trace_id, found)
        target.write(record, origin.identity)
        origin.tally.another(origin)
        event = SpanEvent(DETECTION, record.start_ns, record.attributes)
        for open_still in (*(() if message["ended"] else (found.span,)), str(message["process"])):
            target.tag(open_still or None, event)
        # A shell's command line names what it starts: one deed, which each of its processes shows.
        if self._is_new(origin, found.rule):
            target.tag(origin.call, event)
            self._act(target, origin, found, action)

    def _is_new(self, origin: Origin, rule: str) -> bool:
        """Whether that is the first time in its call."""
        deed = (origin.call or origin.trace_id, rule)
        if deed in self._deeds:
            return False
        self._deeds[deed] = None
        if len(self._deeds) > _DEEDS:
            del self._deeds[next(iter(self._deeds))]
        return True

    def _act(self, target: Target, origin: Origin, found: _Found, action: str) -> None:
        if action != detection.TAG:
            target.violation(
                origin,
                found.span or None,
                "detection",
                reason=f"{found.kind}: {found.rule}",
                report_only=id(target) not in self._joined,  # it has gone: nobody is left to be ended
                action="" if action == detection.VIOLATION else action,
            )

    def _whose(self, message: dict[str, Any]) -> tuple[Target, Origin] | None:
        """Whose doing it is; None: of none that asked for it."""
        call, span, trace = str(message["call"]), str(message["span"]), str(message["trace"])
        joined = [whose for whose in self._joined.values() if whose.asks_for(message)]
        for target, tools, _rules in joined:
            if call in target.open:
                return target, target.origin_of(target.open[call])._replace(trace_id=trace, parent_id=span)
            for tool in tools():
                if tool.running and (call == tool.call or tool.has(call)):
                    return target, tool.origin._replace(trace_id=trace, parent_id=span)
        gone = [whose for whose in self._left if whose.asks_for(message)]
        for target, _tools, _rules in (*joined, *gone):
            if not target.is_of(message["resource"]):
                continue
            # Its call has ended meanwhile, or there was none.
            own = target.own_origin()._replace(trace_id=trace, parent_id=span, identity=_identity(message))
            return target, own._replace(episode=target.episode_of(trace))
        return None


class _Found(NamedTuple):
    """``span``: of the process or flow; empty: of none."""

    span: str
    kind: str
    rule: str


def _rules(path: str) -> dict[str, Any]:
    return {"op": "rules", "path": path}


def _read(folder: str, name: str, place: _Place) -> dict[str, Any]:
    return {"op": "read", "folder": folder, "log": name, "number": place.number, "offset": place.offset}


def _action(target: Target, kind: str) -> str | None:
    """What its policy wants to follow; None: nothing, not even a tag."""
    policy = target.policy.detect
    return max(policy.values(), key=detection.ACTIONS.index) if kind == UNJUDGED else policy.get(kind)


def _record(trace: str, found: _Found) -> SpanRecord:
    now = time.time_ns()
    return SpanRecord(
        trace_id=trace,
        span_id=new_span_id(),
        parent_id=found.span,
        name=DETECTION,
        kind=SpanKind.INTERNAL,
        start_ns=now,
        end_ns=now,
        attributes={"ray_guard.detection.kind": found.kind, "ray_guard.detection.rule": found.rule},
    )


def _identity(message: dict[str, Any]) -> Fragment:
    return fragment(dict(message["identity"]))

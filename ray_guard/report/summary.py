"""What a job used, was refused and violated, by actor, episode, tool and destination.

Runs later, on any machine. Pure: spans in, numbers out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ray_guard.evidence.reader import Entry
from ray_guard.records import AttributeValue, StatusCode
from ray_guard.report.index import Index, Kind, Place


@dataclass(slots=True)
class Usage:
    """Sums over some part of a job. Bytes are payload; ``unsure_*`` counts flows that moved more than is known."""

    rollouts: set[str] = field(default_factory=set)
    calls: int = 0
    failed: int = 0
    unfinished: int = 0
    processes: int = 0
    allowed: int = 0
    refused: int = 0
    sent: int = 0
    received: int = 0
    unsure_sent: int = 0
    unsure_received: int = 0
    violations: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    flops: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    gpu_error_s: float = 0.0
    durations_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Episode:
    rollout: str
    usage: Usage = field(default_factory=Usage)
    iteration: int | None = None
    group: str | None = None
    actors: set[str] = field(default_factory=set)
    turns: set[int] = field(default_factory=set)
    reward: float | None = None
    reward_time_ns: int = 0
    reported_violations: int = 0
    state: str = ""

    @property
    def violations(self) -> int:
        """Violations on record; what the rollout span counts, where its violations are in no segment read here."""
        return max(self.usage.violations, self.reported_violations)


@dataclass(frozen=True, slots=True)
class Destination:
    """Host (a name where the guard knew it), port and transport of a flow."""

    transport: str
    name: str
    address: str
    port: int | None


@dataclass(slots=True)
class Flows:
    """Flows to one destination with one outcome."""

    destination: Destination
    decision: str
    reason: str
    usage: Usage = field(default_factory=Usage)
    flows: int = 0
    calls: set[str] = field(default_factory=set)
    actors: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Refusal:
    """One call (or actor) refused for one reason, with one command: what was tried, where to, how often."""

    first_ns: int
    place: Place
    command: str
    reason: str
    destinations: dict[Destination, int] = field(default_factory=dict)

    @property
    def attempts(self) -> int:
        return sum(self.destinations.values())


@dataclass(slots=True)
class Violations:
    kind: str
    tool: str
    limit: float | None
    first_ns: int
    worst: float | None = None
    count: int = 0
    rollouts: set[str] = field(default_factory=set)
    actors: set[str] = field(default_factory=set)
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Findings:
    """What one rule found in the calls of one tool. ``count``: of programs and flows that showed it."""

    kind: str
    rule: str
    tool: str
    first_ns: int
    count: int = 0
    calls: set[str] = field(default_factory=set)
    rollouts: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Warnings:
    """Scopes in which one limit was almost reached."""

    kind: str
    scope: str
    limit: float | None
    first_ns: int
    count: int = 0
    worst: float | None = None
    rollouts: set[str] = field(default_factory=set)
    actors: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What never ended, was closed by the supervisor because whoever began it was gone, or died of a signal."""

    kind: Kind
    what: str
    place: Place
    start_ns: int
    end_ns: int | None
    state: str
    message: str


@dataclass(slots=True)
class Iteration:
    """Rollouts of one iteration. Rewards are of the rollouts that have one."""

    number: int
    clean: int = 0
    violating: int = 0
    clean_rewards: list[float] = field(default_factory=list)
    violating_rewards: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of rollouts with a violation, 0 to 1."""
        return self.violating / (self.clean + self.violating)

    @property
    def clean_reward(self) -> float | None:
        return _mean(self.clean_rewards)

    @property
    def violating_reward(self) -> float | None:
        return _mean(self.violating_rewards)

    @property
    def difference(self) -> float | None:
        """Mean reward with a violation minus without; None unless both are known."""
        with_, without = self.violating_reward, self.clean_reward
        return None if with_ is None or without is None else with_ - without


@dataclass(slots=True)
class Summary:
    runs: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    spans: int = 0
    claimed: int = 0
    first_ns: int | None = None
    last_ns: int | None = None
    total: Usage = field(default_factory=Usage)
    actors: dict[str, Usage] = field(default_factory=dict)
    episodes: dict[str, Episode] = field(default_factory=dict)
    tools: dict[str, Usage] = field(default_factory=dict)
    destinations: dict[tuple[Destination, str, str], Flows] = field(default_factory=dict)
    refusals: dict[tuple[str, ...], Refusal] = field(default_factory=dict)
    violations: dict[tuple[str, str, float | None], Violations] = field(default_factory=dict)
    findings: dict[tuple[str, str, str], Findings] = field(default_factory=dict)
    warnings: dict[tuple[str, str, float | None], Warnings] = field(default_factory=dict)
    unfinished: list[Unfinished] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)

    @property
    def refused_rollouts(self) -> set[str]:
        return {item.place.rollout for item in self.refusals.values() if item.place.rollout is not None}

    @property
    def violating_rollouts(self) -> set[str]:
        return {name for name, episode in self.episodes.items() if episode.violations}


def summarise(index: Index) -> Summary:
    """Counts everything a report says."""
    summary = Summary(spans=len(index), claimed=index.claimed)
    for entry in index:
        _extent(summary, entry)
    for count, kind in (
        (_rollout, Kind.ROLLOUT),
        (_turn, Kind.TURN),
        (_chat, Kind.CHAT),
        (_call, Kind.TOOL),
        (_process, Kind.PROCESS),
        (_flow, Kind.FLOW),
        (_violation, Kind.VIOLATION),
        (_finding, Kind.DETECTION),
        (_warning, Kind.WARNING),
        (_gpu, Kind.GPU),
    ):
        for entry in index.of(kind):
            place = index.place(entry)
            above = index.above(entry, Kind.CHAT) if kind is Kind.CHAT else None
            if above is None:
                count(summary, entry, place)
            else:
                if not _told_usage(above):
                    _count_tokens(entry, _usages(summary, index.place(above)))
                if index.place(above).actor != place.actor:
                    _served(summary, entry, place)
            _state(summary, entry, place, kind)
    _rewards(summary, index)
    summary.unfinished.sort(key=lambda item: (item.start_ns, item.what))
    summary.iterations = _iterations(summary.episodes.values())
    return summary


def command_of(place: Place) -> str:
    """What ran: the process's arguments, else its executable, else the tool's arguments where content is recorded."""
    if place.process is not None:
        attributes = place.process.span.attributes
        arguments = attributes.get("process.command_args")
        if isinstance(arguments, tuple) and arguments:
            return shlex.join(arguments)
        return str(attributes.get("process.executable.path") or place.process.span.name.removeprefix("process "))
    if place.call is not None:
        return str(place.call.span.attributes.get("gen_ai.tool.call.arguments") or "(in process)")
    return "(in process)"


def tool_of(place: Place) -> str:
    if place.call is None:
        return ""
    name = place.call.span.attributes.get("gen_ai.tool.name")
    return str(name or place.call.span.name.removeprefix("execute_tool "))


def destination_of(entry: Entry) -> Destination:
    attributes = entry.span.attributes
    name, address = str(attributes.get("server.address", "")), str(attributes.get("network.peer.address", ""))
    port = attributes.get("network.peer.port", attributes.get("server.port"))
    return Destination(
        transport=str(attributes.get("network.transport", "")),
        name="" if name == address else name,
        address=address,
        port=port if isinstance(port, int) else None,
    )


def reason_of(entry: Entry) -> str:
    """Why a flow was allowed or refused; the policy's rule where one decided."""
    reason = str(entry.span.attributes.get("ray_guard.egress.reason", ""))
    rule = str(entry.span.attributes.get("ray_guard.egress.rule", ""))
    return f"{reason} {rule}".strip() if rule not in reason else reason


def _extent(summary: Summary, entry: Entry) -> None:
    span, about = entry.span, entry.resource.attributes
    end = span.start_ns if span.end_ns is None else span.end_ns
    summary.first_ns = span.start_ns if summary.first_ns is None else min(summary.first_ns, span.start_ns)
    summary.last_ns = end if summary.last_ns is None else max(summary.last_ns, end)
    run = span.attributes.get("rl.run.id", about.get("rl.run.id"))
    if run:
        summary.runs.add(str(run))
    if about.get("host.name"):
        summary.hosts.add(str(about["host.name"]))


def _usages(summary: Summary, place: Place) -> list[Usage]:
    """Everything a span at this place counts towards."""
    found = [summary.total, summary.actors.setdefault(place.actor, Usage())]
    if place.rollout is not None:
        found.append(_episode(summary, place).usage)
        for usage in found:
            usage.rollouts.add(place.rollout)
    return found


def _episode(summary: Summary, place: Place) -> Episode:
    rollout = place.rollout or ""
    episode = summary.episodes.setdefault(rollout, Episode(rollout))
    if episode.iteration is None:
        episode.iteration = place.iteration
    if episode.group is None:
        episode.group = place.group
    if place.turn is not None:
        episode.turns.add(place.turn)
    return episode


def _with_tool(summary: Summary, place: Place) -> list[Usage]:
    usages = _usages(summary, place)
    if place.call is not None:
        tool = summary.tools.setdefault(tool_of(place), Usage())
        if place.rollout is not None:
            tool.rollouts.add(place.rollout)
        usages.append(tool)
    return usages


def _rollout(summary: Summary, entry: Entry, place: Place) -> None:
    _usages(summary, place)
    if place.rollout is None:
        return
    episode = _episode(summary, place)
    episode.actors.add(place.actor)
    episode.reported_violations = max(
        episode.reported_violations, _integer(entry.span.attributes.get("ray_guard.violation_count"))
    )
    episode.state = _ending(entry)


def _turn(summary: Summary, _entry: Entry, place: Place) -> None:
    _usages(summary, place)


def _chat(summary: Summary, entry: Entry, place: Place) -> None:
    _count_tokens(entry, _usages(summary, place))


def _served(summary: Summary, entry: Entry, place: Place) -> None:
    """The model call of the chat above it, as its engine saw it: counted there, but for the actor that computed it."""
    _count_tokens(entry, [summary.actors.setdefault(place.actor, Usage())])


def _told_usage(entry: Entry) -> bool:
    return any(f"gen_ai.usage.{kind}_tokens" in entry.span.attributes for kind in ("input", "output"))


def _count_tokens(entry: Entry, usages: Sequence[Usage]) -> None:
    attributes = entry.span.attributes
    for usage in usages:
        usage.input_tokens += _integer(attributes.get("gen_ai.usage.input_tokens"))
        usage.output_tokens += _integer(attributes.get("gen_ai.usage.output_tokens"))
        usage.flops += _number(attributes.get("ray_guard.flops")) or 0.0


def _call(summary: Summary, entry: Entry, place: Place) -> None:
    span = entry.span
    if place.rollout is not None:
        _episode(summary, place).actors.add(place.actor)
    for usage in _with_tool(summary, place):
        usage.calls += 1
        usage.failed += span.status is StatusCode.ERROR
        usage.unfinished += bool(_ending(entry))
        if span.end_ns is not None:
            usage.durations_s.append((span.end_ns - span.start_ns) / 1e9)


def _process(summary: Summary, entry: Entry, place: Place) -> None:
    for usage in _with_tool(summary, place):
        usage.processes += 1
        usage.cpu_s += _number(entry.span.attributes.get("ray_guard.process.cpu_seconds")) or 0.0


def _gpu(summary: Summary, entry: Entry, place: Place) -> None:
    for usage in _usages(summary, place):
        usage.gpu_s += _number(entry.span.attributes.get("ray_guard.gpu.seconds")) or 0.0
        usage.gpu_error_s += _number(entry.span.attributes.get("ray_guard.gpu.seconds_error")) or 0.0


def _flow(summary: Summary, entry: Entry, place: Place) -> None:
    attributes = entry.span.attributes
    if attributes.get("ray_guard.egress.mute"):
        return  # a socket that cannot send was "connected" to learn its own address: Ray and gRPC do it all the time
    decision = str(attributes.get("ray_guard.egress.decision", "unknown"))
    reason = reason_of(entry)
    destination = destination_of(entry)
    flows = summary.destinations.setdefault((destination, decision, reason), Flows(destination, decision, reason))
    flows.flows += 1
    flows.actors.add(place.actor)
    if place.call is not None:
        flows.calls.add(place.call.span.span_id)
    if place.rollout is not None:
        flows.usage.rollouts.add(place.rollout)
    refused = decision == "deny"
    sent, received = (_moved(entry, way) for way in ("sent", "received"))
    for usage in (*_with_tool(summary, place), flows.usage):
        usage.refused += refused
        usage.allowed += not refused
        usage.sent += sent.bytes
        usage.received += received.bytes
        usage.unsure_sent += not sent.exact
        usage.unsure_received += not received.exact
    if refused:
        command = command_of(place)
        call = place.call.span.span_id if place.call is not None else ""
        key = (place.actor, place.rollout or "", call, command, reason)
        refusal = summary.refusals.setdefault(key, Refusal(entry.span.start_ns, place, command, reason))
        refusal.destinations[destination] = refusal.destinations.get(destination, 0) + 1


@dataclass(frozen=True, slots=True)
class _Moved:
    bytes: int
    exact: bool


def _moved(entry: Entry, way: str) -> _Moved:
    """Bytes one way. A missing reading is no zero, but where nothing was connected, or nothing is counted by policy
    (Unix sockets), there is none to miss."""
    attributes = entry.span.attributes
    count = _number(attributes.get(f"ray_guard.egress.bytes_{way}"))
    if count is not None:
        return _Moved(int(count), attributes.get("ray_guard.egress.bytes_exact") is not False)
    refused = attributes.get("ray_guard.egress.decision") == "deny"
    failed = entry.span.end_ns is not None and entry.span.status is StatusCode.ERROR
    return _Moved(0, refused or failed or attributes.get("network.transport") == "unix")


def _finding(summary: Summary, entry: Entry, place: Place) -> None:
    kind, rule = (str(entry.span.attributes.get(f"ray_guard.detection.{name}", "unnamed")) for name in ("kind", "rule"))
    key = (kind, rule, tool_of(place))
    found = summary.findings.setdefault(key, Findings(*key, entry.span.start_ns))
    found.count += 1
    if place.call is not None:
        found.calls.add(place.call.span.span_id)
    if place.rollout is not None:
        found.rollouts.add(place.rollout)


def _violation(summary: Summary, entry: Entry, place: Place) -> None:
    attributes = entry.span.attributes
    for usage in _with_tool(summary, place):
        usage.violations += 1
    kind = str(attributes.get("ray_guard.violation.kind", "unnamed"))
    limit, value = (_number(attributes.get(f"ray_guard.violation.{name}")) for name in ("limit", "value"))
    key = (kind, tool_of(place), limit)
    found = summary.violations.setdefault(key, Violations(kind, tool_of(place), limit, entry.span.start_ns))
    found.count += 1
    found.actors.add(place.actor)
    if place.rollout is not None:
        found.rollouts.add(place.rollout)
    if value is not None:
        found.worst = value if found.worst is None else max(found.worst, value)
    reason = str(attributes.get("error.type", "") or entry.span.status_message)
    if reason:
        found.reasons[reason] = found.reasons.get(reason, 0) + 1


def _warning(summary: Summary, entry: Entry, place: Place) -> None:
    attributes = entry.span.attributes
    kind, scope = (str(attributes.get(f"ray_guard.budget.{name}", "unnamed")) for name in ("kind", "scope"))
    limit, value = (_number(attributes.get(f"ray_guard.budget.{name}")) for name in ("limit", "value"))
    found = summary.warnings.setdefault((kind, scope, limit), Warnings(kind, scope, limit, entry.span.start_ns))
    found.count += 1
    found.actors.add(place.actor)
    if place.rollout is not None:
        found.rollouts.add(place.rollout)
    if value is not None:
        found.worst = value if found.worst is None else max(found.worst, value)


def _ending(entry: Entry) -> str:
    """Empty for a span that ended as it should."""
    if entry.span.end_ns is None:
        return "open"
    return "killed" if entry.span.attributes.get("ray_guard.ended_by") == "supervisor" else ""


def _state(summary: Summary, entry: Entry, place: Place, kind: Kind) -> None:
    state = _ending(entry)
    ended_by = entry.span.attributes.get("process.exit.signal")
    if kind is Kind.PROCESS and not state and isinstance(ended_by, int):
        state = f"signal {ended_by}"  # a budget's KILL, the guard's, or its own doing: the message says where known
    if state:
        what = command_of(place) if kind is Kind.PROCESS else entry.span.name
        if kind is Kind.FLOW:
            destination = destination_of(entry)
            what = f"connection to {destination.name or destination.address}:{destination.port}"
        summary.unfinished.append(
            Unfinished(kind, what, place, entry.span.start_ns, entry.span.end_ns, state, entry.span.status_message)
        )


def _rewards(summary: Summary, index: Index) -> None:
    """The latest reward of each rollout: on its span, as an evaluation event, or on a span of its own, told later."""
    for entry in index:
        # The event says when; the attribute repeats it on a span that may end much later.
        found = [
            (event.time_ns, _number(event.attributes.get("gen_ai.evaluation.score.value")))
            for event in entry.span.events
            if event.name == "gen_ai.evaluation.result"
        ] or [(entry.span.end_ns or entry.span.start_ns, _number(entry.span.attributes.get("rl.reward.score")))]
        for time_ns, reward in found:
            if reward is None:
                continue
            episode = summary.episodes.get(index.place(entry).rollout or "")
            if episode is not None and time_ns >= episode.reward_time_ns:
                episode.reward, episode.reward_time_ns = reward, time_ns


def _iterations(episodes: Iterable[Episode]) -> list[Iteration]:
    found: dict[int, Iteration] = {}
    for episode in episodes:
        if episode.iteration is None:
            continue
        iteration = found.setdefault(episode.iteration, Iteration(episode.iteration))
        if episode.violations:
            iteration.violating += 1
        else:
            iteration.clean += 1
        if episode.reward is not None:
            (iteration.violating_rewards if episode.violations else iteration.clean_rewards).append(episode.reward)
    return [found[number] for number in sorted(found)]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: AttributeValue | None) -> float | None:
    """A finite number; None for anything else, which is not the same as zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if value - value == 0 else None


def _integer(value: AttributeValue | None) -> int:
    return int(_number(value) or 0)

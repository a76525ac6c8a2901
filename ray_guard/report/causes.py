"""What a page about an attribution shows: alerts in words, their chains, who came second, rewards by iteration.

Runs later, on any machine. Reads the store that attribution left, and hashes the inputs.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa

from ray_guard.attribution import findings
from ray_guard.attribution.answers import Attribution, Candidate
from ray_guard.attribution.attribute import Result
from ray_guard.attribution.candidates import TIERS
from ray_guard.evidence.reader import segments
from ray_guard.report import text
from ray_guard.report.spoken import spoken
from ray_guard.report.summary import Iteration

ALERT_LIMIT: Final = 2_000
CHAIN_LIMIT: Final = 1_000
INFORMATIONAL_LIMIT: Final = 500
_URGENCY: Final = ("attributed", "ambiguous", "unobserved")
_DEPTH: Final = 12
_LISTED: Final = 5
_CHUNK: Final = 1 << 20
_MISSING: Final = "not in this evidence"

_Span = tuple[str, str]
"""(trace id, span id)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record: where it was said, and what, in words.

    Args:
        number: in the answer, from 0.
        at_ns: the middle of its interval, by the traces' clock, in Unix nanoseconds.
        whole: the log's line.
    """

    number: int
    alert: Attribution
    at_ns: int
    where: str
    near: str
    far: str
    rule: str
    whole: str


@dataclass(frozen=True, slots=True)
class Step:
    """One link of a chain. ``quoted``: text that a model or a tool wrote."""

    what: str
    said: str
    quoted: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """From an iteration down to one alert, or who came nearest where it was nobody in this job.

    ``second`` says who came second, or what else is possible where that is open; ``lost`` why.
    """

    row: Row
    steps: Sequence[Step]
    second: str
    lost: str


@dataclass(frozen=True, slots=True)
class Input:
    """A file that was read. ``size`` in bytes; None where it cannot be read any more."""

    role: str
    path: str
    size: int | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything a page shows.

    Args:
        alerts, informational: as many as are shown, by time.
        verdicts: counts of all alerts.
        quiet: how many informational records there were.
        moments: (time in ns, verdict) of every alert.
        iterations: (number, first ns, last ns), in order.
        rewards: alerting rollouts against the others.
    """

    result: Result
    answer: Mapping[str, Any]
    alerts: Sequence[Row]
    informational: Sequence[Row]
    chains: Sequence[Chain]
    verdicts: Counter[str]
    quiet: int
    moments: Sequence[tuple[int, str]]
    iterations: Sequence[tuple[int, int, int]]
    rewards: Sequence[Iteration]


def gather(result: Result, answer: Mapping[str, Any]) -> Findings:
    """Looks up what the page says.

    Args:
        result: of the attribution.
        answer: what :func:`ray_guard.attribution.document.found` made of it.
    """
    answers = result.alerts
    verdicts, at = answers.verdicts(), answers.middles()
    objections = np.flatnonzero(~answers.informational)
    ordinary = np.flatnonzero(answers.informational)
    # What is known to be the job's doing stays where not all of it can be shown.
    urgency = np.select([verdicts == each for each in _URGENCY], range(len(_URGENCY)))
    shown = objections[np.lexsort((objections, at[objections], urgency[objections]))][:ALERT_LIMIT]
    quiet = ordinary[np.lexsort((ordinary, at[ordinary]))][:INFORMATIONAL_LIMIT]
    alerts = _rows(result, shown)
    chains = _chains(result, alerts[:CHAIN_LIMIT])

    def by_time(row: Row) -> tuple[int, int]:
        return row.at_ns, row.number

    return Findings(
        result,
        answer,
        sorted(alerts, key=by_time),
        _rows(result, quiet),
        sorted(chains, key=lambda chain: by_time(chain.row)),
        Counter(verdicts[objections].tolist()),
        len(ordinary),
        sorted(zip(at[objections].tolist(), verdicts[objections].tolist(), strict=True)),
        result.db.execute(
            """SELECT iteration, min(start_ns), max(coalesce(end_ns, start_ns)) FROM span
               WHERE iteration IS NOT NULL GROUP BY iteration ORDER BY iteration"""
        ).fetchall(),
        _rewards(result),
    )


def beware(result: Result) -> list[str]:
    """A warning where no record can be the doing of any call, which is not the same as nobody's doing."""
    at = result.alerts.middles()
    if not len(at):
        return []
    ((first, last),) = result.db.execute("SELECT min(start_ns), max(end_ns) FROM alive").fetchall()
    if first is None:
        left = text.counted(result.quarantine.counts)
        why = f"; of their lines {left} could not be used" if left else ""
        return [f"beware: there is no tool call in the traces{why}: nobody can be named, which clears nobody"]
    if at.min() <= last and at.max() >= first:
        return []
    records, calls = (
        f"{text.date(int(begin))} to {text.date(int(end))} UTC" for begin, end in ((at.min(), at.max()), (first, last))
    )
    return [f"beware: the records are of {records}, the traces' calls of {calls}: are their times Unix nanoseconds?"]


def inputs(result: Result, traces: Sequence[str], maps: Sequence[str]) -> list[Input]:
    """Every file that was read, with its SHA-256: alerts as they were read, the others as they lie there now.

    Args:
        result: of the attribution.
        traces: paths as given; folders by their segments.
        maps: paths of NAT maps.
    """
    parquet = [path for path in traces if path.endswith(".parquet")]
    others = [path for path in traces if path not in parquet]
    found = [_hashed("traces", path) for path in (*parquet, *map(str, segments(others) if others else ()))]
    for report in {source.path: source.report for source in result.sources}.values():
        whole = _hashed("alerts", report.path) if not report.sha256 else None
        found.append(whole or Input("alerts", report.path, _size(report.path), report.sha256))
    return found + [_hashed("NAT map", path) for path in maps]


def _hashed(role: str, path: str) -> Input:
    whole = sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                whole.update(chunk)
    except OSError as error:
        return Input(role, path, None, f"cannot be read: {error.strerror}")
    return Input(role, path, _size(path), whole.hexdigest())


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


# --- records ---------------------------------------------------------------------------------------------------------


def _at(alert: Attribution) -> int:
    # Its end, less half of what the log leaves open: a record of an end looks far back for its begin.
    return alert.end_ns - alert.width_ns // 2


def _rows(result: Result, numbers: Any) -> list[Row]:
    wanted = list(zip(numbers.tolist(), result.alerts.of(numbers), strict=True))
    said = {
        number: rest
        for number, *rest in _looked_up(
            result.db,
            {"alert": [number for number, _ in wanted]},
            """SELECT t.alert, src_ip, src_port, dst_ip, dst_port, proto, host, node, rule, denied, pid, command
               FROM timed t JOIN wanted w USING (alert)""",
        )
    }
    rows = []
    for number, alert in wanted:
        src, src_port, dst, dst_port, proto, host, node, rule, denied, pid, command = said[number]
        far = _endpoint(dst, dst_port, proto)
        if host:
            far = f"{far} ({host})" if far else host
        near = _endpoint(src, src_port, "") or node or ""
        if pid is not None or command:
            near = " ".join(part for part in (near, f"pid {pid}" if pid is not None else "", command or "") if part)
        whole = result.alerts.line(number).decode("utf-8", "replace").rstrip("\r\n")
        where = f"{alert.source.path}:{alert.record}"
        rows.append(Row(number, alert, _at(alert), where, near, far, rule or ("denied" if denied else ""), whole))
    return rows


def _endpoint(address: str | None, port: int | None, proto: str) -> str:
    if not address:
        return ""
    where = text.endpoint(address, port)
    return where if proto in ("", "tcp") else f"{proto}://{where}"


def _looked_up(db: duckdb.DuckDBPyConnection, wanted: Mapping[str, list[Any]], query: str) -> list[tuple[Any, ...]]:
    """What ``query`` says of the table ``wanted``; nothing where that is empty."""
    table = pa.table(dict(wanted))
    if not len(table):
        return []
    db.register("wanted", table)
    try:
        return db.execute(query).fetchall()
    finally:
        db.unregister("wanted")


# --- chains ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Trace:
    """What the spans of the calls at hand say."""

    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    flows: dict[int, dict[str, Any]] = field(default_factory=dict)  # by alert
    processes: dict[_Span, dict[str, Any]] = field(default_factory=dict)
    of_call: dict[int, list[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(list))
    chats: dict[int, dict[str, Any]] = field(default_factory=dict)  # by call
    rollouts: dict[str, tuple[float | None, float | None, str | None]] = field(default_factory=dict)  # by trace
    peers: dict[tuple[Any, Any, Any], list[tuple[str, float]]] = field(default_factory=lambda: defaultdict(list))


_OF_CALL: Final = ("arguments", "start_ns", "end_ns", "host", "parent_id", "trace_id")
_OF_FLOW: Final = (
    "parent_id", "trace_id", "span_id", "start_ns", "end_ns", "local_ip", "local_port", "peer_ip", "peer_port", "proto",
    "host", "decision", "ambiguous", "reason", "sent", "received", "rank",
)  # fmt: skip
_OF_CHAT: Final = ("model", "input_tokens", "output_tokens", "attributes", "events", "same_turn")


def _chains(result: Result, rows: Sequence[Row]) -> list[Chain]:
    led = [row for row in rows if row.alert.candidates]
    trace = _read(result.db, [(row.number, row.alert.candidates[0]) for row in led])
    others = _others(result.db, [(row.number, row.alert.candidates[0].call) for row in led])
    found = []
    for row in rows:
        if not row.alert.candidates:
            found.append(Chain(row, (), "", "No call of this job was open on that machine at that time."))
            continue
        first = row.alert.candidates[0]
        steps = () if row.alert.verdict == "unobserved" else _steps(row, first, trace)
        found.append(Chain(row, steps, *_second(row.alert, others.get(row.number))))
    return found


def _read(db: duckdb.DuckDBPyConnection, wanted: Sequence[tuple[int, Candidate]]) -> _Trace:
    found = _Trace()
    pairs = {"alert": [number for number, _ in wanted], "call": [each.call for _, each in wanted]}
    calls = {"call": sorted({each.call for _, each in wanted})}
    for call, *rest in _looked_up(
        db,
        calls,
        """SELECT c.call, c.arguments, c.start_ns, c.end_ns, n.host, s.parent_id, c.trace_id
           FROM call c JOIN wanted w USING (call) JOIN node n USING (node)
           JOIN span s ON s.trace_id = c.trace_id AND s.span_id = c.span_id""",
    ):
        found.calls[call] = dict(zip(_OF_CALL, rest, strict=True))
    # The socket that the alert met, else one of the call to the same place.
    for alert, *rest in _looked_up(
        db,
        pairs,
        """WITH met AS (
             SELECT w.alert, f.flow, 0 AS rank, b.gap_ns FROM wanted w JOIN by_socket b USING (alert)
               JOIN flow f ON f.flow = b.flow AND (f.call = w.call OR b.one_of IS NOT NULL)
             UNION ALL
             SELECT w.alert, f.flow, 1, greatest(0, f.start_ns - s.end_ns, s.start_ns - f.end_ns)
               FROM wanted w JOIN side s USING (alert)
               JOIN flow f ON f.call = w.call AND f.peer_ip = s.peer_ip AND f.peer_port = s.peer_port),
           best AS (SELECT * FROM met QUALIFY row_number() OVER (PARTITION BY alert ORDER BY rank, gap_ns, flow) = 1)
           SELECT b.alert, s.parent_id, f.trace_id, f.span_id, f.start_ns, s.end_ns, f.local_ip, f.local_port,
             f.peer_ip, f.peer_port, f.proto, f.host, f.decision, f.ambiguous,
             s.attributes['ray_guard.egress.reason'], s.attributes['ray_guard.egress.bytes_sent'],
             s.attributes['ray_guard.egress.bytes_received'], b.rank
           FROM best b JOIN flow f USING (flow)
           JOIN span s ON s.trace_id = f.trace_id AND s.span_id = f.span_id""",
    ):
        found.flows[alert] = dict(zip(_OF_FLOW, rest, strict=True))
    _climb(db, found)
    for call, *process in _looked_up(
        db,
        calls,
        """SELECT p.call, p.pid, p.start_ns, p.command, count(*) OVER (PARTITION BY p.call)
           FROM process p JOIN wanted w USING (call)
           QUALIFY row_number() OVER (PARTITION BY p.call ORDER BY p.start_ns, p.pid, p.command) <= 4
           ORDER BY p.call, p.start_ns, p.pid, p.command""",
    ):
        found.of_call[call].append(tuple(process))
    _read_turns(db, found)
    _read_rollouts(db, [each.about for _, each in wanted], found)
    return found


def _climb(db: duckdb.DuckDBPyConnection, found: _Trace) -> None:
    """The processes above each flow."""
    above = {(flow["trace_id"], flow["parent_id"]) for flow in found.flows.values() if flow["parent_id"]}
    for _ in range(_DEPTH):
        ordered = sorted(above)
        rows = _looked_up(
            db,
            {"trace_id": [trace for trace, _ in ordered], "span_id": [span for _, span in ordered]},
            """SELECT s.trace_id, s.span_id, s.parent_id, s.start_ns, s.attributes['process.pid'],
                 coalesce(array_to_string(TRY_CAST(s.attributes['process.command_args'] AS VARCHAR[]), ' '),
                   s.attributes['process.command_line'], s.attributes['process.command_args'],
                   s.attributes['process.executable.path'], substr(s.name, 9))
               FROM span s JOIN wanted w USING (trace_id, span_id) WHERE s.name LIKE 'process %'""",
        )
        above = set()
        for trace, span, parent, start, pid, command in rows:
            found.processes[trace, span] = {"parent_id": parent, "start_ns": start, "pid": pid, "command": command}
            if parent and (trace, parent) not in found.processes:
                above.add((trace, parent))


def _read_turns(db: duckdb.DuckDBPyConnection, found: _Trace) -> None:
    """The model call before each tool call: in its turn, else (where there are none) in its trace."""
    calls = found.calls
    for call, *rest in _looked_up(
        db,
        {
            "call": list(calls),
            "trace_id": [each["trace_id"] for each in calls.values()],
            "parent_id": [each["parent_id"] for each in calls.values()],
            "before_ns": [each["start_ns"] for each in calls.values()],
        },
        """SELECT w.call, substr(s.name, 6), s.attributes['gen_ai.usage.input_tokens'],
             s.attributes['gen_ai.usage.output_tokens'], s.attributes, s.events,
             s.parent_id IS NOT DISTINCT FROM w.parent_id
           FROM span s JOIN wanted w ON s.trace_id = w.trace_id AND s.start_ns <= w.before_ns
           WHERE s.name LIKE 'chat %'
           QUALIFY row_number() OVER (PARTITION BY w.call ORDER BY s.parent_id IS NOT DISTINCT FROM w.parent_id DESC,
             s.start_ns DESC, s.span_id DESC) = 1""",
    ):
        found.chats[call] = dict(zip(_OF_CHAT, rest, strict=True))


def _read_rollouts(db: duckdb.DuckDBPyConnection, abouts: Iterable[Mapping[str, Any]], found: _Trace) -> None:
    """Rewards of the rollouts at hand, and of their groups."""
    abouts = list(abouts)
    traces = sorted({about["trace_id"] for about in abouts if about.get("trace_id")})
    for trace, actor in _looked_up(
        db,
        {"trace_id": traces},
        "SELECT s.trace_id, max(s.actor_name) FROM span s JOIN wanted w USING (trace_id) GROUP BY s.trace_id",
    ):
        found.rollouts[trace] = (None, None, actor)
    for run, group, iteration, trace, score, advantage in _looked_up(
        db,
        {"trace_id": traces},
        """WITH groups AS (
                SELECT DISTINCT r.run, r."group", r.iteration FROM rollout r JOIN wanted w USING (trace_id)),
              peers AS (SELECT r.trace_id, r.run, r."group", r.iteration FROM rollout r JOIN groups g
                ON r.run IS NOT DISTINCT FROM g.run AND r."group" IS NOT DISTINCT FROM g."group"
                AND r.iteration IS NOT DISTINCT FROM g.iteration
                WHERE r."group" IS NOT NULL OR r.trace_id IN (SELECT trace_id FROM wanted))
            SELECT p.run, p."group", p.iteration, p.trace_id, t.score, t.advantage
            FROM peers p JOIN rewarded t USING (trace_id) ORDER BY p.trace_id""",
    ):
        if trace in found.rollouts:
            found.rollouts[trace] = (score, advantage, found.rollouts[trace][2])
        if group is not None and score is not None:
            found.peers[run, group, iteration].append((trace, score))


def _steps(row: Row, first: Candidate, trace: _Trace) -> list[Step]:
    about, call, flow = first.about, trace.calls.get(first.call), trace.flows.get(row.number)
    iteration = about.get("iteration")
    steps = [
        Step("iteration", _joined(iteration, about.get("run") and f"run {about['run']}")),
        Step("rollout", _rollout(about, trace)),
    ]
    if call is None:
        steps.append(Step("tool call", "the rollout alone is known: the socket belongs to none of its calls"))
    else:
        steps.append(Step("turn", _joined(about.get("turn"))))
        steps.append(_output(first.call, trace))
        steps.append(
            Step(
                "tool call",
                _joined(
                    about.get("tool"),
                    about.get("call_id"),
                    _period(call["start_ns"], call["end_ns"]),
                    call["host"] and f"on {call['host']}",
                    f"span {about.get('span_id')}",
                    "" if call["arguments"] else "its arguments were not recorded",
                ),
                call["arguments"] or "",
            )
        )
    steps += _processes(first.call, flow, trace)
    steps.append(Step("flow", "no socket of this call to there was recorded" if flow is None else _flow(flow)))
    if first.tier == "nat" and flow is not None and flow["rank"] == 0:
        inside = _endpoint(flow["local_ip"], flow["local_port"], "")
        steps.append(Step("NAT map", f"{inside} stood behind the address in the log"))
    said = _joined(f"{text.date(row.at_ns)} UTC", row.where, f"{row.near or '?'} to {row.far or '?'}", row.rule)
    steps.append(Step("alert", said, row.whole))
    return steps


def _rollout(about: Mapping[str, Any], trace: _Trace) -> str:
    key = about.get("trace_id", "")
    score, advantage, actor = trace.rollouts.get(key, (None, None, None))
    group = about.get("group")
    rest = [
        value for other, value in trace.peers.get((about.get("run"), group, about.get("iteration")), ()) if other != key
    ]
    reward = "no reward was recorded" if score is None else f"reward {score:.3f}"
    if score is not None and rest:
        reward += f", against a mean of {fmean(rest):.3f} of {text.plural(len(rest), 'other')} in its group"
    return _joined(
        about.get("rollout"),
        group and f"group {group}",
        about.get("policy_version") and f"policy version {about['policy_version']}",
        actor and f"actor {actor}",
        reward,
        "" if advantage is None else f"advantage {advantage:+.3f}",
        key and f"trace {key}",
    )


def _output(call: int, trace: _Trace) -> Step:
    chat = trace.chats.get(call)
    if chat is None:
        return Step("model output", "not recorded")
    tokens = f"{chat['input_tokens']} tokens in, {chat['output_tokens']} out" if chat["output_tokens"] else ""
    where = "" if chat["same_turn"] else "the last one of its trace before the call"
    output = spoken(chat["attributes"], chat["events"])
    return Step(
        "model output", _joined(chat["model"], tokens, where, "" if output else "its text was not recorded"), output
    )


def _processes(call: int, flow: Mapping[str, Any] | None, trace: _Trace) -> list[Step]:
    """Those between the call and its socket, the outermost first; else the first ones that the call started."""
    above: list[Step] = []
    at = (flow["trace_id"], flow["parent_id"]) if flow else ("", "")
    while at in trace.processes and len(above) < _DEPTH:
        process = trace.processes[at]
        said = _joined(f"pid {process['pid'] or '?'}", f"from {text.clock(process['start_ns'])} UTC")
        above.append(Step("process", said, process["command"]))
        at = (at[0], process["parent_id"])
    if above:
        return above[::-1]
    steps = [
        Step("process", _joined(f"pid {'?' if pid is None else pid}", f"from {text.clock(start)} UTC"), command)
        for pid, start, command, _ in trace.of_call.get(call, [])
    ]
    if not steps:
        return [Step("process", "in the actor's own process, or not recorded")]
    more = trace.of_call[call][0][3] - len(steps)
    return [*steps, Step("process", f"{text.plural(more, 'more')} of this call")] if more > 0 else steps


def _flow(flow: Mapping[str, Any]) -> str:
    near, far = _endpoint(flow["local_ip"], flow["local_port"], ""), _endpoint(flow["peer_ip"], flow["peer_port"], "")
    moved = [f"{text.size(int(flow[way]))} {way}" for way in ("sent", "received") if str(flow[way] or "").isdecimal()]
    outcome = {"allow": "allowed", "deny": "refused"}.get(flow["decision"], flow["decision"])
    return _joined(
        f"{flow['proto']} {f'{near} to ' if near else ''}{far}",
        flow["host"],
        f"{outcome}: {flow['reason']}" if flow["reason"] else outcome,
        ", ".join(moved),
        _period(flow["start_ns"], flow["end_ns"]),
        f"span {flow['span_id']}",
        "which of several calls it belongs to is not certain" if flow["ambiguous"] else "",
        "" if flow["rank"] == 0 else "another socket of this call to the same place, not the one in the log",
    )


def _period(start_ns: int, end_ns: int | None) -> str:
    begun = f"{text.clock(start_ns)} UTC"
    return f"{begun}, never ended" if end_ns is None else f"{begun} for {text.seconds((end_ns - start_ns) / 1e9)}"


def _joined(first: object, *rest: str | None) -> str:
    """The parts there are; a first one that is missing is named as such."""
    return " · ".join([_MISSING if first is None or first == "" else str(first), *(part for part in rest if part)])


# --- who came second -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Other:
    """The best of the calls that are not the first candidate, by its evidence, and how many there are."""

    name: str
    said: str
    count: int


_ALONE: Final = {
    "socket": "the same socket was recorded for it",
    "nat": "a socket behind the NAT map speaks for it",
    "process": "the sensor names a process of it",
    "interval": "it was open on that machine at that time",
}


def _others(db: duckdb.DuckDBPyConnection, wanted: Sequence[tuple[int, int]]) -> dict[int, _Other]:
    rows = _looked_up(
        db,
        {"alert": [number for number, _ in wanted], "call": [call for _, call in wanted]},
        """WITH rest AS (
             SELECT c.*, count(*) OVER (PARTITION BY c.alert) AS others FROM candidate c JOIN wanted w USING (alert)
             WHERE c.call <> w.call
             QUALIFY row_number() OVER (
               PARTITION BY c.alert ORDER BY c.tier, c.used DESC, c.named DESC, c.reach DESC, c.gap_ns, c.call) = 1)
           SELECT r.alert, r.others, r.tier, r.used, r.named, r.gap_ns, coalesce(c.rollout, o.rollout), c.turn, c.tool,
             c.call_id
           FROM rest r LEFT JOIN call c USING (call) LEFT JOIN rollout o ON o.call = r.call""",
    )
    found = {}
    for alert, count, tier, used, named, gap_ns, *place in rows:
        said = [_ALONE[TIERS[tier]]]
        said += ["it used a socket to there"] if used else []
        said += ["its command names the destination"] if named else []
        said += [f"but {text.seconds(gap_ns / 1e9)} outside its life"] if gap_ns else []
        found[alert] = _Other(_named(dict(zip(_OF_PLACE, place, strict=True))), ", ".join(said), count)
    return found


_OF_PLACE: Final = ("rollout", "turn", "tool", "call_id")


def _second(alert: Attribution, other: _Other | None) -> tuple[str, str]:
    """(who came second, or what else is possible; why it lost)."""
    first, *rest = alert.candidates
    if alert.verdict == "unobserved":
        return _ranked([first], 0.0), _nobody(first)
    if alert.verdict == "ambiguous":
        lost = f"{_named(rest[0].about)}: {why_lost(first, rest[0])}" if rest else _nearest(other)
        return _ranked(rest, alert.unobserved), lost
    if rest and rest[0].confidence >= alert.unobserved:
        return _ranked(rest[:1], 0.0), why_lost(first, rest[0])
    return _ranked([], alert.unobserved), _nearest(other)


def _ranked(calls: Sequence[Candidate], unobserved: float) -> str:
    """The likeliest first, nobody among them."""
    every = [(each.confidence, f"{_named(each.about)} ({each.confidence:.3f}, {each.tier})") for each in calls]
    if unobserved:
        every.append((unobserved, f"nobody in this job ({unobserved:.3f})"))
    every.sort(key=lambda each: (-each[0], each[1]))
    more = f"; {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return "; ".join(said for _, said in every[:_LISTED]) + more


def _nearest(other: _Other | None) -> str:
    if other is None:
        return "No other call of this job could have caused it."
    if other.count == 1:
        return f"One other call could have caused it, {other.name}: {other.said}."
    return f"Of {other.count:,} other calls that could have caused it {other.name} is the nearest: {other.said}."


def why_lost(first: Candidate, second: Candidate) -> str:
    """What the evidence for two candidates differs in."""
    parts = []
    if first.tier != second.tier:
        parts.append(f"its evidence is {second.tier}, not {first.tier}")
    missing = [said for said in first.evidence if said not in second.evidence]
    if missing:
        parts.append(f"it lacks: {'; '.join(missing)}")
    against = [said for said in second.against if said not in first.against]
    if against:
        parts.append(f"against it: {'; '.join(against)}")
    if not parts:
        return "the same evidence speaks for both: only how long they lived and how near they were tells them apart."
    return f"{'; '.join(parts)}."


def _nobody(first: Candidate) -> str:
    said = "; ".join([*first.evidence, *(f"but {each}" for each in first.against)])
    return f"The nearest call: {said}. Something outside of this job explains the alert better."


def _named(about: Mapping[str, Any]) -> str:
    parts = [f"rollout {about.get('rollout') or '?'}"]
    if about.get("turn") is not None:
        parts.append(f"turn {about['turn']}")
    return ", ".join([*parts, *(str(about[name]) for name in ("tool", "call_id") if about.get(name))])


# --- rewards ---------------------------------------------------------------------------------------------------------


def _rewards(result: Result) -> list[Iteration]:
    """Rollouts that alerts are put down to against the others, by iteration."""
    caused = sorted(findings.causes(result))
    violating = {
        trace
        for (trace,) in _looked_up(
            result.db,
            {"call": caused},
            """SELECT trace_id FROM call JOIN wanted USING (call)
               UNION SELECT trace_id FROM rollout JOIN wanted USING (call)""",
        )
    }
    rows = result.db.execute(
        """SELECT r.iteration, r.trace_id, t.score FROM rollout r LEFT JOIN rewarded t USING (trace_id)
            WHERE r.iteration IS NOT NULL ORDER BY r.iteration, r.trace_id"""
    ).fetchall()
    found: dict[int, Iteration] = {}
    for number, trace, score in rows:
        item = found.setdefault(number, Iteration(number))
        bad = trace in violating
        item.violating += bad
        item.clean += not bad
        if score is not None:
            (item.violating_rewards if bad else item.clean_rewards).append(score)
    return list(found.values())

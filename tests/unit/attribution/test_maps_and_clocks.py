"""Logs and maps of gateways against a job whose sockets are known: whose an alert is, through every translation and by
every clock; and where nothing tells, that this is said."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_guard.attribution import clock
from ray_guard.attribution.answers import Attribution
from ray_guard.attribution.attribute import Result, attribute
from ray_guard.attribution.clock import Clock
from ray_guard.attribution.intake import Intake, Options, placed
from ray_guard.attribution.observation import Semantics
from ray_guard.attribution.times import syslog
from ray_guard.evidence import columns

SECOND: Final = 1_000_000_000
BEGIN: Final = 1_772_854_811 * SECOND
"""2026-03-07T03:40:11Z"""
PEER: Final = "198.51.100.7"
HERE: Final = "10.0.0.5"


class Flow(NamedTuple):
    """A socket that was recorded in a call of its own."""

    at: float
    lasts: float = 0.4
    port: int = 40000
    ip: str = HERE
    peer: str = PEER
    peer_port: int = 443

    @property
    def start_ns(self) -> int:
        return BEGIN + int(self.at * SECOND)

    @property
    def end_ns(self) -> int:
        return self.start_ns + int(self.lasts * SECOND)


def steady(count: int, every: float = 7.3, lasts: float = 0.4) -> list[Flow]:
    chance = Random(1)
    return [Flow(n * every + chance.uniform(0, every / 2), lasts, 40000 + n) for n in range(count)]


def traces(
    folder: Path, flows: Iterable[Flow], *, host: str = "node-3", ips: Sequence[str] = (HERE,), texts: bool = False
) -> Path:
    rows: list[dict[str, Any]] = []
    for number, flow in enumerate(flows):
        same = {"trace_id": f"{number:032x}", "source": "supervisor", "rollout": f"r{number}", "host": host}
        same |= {"host_ips": list(ips)} if flow.ip in (HERE, *ips) else {"host": f"at-{flow.ip}", "host_ips": [flow.ip]}
        call = {"span_id": f"{number:015x}1", "name": "execute_tool bash"}
        call |= {"start_ns": flow.start_ns - SECOND // 5, "end_ns": flow.end_ns + SECOND // 5}
        arguments = [("gen_ai.tool.call.arguments", f"curl https://{flow.peer}/")] if texts else []
        rows.append(same | call | {"attributes": [("gen_ai.tool.call.id", f"call-{number}"), *arguments]})
        if not texts:
            ends = [("network.local.address", flow.ip), ("network.local.port", str(flow.port))]
            ends += [("network.peer.address", flow.peer), ("network.peer.port", str(flow.peer_port))]
            rows.append(
                same
                | {"span_id": f"{number:015x}2", "parent_id": call["span_id"], "name": "egress connect"}
                | {"start_ns": flow.start_ns, "end_ns": flow.end_ns, "attributes": ends}
            )
    path = folder / "traces.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=columns.SCHEMA), path)
    return path


def line(moment_ns: int, src: str, sport: int | str, *, dst: str = PEER, dport: int = 443, node: str = "gw") -> str:
    stamp = datetime.fromtimestamp(moment_ns // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return (
        f"{stamp}.{moment_ns % SECOND // 1000:06d}+00:00 {node} kernel: DENY: IN= OUT=eth0 SRC={src} DST={dst} LEN=60 "
        f"PROTO=TCP SPT={sport} DPT={dport} SYN"
    )


def answer(
    folder: Path, flows: Sequence[Flow], log: Sequence[str], *maps: str, options: Options | None = None, **job: Any
) -> Result:
    (folder / "fw.log").write_text("".join(f"{each}\n" for each in log))
    paths = []
    for number, content in enumerate(maps):
        paths.append(folder / f"map{number}")
        paths[-1].write_text(content)
    return attribute([traces(folder, flows, **job)], [folder / "fw.log"], maps=paths, options=options)


def named(alert: Attribution) -> str:
    """The call that an alert is laid to, or what is said instead."""
    return str(alert.candidates[0].about["call_id"]) if alert.verdict == "attributed" else alert.verdict


def all_named(result: Result) -> list[str]:
    return [named(each) for each in result.alerts]


def calls(count: int) -> list[str]:
    return [f"call-{number}" for number in range(count)]


# ── maps ──────────────────────────────────────────────────────────────────────────────────────────────────────────

GATEWAY: Final = "203.0.113.9"


def event(kind: str, at: float, inside: tuple[str, int], outside: tuple[str, int], aim: str = PEER) -> str:
    far = f"src={PEER} dst={outside[0]} sport=443 dport={outside[1]}"
    return f"[{at:.6f}]\t[{kind}] tcp      6 120 SYN_SENT src={inside[0]} dst={aim} sport={inside[1]} dport=443 {far}"


def conntrack(flows: Sequence[Flow], kinds: str, *, skew: float = 0.0, **changed: Any) -> str:
    """What a gateway says of these flows. It gives out one port again and again."""
    rows = []
    for number, flow in enumerate(flows):
        ends = (flow.ip, flow.port), (GATEWAY, 61000 + number % 2)
        if "NEW" in kinds:
            rows.append((flow.start_ns / SECOND + skew, "NEW", *ends))
        if "DESTROY" in kinds:
            rows.append((flow.end_ns / SECOND + skew + 1.0, "DESTROY", *ends))
    return "".join(event(kind, at, *ends, **changed) + "\n" for at, kind, *ends in sorted(rows))


def outside(flows: Sequence[Flow], skew: float = 0.0) -> list[str]:
    return [
        line(flow.start_ns + int((0.1 + skew) * SECOND), GATEWAY, 61000 + number % 2)
        for number, flow in enumerate(flows)
    ]


@pytest.mark.parametrize("kinds", ["NEW DESTROY", "NEW", "DESTROY"])
@pytest.mark.parametrize("skew", [0.0, 41.0])
def test_a_port_that_is_given_out_again_is_each_time_another_calls(tmp_path: Path, kinds: str, skew: float) -> None:
    flows = steady(24)
    result = answer(tmp_path, flows, outside(flows, skew), conntrack(flows, kinds, skew=skew))
    assert all_named(result) == calls(24)
    assert {each.candidates[0].tier for each in result.alerts} == {"nat"}


def test_a_dump_holds_beside_the_events(tmp_path: Path) -> None:
    """It does not say of when it is."""
    flows = steady(12)
    dump = event("NEW", 0, (HERE, flows[0].port), (GATEWAY, 61000)).partition("\t[NEW] ")[2]
    result = answer(tmp_path, flows, outside(flows), conntrack(flows, "DESTROY").partition("\n")[2] + dump + "\n")
    assert all_named(result)[0] == "call-0"


def test_a_map_has_a_clock_of_its_own(tmp_path: Path) -> None:
    flows = steady(24)
    result = answer(tmp_path, flows, outside(flows, 3.0), conntrack(flows, "NEW DESTROY", skew=-3600.0))
    assert all_named(result) == calls(24)
    (given,) = result.maps
    assert (given.translations, given.own_clock, round(given.clock.skew_ns / SECOND)) == (24, True, -3600)
    assert round(result.sources[0].clock.skew_ns / SECOND) == 3


def test_from_node_to_host_to_gateway(tmp_path: Path) -> None:
    flows = [flow._replace(ip="172.17.0.2") for flow in steady(24)]
    host = "".join(
        event("NEW", flow.start_ns / SECOND + 5, ("172.17.0.2", flow.port), ("10.0.0.5", 50000 + n)) + "\n"
        for n, flow in enumerate(flows)
    )
    rows = (f"{flow.start_ns / SECOND - 9},,10.0.0.5,{50000 + n},{GATEWAY},61000" for n, flow in enumerate(flows))
    log = [line(flow.start_ns + SECOND // 10, GATEWAY, 61000) for flow in flows]
    result = answer(tmp_path, flows, log, host, "\n".join(rows), ips=["172.17.0.2", "10.0.0.5"])
    assert all_named(result) == calls(24)
    assert [round(each.clock.skew_ns / SECOND) for each in result.maps] == [5, -9]


def test_a_destination_that_is_translated_too(tmp_path: Path) -> None:
    flows = [flow._replace(peer="10.96.0.1") for flow in steady(12)]
    result = answer(tmp_path, flows, outside(flows), conntrack(flows, "NEW DESTROY", aim="10.96.0.1"))
    assert all_named(result) == calls(12)


def test_a_whole_address_is_mapped(tmp_path: Path) -> None:
    flows = steady(12)
    log = [line(flow.start_ns, GATEWAY, flow.port) for flow in flows]
    result = answer(tmp_path, flows, log, f"outside_ip;inside_ip\n{GATEWAY};{HERE}\n")
    assert all_named(result) == calls(12)


def test_icmp_has_no_ports_that_a_map_could_lack(tmp_path: Path) -> None:
    flows = steady(12)
    ping = line(flows[5].start_ns, GATEWAY, 8, dport=0).replace("PROTO=TCP", "PROTO=ICMP")
    result = answer(tmp_path, flows, [*outside(flows), ping], conntrack(flows, "NEW DESTROY"))
    assert result.db.execute("SELECT count(*) FROM unmapped").fetchall() == [(0,)]


ELSEWHERE: Final = "198.51.100.99"


def busy(rounds: int) -> tuple[list[Flow], list[int]]:
    """Three machines that are at work at once, one of which goes to the peer; which calls those are."""
    chance = Random(3)
    flows, guilty = [], []
    for n in range(rounds):
        who = chance.randrange(3)
        guilty.append(3 * n + who)
        for machine in range(3):
            at = 30.0 * n + chance.uniform(0, 2)
            peer = PEER if machine == who else ELSEWHERE
            flows.append(Flow(at, 8.0, 40000 + n, f"10.0.0.{machine + 5}", peer))
    return flows, guilty


def with_peers(flows: Sequence[Flow]) -> str:
    rows = ["start,end,inside_ip,inside_port,outside_ip,outside_port,proto,peer_ip,peer_port"]
    for number, flow in enumerate(flows):
        rows.append(
            f"{flow.start_ns / SECOND},{flow.end_ns / SECOND + 1},{flow.ip},{flow.port},{GATEWAY},{61000 + number},"
            f"tcp,{flow.peer},443"
        )
    return "\n".join(rows)


def portless(flows: Iterable[Flow]) -> list[str]:
    """What a firewall behind the gateway says that sums flows up."""
    return [line(flow.start_ns + SECOND, GATEWAY, "").replace("SPT= ", "") for flow in flows]


def test_without_a_source_port_the_map_names_the_sockets_to_there(tmp_path: Path) -> None:
    flows, guilty = busy(20)
    result = answer(tmp_path, flows, portless(flows[number] for number in guilty), with_peers(flows))
    assert all_named(result) == [f"call-{number}" for number in guilty]
    assert {each.candidates[0].tier for each in result.alerts} == {"nat"}


def test_without_a_source_port_the_map_names_the_machine(tmp_path: Path) -> None:
    """No sockets were recorded, and all three say in their commands that they would go there."""
    flows, guilty = busy(20)
    said = [flow._replace(peer=PEER) for flow in flows]
    result = answer(tmp_path, said, portless(flows[number] for number in guilty), with_peers(flows), texts=True)
    assert all_named(result) == [f"call-{number}" for number in guilty]


@pytest.mark.parametrize("ports", [True, False])
def test_a_map_that_names_another_machine_clears_the_job(tmp_path: Path, *, ports: bool) -> None:
    """Calls that would go there were open all the time; the gateway translated for a machine that is none of theirs."""
    flows = [Flow(10.0 * n, 9.0, 40000 + n) for n in range(30)]
    strangers = [Flow(30.0 * n + 4, 1.0, 50000 + n, "10.9.9.9") for n in range(10)]
    seen = [line(flow.start_ns + SECOND, GATEWAY, 61000 + n) for n, flow in enumerate(strangers)]
    seen = seen if ports else portless(strangers)
    result = answer(tmp_path, flows, seen, with_peers([*strangers, *flows[1::3]]), texts=True)
    assert all_named(result) == ["unobserved"] * 10


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("host", "said", "same"),
    [
        ("node-3", "node-3", True),
        ("node-3", "NODE-3.rl.example.", True),
        ("node-3.rl.example", "node-3", True),
        ("node-3.rl.example", "node-3.eu.example", False),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.5", "10.0.0.6", False),
        ("node-3", "192.0.2.5", True),  # by its address
        ("node-3", "2001:db8::5", True),
    ],
)
def test_a_machine_by_its_name(tmp_path: Path, host: str, said: str, same: bool) -> None:
    log = [line(BEGIN, "203.0.113.77", 1, node=said)]
    result = answer(tmp_path, steady(3), log, host=host, ips=["192.0.2.5", "2001:db8::5"])
    assert result.db.execute("SELECT known FROM place").fetchall() == [(same,)]


@pytest.mark.parametrize(
    ("recorded", "logged"),
    [("::ffff:10.0.0.5", "10.0.0.5"), ("2001:0DB8:0::05", "2001:db8::5"), ("fe80::5%eth0", "fe80::5")],
)
def test_an_address_however_it_was_recorded(tmp_path: Path, recorded: str, logged: str) -> None:
    flows = [flow._replace(ip=recorded) for flow in steady(6)]
    log = [line(flow.start_ns, logged, flow.port) for flow in flows]
    result = answer(tmp_path, flows, log, ips=[recorded, "192.0.2.1"])
    assert all_named(result) == calls(6)
    assert result.db.execute("SELECT DISTINCT known FROM place").fetchall() == [(True,)]


# ── clocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def direct(flows: Sequence[Flow], skew: Callable[[Flow], float]) -> list[str]:
    return [line(flow.start_ns + int((0.1 + skew(flow)) * SECOND), flow.ip, flow.port) for flow in flows]


def told(clock: Clock) -> float:
    assert clock.identifiable
    assert clock.low_ns <= clock.skew_ns <= clock.high_ns
    return clock.skew_ns / SECOND


@pytest.mark.parametrize(
    ("every", "skew"),
    [
        (7.3, lambda _: -5.0),
        (7.3, lambda _: 8 * 3600 + 3.0),  # civil time of another zone
        (1440, lambda flow: 3 + flow.at * 500e-6),  # 500 ppm, over a day
        (10_080, lambda flow: 3 - flow.at * 500e-6),  # … a week
    ],
)
def test_a_clock_is_told_and_taken_off(tmp_path: Path, every: float, skew: Callable[[Flow], float]) -> None:
    flows = steady(60, every)
    result = answer(tmp_path, flows, direct(flows, skew))
    (one,) = result.sources[0].clocks
    middle = next(flow for flow in flows if flow.start_ns > one.reference_ns - (skew(flow) + 1) * SECOND)
    assert abs(told(one) - skew(middle)) <= 0.5 + every * 500e-6
    assert all_named(result) == calls(60)


@pytest.mark.parametrize("jump", [37.0, -3600.0, 3600.0])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_clock_that_is_set_in_between_is_two(tmp_path: Path, jump: float, share: float) -> None:
    """By a time server; by the change from or to summer time in a log that does not say its zone."""
    flows = steady(60)
    result = answer(tmp_path, flows, direct(flows, lambda flow: jump if flow.at > flows[int(60 * share)].at else 0.0))
    before, after = result.sources[0].clocks
    assert told(before) == 0.0
    assert abs(told(after) - jump) <= 0.5
    assert result.sources[0].set_at == [int(60 * share) + 1]
    assert all_named(result) == calls(60)


def parted(
    folder: Path, flows: Sequence[Flow], log: Sequence[str], names: Sequence[str], ends: Sequence[int]
) -> Result:
    """The answer where a log's lines lie in several files, the last of which is written to."""
    for name, begin, end in zip(names, (0, *ends), (*ends, len(log)), strict=True):
        content = "".join(f"{each}\n" for each in log[begin:end]).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return attribute([traces(folder, flows)], [folder / name for name in reversed(names)])


ROTATED: Final = ("fw.log.10.gz", "fw.log.2", "fw.log")


@pytest.mark.parametrize(
    "names",
    [
        ROTATED,
        ("fw-20260306.log.gz", "fw-20260307.log", "fw.log"),
        ("fw-2026-03-06-23:00.log", "fw-2026-03-07-00:00.log", "fw-2026-03-07-01:00.log"),
    ],
)
def test_a_rotated_log_has_one_clock(tmp_path: Path, names: Sequence[str]) -> None:
    """A part of it has one record of a port that comes again at every call; and drift shows over days alone."""
    flows = [*steady(20, 2000), *(Flow(50_000 + 60.0 * n, 1.0, 39000) for n in range(5)), *steady(60, 2000)[40:]]
    drifting = direct(flows, lambda flow: 37 + flow.at * 500e-6)
    result = parted(tmp_path, flows, drifting, names, (20, 25))
    assert [source.path for source in result.sources] == [str(tmp_path / name) for name in names]
    assert [source.records for source in result.sources] == [20, 5, 20]
    assert len({source.report.sha256 for source in result.sources}) == 3
    assert [each.record for each in result.alerts] == [*range(20), *range(5), *range(20)]
    (clock,) = {clock for source in result.sources for clock in source.clocks}
    told(clock)
    assert clock.drift == pytest.approx(500e-6, abs=2e-5)
    assert all_named(result) == calls(45)


def test_a_clock_that_is_set_in_a_rotated_log(tmp_path: Path) -> None:
    flows = steady(60)
    result = parted(
        tmp_path, flows, direct(flows, lambda flow: 90.0 if flow.at > flows[34].at else 4.0), ROTATED, (20, 40)
    )
    assert [[round(told(clock)) for clock in source.clocks] for source in result.sources] == [[4], [4, 90], [90]]
    assert [source.set_at for source in result.sources] == [[], [15], []]
    assert all_named(result) == calls(60)


@pytest.mark.parametrize("names", [ROTATED, ("fw-1.log", "fw-2.log", "fw-3.log"), ("10.0.0.3", "10.0.0.2", "10.0.0.1")])
def test_files_that_may_be_of_two_sensors_stay_apart(tmp_path: Path, names: Sequence[str]) -> None:
    """Whatever the names are: what is written at one time; or where names say nothing of an order."""
    flows = steady(60)
    log = direct(flows, lambda flow: 30.0 * (flow.port % 3))
    if names is ROTATED:
        log = [*log[::3], *log[1::3], *log[2::3]]
    else:
        log = direct(flows, lambda flow: 30.0 * (flow.port // 20 - 2000))
    result = parted(tmp_path, flows, log, names, (20, 40))
    assert {round(told(source.clock)) for source in result.sources} == {0, 30, 60}


def test_amazons_parts_of_one_log_overlap(tmp_path: Path) -> None:
    names = [f"1_vpcflowlogs_eu-west-1_fl-7_20260307T03{n}Z_{n}3456ab.log.gz" for n in (40, 45, 50)]
    flows = steady(60)
    log = direct(flows, lambda _: 37.0)
    result = parted(tmp_path, flows, [*log[::3], *log[1::3], *log[2::3]], names, (20, 40))
    assert len({clock for source in result.sources for clock in source.clocks}) == 1


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """However many names lead to it."""
    log = "".join(f"{each}\n" for each in direct(steady(3), lambda _: 0.0))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "fw.log").write_text(log)
    (tmp_path / "logs" / "link.log").symlink_to("fw.log")
    logs = Intake()
    list(logs.read([tmp_path / "logs", tmp_path / "logs" / "fw.log"], Options(), (BEGIN, BEGIN + SECOND)))
    assert [(source.records, dict(source.report.quarantined)) for source in logs.sources] == [
        (3, {}),
        (0, {"twice": 1}),
        (0, {"twice": 1}),
    ]
    assert len({source.report.sha256 for source in logs.sources}) == 1


def test_two_clocks_in_one_file_are_none(tmp_path: Path) -> None:
    flows = steady(60)
    result = answer(tmp_path, flows, direct(flows, lambda flow: 90.0 if flow.port % 3 == 0 else 4.0))
    (clock,) = result.sources[0].clocks
    assert not clock.identifiable
    assert all_named(result) == ["unobserved" if flow.port % 3 == 0 else f"call-{n}" for n, flow in enumerate(flows)]


@pytest.mark.parametrize("offset", [-1000.0, 5.0])
def test_what_texts_tell_counts_as_far_as_sockets_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    """Flows of minutes bound the clock: calls at regular intervals once told one that none of the sockets allowed."""
    ns = int(offset * SECOND)
    by_texts = Clock(ns, low_ns=ns - SECOND // 10, high_ns=ns + SECOND // 10, identifiable=True)
    monkeypatch.setattr(clock, "_by_texts", lambda *_, **__: by_texts)
    flows = [Flow(20.0 * n, 600.0, 40000 + n) for n in range(30)]
    result = answer(tmp_path, flows, direct(flows, lambda _: 5.0))
    assert result.sources[0].clock.identifiable == (offset == 5.0)
    assert all_named(result) == calls(30)


@pytest.mark.parametrize(
    ("flows", "seen", "skew", "right"),
    [
        # the same port at every call: one offset fits as well as the next
        ([Flow(10.0 * n, 1.0) for n in range(40)], slice(None), 7.0, False),
        ([Flow(10.0 * n, 1.0) for n in range(40)], slice(10, 16), 7.0, False),
        ([Flow(60.0 * n, 1.0, 40000 + n % 7) for n in range(90)], slice(50, 51), 0.0, True),
        ([Flow(60.0 * n, 1.0, 40000 + n % 7) for n in range(90)], slice(50, 53), 37.0, False),
        # flows of minutes: any of many offsets puts each alert into its own
        ([Flow(20.0 * n, 600.0, 40000 + n) for n in range(30)], slice(None), 37.0, True),
        # drift over a day, and too few to tell it
        (steady(12, 7200), slice(None), 0.0005, False),
    ],
)
def test_what_does_not_tell_a_clock_is_said_not_to(
    tmp_path: Path, flows: list[Flow], seen: slice, skew: float, right: bool
) -> None:
    drifting = skew < 0.01
    log = direct(flows, lambda flow: flow.at * skew if drifting else skew)[seen]
    result = answer(tmp_path, flows, log)
    assert not result.sources[0].clock.identifiable
    wanted = calls(len(flows))[seen] if right else ["unobserved"] * len(log)
    if drifting and not right:
        wanted = [call if call == "call-0" else "unobserved" for call in all_named(result)]
    assert all_named(result) == wanted


@pytest.mark.parametrize(
    ("traces_begin", "written", "year", "expected"),
    [
        ("2025-12-31T23:59:00Z", "Jan  1 00:00:01", None, "2026-01-01T00:00:01Z"),
        ("2026-01-01T00:01:00Z", "Dec 31 23:59:59", None, "2025-12-31T23:59:59Z"),
        ("2026-01-01T00:01:00Z", "Dec 31 23:59:59", 2025, "2025-12-31T23:59:59Z"),
        ("2026-01-01T00:01:00Z", "Jan  1 00:00:01", 2025, "2026-01-01T00:00:01Z"),
        ("2026-03-01T00:01:00Z", "Mar  1 00:00:01", 2024, "2024-03-01T00:00:01Z"),
        ("2026-03-01T00:01:00Z", "Jan  1 00:00:01", 2024, "2024-01-01T00:00:01Z"),
        ("2028-03-01T00:01:00Z", "Feb 29 23:59:59", None, "2028-02-29T23:59:59Z"),
        ("2026-03-01T00:01:00Z", "Feb 29 23:59:59", None, "2024-02-29T23:59:59Z"),
    ],
)
def test_a_year_that_is_not_said(traces_begin: str, written: str, year: int | None, expected: str) -> None:
    begin = int(datetime.fromisoformat(traces_begin).timestamp()) * SECOND
    time, _ = syslog(written, Semantics.PACKET)
    placed_ns = placed(time, Options(year=year), (begin, begin + 3600 * SECOND)).start_ns
    assert datetime.fromtimestamp(placed_ns // SECOND, UTC) == datetime.fromisoformat(expected)


@pytest.mark.parametrize(
    ("year", "written", "expected"),
    [
        # a log of ten months, and a job at its end: what is nearer to next summer than to this job was last summer
        (
            None,
            [("Jun  9", "Oct  1"), ("Dec 31", "Jan  1"), ("Mar 10", "Mar  7")],
            [2025, 2025, 2025, 2026, 2026, 2026],
        ),
        # relays write lines out of order
        (
            None,
            [("Sep  6", "Aug 20"), ("Sep  9", "Feb 28"), ("Mar  7", "Mar  7")],
            [2025, 2025, 2025, 2026, 2026, 2026],
        ),
        (
            2025,
            [("Jun  9", "Oct  1"), ("Dec 31", "Jan  1"), ("Mar 10", "Mar  7")],
            [2025, 2025, 2025, 2026, 2026, 2026],
        ),
        (
            2023,
            [("Jun  9", "Oct  1"), ("Feb 28", "Feb 29"), ("Mar  1", "Mar  7")],
            [2023, 2023, 2024, 2024, 2024, 2024],
        ),
    ],
)
def test_years_follow_one_another_from_file_to_file(
    tmp_path: Path, year: int | None, written: list[tuple[str, str]], expected: list[int]
) -> None:
    for name, days in zip(ROTATED, written, strict=True):
        content = "".join(
            f"{day} 03:40:11 gw kernel: IN= OUT=e SRC={HERE} DST={PEER} PROTO=TCP SPT=1 DPT=2\n" for day in days
        )
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    logs = Intake()
    list(logs.read([tmp_path], Options(year=year), (BEGIN, BEGIN + 3600 * SECOND)))
    moments = [
        datetime.fromtimestamp(ns // SECOND, UTC) for batch in logs.batches for ns in batch["start_ns"].to_pylist()
    ]
    assert [moment.year for moment in moments] == expected
    assert [moment.strftime("%b %e") for moment in moments] == [day for days in written for day in days]


@pytest.mark.parametrize(
    ("zone", "written", "expected"),
    [
        # set back from 3 to 2 o'clock: 2:30 comes twice, and the log tells which
        (
            "Europe/Berlin",
            ["25 01:59", "25 02:10", "25 02:50", "25 02:05", "25 02:55", "25 03:10"],
            ["24 23:59", "25 00:10", "25 00:50", "25 01:05", "25 01:55", "25 02:10"],
        ),
        ("Europe/Berlin", ["25 02:10", "25 02:50", "25 03:10"], ["25 00:10", "25 00:50", "25 02:10"]),
        ("Australia/Lord_Howe", ["04 01:40", "04 01:50"], ["03 15:10", "03 15:20"]),
        ("Asia/Shanghai", ["25 02:10", "25 02:05"], ["24 18:10", "24 18:05"]),
    ],
)
def test_an_hour_that_comes_twice(tmp_path: Path, zone: str, written: list[str], expected: list[str]) -> None:
    begin = int(datetime.fromisoformat("2026-10-25T00:00:00Z").timestamp()) * SECOND
    path = tmp_path / "log"
    path.write_text(
        "".join(f"2026-10-{each}:00 gw kernel: IN= OUT=e SRC={HERE} DST={PEER} SPT=1\n" for each in written)
    )
    logs = Intake()
    list(logs.read([path], Options(zone=ZoneInfo(zone)), (begin, begin + 3600 * SECOND)))
    assert [
        f"{datetime.fromtimestamp(at // SECOND, UTC):%d %H:%M}"
        for batch in logs.batches
        for at in batch["start_ns"].to_pylist()
    ] == expected


def test_an_hour_that_never_was(tmp_path: Path) -> None:
    """A clock that was not set for summer goes on by its own time."""
    time, _ = syslog("Mar 29 02:30:00", Semantics.PACKET)
    begin = int(datetime.fromisoformat("2026-03-29T01:30:00Z").timestamp()) * SECOND
    assert placed(time, Options(zone=ZoneInfo("Europe/Berlin")), (begin, begin)).start_ns == begin

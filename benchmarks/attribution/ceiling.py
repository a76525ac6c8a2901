"""About the most that anybody could score on generate.py's jobs without sockets: Bayes with the generator's own rates.

python benchmarks/attribution/ceiling.py [--seeds N]

It is told what no reader of logs knows: the exact moment of each flow, how many calls are guilty, how many flows are
strays, and how a guilty call spreads its flow over its life. It is not told the generator's list of commands: a
command says whether it names an address, and which, and whether its program can do anything at all (``python``,
``bash``, ``make``) or does one known thing that nobody objects to (``ls``, ``pip``). A goal well above this is one that
the scenario rules out. It leaves out the ports that some commands name, which matter only where two guilty calls meet,
or a guilty one and a stray: rare here, but it makes this a reference and not a proof. "Nobody" is called so by the
product's rule: where at least half of the probability is nobody's.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass

from generate import FAR, GUILTY, QUIET, SCENARIOS, Job, Scenario

SECOND = 1_000_000_000
NAMING = sum("{ip}" in each for each in GUILTY) / len(GUILTY)
OPEN = ("python", "bash", "make")
SILENT_OPEN = 0.75 * sum(each.startswith(OPEN) and "--url" not in each for each in QUIET) / len(QUIET)
"""Of the calls that are not guilty, the share whose command names no address and could be anything."""
ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Open:
    """A tool call as the traces tell it."""

    span: str
    node: str
    start: int
    end: int
    names: frozenset[str] | None
    """Addresses that its command names; None where the commands are not known."""
    harmless: bool
    """Its program does one known thing that nobody objects to."""


def calls_of(job: Job) -> list[Open]:
    found = []
    for line in job.lines:
        group = json.loads(line)["resourceSpans"][0]
        span = group["scopeSpans"][0]["spans"][0]
        if span["name"].startswith("execute_tool"):
            about = {each["key"]: each["value"].get("stringValue") for each in span["attributes"]}
            node = {each["key"]: each["value"].get("stringValue") for each in group["resource"]["attributes"]}
            text = about.get("gen_ai.tool.call.arguments")
            names = None if text is None else frozenset(ADDRESS.findall(text))
            harmless = text is not None and not names and not json.loads(text)["command"].startswith(OPEN)
            harmless |= text is not None and "--url" in text
            start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
            found.append(Open(span["spanId"], str(node["host.name"]), start, end, names, harmless))
    return found


def rate(call: Open, at: int, peer: str, scenario: Scenario) -> float:
    """Objected flows to this peer per second that the call makes at this moment."""
    length = call.end - call.start
    if length <= 0 or not 0.02 * length <= at - call.start <= 0.8 * length:
        return 0.0
    if call.harmless:
        return 0.0
    if call.names is None:
        guilty = scenario.guilty / len(FAR)
    elif call.names:
        guilty = float(peer in call.names)
    else:
        unnamed = scenario.guilty * (1 - NAMING)
        guilty = unnamed / (unnamed + (1 - scenario.guilty) * SILENT_OPEN) / len(FAR)
    return guilty / (0.78 * length / SECOND)


def ceiling(scenario: Scenario, seed: int) -> dict[str, float]:
    job = Job(scenario, seed)
    job.run()
    calls, hidden = calls_of(job), scenario.nat == "hidden"
    caused = right = negatives = seen = 0
    expected = 0.0
    for flow in job.flows:
        if not flow.objected or (flow.node >= 100 and not hidden):
            if flow.objected:  # of a machine that the job does not have, and told so by its address
                negatives += 1
                seen += 1
            continue
        machines = 1 if not hidden else scenario.nodes
        stray = scenario.strays_per_hour / 3600 / scenario.nodes / len(FAR) * machines * (1.0 if hidden else 0.6)
        options = {
            call.span: rate(call, flow.start, flow.peer, scenario)
            for call in calls
            if call.start <= flow.start <= call.end and (hidden or call.node == f"node-{flow.node}")
        }
        whole = stray + sum(options.values())
        best = max(options, key=lambda span: options[span], default=None)
        if flow.cause is None:
            negatives += 1
            seen += stray >= whole / 2
        else:
            caused += 1
            right += best == flow.cause
            expected += (options[best] / (whole - stray)) if best and whole > stray else 0.0
    return {
        "caused": caused,
        "top1": right / max(caused, 1),
        "top1 expected": expected / max(caused, 1),
        "negatives": negatives,
        "negatives_unobserved": seen / max(negatives, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for name in ("interval", "interval-bare", "nat-hidden"):
        for seed in range(arguments.seeds):
            found = ceiling(SCENARIOS[name], seed)
            print(f"{name:16} {seed}  " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()

"""``ray-guard run``: one command, confined as one tool call. Its own process is not confined."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from ray_guard.client import channel as channels
from ray_guard.client import places
from ray_guard.client.confine import Identity, default_evidence
from ray_guard.client.process import (
    Control,
    checked_descriptor,
    own_variables,
    standard_descriptor,
    start_message,
    tool_environment,
)
from ray_guard.errors import RayGuardError
from ray_guard.policy.model import Policy

NOTHING_STARTED = 125
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a command confined as one tool call",
        description="Runs CMD under a policy. The exit status is CMD's own, 128+N after signal N, 125 when nothing was "
        "started.",
    )
    parser.add_argument("--policy", required=True, metavar="FILE", help="policy file (YAML or JSON)")
    parser.add_argument("--evidence", metavar="DIR", help="where the journal goes (default: RAY_GUARD_EVIDENCE, or "
                        "the user's state folder)")  # fmt: skip
    parser.add_argument(
        "--pass-fd", type=int, action="append", default=[], metavar="N", help="pass descriptor N on (repeatable)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD …")
    return parser


def run(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        return _nothing("no command: ray-guard run --policy FILE -- CMD …")
    try:
        control = _start(Policy.load(arguments.policy), arguments.evidence, command, arguments.pass_fd)
    except OSError as error:
        if isinstance(error, RayGuardError):
            return _nothing(str(error))
        return _nothing(f"{command[0]}: {error.strerror}")
    except (RayGuardError, ValueError) as error:
        return _nothing(str(error))
    for number in _FORWARDED:
        signal.signal(number, lambda received, _frame: control.signal(received))
    ended = None
    while ended is None:
        ended = control.wait(1.0)
    code = os.waitstatus_to_exitcode(int(ended["status"]))
    if ended.get("timed_out"):
        _say("the call's wall_seconds are over: it was ended")
    if ended.get("unkillable"):
        _say(f"unkillable (uninterruptible sleep): {', '.join(map(str, ended['unkillable']))}")
    return 128 - code if code < 0 else code


def _start(policy: Policy, evidence: str | None, command: list[str], passed: list[int]) -> Control:
    folder = evidence or os.environ.get("RAY_GUARD_EVIDENCE") or default_evidence()
    run_id = os.environ.get("RAY_GUARD_RUN_ID") or f"run-{os.urandom(4).hex()}"
    identity = Identity(
        evidence=folder, run_id=run_id, service_name=os.environ.get("OTEL_SERVICE_NAME", "ray-guard run")
    )
    channel = channels.connect()
    channel.request(
        {
            "op": "hello",
            "kind": "run",
            "pid": os.getpid(),
            "policy": policy.to_wire(),
            "identity": identity.as_message(),
            "evidence": os.path.abspath(folder),
            "export": channels.export_environment(),
            "places": places.told(),
        }
    )
    numbers = [0, 1, 2, *sorted({number for number in passed if number > 2})]
    payload = start_message(
        command,
        executable=None,
        environment={**tool_environment(dict(os.environ)), **own_variables()},
        umask=-1,
        numbers=numbers,
        restore_signals=True,
    )
    opened: list[int] = []  # for the life of this process
    standard = [standard_descriptor(number, opened) for number in numbers[:3]]
    more = [checked_descriptor(number) for number in numbers[3:]]
    working_folder = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return Control(channel, payload, working_folder, [*standard, *more])


def _nothing(reason: str) -> int:
    _say(reason)
    return NOTHING_STARTED


def _say(line: str) -> None:
    print(f"ray-guard: {line}", file=sys.stderr)

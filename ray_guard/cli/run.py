"""``ray-guard run``: one command, confined as one tool call. Its own process is not confined."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from ray_guard.cli.order import Order
from ray_guard.client import channel as channels
from ray_guard.errors import RayGuardError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ray_guard.cli.terminal import Terminal
    from ray_guard.client.start import Control

NOTHING_STARTED = 125
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    from argparse import REMAINDER

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
    parser.add_argument("command", nargs=REMAINDER, metavar="-- CMD …")
    return parser


def run(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return carry_out(Order(arguments.policy, arguments.evidence, arguments.pass_fd, command))


def carry_out(order: Order) -> int:
    """Runs the command; the exit status."""
    command = order.command
    if not command:
        return _nothing("no command: ray-guard run --policy FILE -- CMD …")
    try:
        summons = channels.Summons(starts=1, supervise=_supervise)
        # A supervisor that was just started has much to load: what it will be told is put together meanwhile.
        hello = _hello(order)
        terminal = _terminal()
        start = _prepared(command, order.pass_fd, terminal)
        channel = summons.connect()
        channel.request(hello)
        forward = _Forwarding()
        control = start(channel)
    except OSError as error:
        if isinstance(error, RayGuardError):
            return _nothing(str(error))
        return _nothing(f"{error.filename or command[0]}: {error.strerror}")
    except (RayGuardError, ValueError) as error:
        return _nothing(str(error))
    forward.to(control)
    if terminal is not None:
        terminal.attend(control)
    ended = None
    while ended is None:
        ended = control.wait(1.0)
    code = os.waitstatus_to_exitcode(int(ended["status"]))
    if ended.get("why"):
        _say(f"ended: {ended['why']}")
    if ended.get("unkillable"):
        _say(f"unkillable (uninterruptible sleep): {', '.join(map(str, ended['unkillable']))}")
    return 128 - code if code < 0 else code


def _supervise(listener: int, prepared: int) -> None:
    """In a copy of this process, where no supervisor is there yet."""
    from ray_guard.supervisor.__main__ import main

    main(listener, prepared)


class _Forwarding:
    """From here on signals to this process are the command's; those that come before it runs are kept for it."""

    def __init__(self) -> None:
        self._control: Control | None = None
        self._kept: list[int] = []
        for number in _FORWARDED:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: object) -> None:
        if self._control is None:
            self._kept.append(number)
        else:
            self._control.signal(number)

    def to(self, control: Control) -> None:
        self._control = control
        while self._kept:
            control.signal(self._kept.pop(0))


def _hello(order: Order) -> dict[str, Any]:
    """Who asks, and the policy that shall hold."""
    from ray_guard.client import places
    from ray_guard.client.identity import from_environment
    from ray_guard.policy.plain import wire_of

    policy = wire_of(order.policy)
    identity = from_environment("ray-guard run", order.evidence)
    return {
        "op": "hello",
        "kind": "run",
        "pid": os.getpid(),
        "policy": policy,
        "identity": identity.as_message(),
        "evidence": os.path.abspath(identity.evidence),
        "export": channels.export_environment(),
        "places": places.told(),
    }


def _terminal() -> Terminal | None:
    if not any(os.isatty(number) for number in (0, 1, 2)):
        return None
    from ray_guard.cli.terminal import Terminal

    return Terminal.of_this_process()


def _prepared(
    command: list[str], passed: list[int], terminal: Terminal | None
) -> Callable[[channels.Channel], Control]:
    """What starts the command, once there is a channel."""
    from ray_guard.client import environment, start

    for number in passed:
        if not _is_open(number):
            raise ValueError(f"--pass-fd {number}: no descriptor is open under that number")
    numbers = [0, 1, 2, *sorted({number for number in passed if number > 2})]
    variables = {**environment.inherited(os.environ), start.CALL_VARIABLE: "1"}
    payload = start.start_message(
        command,
        executable=None,
        environment=variables,
        umask=-1,
        numbers=numbers,
        restore_signals=True,
        terminal=None if terminal is None else terminal.numbers[0],
    )
    opened: list[int] = []  # for the life of this process
    standard = [
        terminal.slave if terminal is not None and number in terminal.numbers
        else start.standard_descriptor(number, opened)
        for number in numbers[:3]
    ]  # fmt: skip
    more = [start.checked_descriptor(number) for number in numbers[3:]]
    working_folder = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return lambda channel: start.Control(channel, payload, working_folder, [*standard, *more], _place())


def _place() -> dict[str, Any]:
    """Where the call belongs in the traces: below the span that started this command."""
    if not os.environ.get("TRACEPARENT"):
        return {}
    from ray_guard.client import foreign  # few are started below one, and it takes longer to load than most tools

    found = foreign.named(os.environ["TRACEPARENT"], "TRACEPARENT")
    return {} if found is None else {"trace": found[0], "parent": found[1]}


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except (OSError, OverflowError):
        return False
    return number >= 0


def _nothing(reason: str) -> int:
    _say(reason)
    return NOTHING_STARTED


def _say(line: str) -> None:
    print(f"ray-guard: {line}", file=sys.stderr)

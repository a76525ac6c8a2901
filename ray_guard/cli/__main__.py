"""The ``ray-guard`` command. Each subcommand is a module of this package and is imported only when it is asked for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

COMMANDS = ("doctor", "run", "report", "attribute", "detect", "verify", "prove", "export", "cost")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["run"]:
        return _parsed(words)
    gc.disable()  # this process starts and waits: collecting garbage would only delay it
    from ray_guard.cli import order

    given = order.at_first_sight(words[1:])
    if given is None:
        status = _parsed(words)
    else:
        from ray_guard.cli import run

        status = run.carry_out(given)
    if argv is None:
        # Nothing is left to tidy up, and taking an interpreter down takes as long as starting a tool.
        sys.stderr.flush()
        os._exit(status)
    return status


def _parsed(words: list[str]) -> int:
    """By way of argparse, which knows what to say of what is wrong, and loads more than starting a tool takes."""
    import argparse
    import importlib

    from ray_guard import __version__

    parser = argparse.ArgumentParser(
        prog="ray-guard", description="Kernel-enforced egress and compute budgets, with a span for every tool call."
    )
    parser.add_argument("--version", action="version", version=f"ray-guard {__version__}")
    # Said, not asked of the parser: it would load what it formats help with, for every command.
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, prog="ray-guard")
    # Only the module that will run: `ray-guard run` should not wait for what draws reports.
    asked = [word for word in words if word in COMMANDS][:1]
    for name in asked or COMMANDS:
        command = importlib.import_module(f"ray_guard.cli.{name}")
        command.add_parser(subparsers).set_defaults(run=command.run)
    arguments = parser.parse_args(words)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

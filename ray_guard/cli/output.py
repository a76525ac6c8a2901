"""What the commands that read evidence have in common: how they are added, and print. Runs later."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    # What add_subparsers() returns has no public name.
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001


def say(content: str) -> None:
    """To stdout in whatever encoding it has, and quietly when nobody reads any more (``| head``)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(content.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def failed(command: str, why: str) -> int:
    """Says on stderr why a command has nothing to show; its exit status."""
    sys.stderr.write(f"ray-guard {command}: {why}\n")
    return 2

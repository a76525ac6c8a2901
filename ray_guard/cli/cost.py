"""``ray-guard cost``: what a mixture-of-experts policy costs per token, from its ``config.json``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ray_guard.compute import moe
from ray_guard.errors import UnknownArchitecture

_MOST_CONTEXT = 1 << 40
_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cost",
        help="parameters and FLOPs per token of a mixture-of-experts model",
        description="Reads a Hugging Face config.json. The exit status is 1 for an architecture that is not known.",
    )
    parser.add_argument("config", metavar="CONFIG.json")
    parser.add_argument("--context", type=_context, default=0, metavar="N", help="tokens of context (default 0)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    try:
        with open(arguments.config, encoding="utf-8") as file:
            cost = moe.cost(json.load(file))
    except OSError as error:
        return _failed(f"{arguments.config}: {error.strerror}")
    except UnknownArchitecture as error:
        return _failed(f"{arguments.config}: {error}")
    except (ValueError, RecursionError) as error:
        return _failed(f"{arguments.config} is no JSON: {error}")
    if arguments.json:
        print(json.dumps(cost._asdict()))
        return 0
    at_context = cost.flops_per_token + arguments.context * cost.flops_per_context_token
    rows = [
        ("parameters", cost.total_params, ""),
        ("active per token", cost.active_params, "embedding and output projection included"),
        ("  no embedding", cost.active_params_no_embedding, "nor output projection"),
        ("  with lm_head", cost.active_params_with_lm_head, "output projection, no embedding"),
        ("FLOPs per token", at_context, f"at a context of {arguments.context}"),
        ("  more per context token", cost.flops_per_context_token, ""),
    ]
    for name, value, note in rows:
        print(f"{name:26}{_readable(value):>10}  {note}".rstrip())
    return 0


def _context(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _MOST_CONTEXT:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of tokens")
    return value


def _readable(value: int) -> str:
    for size, letter in _LARGE:
        if value >= size:
            return f"{value / size:.3f} {letter}"
    return str(value)


def _failed(reason: str) -> int:
    print(f"ray-guard: {reason}", file=sys.stderr)
    return 1

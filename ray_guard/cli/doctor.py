"""``ray-guard doctor``: what this host can enforce, by which mechanism, and what is missing. Everything is tried."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray_guard.client.identity import from_environment
from ray_guard.egress.meter import TICK_S
from ray_guard.egress.resolver import start as resolver
from ray_guard.evidence import probe as evidence
from ray_guard.kernel.probe import Feature, Status, probe
from ray_guard.supervisor import ceilings, leaf, memory_group

_EGRESS: Final = (
    "seccomp.architecture",
    "seccomp.user_notification",
    "seccomp.thread_sync",
    "pidfd_getfd",
    "proc_mem",
    "sock_diag.destroy_events",
    "udp.mute",
    "yama",
)
_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "egress": _EGRESS,
    "names": (*_EGRESS, "resolver"),
    "processes": ("seccomp.user_notification", "pidfd_getfd", "subreaper", "landlock.signal_scope"),
    "files": ("seccomp.user_notification", "proc_mem", "landlock.signal_scope", "landlock.files", "mounts"),
    "evidence": ("evidence.seal",),
    "gpu": ("seccomp.user_notification", "gpu.census", "gpu.meter"),
}
_NOT_IN_THIS_VERSION: Final = ("compute",)

_SAID: Final = f"""\
Two promises:
  tool processes (ray_guard.run)   hostile code: nothing leaves but what the policy grants
  the actor's own process          egress and accounting hold for all its tree does by system call; files, signals and
                                   GPU opens are not prevented, and code that speaks Ray's wire protocol itself is not
                                   contained
Byte caps of calls and episodes hold on the byte: such flows are relayed, and getpeername() shows the relay. Others go
direct: their bytes are exact at the flow's end (off by one where a tool closes while its peer still sends). Under a cap
of actor or job alone they are read every {1000 * TICK_S:g} ms and cut late: by the flow's rate times that, and what its
socket had queued by then.
Files: the view of a tool process. A hidden or protected place that somebody outside replaces while a call runs is no
longer covered for that call; one in a hidden or protected folder is. Existence, size and mode of files can be asked
(stat) wherever their folders may be entered. gpu: none is held in tools (nodes, inherited descriptors).
Datagrams: an actor's own sockets are mute unless the policy lists udp:// destinations (sendmsg is then judged too,
which costs every Ray call about 15 %).
Names: whatever name server a process asks, the guard answers. Programs that send without connecting (musl, dnspython)
believe the answer where the supervisor has CAP_NET_RAW, else they give up; RES_OPTIONS=use-vc is set for c-ares."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="what this host can enforce, and what is missing",
        description="Tries every mechanism the guard uses on this host. Exit status 1 where egress or processes "
        "cannot be enforced.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def run(arguments: argparse.Namespace) -> int:
    folder = from_environment("ray-guard doctor").evidence
    features = probe(
        {
            "resolver": resolver.probe,
            "cgroup.kill": leaf.probe,
            "cgroup.memory": memory_group.probe,
            "nftables": ceilings.probe,
            "evidence.seal": evidence.seal,
            "evidence.reserve": lambda: evidence.reserve(folder),
        }
    )
    enforceable = judge(features)
    if arguments.json:
        rows = [{"name": f.name, "status": f.status.value, "detail": f.detail} for f in features]
        print(json.dumps({"features": rows, "enforceable": enforceable}, indent=2))
    else:
        print(_table(features, enforceable))
    return 0 if enforceable["egress"] and enforceable["processes"] else 1


def judge(features: Sequence[Feature]) -> dict[str, bool]:
    """What can be enforced: all that it needs was tried and works. What was not tried is not enforceable."""
    works = {feature.name for feature in features if feature.status is not Status.MISSING}
    can = {name: works.issuperset(needs) for name, needs in _NEEDS.items()}
    return {**can, **dict.fromkeys(_NOT_IN_THIS_VERSION, False)}


def _table(features: Sequence[Feature], enforceable: Mapping[str, bool]) -> str:
    width = max(len(feature.name) for feature in features)
    lines = [f"{feature.name:{width}}  {feature.status.value:7}  {feature.detail}" for feature in features]
    lines.append("")
    for name, can in enforceable.items():
        said = "enforced" + _limits(name, features) if can else "NOT enforced" + _why_not(name, features)
        lines.append(f"{name:{width}}  {said}")
    return "\n".join([*lines, "", _SAID])


def _limits(name: str, features: Sequence[Feature]) -> str:
    partly = [f.name for f in features if f.name in _NEEDS[name] and f.status is Status.PARTLY]
    return f" (limited: {', '.join(partly)})" if partly else ""


def _why_not(name: str, features: Sequence[Feature]) -> str:
    if name in _NOT_IN_THIS_VERSION:
        return " (not in this version)"
    missing = [f.name for f in features if f.name in _NEEDS[name] and f.status is Status.MISSING]
    return f" (missing: {', '.join(missing)})"

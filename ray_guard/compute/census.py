"""Who may hold a GPU: one process at a time, judged by what is known of it. Pure. Runs in the supervisor.

What a process calls itself does not count; what it holds, whose tree it is in and whether it was registered do. Told
here is what :mod:`ray_guard.kernel.gpu_devices` and NVML found; nothing is read.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from ray_guard.kernel.gpu_majors import Kind


class Place(StrEnum):
    """Where in a target a process is."""

    OWN = "own"
    """The target's own process."""
    ACTOR = "actor"
    """Started by it: in the actor ring."""
    CALL = "call"
    """A tool's."""


class Reason(StrEnum):
    """Why a process may not hold what it holds; ``error.type`` of the violation."""

    NOT_GRANTED = "gpu_none"
    NOT_AN_ENGINE = "not_an_engine"
    TOOL = "tool"
    BUDGET = "budget"
    """Its GPU budget is used up."""
    UNMEASURED = "unmeasured"
    """There is a GPU budget, and nobody can say what the process uses of it."""
    UNREADABLE = "unreadable"
    """It hides what it holds, and no list of contexts tells instead."""
    CONTROL = "control_device"
    """Of a driver's control nodes alone, through which nothing computes."""


class Holder(NamedTuple):
    """A process that holds, or may hold, a GPU."""

    place: Place
    kinds: frozenset[Kind]
    context: bool
    """NVML lists it."""
    engine: bool
    """Registered, or the target's own process."""
    measured: bool
    """NVML tells what it uses."""
    unreadable: bool = False


class Finding(NamedTuple):
    """``ends``: in enforce mode the process is killed; False: it is only told."""

    reason: Reason
    ends: bool


_CONTROL_ONLY: Final = frozenset({Kind.NVIDIA_CONTROL})


def judge(gpu: str, holder: Holder, *, budget: bool, exhausted: bool, required: bool = False) -> Finding | None:
    """What is wrong with a process; None: nothing.

    Args:
        gpu: the policy's word, ``none``, ``engine`` or ``any``.
        holder: the process.
        budget: whether a GPU budget limits it.
        exhausted: whether that is used up.
        required: whether the policy asks that GPU use be known at all (``require: [gpu]``).
    """
    computes = holder.context or bool(holder.kinds - _CONTROL_ONLY)
    if holder.unreadable and not computes:
        return None if gpu == "any" and not budget else Finding(Reason.UNREADABLE, ends=budget or required)
    if not computes and not holder.kinds:
        return None
    reason = _refused(gpu, holder)
    if reason is None and budget and computes:
        reason = Reason.BUDGET if exhausted else None if holder.measured else Reason.UNMEASURED
    if reason is None:
        return None
    return Finding(reason, ends=True) if computes else Finding(Reason.CONTROL, ends=False)


def _refused(gpu: str, holder: Holder) -> Reason | None:
    if gpu == "any":
        return None
    if holder.place is Place.CALL:
        return Reason.TOOL
    if gpu != "engine":
        return Reason.NOT_GRANTED
    return None if holder.engine else Reason.NOT_AN_ENGINE


def word(gpu: str, *, said: bool, actor_limit: bool) -> str:
    """The policy's word as it applies.

    Args:
        gpu: the policy's, or its default.
        said: whether the policy says so itself.
        actor_limit: whether it limits what the actor may use of a GPU: then it is meant to use one.
    """
    return "engine" if gpu == "none" and not said and actor_limit else gpu

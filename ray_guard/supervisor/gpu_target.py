"""One target's GPU use: what it is granted, what it has used, what is told of it. Runs in the supervisor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from ray_guard.compute import engines
from ray_guard.compute.census import Reason, word
from ray_guard.compute.engines import Engines
from ray_guard.compute.gpu_meter import Share, Usage, memory
from ray_guard.evidence.journal import JournalError
from ray_guard.ids import new_span_id
from ray_guard.kernel import procfs
from ray_guard.log import logger
from ray_guard.policy.budgets import UNLIMITED, Account, Exceeded, Scope
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import AttributeValue, Mode, SpanKind, SpanRecord
from ray_guard.supervisor.orphans import Mark
from ray_guard.supervisor.target import Origin, Target

log = logger("ray_guard.gpu")

SECONDS: Final = "gpu_seconds"
MEMORY: Final = "gpu_memory"
IDLE_USE: Final = "gpu_idle_use"
RECORD_S: Final = 30.0
"""How often what a target has used is journaled; at its end in any case."""

KINDS: Final = (SECONDS, MEMORY)


def granted(policy: CompiledPolicy) -> str:
    """The policy's word on GPUs as it applies: ``none``, ``engine`` or ``any``."""
    said = any("gpu" in wire.get("set", ()) for wire in policy.wires)
    return word(policy.gpu, said=said, actor_limit=any(limits(policy, Scope.ACTOR).values()))


def limits(policy: CompiledPolicy, scope: Scope) -> dict[str, float]:
    """The GPU limits of that scope that are enforced."""
    return {kind: limit for kind, limit in policy.limits(scope).items() if kind in KINDS}


def has_budget(policy: CompiledPolicy) -> bool:
    """Whether a GPU limit is enforced."""
    return any(limits(policy, scope) for scope in Scope)


class GpuTarget:
    """See the module. ``mark``: what its processes have in common; None: it is not filtered itself."""

    def __init__(self, target: Target, mark: Mark | None = None) -> None:
        self.target = target
        self.mark = mark
        self.engines = Engines()
        self.usage = Usage()
        self.tools: dict[int, Origin] = {}
        """By the process that a tool began with, and by its leader."""
        self.told: set[tuple[int, int, Reason]] = set()
        """Processes (pid, start time) of which a violation was told."""
        self._unknown: set[Account] = set()
        """Whose memory NVML does not tell, though it is limited."""
        self._over_memory: set[Account] = set()
        """Who pays for memory that some limit around has no room for."""
        self._levels: dict[Account, int] = {}
        """Bytes that each of them holds."""
        self._passed: set[tuple[str, str]] = set()
        """Limits that were passed, and told: kind, and whose."""
        self._span = new_span_id()
        self._began_ns = time.time_ns()
        self._recorded = 0.0

    @property
    def word(self) -> str:
        return granted(self.target.policy)

    def account(self, call: Origin | None) -> Account:
        """Who pays for a process: the call whose tool it is, or the actor."""
        return self.target.account if call is None else call.account

    def budget(self, call: Origin | None) -> bool:
        """Whether a limit that is enforced holds for such a process."""
        return any(self.account(call).room(kind) is not UNLIMITED for kind in KINDS)

    def exhausted(self, call: Origin | None) -> bool:
        """Whether one of them is used up. Zero grants nothing, not even a context."""
        account = self.account(call)
        granted_none = any(each.limit(MEMORY) == 0 for each in account.upwards())
        return granted_none or account in self._over_memory or account.room(SECONDS) == 0

    def measured(self, call: Origin | None) -> bool:
        """Whether the memory of such a process is known, as far as it must be."""
        return self._unknown.isdisjoint((self.account(call), self.target.account))

    @property
    def asks(self) -> bool:
        """Whether anybody must look."""
        watched = any(kind in self.target.policy.watched(scope) for scope in Scope for kind in KINDS)
        return self.word != "any" or has_budget(self.target.policy) or watched

    @property
    def strict(self) -> bool:
        """Whether not to know is a reason to refuse."""
        return has_budget(self.target.policy) or "gpu" in self.target.policy.require

    @property
    def enforces(self) -> bool:
        return self.target.policy.mode is Mode.ENFORCE

    # -- usage ---------------------------------------------------------------------------------------------------------

    def charge(self, shares: list[tuple[Share, Origin | None]]) -> None:
        """Books what its processes used since the last reading of all GPUs, and judges what they hold now.

        Args:
            shares: each with the call whose tool it is; None: the actor's own, or an engine's.
        """
        payers: dict[Account, Origin | None] = {self.target.account: None}
        by_payer: dict[Account, list[Share]] = {self.target.account: []}
        for share, call in shares:
            self.usage.add(share)
            account = self.account(call)
            payers.setdefault(account, call)
            by_payer.setdefault(account, []).append(share)
        for account, call in payers.items():
            exceeded = account.charge(SECONDS, sum(share.seconds for share in by_payer[account]))
            if exceeded is not None:
                self._exceeded(exceeded, call)
        self._unknown.clear()
        self.usage.level(share for share, _ in shares)
        self._hold({account: memory(by_payer[account]) for account in payers})
        self._weigh(payers)

    def _hold(self, held: Mapping[Account, int | None]) -> None:
        """Notes what each who pays holds now, and so each scope around; None: unknown."""
        for account in self._levels.keys() - held.keys():
            account.level(MEMORY, self._levels.pop(account), 0)
        for account, level in held.items():
            if level is None:
                if account.limits_any((MEMORY,)):
                    self._unknown.add(account)
            else:
                account.level(MEMORY, self._levels.get(account, 0), level)
                self._levels[account] = level

    def _weigh(self, payers: Mapping[Account, Origin | None]) -> None:
        """Judges it, once all is noted: the limits of the call, or the target's own, and those around."""
        passed: dict[Account, Exceeded] = {}
        for account, level in self._levels.items():
            exceeded = account.level(MEMORY, level, level)
            # What passes this node's part of a job's limit is judged by the next reading, where there may be more.
            if exceeded is not None and not (exceeded.scope is Scope.JOB and account.root.grow(MEMORY)):
                passed[account] = exceeded
        self._over_memory = {account for account, exceeded in passed.items() if not exceeded.report_only}
        sources = {exceeded.source for exceeded in passed.values()}
        self._passed = {(kind, source) for kind, source in self._passed if kind != MEMORY or source in sources}
        for account, exceeded in passed.items():
            self._exceeded(exceeded, payers[account])

    def _exceeded(self, exceeded: Exceeded, call: Origin | None) -> None:
        key = (exceeded.kind, exceeded.source)
        if key in self._passed:
            return
        self._passed.add(key)
        try:
            self.target.exceeded(call or self.target.own_origin(), None, exceeded)
        except JournalError:
            log.exception("a violation could not be journaled")

    def find_idle_use(self, computed: Mapping[tuple[int, int], float], passed: float) -> None:
        """Tells which engines compute what nobody asked for.

        Args:
            computed: GPU-seconds by process (pid, start time) since the last reading.
            passed: seconds since then.
        """
        now = time.monotonic()
        for key, seconds in computed.items():
            engine = self.engines.find(*key)
            if engine is not None and engines.idle_use(engine, seconds, passed, now):
                where = f"pid {engine.pid} ({procfs.command_name(engine.pid)}), phase {engine.phase.value}"
                self.violation(self.target.own_origin(), IDLE_USE, "no_request", destination=where)

    # -- evidence ------------------------------------------------------------------------------------------------------

    def violation(
        self,
        origin: Origin,
        kind: str,
        reason: str,
        *,
        destination: str = "",
        value: AttributeValue | None = None,
        deed: bool = True,
    ) -> None:
        """Journals a violation. One that cannot be is logged: what follows from it happens all the same.

        Args:
            deed: whether the target has done it. What was only found out has no consequences (``on_violation``).
        """
        try:
            self.target.violation(
                origin, None, kind, reason=reason, destination=destination, value=value, report_only=not deed
            )
        except JournalError:
            log.exception("a violation could not be journaled")

    def record(self, *, ended: bool) -> None:
        """Journals what was used so far, where anything was; a later record replaces this one."""
        usage = self.usage
        if not usage.methods or (not ended and time.monotonic() - self._recorded < RECORD_S):
            return
        self._recorded = time.monotonic()
        attributes: dict[str, AttributeValue] = {
            "ray_guard.gpu.seconds": round(usage.seconds, 3),
            "ray_guard.gpu.seconds_error": round(usage.error_s, 3),
            "ray_guard.gpu.method": tuple(sorted(method.value for method in usage.methods)),
            "ray_guard.gpu.memory_peak": usage.memory_peak,
        }
        if usage.energy_known:
            attributes["ray_guard.gpu.energy_joules"] = round(usage.energy_j, 3)
        origin = self.target.own_origin()
        record = SpanRecord(
            trace_id=origin.trace_id,
            span_id=self._span,
            parent_id=None,
            name="ray_guard.gpu",
            kind=SpanKind.INTERNAL,
            start_ns=self._began_ns,
            end_ns=time.time_ns() if ended else None,
            attributes=attributes,
        )
        try:
            self.target.write(record, origin.identity, grants=not ended)
        except JournalError:
            log.exception("GPU usage could not be journaled")

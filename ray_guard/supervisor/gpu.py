"""GPUs of a node's targets: who may hold one, what is used, what happens otherwise. Runs in the supervisor.

The helper's census and readings come in (:mod:`ray_guard.supervisor.gpu_poller`); each holder is put down to a target,
judged (:mod:`ray_guard.compute.census`), and in enforce mode ended. What NVML measured is charged to the target's
account, and so to its job's. Where no GPU driver is loaded nothing can be opened: usage is zero for certain, and all
that runs is a look at /proc/devices.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from ray_guard.compute.census import Finding, Holder, Place, judge
from ray_guard.compute.engines import Phase
from ray_guard.compute.gpu_meter import MEMORY_S, GpuMeter, Hidden, Method, Share, Tick
from ray_guard.egress.gate import Waiting
from ray_guard.errors import NotEnforced, PolicyError
from ray_guard.kernel import gpu_devices, gpu_majors, procfs
from ray_guard.kernel.gpu_devices import Descriptors
from ray_guard.kernel.gpu_majors import Kind
from ray_guard.log import logger
from ray_guard.policy.budgets import Scope
from ray_guard.policy.decide import CompiledPolicy
from ray_guard.records import Mode
from ray_guard.supervisor import orphans
from ray_guard.supervisor.gpu_poller import LOAD_S, Census, Held, Poller
from ray_guard.supervisor.gpu_target import GpuTarget, granted, has_budget, limits
from ray_guard.supervisor.target import Origin, Target

if TYPE_CHECKING:
    from ray_guard.kernel.nvml import Reading

log = logger("ray_guard.gpu")

PROCESS: Final = "gpu_process"
HIDDEN_TENANT: Final = "gpu_hidden_tenant"
LOST: Final = "gpu_census"

LOOK_S: Final = 1.0
"""How often it is looked whether a driver has been loaded, and whether the helper still tells."""
STALE_S: Final = 3.0
"""A census older than that is none; the supervisor then makes its own, and starts another helper."""
RESTART_S: Final = 5.0
"""Between two starts of the helper."""
_DEPTH: Final = 4096
_FAULTS_TOLD: Final = 20


class _Owner(NamedTuple):
    """Whose a process is, and where in there."""

    watched: GpuTarget
    place: Place
    call: Origin | None = None
    """The tool's; whatever else the actor started is put down to the calls that are open when it is told."""

    @property
    def origin(self) -> Origin:
        return self.call or self.watched.target.origin_unknown()


class Gpus:
    """See the module."""

    def __init__(self, loop: Waiting) -> None:
        self._loop = loop
        self._watched: dict[int, GpuTarget] = {}
        self._poller: Poller | None = None
        self._own: Descriptors | None = None
        self._looking = False
        self._majors: gpu_majors.Majors = {}
        self._census: float | None = None
        """When the last one came, or the first was asked for."""
        self._tried = float("-inf")
        self._lost_told = False
        self._waiting: list[Callable[[], None]] = []
        self._meters: dict[int, GpuMeter] = {}
        self._ticks: dict[int, Tick] = {}
        self._read = 0.0
        self._contexts: dict[int, int] = {}
        """Start time by pid of whom NVML lists."""
        self._owners: dict[int, tuple[int, _Owner]] = {}
        """By pid (start time, owner): whoever was seen in a tree stays its, whatever becomes of its parents."""
        self._faults = 0
        self._minors: frozenset[int] | None = None
        """Of the GPUs that NVML reads; None: it does not say."""

    # -- targets come and go -------------------------------------------------------------------------------------------

    def must_wait(self, policy: CompiledPolicy) -> bool:
        """Whether it must be known first if NVML works: :meth:`when_known`."""
        if policy.mode is not Mode.ENFORCE or not (has_budget(policy) or "gpu" in policy.require):
            return False
        if Kind.NVIDIA not in gpu_majors.known_majors().values():
            return False
        poller = self._started()
        self._loop.later(2 * LOAD_S, self._stop_unused)
        return poller is not None and poller.missing == ""

    def when_known(self, again: Callable[[], None]) -> None:
        """``again`` is called once it is known if NVML works, within :data:`LOAD_S`."""
        self._waiting.append(again)

    def admit(self, policy: CompiledPolicy) -> None:
        """Raises NotEnforced, naming the keys, where GPU use could not be held to ``policy`` on this host."""
        keys = [f"budgets.{s.value}.{kind}" for s in Scope for kind in limits(policy, s)]
        required = ["require.gpu"] if "gpu" in policy.require else []
        if policy.mode is not Mode.ENFORCE or not keys + required:
            return
        try:
            majors = gpu_majors.majors()
        except OSError as error:
            raise NotEnforced(keys + required, f"/proc/devices: {error.strerror}: GPUs are not known") from error
        missing = "the GPU helper does not run" if self._poller is None else self._poller.missing
        if Kind.NVIDIA in majors.values() and missing is not None and required:
            raise NotEnforced(required, missing)
        kinds = {node.kind for node in gpu_devices.nodes()}
        used = granted(policy) != "none"
        if keys and used and Kind.NVIDIA in kinds and missing is not None:
            raise NotEnforced(keys, f"GPUs cannot be measured: {missing}")
        if keys and used and Kind.KFD in kinds and Kind.NVIDIA not in kinds:
            raise NotEnforced(keys, "GPUs are measured by NVML alone: there is none for AMD's")

    def join(self, target: Target) -> None:
        """A target has been armed, or (``ray-guard run``) admitted."""
        watched = GpuTarget(target, None if target.kind == "run" else orphans.mark(target.pid))
        self._watched[id(target)] = watched
        self._attend()
        if not self._looking:
            self._looking = True
            self._loop.later(LOOK_S, self._look)

    def leave(self, target: Target) -> None:
        watched = self._watched.pop(id(target), None)
        if watched is None:
            return
        self._owners = {pid: known for pid, known in self._owners.items() if known[1].watched is not watched}
        watched.record(ended=True)
        if not self._watched:
            self._stop()

    def began(self, pid: int, target: Target, origin: Origin) -> None:
        """A tool has been armed: ``pid`` is its first process, and its parent leads it."""
        watched = self._watched.get(id(target))
        if watched is not None:
            leader = procfs.parent(pid)
            watched.tools.update({each: origin for each in (pid, leader) if each})

    def ended(self, pid: int, target: Target) -> None:
        """A tool's tree is dead."""
        watched = self._watched.get(id(target))
        if watched is not None and (origin := watched.tools.pop(pid, None)) is not None:
            watched.tools = {each: found for each, found in watched.tools.items() if found is not origin}

    def close(self) -> None:
        for watched in self._watched.values():
            watched.record(ended=True)
        self._stop()

    # -- engines -------------------------------------------------------------------------------------------------------

    def register(self, target: Target, pid: int, phase: str) -> None:
        """A target names one of its processes as an engine.

        Raises:
            NotEnforced: its policy has no place for one.
            PolicyError: it is none of the target's own, or the phase is unknown.
        """
        watched = self._watched.get(id(target))
        if watched is None or watched.word == "none":
            raise NotEnforced(["gpu"], "gpu: none has no engine processes: the policy must say engine or any")
        start = procfs.start_time(pid)
        if start is None or not (pid == target.pid or procfs.is_in_tree(pid, target.pid)):
            raise PolicyError("engine", pid, "a process that the actor has started, and that lives")
        for known in watched.engines.pids():
            if procfs.start_time(known) is None:
                watched.engines.forget(known)
        watched.engines.register(pid, start, _phase(phase))

    def declare(self, target: Target, pid: int, phase: str | None, in_flight: int | None) -> None:
        """An engine has entered a phase, or has that many requests in flight. Raises PolicyError, ValueError."""
        watched = self._watched.get(id(target))
        start = procfs.start_time(pid)
        if watched is None or start is None:
            return  # it ended meanwhile
        if in_flight is not None and (isinstance(in_flight, bool) or not 0 <= in_flight < 1 << 31):
            raise PolicyError("in_flight", in_flight, "a number of requests")
        known = None if phase is None else _phase(phase)
        watched.engines.declare(pid, start, time.monotonic(), known, in_flight)

    # -- the helper ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Once a second, as long as there is a target."""
        if not self._watched:
            self._looking = False
            return
        self._loop.later(LOOK_S, self._look)
        if not self._attend():
            return
        if self._census is not None and time.monotonic() - self._census > STALE_S:
            self._blind()
        for watched in self._watched.values():
            watched.record(ended=False)

    def _attend(self) -> bool:
        """Whether there is anything to look for; sees to it that the helper runs then."""
        if not any(watched.asks for watched in self._watched.values()):
            return False
        self._majors = gpu_majors.known_majors()
        if not self._majors:
            return False  # no driver is loaded: there is nothing that could be opened
        self._started()
        return True

    def _started(self) -> Poller | None:
        """The helper, started where there is none and it is not too soon; None: there is none now."""
        now = time.monotonic()
        if self._poller is None and now - self._tried > RESTART_S:
            self._tried = now
            self._census = now if self._census is None else self._census
            try:
                self._poller = Poller(self._loop, self._counted, self._take, self._known, self._lost)
            except OSError:
                log.exception("the GPU helper cannot be started")
        return self._poller

    def _known(self) -> None:
        self._read = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            again()

    def _lost(self) -> None:
        log.warning("the GPU helper has ended")
        self._poller = None
        self._known()  # whoever waits for NVML hears that it is not there

    def _blind(self) -> None:
        """The helper has been silent for too long: it is told, another is started, and the census made here."""
        if not self._lost_told:
            self._lost_told = True
            for watched in self._watched.values():
                if watched.strict:
                    watched.violation(watched.target.own_origin(), LOST, "silent", deed=False)
            if self._poller is not None:
                self._poller.close()
                self._poller = None
                self._known()
        if self._own is None or self._own.majors != self._majors:
            self._own = Descriptors(self._majors)
        holders, unreadable = self._own.scan()
        found = [(pid, procfs.start_time(pid), tuple(devices)) for pid, devices in holders.items()]
        held = [Held(pid, start, devices) for pid, start, devices in found if start is not None]
        starts = [(pid, procfs.start_time(pid)) for pid in unreadable]
        held += [Held(pid, start, None) for pid, start in starts if start is not None]
        self._judge(Census(time.monotonic(), tuple(held)))

    def _stop_unused(self) -> None:
        """Whoever it was started for may have been refused, or gone."""
        if not self._watched and not self._waiting:
            self._stop()

    def _stop(self) -> None:
        if self._poller is not None:
            self._poller.close()
            self._poller = None
        self._meters.clear()
        self._ticks.clear()
        self._contexts.clear()
        self._owners.clear()
        self._own = self._census = self._minors = None
        self._tried = float("-inf")

    # -- census --------------------------------------------------------------------------------------------------------

    def _counted(self, census: Census) -> None:
        self._census, self._lost_told, self._own = time.monotonic(), False, None
        self._judge(census)

    def _judge(self, census: Census) -> None:
        """Every holder once; whom NVML lists without a descriptor of its own too."""
        self._majors = gpu_majors.known_majors()
        held = {each.pid: each for each in census.held}
        for pid, start in self._contexts.items():
            if pid not in held:
                held[pid] = Held(pid, start, ())
        alive: dict[int, tuple[int, _Owner]] = {}
        for each in held.values():
            owner = self._owner(each.pid, each.start_time)
            if owner is not None:
                alive[each.pid] = (each.start_time, owner)
                self._weigh(each, owner)
        self._owners.update(alive)
        if len(self._owners) > 4 * len(alive) + 64:
            self._owners = alive

    def _weigh(self, held: Held, owner: _Owner) -> None:
        watched = owner.watched
        context = self._contexts.get(held.pid) == held.start_time
        kinds = self._kinds(held.devices or ())
        measuring = self._measuring and watched.measured(owner.call)
        if held.devices is None and not context and self._measuring and not self._others:
            return  # what it hides could only be NVIDIA's, and NVML says that it has no context there
        holder = Holder(
            place=owner.place,
            kinds=frozenset(kinds),
            context=context,
            engine=owner.place is Place.OWN or watched.engines.find(held.pid, held.start_time) is not None,
            measured=measuring and all(kinds.values()) and (context or not self._foreign),
            unreadable=held.devices is None,
        )
        finding = judge(
            watched.word,
            holder,
            budget=watched.budget(owner.call),
            exhausted=watched.exhausted(owner.call),
            required=watched.strict,
        )
        if finding is not None:
            self._found(held, owner, finding)

    def _found(self, held: Held, owner: _Owner, finding: Finding) -> None:
        watched = owner.watched
        key = (held.pid, held.start_time, finding.reason)
        if key not in watched.told:
            if len(watched.told) > 10_000:
                watched.told.clear()
            watched.told.add(key)
            watched.violation(
                owner.origin, PROCESS, finding.reason.value, destination=self._described(held), deed=finding.ends
            )
        if finding.ends and watched.enforces:
            _end(held)

    @property
    def _measuring(self) -> bool:
        """Whether NVML tells what is used; while it is being loaded it may."""
        poller = self._poller
        if poller is None:
            return False
        now = time.monotonic()
        if poller.missing is not None:
            return poller.missing == "" and now - poller.began < LOAD_S
        return now - self._read < MEMORY_S and not any(t.unmeasured for t in self._ticks.values())

    @property
    def _foreign(self) -> bool:
        """Whether a process that NVML does not list may be one of those that it does, under another number."""
        return any(tick.foreign for tick in self._ticks.values())

    @property
    def _others(self) -> bool:
        """Whether there are GPUs that NVML knows nothing of."""
        return any(kind in (Kind.DRM, Kind.KFD) for kind in self._majors.values())

    def _kinds(self, devices: tuple[int, ...]) -> dict[Kind, bool]:
        """By kind, whether NVML covers all of them."""
        found: dict[Kind, bool] = {}
        for device, kind in self._labelled(devices):
            if kind is Kind.NVIDIA:
                covered = self._minors is None or os.minor(device) in self._minors
            else:
                covered = kind is Kind.NVIDIA_CONTROL or gpu_devices.rendered_by(device) == "nvidia"
            found[kind] = found.get(kind, True) and covered
        return found

    def _labelled(self, devices: tuple[int, ...]) -> Iterator[tuple[int, Kind]]:
        for device in devices:
            yield device, gpu_majors.kind_of(device, self._majors) or Kind.NVIDIA  # its driver is gone just now

    def _described(self, held: Held) -> str:
        """The process and what it holds, in words."""
        devices = [f"{kind.value} {os.major(d)}:{os.minor(d)}" for d, kind in self._labelled(held.devices or ())]
        what = ", ".join(devices) or ("unreadable descriptors" if held.devices is None else "a context")
        return f"pid {held.pid} ({procfs.command_name(held.pid)}): {what}"

    # -- whose ---------------------------------------------------------------------------------------------------------

    def _owner(self, pid: int, start: int) -> _Owner | None:
        known = self._owners.get(pid)
        if known is not None and known[0] == start:
            return known[1]
        own = {watched.target.pid: watched for watched in self._watched.values() if watched.target.kind != "run"}
        at: int | None = pid
        for _ in range(_DEPTH):
            if at is None or at < 1:
                break
            for watched in self._watched.values():
                if at in watched.tools:
                    return _Owner(watched, Place.CALL, watched.tools[at])
            if at in own:
                place = Place.OWN if at == pid else Place.ACTOR
                return _Owner(own[at], place)
            at = procfs.parent(at)
        for watched in self._watched.values():
            if watched.mark is not None and orphans.carries(pid, start, watched.mark):
                return _Owner(watched, Place.ACTOR)
        return None

    # -- what is used --------------------------------------------------------------------------------------------------

    def _take(self, readings: list[Reading]) -> None:
        self._read = time.monotonic()
        minors = [reading.minor for reading in readings if isinstance(reading.minor, int)]
        self._minors = frozenset(minors) if len(minors) == len(readings) else None
        contexts: dict[int, int] = {}
        shares: dict[int, list[tuple[Share, Origin | None]]] = {}
        computed: dict[tuple[int, int], float] = {}
        for reading in readings:
            tick = self._meters.setdefault(reading.device, GpuMeter(_exists)).take(reading)
            self._ticks[reading.device] = tick
            self._note(reading, tick)
            if tick.hidden is not None:
                self._hidden(reading, tick, tick.hidden)
            for share in tick.shares:
                start = procfs.start_time(share.pid)
                if start is not None and share.pid in tick.residents:
                    contexts[share.pid] = start
                known = self._owners.get(share.pid)
                owner = self._owner(share.pid, start) if start is not None else None if known is None else known[1]
                if owner is None:
                    continue
                if start is not None:
                    self._owners[share.pid] = (start, owner)
                shares.setdefault(id(owner.watched.target), []).append((share, owner.call))
                if share.method is not Method.RESIDENCY and start is not None:
                    key = (share.pid, start)
                    computed[key] = computed.get(key, 0.0) + share.seconds
        self._contexts = contexts
        passed = max((tick.seconds for tick in self._ticks.values()), default=0.0)
        for watched in list(self._watched.values()):
            watched.charge(shares.get(id(watched.target), []))
            watched.find_idle_use(computed, passed)

    def _hidden(self, reading: Reading, tick: Tick, hidden: Hidden) -> None:
        """It is told to whoever uses that GPU; where nobody does, to all who must not let it be used."""
        there = [known[1].watched for pid in tick.residents if (known := self._owners.get(pid)) is not None]
        told = {id(watched.target): watched for watched in there or self._watched.values() if watched.word != "any"}
        reason = "unexplained_memory" if hidden.memory else "unexplained_utilization"
        for watched in told.values():
            watched.violation(
                watched.target.own_origin(),
                HIDDEN_TENANT,
                reason,
                destination=f"GPU {reading.device} ({reading.uuid})",
                value=hidden.memory or hidden.utilization,
                deed=False,
            )

    def _note(self, reading: Reading, tick: Tick) -> None:
        for fault in (*tick.faults, *([tick.unmeasured] if tick.unmeasured else ())):
            self._faults += 1
            if self._faults <= _FAULTS_TOLD:
                log.warning("GPU %d: %s", reading.device, fault)


def _exists(pid: int) -> bool:
    """Whether there is such a process, whoever's it is."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _phase(name: str) -> Phase:
    try:
        return Phase(name)
    except ValueError:
        raise PolicyError("phase", name, "one of " + ", ".join(phase.value for phase in Phase)) from None


def _end(held: Held) -> None:
    """Kills that very process, and none that has been given its number."""
    try:
        pidfd = os.pidfd_open(held.pid)
    except OSError:
        return
    try:
        if procfs.start_time(held.pid) == held.start_time:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        log.warning("process %d holds a GPU and cannot be ended: %s", held.pid, error)
    finally:
        os.close(pidfd)

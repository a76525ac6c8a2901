"""GPU-seconds, memory and energy by process, with their error, and what no process explains. Pure. Runs in supervisor.

A GPU-second is one second in which one whole GPU computed: the share of the sample period in which a process had
something running, times the time that passed. Three methods, the best that a GPU offers, and which it was is told:

- ``process_utilization``: NVML's samples by process. Statistical: each sample sees one process per engine.
- ``device_utilization``: the GPU's own, where one process alone has a context there.
- ``residency``: all the time in which a process had a context. An upper bound: what is there for MIG, which has no
  utilization by process, for rows that cannot be true, and for gaps longer than NVML's memory.

The error is told in two parts, because they add differently: a ``bias`` that adds up (percent are whole numbers; what
a bound may be too high by) and a ``variance`` that averages out (sampling). :meth:`Usage.error_s` joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from ray_guard.kernel.nvml import SAMPLE_PERIOD_S, Missing, Process, Reading, Sample

MEMORY_S: Final = 10.0
"""NVML remembers samples about that long: 72 of them."""
_RESOLUTION: Final = 0.01 / 2
"""Percent are rounded: what a reading is wrong by, as a share."""
_CLOCK_SLACK_US: Final = 2_000_000
_SMOOTHING: Final = 0.05
_MOST_BYTES: Final = 1 << 50
_MOST_WATTS: Final = 10_000
"""No GPU holds or draws as much: what says so is garbage."""

HIDDEN_BYTES: Final = 512 << 20
"""Memory that nobody explains, and that is no driver's bookkeeping."""
_RESERVE_UNKNOWN: Final = 1 << 30
_HIDDEN_PERCENT_ALONE: Final = 10
_HIDDEN_PERCENT: Final = 30
HIDDEN_READINGS: Final = 4
"""In so many readings in a row: a process that starts or ends is listed a moment late."""


class Method(StrEnum):
    PROCESS = "process_utilization"
    DEVICE = "device_utilization"
    RESIDENCY = "residency"


class Share(NamedTuple):
    """What one process used of one GPU between two readings.

    ``memory``: bytes, now; None: not to be known. ``memory_exact`` False: an upper bound. ``energy_j`` None: not
    measured; else its part of the GPU's whole draw, by utilization.
    """

    pid: int
    seconds: float
    method: Method
    bias_s: float
    variance_s2: float
    memory: int | None
    memory_exact: bool
    energy_j: float | None


class Hidden(NamedTuple):
    """What no visible process explains: bytes, and percent of utilization; 0: that much is explained."""

    memory: int
    utilization: int


class Tick(NamedTuple):
    """What a reading of one GPU says of the time since the last.

    ``residents``: who has a context now. ``unmeasured``: why nothing can be said; "": it can.
    """

    device: int
    seconds: float
    residents: frozenset[int]
    shares: tuple[Share, ...]
    hidden: Hidden | None
    faults: tuple[str, ...]
    unmeasured: str
    foreign: bool = False
    """NVML goes on listing processes that do not exist here: an old driver, whose pids are another namespace's. Whoever
    holds this GPU and is not listed may be one of them."""


class Usage:
    """What a scope has used, summed over processes and GPUs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.bias_s = 0.0
        self.variance_s2 = 0.0
        self.energy_j = 0.0
        self.energy_known = True
        self.memory = 0
        self.memory_exact = True
        self.memory_peak = 0
        self.methods: set[Method] = set()

    def add(self, share: Share) -> None:
        self.seconds += share.seconds
        self.bias_s += share.bias_s
        self.variance_s2 += share.variance_s2
        self.methods.add(share.method)
        if share.energy_j is None:
            self.energy_known = False
        else:
            self.energy_j += share.energy_j

    def level(self, shares: Iterable[Share]) -> int | None:
        """Bytes held now by all of ``shares``, the scope's on every GPU; None: unknown."""
        shares = list(shares)
        total = memory(shares)
        if total is not None:
            self.memory_exact = all(share.memory_exact for share in shares)
            self.memory, self.memory_peak = total, max(self.memory_peak, total)
        return total

    @property
    def error_s(self) -> float:
        """GPU-seconds that ``seconds`` may be off by, either way, at two standard deviations of the sampling."""
        return self.bias_s + 2 * math.sqrt(self.variance_s2)


def memory(shares: Iterable[Share]) -> int | None:
    """Bytes held now by all of ``shares``; None: unknown."""
    held = [share.memory for share in shares]
    return None if None in held else sum(each or 0 for each in held)


class GpuMeter:
    """Accounts for one GPU, reading after reading.

    Args:
        exists: whether there is a process of that number here. One that is not explains nothing.
    """

    def __init__(self, exists: Callable[[int], bool] = lambda _pid: True) -> None:
        self._exists = exists
        self._last: Reading | None = None
        self._counted_us = 0
        self._residents: frozenset[int] = frozenset()
        self._unexplained = 0
        self._strange = 0
        self._loads_now: dict[int, _Load] = {}
        self._energy: tuple[int, float] | None = None
        """Millijoules, and when: from there on they have not been shared out yet."""
        self._computed: dict[int, float] = {}
        """GPU-seconds by process since then."""
        self._usual: dict[int, float] = {}
        """By process its share, smoothed: a reading of one sample says all or nothing, and knows no variance."""

    def take(self, reading: Reading) -> Tick:
        """The next reading; the first one only says where counting begins, and who is there."""
        last, self._last = self._last, reading
        faults: list[str] = []
        reading = _plausible(reading, faults)
        if isinstance(reading.processes, Missing):
            self._unexplained = self._strange = 0
            return Tick(reading.device, 0.0, frozenset(), (), None, (), str(reading.processes))
        listed = _residents(reading.processes, faults)
        resident = {pid: memory for pid, memory in listed.items() if self._exists(pid)}
        strangers = sorted(listed.keys() - resident.keys())
        self._strange = self._strange + 1 if strangers else 0
        if strangers:
            faults.append(f"processes {strangers[:8]} have a context, and do not exist here")
        passed = 0.0 if last is None else max(0.0, reading.monotonic - last.monotonic)
        told = passed if isinstance(reading.samples, Missing) else reading.window_s if last is not None else 0.0
        loads, method = self._loads(reading, resident, told, faults, alone=len(listed) == 1)
        if told or method is not Method.PROCESS:
            self._remember(resident, loads)
        memory = _memory(listed, reading.memory_used)
        # Who was not there at the last reading has computed since then at most.
        spans = {pid: told if pid in self._residents else min(told, passed) for pid in {*resident, *loads}}
        energy = self._joules(reading, {pid: load.share * spans[pid] for pid, load in loads.items()})
        shares = tuple(
            _share(
                pid,
                loads.get(pid, _Load(0.0, 1)),
                method=method,
                passed=spans[pid],
                usual=self._usual.get(pid, 0.0),
                memory=memory.get(pid, (0, True)),
                energy=None if energy is None else energy.get(pid, 0.0),
            )
            for pid in sorted(spans)
        )
        hidden = self._hidden(reading, resident, loads, method)
        self._residents = frozenset(resident)
        foreign = self._strange >= HIDDEN_READINGS
        return Tick(reading.device, passed, self._residents, shares, hidden, tuple(faults), "", foreign)

    def _joules(self, reading: Reading, computed: Mapping[int, float]) -> dict[int, float] | None:
        """By process its part of the GPU's energy, by what each has computed since that was last known; None: not
        measured. What an idle GPU draws is nobody's."""
        for pid, seconds in computed.items():
            self._computed[pid] = self._computed.get(pid, 0.0) + seconds
        if reading.energy_mj is None:
            return {}
        before, self._energy = self._energy, None
        if not isinstance(reading.energy_mj, Missing):
            self._energy = (reading.energy_mj, reading.monotonic)
        spent, self._computed = self._computed, {}
        whole = sum(spent.values())
        joules = None if before is None or self._energy is None else _drawn(before, self._energy)
        return None if joules is None else {pid: joules * each / whole for pid, each in spent.items() if whole}

    def _loads(
        self, reading: Reading, resident: Mapping[int, int | None], passed: float, faults: list[str], *, alone: bool
    ) -> tuple[dict[int, _Load], Method]:
        """By process the share of ``passed`` seconds it computed in, and how many samples say so."""
        samples = reading.samples
        if not isinstance(samples, Missing):
            if not passed and not samples:
                return {pid: load for pid, load in self._loads_now.items() if pid in resident}, Method.PROCESS
            rows = _valid(samples, reading.time_us, self._counted_us)
            self._counted_us = max((row.time_us for row in samples if row.time_us <= reading.time_us),
                                   default=self._counted_us)  # fmt: skip
            if rows is not None and passed <= MEMORY_S:
                self._loads_now = _by_process(rows, passed)
                return self._loads_now, Method.PROCESS
            if rows is None:
                faults.append("process utilization: rows that cannot be true")
            else:
                faults.append(f"no reading for {passed:.1f} s: NVML remembers {MEMORY_S:g}")
        elif alone and resident and isinstance(reading.utilization, int) and 0 <= reading.utilization <= 100:
            faults.append(str(samples))
            return {next(iter(resident)): _Load(reading.utilization / 100, _count(passed))}, Method.DEVICE
        else:
            faults.append(str(samples))
        # Whoever is here now, or was at the last reading, may have computed all the time.
        return {pid: _Load(1.0, 1) for pid in {*resident, *self._residents}}, Method.RESIDENCY

    def _remember(self, resident: Iterable[int], loads: Mapping[int, _Load]) -> None:
        """What is usual of each process that is here. On a GPU that was idle nothing was missed of anybody."""
        before, self._usual = self._usual, {}
        for pid in {*resident, *loads}:
            share = loads[pid].share if pid in loads else 0.0
            usual = before.get(pid, (share + 0.5) / 2) if loads else 0.0
            self._usual[pid] = usual + _SMOOTHING * (share - usual)

    def _hidden(
        self, reading: Reading, resident: Mapping[int, int | None], loads: Mapping[int, _Load], method: Method
    ) -> Hidden | None:
        """What has been unexplained for long enough; told once, until it is explained again."""
        memory, utilization = 0, 0
        used = reading.memory_used
        if not isinstance(used, Missing) and all(known is not None for known in resident.values()):
            slack = HIDDEN_BYTES + (0 if reading.reserved_known else _RESERVE_UNKNOWN)
            free_standing = used - sum(known or 0 for known in resident.values())
            memory = free_standing if free_standing > slack else 0
        whole = reading.utilization
        if not isinstance(whole, Missing) and 0 <= whole <= 100:
            if not resident:
                utilization = whole if whole >= _HIDDEN_PERCENT_ALONE else 0
            elif method is Method.PROCESS:
                seen = {*resident, *self._residents}
                left = whole - round(100 * sum(load.share for pid, load in loads.items() if pid in seen))
                utilization = left if left >= _HIDDEN_PERCENT else 0
        self._unexplained = self._unexplained + 1 if memory or utilization else 0
        return Hidden(memory, utilization) if self._unexplained == HIDDEN_READINGS else None


def _plausible(reading: Reading, faults: list[str]) -> Reading:
    """Without an amount of memory that no GPU has: it would be a process's bound, or a hidden tenant's."""
    used = reading.memory_used
    if isinstance(used, Missing) or 0 <= used < _MOST_BYTES:
        return reading
    missing = Missing("nvmlDeviceGetMemoryInfo", f"{used} bytes, which cannot be true")
    faults.append(str(missing))
    return reading._replace(memory_used=missing)


class _Load(NamedTuple):
    share: float
    samples: int


def _count(passed: float) -> int:
    return max(1, int(passed / SAMPLE_PERIOD_S))


def _residents(rows: Iterable[Process], faults: list[str]) -> dict[int, int | None]:
    """Bytes by process with a context, over all its instances of a MIG GPU; None: not told."""
    found: dict[int, int | None] = {}
    for row in rows:
        if row.pid <= 0:
            faults.append(f"a process row of pid {row.pid}")
            continue
        memory = row.memory if row.memory is None or 0 <= row.memory < _MOST_BYTES else None
        if row.pid in found:
            known = found[row.pid]
            memory = None if known is None or memory is None else known + memory
        found[row.pid] = memory
    return found


def _memory(resident: Mapping[int, int | None], used: int | Missing) -> dict[int, tuple[int | None, bool]]:
    """By process (bytes, exact): where NVML does not tell, all that the others do not explain."""
    told = sum(known or 0 for known in resident.values())
    bound = None if isinstance(used, Missing) else max(0, used - told)
    return {pid: (bound, False) if known is None else (known, True) for pid, known in resident.items()}


def _valid(rows: Iterable[Sample], now_us: int, counted_us: int) -> list[Sample] | None:
    """The rows not counted yet, each once. None: there is one that cannot be true, so none of them is believed."""
    oldest = now_us - int(MEMORY_S * 1_000_000) - _CLOCK_SLACK_US
    found: dict[tuple[int, int], Sample] = {}
    for row in rows:
        if row.pid == 0 or row.time_us == 0:
            continue  # a place in NVML's array that was not filled
        if not 0 <= row.sm <= 100 or not oldest <= row.time_us <= now_us + _CLOCK_SLACK_US:
            return None
        if row.time_us <= counted_us:
            continue
        key = (row.pid, row.time_us)
        if key not in found or found[key].sm < row.sm:
            found[key] = row
    return list(found.values())


def _by_process(rows: list[Sample], passed: float) -> dict[int, _Load]:
    """By process its mean over all samples. Most drivers tell just that, one row for each process.

    Where one has several rows they are samples: one in which another process was seen saw nothing of this one.
    """
    sums: dict[int, int] = {}
    for row in rows:
        sums[row.pid] = sums.get(row.pid, 0) + row.sm
    single = len(rows) == len(sums)
    samples = _count(passed) if single else len({row.time_us for row in rows})
    each = 1 if single else samples
    whole = sum(sums.values()) / each
    scale = 1 / max(100.0, whole) / each  # two processes cannot compute more than all the time
    return {pid: _Load(total * scale, samples) for pid, total in sums.items()}


def _share(
    pid: int,
    load: _Load,
    *,
    method: Method,
    passed: float,
    usual: float,
    memory: tuple[int | None, bool],
    energy: float | None,
) -> Share:
    seconds = load.share * passed
    if method is Method.RESIDENCY:
        bias, variance = seconds, 0.0
    else:
        bias = _RESOLUTION * passed
        variance = passed * passed * usual * (1 - usual) / min(load.samples, _count(passed))
    return Share(pid, seconds, method, bias, variance, *memory, energy)


def _drawn(before: tuple[int, float], now: tuple[int, float]) -> float | None:
    """Joules between two (millijoules, seconds); None: garbage, or the driver has begun to count anew."""
    joules, seconds = (now[0] - before[0]) / 1000, now[1] - before[1]
    return joules if 0 <= joules <= _MOST_WATTS * max(seconds, SAMPLE_PERIOD_S) else None

"""GPU-seconds with their error, from readings of every kind; what nobody explains; rows that cannot be true."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from ray_guard.compute.gpu_meter import HIDDEN_READINGS, GpuMeter, Hidden, Method, Tick, Usage
from ray_guard.kernel.nvml import Missing, Process, Reading, Sample

GIB = 1 << 30
TICK = 0.5
_EPOCH_US = 1_800_000_000_000_000
_NOT_SUPPORTED = Missing("nvmlDeviceGetProcessUtilization", "NOT_SUPPORTED")


def at(second: float, **fields: Any) -> Reading:
    """A reading at ``second``; processes as (pid, memory), samples as (pid, seconds before now, percent)."""
    now = _EPOCH_US + int(second * 1e6)
    given: dict[str, Any] = {
        "memory_used": 0, "utilization": 0, "energy_mj": 0, "mig": False, "reserved_known": True, "window_s": TICK,
        **fields,
    }  # fmt: skip
    processes, samples = given.pop("processes", ()), given.pop("samples", ())
    if not isinstance(processes, Missing):
        processes = tuple(Process(row[0], row[1], *(row[2:] or (None, None))) for row in processes)
    if not isinstance(samples, Missing):
        samples = tuple(Sample(pid, now - int(before * 1e6), sm) for pid, before, sm in samples)
    return Reading(0, "GPU-0", 0, second, now, processes=processes, samples=samples, **given)


def used(ticks: list[Tick], pid: int) -> Usage:
    usage = Usage()
    for tick in ticks:
        mine = [share for share in tick.shares if share.pid == pid]
        for share in mine:
            usage.add(share)
        usage.level(mine)
    return usage


def hidden(**rows: Any) -> list[Hidden | None]:
    meter = GpuMeter()
    return [meter.take(at(n * TICK, **rows)).hidden for n in range(2 * HIDDEN_READINGS)]


def test_process_utilization_times_time() -> None:
    meter = GpuMeter()
    rows = {"processes": [(1, GIB), (2, GIB)], "samples": [(1, 0.1, 60), (2, 0.1, 30)], "memory_used": 2 * GIB}
    ticks = [meter.take(at(n * TICK, **rows)) for n in range(21)]
    assert used(ticks, 1).seconds == pytest.approx(6.0)
    assert used(ticks, 2).seconds == pytest.approx(3.0)
    assert used(ticks, 1).methods == {Method.PROCESS}
    assert used(ticks, 1).memory == GIB
    assert not ticks[-1].faults


def test_the_first_reading_counts_nothing() -> None:
    tick = GpuMeter().take(at(0, processes=[(1, GIB)], samples=[(1, 0.1, 100)]))
    assert [share.seconds for share in tick.shares] == [0.0]
    assert tick.residents == {1}


def test_idle_is_zero_and_certain_but_for_rounding() -> None:
    meter = GpuMeter()
    ticks = [meter.take(at(n * TICK, processes=[(1, GIB)], memory_used=GIB)) for n in range(11)]
    usage = used(ticks, 1)
    assert usage.seconds == 0.0
    assert 0 < usage.error_s < 0.05


def test_samples_of_others_count_as_nothing_of_mine() -> None:
    """One process per engine and sample: seen in one of four, it computed in a quarter of the time."""
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0), (2, 0)]))
    samples = [(1, 0.8, 100), (2, 0.6, 100), (2, 0.4, 100), (2, 0.2, 100)]
    tick = meter.take(at(1, window_s=1, processes=[(1, 0), (2, 0)], samples=samples))
    assert {share.pid: share.seconds for share in tick.shares} == {1: 0.25, 2: 0.75}


def test_a_row_for_each_process_is_its_mean_already() -> None:
    """As an H200's driver tells it of two processes that compute by turns: each row at its own last sample."""
    meter = GpuMeter()
    meter.take(at(0, processes=[(557, 0), (558, 0)]))
    tick = meter.take(at(1, window_s=1, processes=[(557, 0), (558, 0)], samples=[(557, 0.03, 80), (558, 0.83, 20)]))
    assert {share.pid: share.seconds for share in tick.shares} == {557: pytest.approx(0.8), 558: pytest.approx(0.2)}


def test_a_reading_without_samples_counts_nothing_and_the_next_counts_for_both() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0)]))
    between = meter.take(at(0.5, window_s=0, processes=[(1, 0)]))
    tick = meter.take(at(1, window_s=1, processes=[(1, 0)], samples=[(1, 0.1, 60)]))
    assert [share.seconds for each in (between, tick) for share in each.shares] == [0.0, pytest.approx(0.6)]


def test_who_has_just_come_has_not_computed_for_longer() -> None:
    meter = GpuMeter()
    meter.take(at(0))
    meter.take(at(0.5, window_s=0))
    tick = meter.take(at(1, window_s=1, processes=[(1, 0)], samples=[(1, 0.1, 100)]))
    assert [share.seconds for share in tick.shares] == [pytest.approx(0.5)]


def test_energy_that_is_asked_for_seldom_is_shared_out_by_all_that_was_computed_meanwhile() -> None:
    meter = GpuMeter()
    both = [(1, 0), (2, 0)]
    meter.take(at(0, energy_mj=0, processes=both))
    ticks = [meter.take(at(1, window_s=1, energy_mj=None, processes=both, samples=[(1, 0.1, 90)]))]
    ticks.append(meter.take(at(2, window_s=1, energy_mj=300_000, processes=both, samples=[(2, 0.1, 30)])))
    assert (used(ticks, 1).energy_j, used(ticks, 2).energy_j) == (pytest.approx(225), pytest.approx(75))
    assert used(ticks, 1).energy_known


def test_the_error_bound_holds_the_truth() -> None:
    """A process that computes in 30 % of the samples, drawn anew 40 times: the bound is two standard deviations."""
    draw = secrets.SystemRandom()
    outside = 0
    for _ in range(40):
        meter = GpuMeter()
        ticks = []
        for n in range(241):
            samples = [(1 if draw.random() < 0.3 else 2, 0.1, 100)]
            ticks.append(meter.take(at(n * TICK, processes=[(1, 0), (2, 0)], samples=samples)))
        usage = used(ticks, 1)
        outside += abs(usage.seconds - 0.3 * 120) > usage.error_s
    assert outside <= 8, "at two standard deviations one in twenty would be outside"


def test_the_bound_grows_with_what_is_not_seen() -> None:
    def error(share: int) -> float:
        meter = GpuMeter()
        rows = {"processes": [(1, 0)], "samples": [(1, 0.1, share)]}
        return used([meter.take(at(n * TICK, **rows)) for n in range(121)], 1).error_s

    assert error(0) < error(100) + 1e-9 < error(50)
    assert error(50) < 0.2 * 60


def test_duplicates_and_rows_already_counted_count_once() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0)]))
    tick = meter.take(at(1, window_s=1, processes=[(1, 0)], samples=[(1, 0.5, 80), (1, 0.5, 80), (1, 0.5, 40)]))
    assert [share.seconds for share in tick.shares] == [pytest.approx(0.8)]
    old = (1, 1.0, 80)  # half a second later, the driver tells the same row again
    tick = meter.take(at(1.5, processes=[(1, 0)], samples=[old]))
    assert [share.seconds for share in tick.shares] == [0.0]


@pytest.mark.parametrize(
    "row",
    [(1, 0.1, 101), (1, 0.1, 4_000_000_000), (1, 3600.0, 50), (1, -3600.0, 50)],
    ids=["over 100 %", "garbage", "an hour old", "of the future"],
)
def test_rows_that_cannot_be_true_make_a_bound_of_it(row: tuple[int, float, int]) -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0), (2, 0)]))
    tick = meter.take(at(1, window_s=1, processes=[(1, 0), (2, 0)], samples=[(2, 0.1, 10), row]))
    assert {share.pid: (share.seconds, share.method) for share in tick.shares} == {
        1: (1.0, Method.RESIDENCY),
        2: (1.0, Method.RESIDENCY),
    }
    assert tick.faults == ("process utilization: rows that cannot be true",)


def test_empty_places_in_the_array_are_none() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0)]))
    now = _EPOCH_US + 1_000_000
    reading = at(1, window_s=1, processes=[(1, 0)])._replace(samples=(Sample(0, 0, 0), Sample(1, now, 40)))
    tick = meter.take(reading)
    assert [share.seconds for share in tick.shares] == [pytest.approx(0.4)]
    assert not tick.faults


def test_more_than_all_the_time_is_shared_out() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0), (2, 0)]))
    tick = meter.take(at(1, window_s=1, processes=[(1, 0), (2, 0)], samples=[(1, 0.1, 90), (2, 0.1, 90)]))
    assert sum(share.seconds for share in tick.shares) == pytest.approx(1.0)


def test_without_samples_a_process_alone_has_what_the_gpu_has() -> None:
    meter = GpuMeter()
    rows = {"processes": [(1, 0)], "samples": _NOT_SUPPORTED, "utilization": 40}
    ticks = [meter.take(at(n, **rows)) for n in range(3)]
    usage = used(ticks, 1)
    assert usage.seconds == pytest.approx(0.8)
    assert usage.methods == {Method.DEVICE}
    assert ticks[-1].faults == (str(_NOT_SUPPORTED),)


@pytest.mark.parametrize("utilization", [Missing("nvmlDeviceGetUtilizationRates", "NOT_SUPPORTED"), 40])
def test_mig_counts_the_time_that_a_process_is_there(utilization: int | Missing) -> None:
    """An upper bound, and marked as one: the error says that all of it may be too much."""
    meter = GpuMeter()
    processes = [(1, GIB, 1, 0), (1, GIB, 2, 0), (2, GIB, 3, 0)]
    rows = {"processes": processes, "samples": _NOT_SUPPORTED, "utilization": utilization, "mig": True,
            "memory_used": 3 * GIB}  # fmt: skip
    usage = used([meter.take(at(n, **rows)) for n in range(5)], 1)
    assert (usage.seconds, usage.error_s, usage.memory) == (4.0, 4.0, 2 * GIB)
    assert usage.methods == {Method.RESIDENCY}


def test_whoever_has_just_left_may_have_computed_until_then() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0)], samples=_NOT_SUPPORTED))
    tick = meter.take(at(1, window_s=1, processes=[], samples=_NOT_SUPPORTED))
    assert [(share.pid, share.seconds) for share in tick.shares] == [(1, 1.0)]
    assert tick.residents == frozenset()


def test_a_gap_that_nvml_does_not_remember_is_bounded() -> None:
    meter = GpuMeter()
    meter.take(at(0, processes=[(1, 0)]))
    tick = meter.take(at(60, window_s=60, processes=[(1, 0)], samples=[(1, 0.1, 1)]))
    assert [(share.seconds, share.method) for share in tick.shares] == [(60.0, Method.RESIDENCY)]
    assert "no reading for 60.0 s" in tick.faults[0]


def test_no_list_of_processes_is_no_measurement() -> None:
    missing = Missing("nvmlDeviceGetComputeRunningProcesses_v3", "NO_PERMISSION")
    tick = GpuMeter().take(at(0, processes=missing, samples=[(1, 0.1, 50)]))
    assert tick.unmeasured == str(missing)
    assert tick.shares == ()


def test_memory_that_is_not_told_is_bounded_by_the_rest() -> None:
    tick = GpuMeter().take(at(0, processes=[(1, None), (2, 2 * GIB)], memory_used=5 * GIB))
    assert {share.pid: (share.memory, share.memory_exact) for share in tick.shares} == {
        1: (3 * GIB, False),
        2: (2 * GIB, True),
    }
    unknown = GpuMeter().take(at(0, processes=[(1, None)], memory_used=Missing("nvmlDeviceGetMemoryInfo", "UNKNOWN")))
    assert unknown.shares[0].memory is None
    assert Usage().level(unknown.shares) is None


def test_garbage_memory_is_unknown() -> None:
    tick = GpuMeter().take(at(0, processes=[(1, (1 << 64) - 2)], memory_used=GIB))
    assert (tick.shares[0].memory, tick.shares[0].memory_exact) == (GIB, False)
    assert GpuMeter().take(at(0, processes=[(0, GIB)])).faults == ("a process row of pid 0",)


@pytest.mark.parametrize("garbage", [-1, 1 << 50, (1 << 64) - 1])
def test_garbage_memory_of_a_gpu_bounds_nobody_and_hides_nobody(garbage: int) -> None:
    tick = GpuMeter().take(at(0, processes=[(1, None)], memory_used=garbage))
    assert tick.shares[0].memory is None
    assert tick.faults == (f"nvmlDeviceGetMemoryInfo: {garbage} bytes, which cannot be true",)
    assert hidden(processes=[(1, GIB)], memory_used=garbage) == [None] * 2 * HIDDEN_READINGS


def test_energy_goes_by_utilization_and_idle_draw_is_nobodys() -> None:
    meter = GpuMeter()
    meter.take(at(0, energy_mj=1_000, processes=[(1, 0), (2, 0)]))
    tick = meter.take(
        at(1, window_s=1, energy_mj=301_000, processes=[(1, 0), (2, 0)], samples=[(1, 0.1, 20), (2, 0.1, 40)])
    )
    assert {share.pid: share.energy_j for share in tick.shares} == {1: pytest.approx(100), 2: pytest.approx(200)}
    tick = meter.take(at(2, window_s=1, energy_mj=400_000, processes=[(1, 0), (2, 0)]))
    assert [share.energy_j for share in tick.shares] == [0.0, 0.0]


def test_energy_that_is_not_measured_is_not_zero() -> None:
    for before, after in (
        (5_000, 1_000),
        (5_000, (1 << 64) - 1),
        (5_000, Missing("nvmlDeviceGetTotalEnergyConsumption", "NOT_SUPPORTED")),
    ):
        meter = GpuMeter()
        meter.take(at(0, energy_mj=before, processes=[(1, 0)]))
        tick = meter.take(at(1, window_s=1, energy_mj=after, processes=[(1, 0)], samples=[(1, 0.1, 50)]))
        assert tick.shares[0].energy_j is None
        usage = used([tick], 1)
        assert not usage.energy_known


def test_memory_that_nobody_explains_is_a_hidden_tenant() -> None:
    found = hidden(processes=[(1, 10 * GIB)], samples=[(1, 0.1, 50)], utilization=50, memory_used=30 * GIB)
    assert [each for each in found if each] == [Hidden(20 * GIB, 0)], "told once"
    assert found.index(Hidden(20 * GIB, 0)) == HIDDEN_READINGS - 1


def test_utilization_that_nobody_explains_is_a_hidden_tenant() -> None:
    assert [each for each in hidden(utilization=90) if each] == [Hidden(0, 90)]
    beside = hidden(processes=[(1, GIB)], samples=[(1, 0.1, 20)], utilization=95, memory_used=GIB)
    assert [each for each in beside if each] == [Hidden(0, 75)]
    stranger = hidden(processes=[(1, GIB)], samples=[(9, 0.1, 90)], utilization=90, memory_used=GIB)
    assert [each for each in stranger if each] == [Hidden(0, 90)], "nobody with that pid has a context"


def test_what_is_explained_is_no_hidden_tenant() -> None:
    assert not any(hidden(processes=[(1, 10 * GIB)], samples=[(1, 0.1, 95)], utilization=99, memory_used=10 * GIB))
    assert not any(hidden(memory_used=400 << 20)), "the driver's own bookkeeping"
    assert not any(hidden(memory_used=GIB, reserved_known=False)), "with the reserve in it"
    assert not any(hidden(processes=[(1, None)], memory_used=30 * GIB)), "unknown is not unexplained"
    assert not any(hidden(processes=[(1, GIB)], samples=_NOT_SUPPORTED, utilization=99, memory_used=GIB))


def test_a_process_that_does_not_exist_here_explains_nothing() -> None:
    """An old driver in a container tells pids of the host's: who holds the GPU may be any of them."""
    meter = GpuMeter({1}.__contains__)
    rows: dict[str, Any] = {"processes": [(1, GIB), (9, 2 * GIB)], "memory_used": 3 * GIB, "samples": [(9, 0.1, 80)]}
    ticks = [meter.take(at(n * TICK, utilization=80, **rows)) for n in range(HIDDEN_READINGS + 1)]
    assert [tick.foreign for tick in ticks] == [False] * (HIDDEN_READINGS - 1) + [True, True]
    assert [tick.hidden for tick in ticks if tick.hidden] == [Hidden(2 * GIB, 80)]
    assert all("[9]" in tick.faults[0] and 9 not in tick.residents for tick in ticks)
    assert not meter.take(at(3, processes=[(1, GIB)], memory_used=GIB)).foreign, "it is gone"


def test_the_gpus_own_utilization_is_not_put_down_to_one_of_two() -> None:
    meter = GpuMeter({1}.__contains__)
    rows: dict[str, Any] = {"processes": [(1, GIB), (9, GIB)], "samples": _NOT_SUPPORTED, "utilization": 10}
    ticks = [meter.take(at(n * TICK, memory_used=2 * GIB, **rows)) for n in range(3)]
    assert used(ticks, 1).methods == {Method.RESIDENCY}


def test_a_tenant_that_comes_back_is_told_again() -> None:
    meter = GpuMeter()
    found = []
    for n in range(6 * HIDDEN_READINGS):
        there = (n // (2 * HIDDEN_READINGS)) % 2 == 0
        found.append(meter.take(at(n * TICK, memory_used=20 * GIB if there else 0)).hidden)
    assert sum(each is not None for each in found) == 2

"""Time several contenders alternately, and compare them round by round."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Run = Callable[[], object]
# Runs something so many times and says how many seconds one call took, on average.
Clock = Callable[[Run, int], float]


class Spread(NamedTuple):
    """A median between the quartiles."""

    median: float
    lower: float
    upper: float


class Samples(NamedTuple):
    """Seconds a call of every contender took, one number a round, and how many calls made a round."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]


def settle_allocator() -> None:
    """Bring the C library's allocator to where it is in a process that has trained or served for a while.

    glibc hands large blocks back to the system until it has seen one of up to 32 MB freed, and every page of a new one
    then costs a fault, more than what most operators do with it: of that, each contender would pay by chance.
    """
    torch.ones(31 << 20, dtype=torch.uint8)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def wall_clock(run: Run, calls: int) -> float:
    """Seconds a call took, by the clock of the host: for work that is done when the call returns."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class CudaEvents:
    """Seconds a call took on the GPU, by events around each call, the L2 cache flushed before each.

    Why not the clock of the host around a queue of calls: inputs that fit into L2 (50 MB on recent cards) would be
    read from there call after call, which no model does, and a contender of one short kernel would be timed by the
    speed of Python. Here the flush keeps the GPU busy while the first launches are queued, as the layer before it does
    in a model; a contender of so many launches that the queue runs dry pays for them, as it does in a model.
    """

    def __init__(self) -> None:
        self._filler = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, run: Run, calls: int) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
        for start, end in zip(events[::2], events[1::2], strict=True):
            self._filler.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        milliseconds = [a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True)]
        return statistics.fmean(milliseconds) / 1e3


def _once(run: Run, clock: Clock, loop_seconds: float) -> float:
    """Seconds of one call when nothing disturbs it; warms up, too."""
    clock(run, 1)
    end = time.perf_counter() + 10 * loop_seconds
    fastest = clock(run, 1)
    while time.perf_counter() < end:
        fastest = min(fastest, clock(run, 1))
    return max(fastest, 1e-9)


def measure(
    contenders: Mapping[str, Run],
    clock: Clock,
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int = 300,
    loop_seconds: float = 2e-3,
) -> Samples:
    """Time the contenders alternately until the time is up.

    Every round times each contender once, the order turned from round to round: whatever drifts meanwhile (clock rate,
    neighbours on the machine) drifts for all alike, and the ratio of two times of the same round is hardly touched.

    Args:
        contenders: What to time, by name.
        clock: How to time it.
        seconds: Time for all of them together, without warming up.
        min_rounds: Rounds to make even if that takes longer.
        max_rounds: Rounds to stop at.
        loop_seconds: Calls are repeated within a round until they take about this long, so that neither the clock's
            resolution nor its own cost is seen.
    """
    calls = {}
    for name, run in contenders.items():
        calls[name] = math.ceil(loop_seconds / _once(run, clock, loop_seconds))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() >= end:
                break
            for name in names if done % 2 == 0 else reversed(names):
                if not samples[name] or samples[name][-1] < 20e-3:
                    contenders[name]()  # caches as it leaves them itself, not as its neighbour does
                samples[name].append(clock(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return Samples(samples, calls)

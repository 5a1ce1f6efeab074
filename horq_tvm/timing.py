"""Timing engines against each other in one process: in turn (A B A B …), so that a drifting clock or a busy neighbour
meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_ROUNDS = 7
BLOCK_NS = 5_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and minimum over `runs` calls."""

    median_ms: float
    min_ms: float
    runs: int


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, Timing]:
    """Time each call for about `seconds`, in blocks that take turns.

    A block is long enough (5 ms) to be worth the switch; its first call, which finds the caches full of the other
    engine's data, is not counted. Each gets at least 7 blocks.
    """
    sizes = {name: _block_size(call) for name, call in calls.items()}
    samples: dict[str, list[int]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0)
    rounds = 0
    while rounds < MIN_ROUNDS or min(spent.values(), default=seconds * 1e9) < seconds * 1e9:
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            call()
            samples[name] += _time_calls(call, sizes[name])
            spent[name] += time.perf_counter_ns() - begin
        rounds += 1
    return {
        name: Timing(statistics.median(values) / 1e6, min(values) / 1e6, len(values))
        for name, values in samples.items()
    }


def _block_size(call: Callable[[], object]) -> int:
    """Calls a block, after a warm-up that is at most a few calls long."""
    call()
    longest = max(1, min(_time_calls(call, 2)))
    return max(1, BLOCK_NS // longest)


def _time_calls(call: Callable[[], object], count: int) -> list[int]:
    """Nanoseconds of each of `count` calls."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(count):
        begin = clock()
        call()
        times.append(clock() - begin)
    return times

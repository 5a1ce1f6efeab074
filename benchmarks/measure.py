"""Timing kernels inside their libraries, in turn: a drifting clock or a busy neighbour meets all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from horq_tvm.errors import HorqError
from horq_tvm.runtime.loader import LoadedModel

ALIGNMENT = 64
"""Bytes. A library uses memory so aligned in place."""

BLOCK_NS = 3_000_000
MIN_ROUNDS = 9

Times = Mapping[str, float]
Probe = Callable[[], Times]
"""Runs for about `BLOCK_NS` and returns nanoseconds of one call, the median of the block, by name."""


def kernel_probe(model: LoadedModel, feeds: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Probe:
    """Times steps of a library with its own clock, the call from Python left out.

    `names` maps what to call a time to a part of the name of the steps that are summed up for it ("" for all steps).

    Raises:
        HorqError: no step of the library has such a name.
    """
    aligned = {name: aligned_copy(array) for name, array in feeds.items()}

    def run(runs: int) -> dict[str, float]:
        steps = model.profile(runs=runs, **aligned)
        return {label: float(sum(s.median_ns for s in steps if part in s.name)) for label, part in names.items()}

    steps = model.profile(runs=3, **aligned)
    for label, part in names.items():
        if not any(part in step.name for step in steps):
            raise HorqError(f"{label}: no step called *{part}*; there are {', '.join(step.name for step in steps)}")
    runs = _block_size(sum(step.median_ns for step in steps))
    return lambda: run(runs)


def call_probe(name: str, call: Callable[[], object]) -> Probe:
    """Times whole calls from Python; the first of a block, which finds other data in the caches, is not counted."""
    clock = time.perf_counter_ns

    def run(count: int) -> dict[str, float]:
        call()
        samples = []
        for _ in range(count):
            begin = clock()
            call()
            samples.append(clock() - begin)
        return {name: float(statistics.median(samples))}

    count = _block_size(int(run(3)[name]))
    return lambda: run(count)


def alternate(probes: Sequence[Probe], seconds: float) -> dict[str, list[float]]:
    """Nanoseconds by name, one value a round; the probes take turns until about `seconds` have gone by."""
    samples: dict[str, list[float]] = {}
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.monotonic() < end:
        for probe in probes:
            for name, value in probe().items():
                samples.setdefault(name, []).append(value)
        rounds += 1
    return samples


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of numerator / denominator: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """The same array in memory that a library uses in place."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """One thread stays on one CPU, the last that the process may use; more are left to the scheduler."""
    if threads != 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _block_size(nanoseconds: int) -> int:
    return max(3, BLOCK_NS // max(nanoseconds, 1))

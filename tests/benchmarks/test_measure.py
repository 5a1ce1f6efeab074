"""Measuring: probes take turns, ratios pair up the rounds, memory is what a library uses in place."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from benchmarks.measure import ALIGNMENT, MIN_ROUNDS, aligned_copy, alternate, call_probe, pinned, ratio


def test_probes_take_turns_round_by_round() -> None:
    order: list[str] = []

    def probe(name: str, nanoseconds: float):  # type: ignore[no-untyped-def]
        def run() -> dict[str, float]:
            order.append(name)
            return {name: nanoseconds, f"{name}.half": nanoseconds / 2}

        return run

    samples = alternate([probe("a", 10.0), probe("b", 20.0)], seconds=0.0)
    assert order == ["a", "b"] * MIN_ROUNDS
    assert samples == {
        name: [value] * MIN_ROUNDS for name, value in {"a": 10.0, "a.half": 5.0, "b": 20.0, "b.half": 10.0}.items()
    }


def test_a_ratio_is_taken_round_by_round() -> None:
    # The clock halves in the middle: medians would say 1.25, each round says 2.
    assert ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2.0


def test_a_call_is_timed_from_outside() -> None:
    (nanoseconds,) = call_probe("sleep", lambda: time.sleep(0.002))().values()
    assert nanoseconds >= 2e6


def test_copies_are_aligned() -> None:
    for size in (1, 7, 33):
        array = np.arange(3 * size, dtype="float32").reshape(3, size)
        copy = aligned_copy(array)
        assert copy.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(copy, array)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_one_thread_is_pinned_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    with pinned(2):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before

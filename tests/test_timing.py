"""Interleaved timing: engines take turns, and each is counted alike."""

from __future__ import annotations

import time

from horq_tvm.timing import MIN_ROUNDS, interleaved


def test_engines_take_turns_and_are_told_apart() -> None:
    order: list[str] = []

    def engine(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    result = interleaved({"a": lambda: engine("a", 0.001), "b": lambda: engine("b", 0.004)}, seconds=0.05)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) // 2 >= MIN_ROUNDS
    assert 1.0 <= result["a"].min_ms <= result["a"].median_ms < 4.0 <= result["b"].min_ms <= result["b"].median_ms
    # The first call of a block meets cold caches and is not counted, nor are the warm-up's calls.
    assert result["a"].runs < order.count("a")


def test_a_quick_call_is_timed_in_blocks() -> None:
    result = interleaved({"a": lambda: None}, seconds=0.02)
    assert result["a"].runs > 1000
    assert 0.0 < result["a"].median_ms < 1.0

"""Changes of layout: every order of the axes, by squares, by few channels, with axes of one element, and shared out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import relax

from tests.end_to_end.drawn import compile_module
from tests.relay_passes.program import module

EVERY = list(itertools.permutations(range(4)))
CASES = [
    ((2, 3, 18, 35), EVERY),
    ((3, 64, 5, 7), EVERY[::3]),
    ((1, 1, 9, 4), EVERY[::3]),
    ((2, 4, 300, 200), [(0, 2, 3, 1), (0, 3, 1, 2)]),  # large enough for two threads
]


@pytest.mark.parametrize(("shape", "orders"), CASES)
def test_orders_of_axes(shape: tuple[int, ...], orders: list[tuple[int, ...]]) -> None:
    def body(emit: Any, x: relax.Var) -> list[relax.Expr]:
        return [emit(relax.op.permute_dims(x, list(axes))) for axes in orders]

    x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    compiled = compile_module(module([shape], body))
    for threads in (1, 2):
        found = compiled.load(threads)(x)
        for i, axes in enumerate(orders):
            np.testing.assert_array_equal(found[f"y{i}"], x.transpose(axes), err_msg=str(axes))

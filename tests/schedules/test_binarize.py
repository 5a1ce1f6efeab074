"""Binarisation at the highest order: the same integers, and a kernel that compiles in seconds."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("tvm")

from horq_tvm.runtime.loader import load
from horq_tvm.specs import MAX_ORDER, Scale
from tests.end_to_end.drawn import Drawn, with_own_scales

SECONDS = 60  # the whole library takes a few; residuals that the compiler walks 2^K times took minutes at order 7


@pytest.mark.parametrize("scale", ["patch", "sample", "static"])
def test_the_highest_order(scale: Scale) -> None:
    layer = Drawn(
        channels=63, filters=16, order=MAX_ORDER, scale=scale, size=(2, 5, 4), kernel=(3, 2), padding=(1, 0, 1, 1)
    )
    begin = time.process_time()
    compiled = with_own_scales([layer])
    assert time.process_time() - begin < SECONDS
    x = layer.image()
    outputs = load(compiled.library)(x)
    expected = layer.expected(x, unit=False, beta=outputs.get("beta_0"))
    found = layer.in_reference_layout(outputs["y0"])
    assert (np.abs(found.astype("float64") - expected.output) <= expected.tolerance).all()

"""Which kernels may work in place: only where an element is read right where it is overwritten."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import te, tirx

import horq_tvm
from horq_tvm import targets
from horq_tvm.schedules import blocks, x86
from tests.schedules.residual import chain

SHAPE = (1, 4, 4, 32)


def scheduled(*operands: te.Tensor) -> tirx.PrimFunc:
    schedule = x86.elementwise(te.create_prim_func(list(operands)), targets.resolve("native"))
    assert schedule is not None
    (func,) = schedule.mod.functions.values()
    return func


def test_an_elementwise_operand_of_the_outputs_shape() -> None:
    a, b = te.placeholder(SHAPE, name="a"), te.placeholder((32,), name="b")
    out = te.compute(SHAPE, lambda n, y, x, c: a[n, y, x, c] + b[c])
    assert blocks.in_place(scheduled(a, b, out)) == [[0, 2]]


def test_not_one_that_is_read_elsewhere_too() -> None:
    a = te.placeholder(SHAPE, name="a")
    mirrored = te.compute(SHAPE, lambda n, y, x, c: a[n, y, x, c] + a[n, y, x, 31 - c])
    assert blocks.in_place(scheduled(a, mirrored)) == []


def test_not_one_of_another_type_or_order() -> None:
    a = te.placeholder(SHAPE, "int32", name="a")
    cast = te.compute(SHAPE, lambda n, y, x, c: a[n, y, x, c].astype("float32"))
    assert blocks.in_place(scheduled(a, cast)) == []
    b = te.placeholder(SHAPE, name="b")
    turned = te.compute(SHAPE, lambda n, y, x, c: b[n, x, y, c])
    assert blocks.in_place(scheduled(b, turned)) == []


@pytest.mark.filterwarnings("ignore:.*not trained for HORQ")
def test_a_shortcut_added_in_place_gives_what_it_gives_apart() -> None:
    """A chain of residual layers, tapped (so that nothing is shared) and not."""
    model, plan, x = chain(layers=3, channels=32, size=9)
    apart = horq_tvm.build(model, plan=plan, taps=["conv0", "conv1", "conv2"])
    together = horq_tvm.build(model, plan=plan)
    np.testing.assert_allclose(together(x)["y"], apart(x)["y"], rtol=1e-5, atol=1e-6)
    assert together.load().arena_bytes < 2 * (9 * 9 * 32 * 4)  # one activation and planes, not two activations

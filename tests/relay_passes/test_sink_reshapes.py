"""SinkReshapes: what follows a dense layer stands right behind it; dense layers in a row need no reshape between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.sink_reshapes import SinkReshapes
from horq_tvm.straightline import constant, read_main
from tests.relay_passes.program import Body, module, names, run

RNG = np.random.default_rng(0)
CHANNEL = RNG.standard_normal(4).astype("float32")
INNER, OUTER = (1, 1, 6, 4), (2, 3, 4)


def sunk(body: Body, *shapes: tuple[int, ...]) -> tvm.IRModule:
    """The module after the pass, checked to mean what it meant."""
    before = module(shapes or [INNER], body)
    after = SinkReshapes()(before)
    inputs = [RNG.standard_normal(ops.shape_of(p)).astype("float32") for p in read_main(before).params]
    for found, expected in zip(run(after, *inputs), run(before, *inputs), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
    return after


def test_golden_form() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(relax.op.reshape(x, OUTER))
        y = emit(relax.op.add(emit(relax.op.multiply(y, constant(CHANNEL.reshape(1, 1, 4)))), constant(np.float32(2))))
        return emit(relax.op.nn.relu(y))

    def expected(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(relax.op.add(emit(relax.op.multiply(x, constant(CHANNEL))), constant(np.float32([2]))))
        return emit(relax.op.reshape(emit(relax.op.nn.relu(y)), OUTER))

    tvm.ir.assert_structural_equal(sunk(body), module([INNER], expected))


def test_reshapes_between_layers_cancel() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(relax.op.nn.relu(emit(relax.op.reshape(x, OUTER))))
        return emit(relax.op.negative(emit(relax.op.reshape(y, INNER))))

    assert names(sunk(body)) == ["relax.nn.relu", "relax.negative"]


def test_a_residual_is_reshaped_to_the_layer_and_both_users_are_served() -> None:
    def body(emit: Any, x: relax.Expr, shortcut: relax.Expr) -> Any:
        y = emit(relax.op.reshape(x, OUTER))
        return emit(relax.op.add(y, shortcut)), emit(relax.op.concat([y, y], axis=1))

    after = names(sunk(body, INNER, OUTER))
    assert after == ["relax.reshape", "relax.add", "relax.reshape", "relax.concat", "relax.reshape"]


def test_a_constant_of_the_whole_shape_moves_and_prelu_keeps_its_axis_last() -> None:
    slope, place = constant(CHANNEL), constant(RNG.standard_normal(OUTER).astype("float32"))

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(relax.op.add(emit(relax.op.reshape(x, OUTER)), place))
        return emit(relax.op.nn.prelu(y, slope, axis=2))

    values = [value for _, value in read_main(SinkReshapes()(module([INNER], body))).bindings]
    assert [value.op.name for value in values] == ["relax.add", "relax.nn.prelu", "relax.reshape"]
    assert int(values[1].attrs.axis) == 3


@pytest.mark.parametrize("shape", [(2, 12), (6, 2, 2), (4, 6)])
def test_a_reshape_that_changes_the_last_axis_stays(shape: tuple[int, ...]) -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(relax.op.nn.relu(emit(relax.op.reshape(x, shape))))

    tvm.ir.assert_structural_equal(SinkReshapes()(module([INNER], body)), module([INNER], body))


def test_an_operand_that_broadcasts_over_rows_keeps_the_reshape_ahead() -> None:
    def body(emit: Any, x: relax.Expr, gate: relax.Expr) -> relax.Expr:
        return emit(relax.op.multiply(emit(relax.op.reshape(x, OUTER)), gate))

    assert names(sunk(body, INNER, (2, 1, 4))) == ["relax.reshape", "relax.multiply"]

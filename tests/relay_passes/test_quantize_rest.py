"""QuantizeRest: which layers it takes, what it makes of their weights, and that the meaning stays within the steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops, reference_int8
from horq_tvm.errors import HorqError
from horq_tvm.ops.int8 import Activation, activation_of
from horq_tvm.relay_passes.quantize_rest import QuantizeRest
from horq_tvm.straightline import array_of, constant, read_main
from tests.relay_passes.program import Array, module, names

WEIGHT = np.random.default_rng(0).standard_normal((6, 3, 3, 4)).astype("float32")
HEAD = np.random.default_rng(1).standard_normal((5, 6)).astype("float32")


def network() -> tvm.IRModule:
    def body(emit: Any, x: relax.Var) -> relax.Expr:
        y = emit(ops.conv2d(x, constant(WEIGHT), name="stem", strides=(2, 1), padding=(1, 0, 1, 2)))
        return emit(ops.dense(emit(relax.op.nn.relu(y)), constant(HEAD), name="head"))

    return module([(1, 5, 6, 4)], body)


def quantised(activations: dict[str, Activation]) -> tvm.IRModule:
    return tvm.transform.Sequential([QuantizeRest(activations)])(network())


def test_the_layers_that_have_a_range_and_no_other() -> None:
    assert names(quantised({})) == ["horq.conv2d", "relax.nn.relu", "horq.dense"]
    assert names(quantised({"head": Activation(0.1, 3)})) == ["horq.conv2d", "relax.nn.relu", "horq.int8_dense"]


def test_weights_factors_and_geometry() -> None:
    mod = quantised({"stem": Activation(0.1, 3), "head": Activation(0.5, 0)})
    (_, stem), _, (_, head) = read_main(mod).bindings
    for layer, weight, activation in ((stem, WEIGHT, Activation(0.1, 3)), (head, HEAD, Activation(0.5, 0))):
        integers, scale = reference_int8.quantize_weights(weight)
        assert activation_of(layer.attrs) == activation
        assert_equal(array_of(layer.args[1]), integers)
        assert_equal(
            array_of(layer.args[2]), (np.float32(activation.scale).astype("float64") * scale).astype("float32")
        )
    assert ops.Geometry.of(stem.attrs) == ops.Geometry((3, 3), (2, 1), (1, 0, 1, 2))
    assert ops.shape_of(stem) == (1, 3, 6, 6)
    assert ops.shape_of(head) == (1, 3, 6, 5)


def test_an_unknown_layer_is_named_beside_those_there_are() -> None:
    with pytest.raises(HorqError, match=r"no float layer stern in the module; there are stem, head"):
        quantised({"stern": Activation(1.0, 0)})


def test_weights_that_are_computed_are_an_error() -> None:
    def body(emit: Any, x: relax.Var, w: relax.Var) -> relax.Expr:
        return emit(ops.dense(x, w, name="head"))

    with pytest.raises(HorqError, match="layer head: weights have to be constant"):
        tvm.transform.Sequential([QuantizeRest({"head": Activation(1.0, 0)})])(module([(2, 6), (5, 6)], body))


def assert_equal(found: Array | None, expected: Array) -> None:
    assert found is not None
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)

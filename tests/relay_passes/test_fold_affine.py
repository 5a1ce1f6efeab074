"""FoldAffine: where the constants go, that they keep their meaning, and what ends a chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.fold_affine import FoldAffine
from horq_tvm.straightline import array_of, constant, read_main
from tests.relay_passes.program import Array, Body, module, names, run

RNG = np.random.default_rng(0)
X = (2, 4, 4, 8)
A, B, C = (RNG.uniform(0.5, 2, 8).astype("float32") for _ in range(3))
WEIGHT = RNG.standard_normal((8, 3, 3, 8)).astype("float32")
ALPHA = RNG.uniform(0.5, 2, 8)
GEOMETRY = ops.Geometry((3, 3), padding=(1, 1, 1, 1))


def bitserial(emit: Any, x: relax.Expr, alpha: Array = ALPHA, bias: Array | float = 0.0) -> relax.Expr:
    how: dict[str, Any] = {"order": 2, "scale": "static", "geometry": GEOMETRY}
    beta = constant(np.float32([[0.7, 0.3]]))
    signs = constant(np.where(WEIGHT >= 0, 1, -1).astype("int8"))
    constants = [signs, constant(alpha), constant(np.broadcast_to(np.float64(bias), alpha.shape))]
    return emit(ops.bitserial(emit(ops.binarize(x, beta, **how)), *constants, beta, name="a", **how))


def conv(emit: Any, x: relax.Expr, weight: Array = WEIGHT) -> relax.Expr:
    return emit(ops.conv2d(x, constant(weight), name="a", padding=(1, 1, 1, 1)))


def affine(emit: Any, x: relax.Expr) -> relax.Expr:
    """((x·A + B) − 3) / C, the constants in the shapes that front ends leave."""
    y = emit(relax.op.multiply(constant(A.reshape(1, 1, 1, 8)), x))
    y = emit(relax.op.add(y, constant(B)))
    y = emit(relax.op.subtract(y, constant(np.float32(3))))
    return emit(relax.op.divide(y, constant(C.reshape(1, 8))))


FACTOR = A / C.astype("float64")
SHIFT = (B.astype("float64") - 3) / C


def folded(body: Body, shape: tuple[int, ...] = X) -> tvm.IRModule:
    """The module after the pass, checked to mean what it meant."""
    before = module([shape], body)
    after = FoldAffine()(before)
    x = RNG.standard_normal(shape).astype("float32")
    for found, expected in zip(run(after, x), run(before, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return after


def constants_of(mod: tvm.IRModule, op: str) -> list[Array]:
    value = next(value for _, value in read_main(mod).bindings if value.op.name == op)
    return [array for arg in value.args if (array := array_of(arg)) is not None]


def test_behind_a_bitserial_layer_all_goes_into_alpha_and_bias_in_float64() -> None:
    after = folded(lambda emit, x: affine(emit, bitserial(emit, x, bias=2.0)))
    assert names(after) == ["horq.binarize", "horq.bitserial_conv2d"]
    _, alpha, bias, _ = constants_of(after, "horq.bitserial_conv2d")
    assert alpha.dtype == bias.dtype == np.float64
    np.testing.assert_allclose(alpha, ALPHA * FACTOR, rtol=1e-15)
    np.testing.assert_allclose(bias, 2.0 * FACTOR + SHIFT, rtol=1e-14)


def test_golden_form_of_a_folded_multiply() -> None:
    before = module([X], lambda emit, x: emit(relax.op.multiply(bitserial(emit, x), constant(A))))
    tvm.ir.assert_structural_equal(FoldAffine()(before), module([X], lambda emit, x: bitserial(emit, x, ALPHA * A)))


def test_behind_a_float_layer_the_factor_goes_into_the_weights_rounded_once() -> None:
    after = folded(lambda emit, x: affine(emit, conv(emit, x)))
    assert names(after) == ["horq.conv2d", "relax.add"]
    (weight,), (shift,) = constants_of(after, "horq.conv2d"), constants_of(after, "relax.add")
    np.testing.assert_allclose(weight, WEIGHT * FACTOR.reshape(-1, 1, 1, 1), rtol=1e-7)
    np.testing.assert_allclose(shift, SHIFT, rtol=1e-6)


def test_dense_takes_scalars_and_channels_alike() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(ops.dense(x, constant(WEIGHT[:, 0, 0]), name="d"))
        return emit(relax.op.negative(emit(relax.op.multiply(y, constant(np.float32([[0.5]]))))))

    after = folded(body, (2, 3, 8))
    assert names(after) == ["horq.dense"]
    np.testing.assert_array_equal(constants_of(after, "horq.dense")[0], -0.5 * WEIGHT[:, 0, 0])


@pytest.mark.parametrize("layer", [bitserial, conv])
def test_a_constant_minus_the_layer(layer: Any) -> None:
    after = folded(lambda emit, x: emit(relax.op.subtract(constant(B), layer(emit, x))))
    assert "relax.subtract" not in names(after)


def test_a_chain_without_a_layer_becomes_one_multiply_and_one_add() -> None:
    after = folded(affine)
    assert names(after) == ["relax.multiply", "relax.add"]
    np.testing.assert_array_equal(constants_of(after, "relax.multiply")[0], FACTOR.astype("float32"))
    undone = folded(lambda emit, x: emit(relax.op.negative(emit(relax.op.negative(x)))))
    assert names(undone) == []


def test_a_value_that_is_read_elsewhere_ends_the_chain() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = emit(relax.op.add(bitserial(emit, x), constant(B)))
        z = emit(relax.op.multiply(y, constant(A)))
        return emit(relax.op.add(emit(relax.op.nn.relu(z)), y))

    assert names(folded(body)) == [
        "horq.binarize",
        "horq.bitserial_conv2d",
        "relax.multiply",
        "relax.nn.relu",
        "relax.add",
    ]


def test_a_tapped_layer_keeps_its_alpha() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = bitserial(emit, x)
        return affine(emit, y), y

    after = folded(body)
    assert names(after) == ["horq.binarize", "horq.bitserial_conv2d", "relax.multiply", "relax.add"]
    np.testing.assert_array_equal(constants_of(after, "horq.bitserial_conv2d")[1], ALPHA)


@pytest.mark.parametrize(
    "body",
    [
        lambda emit, x: emit(relax.op.multiply(emit(relax.op.nn.relu(conv(emit, x))), constant(A))),
        lambda emit, x: emit(relax.op.add(conv(emit, x), x)),
        lambda emit, x: emit(relax.op.add(conv(emit, x), constant(np.ones((1, 4, 1, 1), "float32")))),
        lambda emit, x: emit(relax.op.divide(constant(A), x)),
        lambda emit, x: emit(relax.op.divide(x, constant(A))),
        lambda emit, x: emit(relax.op.add(emit(relax.op.reshape(x, (2, 4, 4, 8, 1))), constant(A))),
    ],
    ids=["relu between", "residual", "constant along H", "reciprocal", "a single one", "constant that broadcasts x"],
)
def test_does_not_match(body: Body) -> None:
    before = module([X], body)
    tvm.ir.assert_structural_equal(FoldAffine()(before), before)

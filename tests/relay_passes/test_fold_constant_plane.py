"""FoldConstantPlane: which inputs are proven non-negative, and what happens to the first plane then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.fold_constant_plane import FoldConstantPlane, non_negative_vars, relu_fed_layers
from horq_tvm.relay_passes.rewrite_layers import RewriteLayers
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant, op_name, read_main
from tests.relay_passes.program import Body, module, run

X = (2, 5, 4, 8)
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 3, 3, 8)).astype("float32")
OP = relax.op
ONE, MINUS = constant(np.float32(1)), constant(np.float32(-1))


def layer(emit: Any, x: relax.Expr, name: str = "a") -> relax.Expr:
    return emit(ops.conv2d(x, constant(WEIGHT), name=name, padding=(1, 0, 1, 2)))


def rewritten(scale: Any = "sample", order: int = 2, taps: tuple[str, ...] = (), relu: bool = True) -> tvm.IRModule:
    betas = (0.9, 0.4, 0.1)[:order] if scale == "static" else None
    mod = module([X], lambda emit, x: layer(emit, emit(OP.nn.relu(x)) if relu else x))
    return RewriteLayers({"a": LayerConfig(order, scale, betas)}, taps)(mod)


def first_of(mod: tvm.IRModule) -> dict[str, int]:
    values = [value for _, value in read_main(mod).bindings]
    return {op_name(value): int(value.attrs["first"]) for value in values if op_name(value) in FOLDED_OPS}


FOLDED_OPS = ("horq.binarize", "horq.bitserial_conv2d")


@pytest.mark.parametrize("scale", ["patch", "sample", "static"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_first_plane_is_left_out_and_the_output_stays(scale: Any, order: int) -> None:
    before = rewritten(scale, order)
    after = FoldConstantPlane()(before)
    assert first_of(after) == dict.fromkeys(FOLDED_OPS, 1)
    x = RNG.standard_normal(X).astype("float32")
    np.testing.assert_array_equal(run(after, x), run(before, x))


def test_golden_form() -> None:
    def body(first: int) -> Body:
        def emit_all(emit: Any, x: relax.Expr) -> relax.Expr:
            how: dict[str, Any] = {"order": 2, "scale": "static", "geometry": ops.Geometry((1, 1)), "first": first}
            beta = constant(np.float32([[0.5, 0.25]]))
            planes = emit(ops.binarize(emit(OP.nn.relu(x)), beta, **how))
            constants = [constant(np.ones((4, 1, 1, 8), "int8")), constant(np.ones(4)), constant(np.zeros(4))]
            a = emit(ops.bitserial(planes, *constants, beta, name="a", **how))
            return a, emit(ops.bitserial(planes, *constants, beta, name="b", dense=True, **how))

        return emit_all

    tvm.ir.assert_structural_equal(FoldConstantPlane()(module([X], body(0))), module([X], body(1)))
    tvm.ir.assert_structural_equal(FoldConstantPlane()(module([X], body(1))), module([X], body(1)))


@pytest.mark.parametrize(
    "mod",
    [rewritten(relu=False), rewritten(order=1), rewritten(taps=("a",))],
    ids=["signed input", "order 1", "planes are tapped"],
)
def test_does_not_match(mod: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(FoldConstantPlane()(mod), mod)


def relu(emit: Any, x: relax.Expr) -> relax.Expr:
    return emit(OP.nn.relu(x))


PROVEN: dict[str, Body] = {
    "clip from 0": lambda emit, x: emit(OP.clip(x, 0, 6)),
    "maximum with a constant": lambda emit, x: emit(OP.maximum(x, ONE)),
    "sigmoid": lambda emit, x: emit(OP.sigmoid(x)),
    "square": lambda emit, x: emit(OP.multiply(x, x)),
    "pool": lambda emit, x: emit(OP.nn.max_pool2d(relu(emit, x), (2, 2), layout="NHWC")),
    "zero padding": lambda emit, x: emit(OP.nn.pad(relu(emit, x), [0, 0, 1, 1, 1, 1, 0, 0], "constant", 0.0)),
    "concat": lambda emit, x: emit(OP.concat([relu(emit, x), emit(OP.abs(x))], axis=3)),
    "affine": lambda emit, x: emit(OP.add(emit(OP.multiply(relu(emit, x), ONE)), ONE)),
    "residual": lambda emit, x: emit(OP.add(relu(emit, x), emit(OP.abs(x)))),
    "reshape": lambda emit, x: emit(OP.reshape(relu(emit, x), (2, -1))),
    "slice": lambda emit, x: emit(OP.strided_slice(relu(emit, x), [1], [0], [2])),
    "part of a split": lambda emit, x: emit(relax.TupleGetItem(emit(OP.split(relu(emit, x), 2, axis=3)), 1)),
    "divide": lambda emit, x: emit(OP.divide(relu(emit, x), ONE)),
}
UNPROVEN: dict[str, Body] = {
    "input": lambda emit, x: emit(OP.reshape(x, (2, -1))),
    "clip from −1": lambda emit, x: emit(OP.clip(x, -1, 6)),
    "clip to −1": lambda emit, x: emit(OP.clip(relu(emit, x), -6, -1)),
    "maximum with a negative": lambda emit, x: emit(OP.maximum(x, MINUS)),
    "negative padding": lambda emit, x: emit(OP.nn.pad(relu(emit, x), [0, 0, 1, 1, 1, 1, 0, 0], "constant", -1.0)),
    "one of a concat": lambda emit, x: emit(OP.concat([relu(emit, x), x], axis=3)),
    "negative factor": lambda emit, x: emit(OP.multiply(relu(emit, x), MINUS)),
    "negative shift": lambda emit, x: emit(OP.add(relu(emit, x), MINUS)),
    "difference": lambda emit, x: emit(OP.subtract(relu(emit, x), emit(OP.abs(x)))),
    "product": lambda emit, x: emit(OP.multiply(relu(emit, x), x)),
    "tanh": lambda emit, x: emit(OP.tanh(x)),
    "division by zero": lambda emit, x: emit(OP.divide(relu(emit, x), constant(np.float32(0)))),
    "layer": lambda emit, x: layer(emit, relu(emit, x)),
}


@pytest.mark.parametrize("body", PROVEN.values(), ids=PROVEN.keys())
def test_range_analysis_proves(body: Body) -> None:
    program = read_main(module([X], body))
    assert program.result in non_negative_vars(program)


@pytest.mark.parametrize("body", UNPROVEN.values(), ids=UNPROVEN.keys())
def test_range_analysis_does_not_prove(body: Body) -> None:
    program = read_main(module([X], body))
    assert program.result not in non_negative_vars(program)


def test_layers_of_order_1_behind_a_relu_are_named() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        return layer(emit, relu(emit, x), "dead"), layer(emit, x, "signed"), layer(emit, emit(OP.abs(x)), "deep")

    configs = {"dead": LayerConfig(1, "sample"), "signed": LayerConfig(1, "sample"), "deep": LayerConfig(2, "sample")}
    assert relu_fed_layers(FoldConstantPlane()(RewriteLayers(configs)(module([X], body)))) == ("dead",)

"""FuseEpilogue: what becomes one kernel and what does not, in the form that FuseTIR takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.fuse_epilogue import FuseEpilogue
from horq_tvm.relay_passes.pack_weights import PackWeights
from horq_tvm.schedules.legalize import LEGALIZE
from horq_tvm.straightline import constant, read_main
from tests.relay_passes.program import Body, module, names, run

C = 32  # a whole word: planes are fused only where a tile of channels holds words
X = (1, 4, 4, C)
RNG = np.random.default_rng(0)
WEIGHT = RNG.choice(np.array([-1, 1], "int8"), (C, 3, 3, C))
FLOAT_WEIGHT = RNG.standard_normal((C, 1, 1, C)).astype("float32")
CHANNEL = RNG.standard_normal(C).astype("float32")
BETA = np.float32([[0.7, 0.3]])
GEOMETRY = ops.Geometry((3, 3), padding=(1, 1, 1, 1))


def binarize(emit: Any, x: relax.Expr, scale: str = "static") -> relax.Expr:
    how: dict[str, Any] = {"order": 2, "scale": scale, "geometry": ops.Geometry((1, 1))}
    beta = constant(BETA) if scale == "static" else emit(ops.scales(x, **how))
    return emit(ops.binarize(x, beta, **how))


def bitserial(emit: Any, planes: relax.Expr, name: str) -> relax.Expr:
    constants = [constant(WEIGHT), constant(np.full(C, 0.25)), constant(np.zeros(C)), constant(BETA)]
    return emit(ops.bitserial(planes, *constants, name=name, order=2, scale="static", geometry=GEOMETRY))


def affine(emit: Any, x: relax.Expr) -> relax.Expr:
    return emit(relax.op.add(emit(relax.op.multiply(x, constant(CHANNEL))), constant(CHANNEL)))


def packed(body: Body, *shapes: tuple[int, ...]) -> tvm.IRModule:
    return PackWeights(lambda _filters, _groups: 4)(module(shapes or [X], body))


def fused(mod: tvm.IRModule) -> tvm.IRModule:
    """The module after the pass, checked to mean what it meant."""
    after = FuseEpilogue()(mod)
    inputs = [RNG.standard_normal(ops.shape_of(p)).astype("float32") for p in read_main(mod).params]
    for found, expected in zip(run(after, *inputs), run(mod, *inputs), strict=True):
        np.testing.assert_array_equal(found, expected)
    return after


def inside(mod: tvm.IRModule, name: str) -> list[str]:
    """The operators of a fused function."""
    return [
        binding.value.op.name for binding in mod[name].body.blocks[0].bindings if isinstance(binding.value, relax.Call)
    ]


def test_golden_form_of_a_layer_with_its_epilogue() -> None:
    def body(emit: Any, x: relax.Expr, y: relax.Expr) -> relax.Expr:
        layer = emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="c"))
        return emit(relax.op.nn.relu(emit(relax.op.add(emit(relax.op.add(layer, constant(CHANNEL))), y))))

    before = packed(body, X, X)
    weight = read_main(before).bindings[0][1].args[1]
    builder = relax.BlockBuilder()
    tensor = relax.TensorType(X, "float32")
    params = [relax.Var("p0", tensor), relax.Var("p1", weight.ty)]
    params += [relax.Var("p2", relax.TensorType([C], "float32")), relax.Var("p3", tensor)]
    attrs = {"Primitive": True, "horq.layer": "c"}
    with builder.function("fused_packed_conv2d_0", params, attrs=attrs, private=True):
        with builder.dataflow():
            layer = builder.emit(
                ops.packed_conv2d(params[0], params[1], name="c", geometry=ops.Geometry((1, 1)), channels=C)
            )
            sums = builder.emit(relax.op.add(builder.emit(relax.op.add(layer, params[2])), params[3]))
            output = builder.emit_output(relax.op.nn.relu(sums))
        builder.emit_func_output(output)
    main = [relax.Var("x0", tensor), relax.Var("x1", tensor)]
    callee = builder.get().get_global_var("fused_packed_conv2d_0")
    with builder.function("main", main):
        with builder.dataflow():
            called = builder.emit(relax.Call(callee, [main[0], weight, constant(CHANNEL), main[1]]))
            output = builder.emit_output(called)
        builder.emit_func_output(output)
    tvm.ir.assert_structural_equal(FuseEpilogue()(before), builder.get())


def test_the_next_binarisation_joins_and_the_float_value_is_not_stored() -> None:
    after = fused(
        packed(
            lambda emit, x: bitserial(emit, binarize(emit, affine(emit, bitserial(emit, binarize(emit, x), "a"))), "b")
        )
    )
    chain = ["horq.packed_bitserial", "relax.multiply", "relax.add", "horq.binarize"]
    assert inside(after, "fused_packed_bitserial_0") == chain
    kinds = [
        "horq.binarize",
        "horq.pad_planes",
        "fused_packed_bitserial_0",
        "horq.pad_planes",
        "fused_packed_bitserial_1",
    ]
    assert names(after) == kinds
    assert after["fused_packed_bitserial_0"].attrs["horq.layer"] == "a"


def test_a_shortcut_needs_the_float_value_beside_the_planes() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = affine(emit, bitserial(emit, binarize(emit, x), "a"))
        shifted = emit(relax.op.add(y, constant(CHANNEL)))  # RSign
        return emit(relax.op.add(bitserial(emit, binarize(emit, shifted), "b"), y))

    after = fused(packed(body))
    assert inside(after, "fused_packed_bitserial_0")[-2:] == ["relax.add", "horq.binarize"]
    assert len(after["fused_packed_bitserial_0"].ret_ty.fields) == 2
    assert inside(after, "fused_packed_bitserial_1") == ["horq.packed_bitserial", "relax.add"]


def test_a_value_that_forks_and_joins_stays_in_one_kernel() -> None:
    def prelu(emit: Any, x: relax.Expr) -> relax.Expr:
        y = bitserial(emit, binarize(emit, x), "a")
        negative = emit(relax.op.nn.relu(emit(relax.op.negative(y))))
        return emit(relax.op.subtract(emit(relax.op.nn.relu(y)), emit(relax.op.multiply(negative, constant(CHANNEL)))))

    assert names(fused(packed(prelu)))[-1] == "fused_packed_bitserial_0"


def test_a_tapped_output_ends_the_chain_but_not_the_way_to_the_planes() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = bitserial(emit, binarize(emit, x), "a")
        return bitserial(emit, binarize(emit, affine(emit, y)), "b"), y

    after = fused(packed(body))
    assert inside(after, "fused_packed_bitserial_0") == [
        "horq.packed_bitserial", "relax.multiply", "relax.add", "horq.binarize"
    ]  # fmt: skip
    assert len(after["fused_packed_bitserial_0"].ret_ty.fields) == 2


def test_scales_computed_at_run_time_keep_the_binarisation_apart() -> None:
    after = fused(
        packed(lambda emit, x: binarize(emit, affine(emit, bitserial(emit, binarize(emit, x), "a")), "sample"))
    )
    assert names(after)[-3:] == ["fused_packed_bitserial_0", "horq.scales", "horq.binarize"]


def test_an_operand_computed_from_the_group_stays_outside() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="a"))
        gate = emit(relax.op.concat([y], axis=3))  # not elementwise
        return emit(relax.op.multiply(y, gate))

    assert names(fused(packed(body))) == ["fused_packed_conv2d_0", "relax.concat", "relax.multiply"]


def test_two_groups_that_would_wait_for_each_other_are_kept_apart() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        a = emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="a"))
        b = emit(ops.conv2d(x, constant(-FLOAT_WEIGHT), name="b"))
        a_b = emit(relax.op.add(a, b))
        b_a = emit(relax.op.subtract(b, a))
        return binarize(emit, a_b), binarize(emit, b_a)

    after = fused(packed(body))
    assert inside(after, "fused_packed_conv2d_1")[:2] == ["horq.packed_conv2d", "relax.add"]
    assert names(after)[-1] == "fused_subtract_2"


def test_consumers_between_the_members_of_a_group_move_behind_it() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="a"))
        other = emit(relax.op.concat([y, y], axis=3))
        return other, binarize(emit, emit(relax.op.add(y, constant(CHANNEL))))

    assert names(fused(packed(body))) == ["fused_packed_conv2d_0", "relax.concat"]


def test_elementwise_operators_without_an_anchor_are_grouped_and_single_ones_left() -> None:
    after = fused(packed(lambda emit, x: binarize(emit, affine(emit, x))))
    assert names(after) == ["fused_multiply_0"]
    alone = packed(lambda emit, x: emit(relax.op.nn.relu(emit(relax.op.concat([x, x], axis=3)))))
    tvm.ir.assert_structural_equal(FuseEpilogue()(alone), alone)


@pytest.mark.parametrize("shape", [(1, 1, 1, C), (1, 4, 4, 1)])
def test_tensors_of_another_shape_do_not_join(shape: tuple[int, ...]) -> None:
    def body(emit: Any, x: relax.Expr, gate: relax.Expr) -> relax.Expr:
        return emit(relax.op.multiply(emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="a")), gate))

    assert names(fused(packed(body, X, shape))) == ["fused_packed_conv2d_0", "relax.multiply"]


def test_fuse_tir_takes_one_and_two_results() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = affine(emit, emit(ops.conv2d(x, constant(FLOAT_WEIGHT), name="c")))
        return binarize(emit, emit(relax.op.clip(y, 0, 6))), y, emit(relax.op.nn.relu(affine(emit, x)))

    after = FuseEpilogue()(packed(body))
    assert names(after) == ["fused_packed_conv2d_0", "fused_multiply_1"]
    lowered = relax.transform.FuseTIR()(relax.transform.LegalizeOps(dict(LEGALIZE))(after))
    lowered = relax.transform.DeadCodeElimination()(lowered)
    functions = {gvar.name_hint: func for gvar, func in lowered.functions.items()}
    assert sorted(functions) == ["fused_multiply_1", "fused_packed_conv2d_0", "main"]
    assert isinstance(functions["fused_packed_conv2d_0"], tvm.tirx.PrimFunc)
    assert len(functions["fused_packed_conv2d_0"].params) == 7  # x, weight, two constants, β, and two results


def test_pooling_packs_nothing() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return binarize(emit, emit(relax.op.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC")))

    assert names(FuseEpilogue()(module([X], body)))[-1] == "horq.binarize"


@pytest.mark.parametrize("channels", [8, 40])
def test_planes_of_broken_words_are_a_kernel_of_their_own(channels: int) -> None:
    weight = RNG.standard_normal((channels, 1, 1, channels)).astype("float32")

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        layer = emit(ops.conv2d(x, constant(weight), name="c"))
        return binarize(emit, emit(relax.op.nn.relu(layer)))

    after = fused(packed(body, (1, 4, 4, channels)))
    assert inside(after, "fused_packed_conv2d_0") == ["horq.packed_conv2d", "relax.nn.relu"]
    assert names(after)[-1] == "horq.binarize"

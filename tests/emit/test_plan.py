"""From Relax to a call plan: aliases, tuples, constants, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, te, topi

from horq_tvm.emit.plan import CallPlan, item_bytes, lower, make_plan
from horq_tvm.errors import HorqError
from tests.emit.models import Body, module, spec


def plan_of(body: Body, *inputs: object, **options: object) -> CallPlan:
    return make_plan(lower(module(body, *inputs)), **options)


def test_reshapes_and_tuples_are_views_not_steps() -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        flat = builder.emit(relax.op.reshape(x, (6,)))
        y = builder.emit_te(topi.nn.relu, flat)
        pair = builder.emit(relax.Tuple([y, flat]))
        first = builder.emit(relax.TupleGetItem(pair, 0))
        return [builder.emit(relax.op.reshape(first, (3, 2))), first]

    plan = plan_of(body, spec("x", 2, 3))
    assert [step.kernel for step in plan.steps] == ["relu"]
    assert [buffer.kind for buffer in plan.buffers] == ["input", "temporary"]
    assert [plan.views[view].shape for view in plan.steps[0].args] == [(6,), (6,)]
    assert [(plan.views[view].shape, plan.views[view].buffer) for view in plan.outputs] == [((3, 2), 1), ((6,), 1)]


def test_equal_constants_are_one_buffer_whatever_their_shape() -> None:
    values = np.arange(6, dtype="float32")

    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        y = builder.emit_te(topi.add, x, relax.const(values))
        z = builder.emit_te(topi.multiply, y, relax.const(values.copy()))
        return [z, relax.const(values.reshape(2, 3)), relax.const(values + 1)]

    plan = plan_of(body, spec("x", 6))
    constants = [buffer.data for buffer in plan.buffers if buffer.kind == "constant"]
    assert sorted(constants) == sorted([values.tobytes(), (values + 1).tobytes()])


def test_a_kernel_of_two_outputs_is_one_step() -> None:
    def both(x: te.Tensor) -> list[te.Tensor]:
        return list(te.compute(x.shape, lambda i: (x[i] + 1.0, x[i] * 2.0), name="both"))

    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        pair = builder.emit_te(both, x)
        return [builder.emit(relax.TupleGetItem(pair, 1)), builder.emit(relax.TupleGetItem(pair, 0))]

    plan = plan_of(body, spec("x", 5), step_names={"both": "layer1.conv"})
    (step,) = plan.steps
    assert step.name == "layer1.conv"
    assert step.args == (0, *reversed(plan.outputs))


def test_a_call_is_shown_by_its_kernel_or_by_what_stands_for_that() -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        return [builder.emit_te(topi.nn.relu, builder.emit_te(topi.tanh, x))]

    plan = plan_of(body, spec("x", 5), step_names={"relu": "layer1.relu"})
    assert [step.name for step in plan.steps] == ["tanh", "layer1.relu"]


def test_an_operator_that_was_not_lowered_is_named() -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        return [builder.emit(relax.op.nn.softmax(x))]

    with pytest.raises(HorqError, match=r"relax\.nn\.softmax"):
        plan_of(body, spec("x", 4))


def test_an_open_shape_is_refused() -> None:
    mod = module(lambda builder, x: [x], spec("x", 4))
    n = relax.Var("x", relax.TensorType(ndim=1, dtype="float32"))
    mod["main"] = relax.Function([n], relax.SeqExpr([], n), relax.TensorType(ndim=1, dtype="float32"))
    with pytest.raises(HorqError, match="input x"):
        make_plan(mod)


def test_sizes_of_elements() -> None:
    assert [item_bytes(dtype) for dtype in ("bool", "int8", "float16", "uint32", "int64")] == [1, 1, 2, 4, 8]
    with pytest.raises(HorqError, match="int4"):
        item_bytes("int4")

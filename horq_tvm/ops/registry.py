"""Registration of Relax operators from Python, once per process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op

InferType = Callable[[relax.Call], "relax.TensorType | relax.TupleType"]


def register(name: str, num_inputs: int, infer: InferType) -> Op:
    """Registers the pure operator `name` with `num_inputs` operands; `infer(call)` gives the type of its result.

    A second registration of a name is an error in TVM's registry: a reload of our module takes the operator it finds.
    """
    if name in Op.list_op_names():
        return Op.get(name)
    tvm.ir.op._ffi_api.RegisterOp(name, "")
    op = Op.get(name)
    op.set_num_inputs(num_inputs)
    op.set_attr("FPurity", True)
    op.set_attr("FInferType", lambda call, _builder: infer(call))
    return op


def call(op: Op, operands: Sequence[relax.Expr], **attrs: Any) -> relax.Call:
    """A call of one of our operators. DictAttrs checks no names, so only the constructor beside each op calls this."""
    return relax.Call(op, list(operands), attrs=tvm.ir.make_node("ir.DictAttrs", **attrs))


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The static shape of a tensor expression, as Python ints."""
    return tuple(int(extent) for extent in expr.ty.shape)


def tensor(shape: Sequence[int], dtype: str) -> relax.TensorType:
    """The type of a tensor of static shape."""
    return relax.TensorType(list(shape), dtype)

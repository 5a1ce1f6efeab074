"""The call plan: what `main` does, without Relax. Kernels called in order, on views of buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, GlobalVar, Op

from horq_tvm.errors import HorqError

IN_PLACE = "horq.in_place"


@dataclass(frozen=True)
class Buffer:
    """Memory of `nbytes`: the model's input number `index`, a constant's `data`, or a temporary."""

    kind: Literal["input", "constant", "temporary"]
    nbytes: int
    index: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class View:
    """A tensor: a whole buffer seen as dense, row-major `shape` of `dtype`. A reshape is another view of one buffer."""

    buffer: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Step:
    """One kernel call: the name of its PrimFunc in the module, and the views that are its arguments, outputs last.

    `in_place` lists pairs of arguments (input, output) that may be the same memory: the kernel reads each element of
    the one just before it writes that element of the other, and never again.
    """

    kernel: str
    name: str
    args: tuple[int, ...]
    in_place: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CallPlan:
    """Steps over `views` of `buffers`. `outputs` are views, any of them, in the order of the model's results."""

    buffers: tuple[Buffer, ...]
    views: tuple[View, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def buffer_of(self, view: int) -> Buffer:
        """The buffer that a view looks at."""
        return self.buffers[self.views[view].buffer]


def item_bytes(dtype: str) -> int:
    """Bytes of one element. HorqError for a type that does not fill whole bytes."""
    parsed = tvm.DataType(dtype)
    bits = 8 if dtype == "bool" else int(parsed.bits) * int(parsed.lanes)
    if bits % 8:
        raise HorqError(f"a tensor of {dtype} in main; a library holds types of whole bytes")
    return bits // 8


def lower(mod: tvm.IRModule) -> tvm.IRModule:
    """The last Relax lowering: `call_tir` becomes an allocation and a call in destination-passing style."""
    passes = [
        relax.transform.DeadCodeElimination(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
    ]
    return tvm.ir.transform.Sequential(passes)(mod)


def make_plan(lowered: tvm.IRModule, step_names: Mapping[str, str] | None = None) -> CallPlan:
    """Reads the straight line that `lower` leaves in `main`.

    `step_names` maps the name of a kernel to what the profile shows for its calls, if not that name. HorqError names
    whatever is not a call, an alias or a constant.
    """
    main = lowered["main"]
    builder = _Builder(step_names or {}, _in_place(lowered))
    for index, param in enumerate(main.params):
        builder.add_param(index, param)
    result: relax.Expr = main.body
    if isinstance(main.body, relax.SeqExpr):
        for block in main.body.blocks:
            for binding in block.bindings:
                builder.bind(binding)
        result = main.body.body
    return builder.finish(result)


def _in_place(mod: tvm.IRModule) -> dict[str, tuple[tuple[int, int], ...]]:
    """The attribute "horq.in_place" of each kernel that has one, see `Step`."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for gvar, function in mod.functions.items():
        if IN_PLACE in (function.attrs or {}):
            found[gvar.name_hint] = tuple((int(i), int(o)) for i, o in function.attrs[IN_PLACE])
    return found


Value = int | tuple["Value", ...] | None
"""What a variable holds: a view, a tuple, or nothing (a call in destination-passing style)."""


class _Builder:
    def __init__(self, step_names: Mapping[str, str], in_place: Mapping[str, tuple[tuple[int, int], ...]]) -> None:
        self._step_names = step_names
        self._in_place = in_place
        self._buffers: list[Buffer] = []
        self._views: list[View] = []
        self._view_ids: dict[View, int] = {}
        self._constants: dict[bytes, int] = {}
        self._steps: list[Step] = []
        self._values: dict[relax.Var, Value] = {}

    def add_param(self, index: int, param: relax.Var) -> None:
        shape, dtype = _static_tensor(param.ty, f"input {param.name}")
        buffer = self._add_buffer(Buffer("input", math.prod(shape) * item_bytes(dtype), index=index))
        self._values[param] = self._view(View(buffer, shape, dtype))

    def bind(self, binding: relax.Binding) -> None:
        name = binding.var.name
        if not isinstance(binding, relax.VarBinding):
            raise HorqError(f"main matches the shape of {name}; only static shapes are compiled")
        self._values[binding.var] = self._evaluate(binding.value, name)

    def finish(self, result: relax.Expr) -> CallPlan:
        value = self._evaluate(result, "the result")
        fields = value if isinstance(value, tuple) else (value,)
        outputs = tuple(_leaves(value))
        if len(outputs) != len(fields) or None in fields:
            raise HorqError("main returns nested tuples; a model's outputs are tensors")
        return CallPlan(tuple(self._buffers), tuple(self._views), tuple(self._steps), outputs)

    def _evaluate(self, expr: relax.Expr, name: str) -> Value:
        if isinstance(expr, relax.Var):
            return self._values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._evaluate(field, name) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            source = self._evaluate(expr.tuple_value, name)
            assert isinstance(source, tuple)
            return source[expr.index]
        if isinstance(expr, GenericConst) and isinstance(expr.value, tvm.runtime.Tensor):
            return self._add_constant(expr)
        if isinstance(expr, relax.Call):
            return self._call(expr, name)
        raise HorqError(f"main binds {name} to a {type(expr).__name__}, which is neither a call nor an alias")

    def _call(self, call: relax.Call, name: str) -> Value:
        if isinstance(call.op, GlobalVar):
            return self._add_step(call, name)
        op = call.op.name if isinstance(call.op, Op) else type(call.op).__name__
        if op == "relax.builtin.alloc_tensor":
            return self._allocate(call, name)
        if op == "relax.reshape":
            source = self._evaluate(call.args[0], name)
            assert isinstance(source, int)
            shape, dtype = _static_tensor(call.ty, name)
            return self._view(View(self._views[source].buffer, shape, dtype))
        raise HorqError(f"main still calls the operator {op} (bound to {name}); it has not been lowered to a kernel")

    def _add_step(self, call: relax.Call, name: str) -> Value:
        kernel = call.op.name_hint
        args: list[int] = []
        for argument in call.args:
            value = self._evaluate(argument, name)
            if not isinstance(value, int):
                raise HorqError(f"kernel {kernel} takes an argument that is no tensor")
            args.append(value)
        shown = self._step_names.get(kernel, kernel)
        self._steps.append(Step(kernel, shown, tuple(args), self._in_place.get(kernel, ())))
        return None

    def _allocate(self, call: relax.Call, name: str) -> int:
        shape, dtype = _static_tensor(call.ty, name)
        buffer = self._add_buffer(Buffer("temporary", math.prod(shape) * item_bytes(dtype)))
        return self._view(View(buffer, shape, dtype))

    def _add_constant(self, expr: GenericConst) -> int:
        array = np.ascontiguousarray(expr.value.numpy())
        shape, dtype = tuple(int(extent) for extent in expr.value.shape), str(expr.value.dtype)
        data = array.tobytes()
        if data not in self._constants:
            self._constants[data] = self._add_buffer(Buffer("constant", len(data), data=data))
        return self._view(View(self._constants[data], shape, dtype))

    def _add_buffer(self, buffer: Buffer) -> int:
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def _view(self, view: View) -> int:
        if view not in self._view_ids:
            self._view_ids[view] = len(self._views)
            self._views.append(view)
        return self._view_ids[view]


def _leaves(value: Value) -> list[int]:
    if isinstance(value, tuple):
        return [leaf for field in value for leaf in _leaves(field)]
    return [] if value is None else [value]


def _static_tensor(ty: tvm.ir.Type, what: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a tensor type. HorqError where it is no tensor or its shape is not known."""
    shape: Sequence[object] | None = getattr(ty, "shape", None)
    if not isinstance(ty, relax.TensorType) or shape is None:
        raise HorqError(f"{what} is no tensor of known shape: {ty}")
    if not all(isinstance(extent, int | tvm.tirx.IntImm) for extent in shape):
        raise HorqError(f"{what} has the shape {list(shape)}; only static shapes are compiled")
    return tuple(int(extent) for extent in shape), str(ty.dtype)  # type: ignore[call-overload]

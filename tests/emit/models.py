"""Small modules in the lowered form, built by hand and emitted with TVM's default kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import tvm
from tvm import relax
from tvm.s_tir import Schedule

from horq_tvm import targets
from horq_tvm.emit import EmitTarget, standalone
from horq_tvm.manifest import Manifest
from horq_tvm.specs import TensorSpec

Body = Callable[..., Sequence[relax.Expr]]
"""body(builder, *inputs) emits bindings and returns the outputs."""


def spec(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    """A TensorSpec."""
    return TensorSpec(name, shape, dtype)


def module(body: Body, *inputs: TensorSpec) -> tvm.IRModule:
    """`main` of what `body` emits."""
    builder = relax.BlockBuilder()
    params = [relax.Var(entry.name, relax.TensorType(entry.shape, entry.dtype)) for entry in inputs]
    with builder.function("main", params):
        with builder.dataflow():
            results = list(body(builder, *params))
            output = builder.emit_output(results[0] if len(results) == 1 else relax.Tuple(results))
        builder.emit_func_output(output)
    return builder.get()


def manifest_of(mod: tvm.IRModule) -> Manifest:
    """The manifest of `main`: inputs by their names, outputs out0, out1, ..."""
    main = mod["main"]
    result = main.ret_ty
    types = list(result.fields) if isinstance(result, relax.TupleType) else [result]
    inputs = tuple(_spec(param.name, param.ty) for param in main.params)
    return Manifest(inputs, tuple(_spec(f"out{index}", ty) for index, ty in enumerate(types)))


def _spec(name: str, ty: relax.TensorType) -> TensorSpec:
    return TensorSpec(name, tuple(int(extent) for extent in ty.shape), str(ty.dtype))


def emit(path: Path, mod: tvm.IRModule, target: EmitTarget | None = None, **options: object) -> Manifest:
    """The library of `mod` for any x86-64."""
    return standalone(mod, target or targets.resolve("x86-64"), manifest_of(mod), path, **options)


def parallel_rows(mod: tvm.IRModule, kernel: str) -> tvm.IRModule:
    """`mod` with the outermost loop of `kernel` parallel."""
    schedule = Schedule(mod)
    schedule.work_on(kernel)
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    schedule.parallel(schedule.get_loops(block)[0])
    return schedule.mod

"""What every front end returns, and the check that it is what the pipeline expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tvm
from tvm import relax

from ..errors import HorqError
from ..specs import LayerConfig, TensorSpec
from ..straightline import Array


@dataclass(frozen=True)
class ImportedModel:
    """A model as Relax, one function `main` of static shapes with its constants embedded.

    `inputs` are in the order of main's parameters, `outputs` in the order of its results (a tuple if several).
    `trained` holds the layers that the model's own HORQ nodes speak for, by layer name. `weight_scales` has, of layers
    whose weights the model holds as integers, the step of each filter, float [F].
    """

    mod: tvm.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    trained: Mapping[str, LayerConfig]
    weight_scales: Mapping[str, Array] = field(default_factory=dict)


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """The shape of a tensor expression as Python ints, or None where it is not a tensor of a known shape."""
    if not isinstance(expr.ty, relax.TensorType) or expr.ty.shape is None:
        return None
    try:
        return tuple(int(extent) for extent in expr.ty.shape)
    except TypeError:
        return None


def tensor_spec(name: str, expr: relax.Expr) -> TensorSpec:
    """Name, shape and dtype of an input or output. Raises HorqError if its shape is not static."""
    shape = static_shape(expr)
    if shape is None:
        raise HorqError(f"{name!r} has type {expr.ty}; accepted are tensors of static shape")
    return TensorSpec(name, shape, str(expr.ty.dtype.dtype))


def result_specs(mod: tvm.IRModule, names: list[str]) -> tuple[TensorSpec, ...]:
    """The specs of main's results, under `names` in order."""
    result = mod["main"].ret_ty
    types = list(result.fields) if isinstance(result, relax.TupleType) else [result]
    return tuple(tensor_spec(name, relax.Var("result", ty)) for name, ty in zip(names, types, strict=True))

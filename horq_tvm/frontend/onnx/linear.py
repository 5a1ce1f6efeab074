"""QuantizeLinear and DequantizeLinear of constants (onnx's own evaluator knows them from opset 19 on)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from ...straightline import Array

OPERATORS = ("QuantizeLinear", "DequantizeLinear")


def kind_without_zero_point(attrs: Mapping[str, Any]) -> np.dtype[Any]:
    """What a QuantizeLinear without a zero point gives: its output_dtype (opset 21), else uint8."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(attrs.get("output_dtype") or onnx.TensorProto.UINT8))


def evaluate(op: str, operands: Sequence[Array], attrs: Mapping[str, Any]) -> Array | None:
    """The result for x, scale float32 and zero point (or none), one for all or one along the axis.

    None for what is not that: blocks, other floats, integers of less than 8 bits.
    """
    x, scale = operands[:2]
    axis = attrs.get("axis", 1)
    kind = kind_without_zero_point(attrs) if op == "QuantizeLinear" else x.dtype
    zero = operands[2] if len(operands) > 2 else np.zeros((), kind)
    if scale.dtype != np.float32 or scale.ndim > 1 or zero.dtype.kind not in "iu":
        return None
    scale, zero = along(scale, x.ndim, axis), along(zero, x.ndim, axis)
    if op == "DequantizeLinear":
        steps = x.astype("int64") - zero.astype("int64")
        return steps.astype("float32") * scale
    ends = np.iinfo(zero.dtype)
    levels = np.rint(x.astype("float32") / scale) + zero.astype("float32")
    return np.clip(levels, ends.min, ends.max).astype(zero.dtype)


def along(vector: Array, rank: int, axis: int) -> Array:
    """A vector in the shape that broadcasts along an axis; one value as a scalar."""
    if vector.size == 1:
        return vector.reshape(())
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)

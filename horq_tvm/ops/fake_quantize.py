"""horq.fake_quantize: what a QuantizeLinear and the DequantizeLinear behind it do to a float32 tensor."""

from __future__ import annotations

from typing import Any

from tvm import relax

from .int8 import Activation
from .registry import call, register, shape_of, tensor

FAKE_QUANTIZE = register("horq.fake_quantize", 1, lambda expr: tensor(shape_of(expr.args[0]), "float32"))


def fake_quantize(x: relax.Expr, *, scale: float, zero_point: int, low: int, high: int) -> relax.Call:
    """x float32 → float32 of its shape: (clip(rint(x / s) + z, low, high) − z)·s, halves to even."""
    return call(FAKE_QUANTIZE, [x], scale=scale, zero_point=zero_point, low=low, high=high)


def byte_activation(attrs: Any) -> Activation | None:
    """The activation of an int8 layer behind it: z counted from `low`. None where there are not 256 levels."""
    low, high = int(attrs["low"]), int(attrs["high"])
    if high - low != 255:
        return None
    return Activation(float(attrs["scale"]), int(attrs["zero_point"]) - low)

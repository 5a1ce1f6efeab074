"""`horq.scales`: the β of an activation, computed while the model runs (scales `patch` and `sample`)."""

from __future__ import annotations

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    batch, height, width, _ = shape_of(expr.args[0])
    order = int(expr.attrs["order"])
    if expr.attrs["scale"] == "sample":
        return tensor((batch, order), "float32")
    geometry = Geometry.of(expr.attrs)
    return tensor((batch, *geometry.output_size(height, width), geometry.groups, order), "float32")


SCALES = register("horq.scales", -1, _infer)


def scales(x: relax.Expr, *line: relax.Expr, order: int, scale: str, geometry: Geometry) -> relax.Call:
    """x float32 [N,H,W,C] → β float32, `sample` [N,K], `patch` [N,HO,WO,G,K].

    β_i = mean|R_{i-1}| (Li et al. 2017, eq. 8), over the image, or over each im2col row with its padded zeros. With
    factor and addend (`line`, float32 [C] each) they are those of x·factor + addend.
    """
    return call(SCALES, [x, *line], order=order, scale=scale, **geometry.attributes())

"""`horq.patch`: the scales and the planes of every im2col row, from one walk over the rows (scale `patch`)."""

from __future__ import annotations

from tvm import relax

from .binarize import words_of
from .geometry import Geometry
from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TupleType:
    batch, height, width, channels = shape_of(expr.args[0])
    geometry, order, first = Geometry.of(expr.attrs), int(expr.attrs["order"]), int(expr.attrs["first"])
    rows = (batch, *geometry.output_size(height, width), geometry.groups)
    words = geometry.kernel[0] * geometry.kernel[1] * words_of(channels // geometry.groups)
    return relax.TupleType([tensor((*rows, order), "float32"), tensor((*rows, order - first, words), "uint32")])


PATCH = register("horq.patch", -1, _infer)


def patch(x: relax.Expr, *line: relax.Expr, order: int, geometry: Geometry, first: int = 0) -> relax.Call:
    """x float32 [N,H,W,C] → what `horq.scales` and `horq.binarize` of scale `patch` give, as a tuple (β, planes).

    With factor and addend (`line`, float32 [C] each) they are those of x·factor + addend.
    """
    return call(PATCH, [x, *line], order=order, first=first, **geometry.attributes())

"""`horq.binarize`: the residual binarisation of an activation into packed bit planes."""

from __future__ import annotations

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor

WORD_BITS = 32


def words_of(channels: int) -> int:
    """Words that hold `channels` bits of one group."""
    return -(-channels // WORD_BITS)


def _infer(expr: relax.Call) -> relax.TensorType:
    batch, height, width, channels = shape_of(expr.args[0])
    geometry = Geometry.of(expr.attrs)
    planes = int(expr.attrs["order"]) - int(expr.attrs["first"])
    words = words_of(channels // geometry.groups)
    if expr.attrs["scale"] != "patch":
        return tensor((batch, height, width, geometry.groups, planes, words), "uint32")
    rows = geometry.kernel[0] * geometry.kernel[1] * words
    return tensor((batch, *geometry.output_size(height, width), geometry.groups, planes, rows), "uint32")


BINARIZE = register("horq.binarize", -1, _infer)


def binarize(
    x: relax.Expr, beta: relax.Expr, *line: relax.Expr, order: int, scale: str, geometry: Geometry, first: int = 0
) -> relax.Call:
    """x float32 [N,H,W,C], β float32 (`static` [1,K], else as `horq.scales`) → uint32 planes.

    `sample` and `static`: [N,H,W,G,P,words], unpadded. `patch`: im2col rows [N,HO,WO,G,P,kh·kw·words], a padded
    position being an element of value 0. P = order − first: with first = 1 the first plane is known to be all +1 and is
    left out. With factor and addend (`line`, float32 [C] each) they are the planes of x·factor + addend.
    """
    return call(BINARIZE, [x, beta, *line], order=order, scale=scale, first=first, **geometry.attributes())

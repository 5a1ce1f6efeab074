"""`horq.bitserial_conv2d` and `horq.bitserial_dense`: α·Σ β_i·S_i + bias over bit planes, weights not yet packed.

Both have the same operands and one implementation; a dense layer is a 1×1 convolution over the rows of its input, and
keeps a name of its own because that is what its user called it.
"""

from __future__ import annotations

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    batch, height, width, *_ = shape_of(expr.args[0])
    if expr.attrs["scale"] != "patch":
        height, width = Geometry.of(expr.attrs).output_size(height, width)
    return tensor((batch, height, width, shape_of(expr.args[1])[0]), "float32")


BITSERIAL_CONV2D = register("horq.bitserial_conv2d", 5, _infer)
BITSERIAL_DENSE = register("horq.bitserial_dense", 5, _infer)


def bitserial(
    planes: relax.Expr,
    weight: relax.Expr,
    alpha: relax.Expr,
    bias: relax.Expr,
    beta: relax.Expr,
    *,
    name: str,
    order: int,
    scale: str,
    geometry: Geometry,
    first: int = 0,
    dense: bool = False,
) -> relax.Call:
    """Operands, all but planes and a computed β constants:

    planes   as `horq.binarize` gives them for the same order, scale, geometry and first (not padded)
    weight   int8 ±1 [F,kh,kw,C/G]
    alpha    float64 [F], kept in float64 until the affines around the layer are folded in (design.md, Arithmetic)
    bias     float64 [F]
    beta     float32, `static` [1,K] (constant), `sample` [N,K], `patch` [N,HO,WO,G,K]

    → float32 [N,HO,WO,F]. A zero padded position contributes nothing, except that with `patch` it is an element.
    """
    return call(
        BITSERIAL_DENSE if dense else BITSERIAL_CONV2D,
        [planes, weight, alpha, bias, beta],
        name=name,
        order=order,
        scale=scale,
        first=first,
        **geometry.attributes(),
    )

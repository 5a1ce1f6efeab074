"""`horq.conv2d`: a float convolution that carries its layer's name (canonical form, NHWC)."""

from __future__ import annotations

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    batch, height, width, _ = shape_of(expr.args[0])
    return tensor((batch, *Geometry.of(expr.attrs).output_size(height, width), shape_of(expr.args[1])[0]), "float32")


CONV2D = register("horq.conv2d", 2, _infer)


def conv2d(
    x: relax.Expr,
    weight: relax.Expr,
    *,
    name: str,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    affines: int = 0,
) -> relax.Call:
    """x float32 [N,H,W,C], weight float32 [F,kh,kw,C/groups], padding (t,l,b,r) → float32 [N,HO,WO,F].

    `affines`: see `horq.name`.
    """
    _, kh, kw, _ = shape_of(weight)
    geometry = Geometry((kh, kw), strides, padding, dilation, groups)
    return call(CONV2D, [x, weight], name=name, affines=affines, **geometry.attributes())

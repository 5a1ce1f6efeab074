"""`horq.pad_planes`: zero words around bit planes, so that a convolution needs no bounds check."""

from __future__ import annotations

from tvm import relax

from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    batch, height, width, *rest = shape_of(expr.args[0])
    top, left, bottom, right = (int(v) for v in expr.attrs["padding"])
    return tensor((batch, height + top + bottom, width + left + right, *rest), "uint32")


PAD_PLANES = register("horq.pad_planes", 1, _infer)


def pad_planes(planes: relax.Expr, *, padding: tuple[int, int, int, int]) -> relax.Call:
    """planes uint32 [N,H,W,G,P,words], padding (t,l,b,r) → uint32 [N,H+t+b,W+l+r,G,P,words]."""
    return call(PAD_PLANES, [planes], padding=list(padding))

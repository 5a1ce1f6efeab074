"""Images of bytes: what a network does to its pixels before the first layer, as one factor and addend a channel.

    x = p followed by additions, multiplications and divisions by constants = a_c·p + b_c

An int8 layer that reads x can read p itself: x = a_c·(p − z_c) with z_c = −b_c / a_c, so that a_c belongs to its
weights and z_c is a zero point. An integer z_c (a subtracted mean of 127, pixels divided by 255) costs nothing; of any
other the nearest integer pads the image, and what is left, Σ w·a_c·(rint(z_c) − z_c), is an addend of the filter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .straightline import Program, array_of, op_name

LEVELS = 255
HALF_A_LEVEL = 0.5 + 1e-6
TO_NHWC = (0, 2, 3, 1)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Pixels:
    """An image `source`, uint8 [N,H,W,C] (`planar`: [N,C,H,W]), of which a layer reads factor·p + addend, [C] each."""

    source: relax.Var
    planar: bool
    factor: Vector
    addend: Vector

    @property
    def zeros(self) -> Vector:
        """z_c = −b_c / a_c: the pixel that stands for 0."""
        zeros: Vector = -self.addend / self.factor
        return zeros

    @property
    def zero_points(self) -> tuple[int, ...]:
        """The levels nearest to `zeros`."""
        return tuple(int(zero) for zero in np.clip(np.rint(self.zeros), 0, LEVELS))

    def can_pad(self) -> bool:
        """Whether a level is within half a step of 0, as what pads the image has to be."""
        return bool((np.abs(self.zeros - self.zero_points) <= HALF_A_LEVEL).all())

    def folded(self, weight: NDArray[np.float32]) -> tuple[Vector, Vector]:
        """weight [F,kh,kw,C] over x → weight over p − z, float64 of that shape, and the addend float64 [F]."""
        scaled = weight.astype("float64") * self.factor
        return scaled, (scaled * (np.array(self.zero_points) - self.zeros)).sum(axis=(1, 2, 3))


def pixels_of(program: Program, x: relax.Expr) -> Pixels | None:
    """The image of bytes that `x`, float32 [N,H,W,C], is computed from, None where there is none."""
    channels = int(x.ty.shape[3])
    value = program.values.get(x) if isinstance(x, relax.Var) else None
    planar = value is not None and op_name(value) == "relax.permute_dims"
    if planar and value is not None:
        if tuple(int(axis) for axis in value.attrs.axes or ()) != TO_NHWC:
            return None
        x = value.args[0]
    factor, addend = np.ones(channels), np.zeros(channels)
    while isinstance(x, relax.Var) and (value := program.values.get(x)) is not None:
        if op_name(value) == "relax.astype":
            (source,) = value.args
            if str(source.ty.dtype.dtype) == "int32":
                x = source
                continue
            byte = isinstance(source, relax.Var) and str(source.ty.dtype.dtype) == "uint8"
            invertible = np.isfinite(factor).all() and np.isfinite(addend).all() and factor.all()
            return Pixels(source, planar, factor, addend) if byte and invertible else None
        step = _step(value, channels, planar=planar)
        if step is None:
            return None
        x, inner_factor, inner_addend = step
        factor, addend = factor * inner_factor, addend + factor * inner_addend
    return None


def _step(value: relax.Expr, channels: int, *, planar: bool) -> tuple[relax.Expr, Vector, Vector] | None:
    """An elementwise operator as (its operand, factor, addend), None for one that is not affine in one operand."""
    name, ones, zeros = op_name(value), np.ones(channels), np.zeros(channels)
    integers = str(value.ty.dtype.dtype) == "int32"
    if name not in ("relax.add", "relax.subtract", "relax.multiply", *(() if integers else ("relax.divide",))):
        return None
    left, right = (_vector(arg, channels, planar=planar) for arg in value.args)
    operand = value.args[0 if right is not None else 1]
    if [int(e) for e in operand.ty.shape] != [int(e) for e in value.ty.shape]:
        return None  # the constant broadcasts the image, to more channels for one
    if right is not None:
        if name == "relax.add":
            return operand, ones, right
        if name == "relax.subtract":
            return operand, ones, -right
        with np.errstate(divide="ignore"):
            return operand, right if name == "relax.multiply" else 1 / right, zeros
    if left is not None and name != "relax.divide":
        if name == "relax.multiply":
            return operand, left, zeros
        return operand, ones if name == "relax.add" else -ones, left
    return None


def _vector(expr: relax.Expr, channels: int, *, planar: bool) -> Vector | None:
    """A constant of one value, or of one a channel of an image [N,H,W,C] (`planar`: [N,C,H,W]), as float64 [C]."""
    array = array_of(expr)
    if array is None or array.ndim > 4:
        return None
    shape = (1,) * (4 - array.ndim) + array.shape
    along = (1, channels, 1, 1) if planar else (1, 1, 1, channels)
    if array.size != 1 and shape != along:
        return None
    return np.broadcast_to(array.astype("float64").ravel(), (channels,)).copy()

"""Residual binarisation, scales and im2col rows in plain te: right, and a start for schedules.

R_0 = x, H_i = sign(R_{i-1}), R_i = R_{i-1} − β_i·H_i (Li et al. 2017, eq. 9), in float32, rounded after each
subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from tvm import te, tirx

from horq_tvm.ops import WORD_BITS, Geometry, words_of

ZERO = tirx.const(0.0, "float32")


def affine(x: te.Tensor, line: Sequence[te.Tensor]) -> te.Tensor:
    """x·factor + addend by channel, x where there is no `line`."""
    if not line:
        return x
    return te.compute(x.shape, lambda n, h, w, c: x[n, h, w, c] * line[0][c] + line[1][c], name="affine")


def binarize(
    x: te.Tensor, beta: te.Tensor, line: Sequence[te.Tensor], order: int, first: int, groups: int
) -> te.Tensor:
    """x float32 [N,H,W,C], β [1,K] or [N,K] → planes uint32 [N,H,W,G,P,words]."""
    batch, height, width, channels = (int(e) for e in x.shape)
    depth, rows, value = channels // groups, int(beta.shape[0]), affine(x, line)
    bit = te.reduce_axis((0, WORD_BITS), "bit")

    def word(n, h, w, g, p, j):  # type: ignore[no-untyped-def]
        c = j * WORD_BITS + bit
        residual = value(n, h, w, g * depth + tirx.min(c, depth - 1))
        chain = _chain(residual, [beta[n if rows > 1 else 0, k] for k in range(order - 1)], first)
        return te.sum(_bit(tirx.all(c < depth, _select(p, chain[first:]) >= ZERO), bit), axis=[bit])

    return te.compute((batch, height, width, groups, order - first, words_of(depth)), word, name="pack")


def sample_scales(x: te.Tensor, line: Sequence[te.Tensor], order: int) -> te.Tensor:
    """x float32 [N,H,W,C] → β float32 [N,K], sums in float64."""
    batch, *image = (int(e) for e in x.shape)
    return _scales((batch,), image, affine(x, line), order)


class Rows:
    """The im2col rows of an image: values, scales, planes."""

    def __init__(self, x: te.Tensor, line: Sequence[te.Tensor], order: int, geometry: Geometry) -> None:
        self.geometry, self.order = geometry, order
        self.image = affine(x, line)
        self.batch, self.height, self.width, channels = (int(e) for e in x.shape)
        self.depth = channels // geometry.groups
        self.out = (self.batch, *geometry.output_size(self.height, self.width), geometry.groups)

    def value(self, n, y, x, g, ry, rx, c):  # type: ignore[no-untyped-def]
        """An element of a row; padded positions are 0."""
        (sy, sx), (dy, dx) = self.geometry.strides, self.geometry.dilation
        top, left, _, _ = self.geometry.padding
        iy, ix = y * sy + ry * dy - top, x * sx + rx * dx - left
        inside = tirx.all(iy >= 0, iy < self.height, ix >= 0, ix < self.width)
        return tirx.if_then_else(inside, self.image(n, iy, ix, g * self.depth + c), ZERO)

    def scales(self) -> te.Tensor:
        """β float32 [N,HO,WO,G,K], sums in float64."""
        return _scales(self.out, (*self.geometry.kernel, self.depth), self.value, self.order)

    def planes(self, beta: te.Tensor, first: int) -> te.Tensor:
        """uint32 [N,HO,WO,G,P,kh·kw·words]."""
        kh, kw = self.geometry.kernel
        words = words_of(self.depth)
        bit = te.reduce_axis((0, WORD_BITS), "bit")

        def word(n, y, x, g, p, j):  # type: ignore[no-untyped-def]
            tap, c = j // words, j % words * WORD_BITS + bit
            residual = self.value(n, y, x, g, tap // kw, tap % kw, tirx.min(c, self.depth - 1))
            chain = _chain(residual, [beta[n, y, x, g, k] for k in range(self.order - 1)], first)
            return te.sum(_bit(tirx.all(c < self.depth, _select(p, chain[first:]) >= ZERO), bit), axis=[bit])

        return te.compute((*self.out, self.order - first, kh * kw * words), word, name="pack")


def _chain(residual: tirx.Expr, betas: Sequence[tirx.Expr], first: int) -> list[tirx.Expr]:
    """R_0 to R_{K-1}; a plane before `first` is known to be all +1."""
    chain = [residual]
    for k, beta in enumerate(betas):
        before = chain[-1]
        chain.append(before - (beta if k < first else tirx.Select(before >= ZERO, beta, -beta)))
    return chain


def _scales(out: Sequence[int], window: Sequence[int], value: Callable[..., tirx.Expr], order: int) -> te.Tensor:
    """β float32 [*out, K]: β_i = mean|R_{i-1}| over a window, whose elements `value(*index, *axes)` gives."""
    found: list[te.Tensor] = []
    for _ in range(order):
        found.append(_mean(out, window, value, tuple(found)))
    return te.compute(
        (*out, order), lambda *index: _select(index[-1], [beta(*index[:-1]) for beta in found]), name="scales"
    )


def _mean(
    out: Sequence[int], window: Sequence[int], value: Callable[..., tirx.Expr], betas: Sequence[te.Tensor]
) -> te.Tensor:
    """The next β of `out`, after `betas`: |R − β·sign R| is ||R| − β| to the bit."""
    axes = [te.reduce_axis((0, e), f"r{i}") for i, e in enumerate(window)]
    size = tirx.const(float(prod(window)), "float64")

    def magnitude(*index):  # type: ignore[no-untyped-def]
        residual = tirx.abs(value(*index, *axes))
        for beta in betas:
            residual = tirx.abs(residual - beta(*index))
        return te.sum(residual.astype("float64"), axis=axes)

    total = te.compute(out, magnitude, name=f"sum{len(betas)}")
    return te.compute(out, lambda *index: (total(*index) / size).astype("float32"), name=f"beta{len(betas)}")


def _select(index: tirx.Expr, values: Sequence[tirx.Expr]) -> tirx.Expr:
    """values[index]."""
    found = values[-1]
    for k in reversed(range(len(values) - 1)):
        found = tirx.Select(index == k, values[k], found)
    return found


def _bit(condition: tirx.Expr, position: tirx.Expr) -> tirx.Expr:
    one, none = tirx.const(1, "uint32"), tirx.const(0, "uint32")
    return tirx.Select(condition, one << position.astype("uint32"), none)

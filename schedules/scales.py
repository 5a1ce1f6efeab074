"""β_i = mean|R_{i-1}| (Li et al. 2017, eq. 8) of an image or of an im2col row, in one pass over the data per plane.

design.md allows an error of 1e-6·β_1: float32 lanes over at most 256 elements, summed in float64. The residual is
recomputed from x and the β found so far, which costs less than keeping it.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import Geometry

LANES = 16
BLOCK = 256

Element = Callable[[tirx.Expr | int, int], tirx.Expr]


def sample_scales(batch: int, size: int, order: int) -> tirx.PrimFunc:
    """x float32 [N, M] (the image, flat) → β float32 [N, K]."""
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("scales_sample")
        x = T.arg("x", T.Buffer((batch, size), "float32"))
        beta = T.arg("beta", T.Buffer((batch, order), "float32"))
        with T.grid(batch) as image, T.sblock("scales"):
            n = T.axis.spatial(batch, image)
            T.reads(x[n, 0:size])
            T.writes(beta[n, 0:order])
            lanes = T.sblock_alloc_buffer((LANES,), "float64")
            for k in range(order):
                betas = [beta[n, i] for i in range(k)]

                def magnitude(offset: tirx.Expr | int, width: int, betas: list[tirx.Expr] = betas) -> tirx.Expr:
                    return _magnitude(x[n, _span(offset, width)], betas, width)

                _clear(lanes)
                _accumulate(lanes, magnitude, size)
                T.buffer_store(beta, _mean(lanes, size), [n, k])
    return builder.get()


def patch_scales(shape: tuple[int, int, int, int], order: int, geometry: Geometry) -> tirx.PrimFunc:
    """x float32 [N,H,W,C] → β float32 [N,HO,WO,G,K]; a padded position is an element of value 0."""
    batch, height, width, channels = shape
    out, group = geometry.output_size(height, width), channels // geometry.groups
    extents = (batch, *out, geometry.groups)
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("scales_patch")
        x = T.arg("x", T.Buffer(shape, "float32"))
        beta = T.arg("beta", T.Buffer((*extents, order), "float32"))
        with T.grid(*extents) as loops, T.sblock("scales"):
            n, y, x_, g = (T.axis.spatial(e, v) for e, v in zip(extents, loops, strict=True))
            T.reads(x[n, 0:height, 0:width, 0:channels])
            T.writes(beta[n, y, x_, g, 0:order])
            lanes = T.sblock_alloc_buffer((LANES,), "float64")
            for k in range(order):
                betas = [beta[n, y, x_, g, i] for i in range(k)]
                _clear(lanes)
                with T.grid(*geometry.kernel) as (ry, rx):
                    row = y * geometry.strides[0] + ry * geometry.dilation[0] - geometry.padding[0]
                    column = x_ * geometry.strides[1] + rx * geometry.dilation[1] - geometry.padding[1]
                    inside = tirx.all(row >= 0, row < height, column >= 0, column < width)

                    def magnitude(
                        offset: tirx.Expr | int,
                        width_: int,
                        at: tuple[tirx.Expr, ...] = (n, row, column, g),
                        inside: tirx.Expr = inside,
                        betas: list[tirx.Expr] = betas,
                    ) -> tirx.Expr:
                        value = x[at[0], at[1], at[2], _span(at[3] * group + offset, width_)]
                        padded = tirx.if_then_else(inside, value, _splat(tirx.const(0.0, "float32"), width_))
                        return _magnitude(padded, betas, width_)

                    _accumulate(lanes, magnitude, group)
                T.buffer_store(beta, _mean(lanes, geometry.kernel[0] * geometry.kernel[1] * group), [n, y, x_, g, k])
    return builder.get()


def _span(offset: tirx.Expr | int, width: int) -> tirx.Expr | int:
    return T.Ramp(offset, 1, width) if width > 1 else offset


def _splat(value: tirx.Expr, width: int) -> tirx.Expr:
    return T.Broadcast(value, width) if width > 1 else value


def _magnitude(value: tirx.Expr, betas: list[tirx.Expr], width: int) -> tirx.Expr:
    """|R_k| of `width` elements. |R| − β with its sign dropped is |R − β·sign R|: the chain needs no select.

    R − β·sign(R) = sign(R)·(|R| − β), and negation is exact in float32, so the magnitudes agree to the bit.
    """
    residual = tirx.abs(value)
    for beta in betas:
        residual = tirx.abs(residual - _splat(beta, width))
    return residual


def _clear(lanes: tirx.Buffer) -> None:
    T.buffer_store(lanes, T.Broadcast(tirx.const(0.0, "float64"), LANES), [T.Ramp(0, 1, LANES)])


def _accumulate(lanes: tirx.Buffer, magnitude: Element, size: int) -> None:
    """lanes += Σ magnitude over `size` elements: float32 within a block, float64 across blocks."""
    if size >= BLOCK:
        with T.grid(size // BLOCK) as block:
            _add_block(lanes, magnitude, block * BLOCK, BLOCK // LANES)
    done = size - size % BLOCK
    if vectors := (size - done) // LANES:
        _add_block(lanes, magnitude, done, vectors)
    for offset in range(done + vectors * LANES, size):
        T.buffer_store(lanes, lanes[0] + tirx.Cast("float64", magnitude(offset, 1)), [0])


def _add_block(lanes: tirx.Buffer, magnitude: Element, offset: tirx.Expr | int, vectors: int) -> None:
    terms = [magnitude(offset + v * LANES, LANES) for v in range(vectors)]
    while len(terms) > 1:  # pairwise: shorter dependences and a smaller error
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    span = T.Ramp(0, 1, LANES)
    T.buffer_store(lanes, lanes[span] + tirx.Cast(f"float64x{LANES}", terms[0]), [span])


def _mean(lanes: tirx.Buffer, size: int) -> tirx.Expr:
    total = lanes[0]
    for lane in range(1, LANES):
        total = total + lanes[lane]
    return tirx.Cast("float32", total / tirx.const(float(size), "float64"))

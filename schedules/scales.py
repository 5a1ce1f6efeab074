"""Scale `sample`: β_i = mean|R_{i-1}| (Li et al. 2017, eq. 8) over an image, in one pass over the data per plane.

The residual is recomputed from x and the β found so far, which costs less than keeping it. An image is summed by
chunks, on as many threads as there are, and their sums are added in order: the result does not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .lanes import shared, span, splat, tail_lanes
from .mean import MeanOfMagnitudes

BLOCK = 256  # elements in one stretch of straight-line code, or a pixel's channels if they are more
CHUNKS = 16  # at most so many to an image


@dataclass(frozen=True)
class Sample:
    """`size` elements an image; `channels` of them share a factor and an addend each, 0: there are none."""

    batch: int
    size: int
    order: int
    channels: int = 0

    @property
    def block(self) -> int:
        """Elements of a stretch of code: whole pixels, so that each has its factors at a fixed place."""
        if not self.channels:
            return BLOCK
        return max(1, BLOCK // self.channels) * self.channels

    @property
    def chunks(self) -> int:
        """A divisor of the number of blocks; 1 for an image that is not worth sharing out."""
        blocks = self.size // self.block
        return max((c for c in range(1, CHUNKS + 1) if blocks and blocks % c == 0), default=1)

    @property
    def partial_shape(self) -> tuple[int, int]:
        return (self.batch, self.chunks)


def sample_scales(spec: Sample) -> tirx.PrimFunc:
    """x float32 [N, M] (the image, flat) → β float32 [N, K], and sums of chunks float64 as `spec` says.

    With channels, x·factor + addend takes the place of x, float32 [C] each, channels last.
    """
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("scales_sample")
        x = T.arg("x", T.Buffer((spec.batch, spec.size), "float32"))
        names = ("factor", "addend") if spec.channels else ()
        line = [T.arg(name, T.Buffer((spec.channels,), "float32")) for name in names]
        beta = T.arg("beta", T.Buffer((spec.batch, spec.order), "float32"))
        partial = T.arg("partial", T.Buffer(spec.partial_shape, "float64"))
        with T.serial(1), T.sblock("scales"):  # by itself the block would be taken for the function's root
            T.reads(x[0 : spec.batch, 0 : spec.size], *(operand[0 : spec.channels] for operand in line))
            T.writes(beta[0 : spec.batch, 0 : spec.order], partial[0 : spec.batch, 0 : spec.chunks])
            for k in range(spec.order):
                with shared(spec.batch * spec.chunks, spec.batch * spec.size) as index, T.sblock("chunk"):
                    n, chunk = tirx.floordiv(index, spec.chunks), tirx.floormod(index, spec.chunks)
                    T.buffer_store(partial, _sum(spec, x, line, beta, n, chunk, k), [n, chunk])
                with T.serial(spec.batch) as n:
                    total = tirx.const(0.0, "float64")
                    for chunk in range(spec.chunks):
                        total = total + partial[n, chunk]
                    mean = total / tirx.const(float(spec.size), "float64")
                    T.buffer_store(beta, tirx.Cast("float32", mean), [n, k])
    return builder.get()


def _sum(
    spec: Sample,
    x: tirx.Buffer,
    line: Sequence[tirx.Buffer],
    beta: tirx.Buffer,
    n: tirx.Expr,
    chunk: tirx.Expr,
    k: int,
) -> tirx.Expr:
    """Σ|R_k| over a chunk; what does not fill a block belongs to the last one."""
    blocks = spec.size // spec.block // spec.chunks
    whole, rest = _pieces(spec, spec.block), _pieces(spec, spec.size % spec.block)
    total = MeanOfMagnitudes({lanes for _, lanes in (whole if blocks else []) + rest})
    scales = [T.bind(beta[n, i]) for i in range(k)]

    def stretch(begin: tirx.Expr | int, pieces: Sequence[tuple[int, int]]) -> None:
        for offset, lanes in pieces:
            value = x[n, span(begin + offset, lanes)]
            if line:
                at = span(offset % spec.channels, lanes)
                value = value * line[0][at] + line[1][at]
            total.add(_magnitude(value, scales, lanes), lanes)
        total.flush()

    total.clear()
    if blocks:
        with T.serial(blocks) as block:
            stretch((chunk * blocks + block) * spec.block, whole)
    if rest:
        begin = spec.size - spec.size % spec.block
        if spec.chunks == 1:
            stretch(begin, rest)
        else:
            with T.If(chunk == spec.chunks - 1), T.Then():
                stretch(begin, rest)
    return total.total()


def _pieces(spec: Sample, size: int) -> list[tuple[int, int]]:
    """Offsets and lanes of the vectors of `size` elements, none beyond the channels of its pixel."""
    pixel = spec.channels or size
    pieces = tail_lanes(pixel)
    return [(begin + offset, lanes) for begin in range(0, size, max(1, pixel)) for offset, lanes in pieces]


def _magnitude(value: tirx.Expr, betas: Sequence[tirx.Expr], lanes: int) -> tirx.Expr:
    """|R_k| of `lanes` elements. |R| − β with its sign dropped is |R − β·sign R|: the chain needs no select.

    R − β·sign(R) = sign(R)·(|R| − β), and negation is exact in float32, so the magnitudes agree to the bit.
    """
    residual = tirx.abs(value)
    for beta in betas:
        residual = tirx.abs(residual - splat(beta, lanes))
    return residual

"""Scale `sample`: β_i = mean|R_{i-1}| (Li et al. 2017, eq. 8) over an image, a launch for each plane and one more.

A block of threads sums a chunk of an image. Chunks are added up by the next launch, by each of its blocks for itself:
that is less than another launch would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .threads import NOTHING, STRETCH, ZERO, Sum, add_up, index, launch, room, wide

THREADS = 256
STRETCHES = 4  # elements of a thread, in stretches, that are worth a block of threads more
CHUNKS = THREADS  # at most so many to an image: one for each thread that adds them up


@dataclass(frozen=True)
class Sample:
    """`size` elements an image; `channels` of them share a factor and an addend each, 0: there are none."""

    batch: int
    size: int
    order: int
    channels: int = 0

    @property
    def elements(self) -> int:
        """Of a thread, in whole stretches."""
        stretch = STRETCH * THREADS
        chunks = min(CHUNKS, -(-self.size // (STRETCHES * stretch)))
        return -(-self.size // (chunks * stretch)) * STRETCH

    @property
    def chunks(self) -> int:
        return -(-self.size // (self.elements * THREADS))

    @property
    def partial_shape(self) -> tuple[int, int, int]:
        """Of the sums of chunks, plane by plane."""
        return (self.order, self.batch, self.chunks)


def sample_scales(spec: Sample) -> tirx.PrimFunc:
    """x float32 [N, M] (the image, flat) → β float32 [N, K], and sums of chunks float64 as `spec` says.

    With channels, x·factor + addend takes the place of x, float32 [C] each, channels last.
    """
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("scales_sample")
        x = T.arg("x", T.Buffer(wide((spec.batch, spec.size)), "float32"))
        names = ("factor", "addend") if spec.channels else ()
        line = [T.arg(name, T.Buffer(wide((spec.channels,)), "float32")) for name in names]
        beta = T.arg("beta", T.Buffer(wide((spec.batch, spec.order)), "float32"))
        partial = T.arg("partial", T.Buffer(wide(spec.partial_shape), "float64"))
        for k in range(spec.order + 1):
            _launch(spec, k, (x, *line), beta, partial)
    return builder.get()


def _launch(spec: Sample, k: int, operands: Sequence[tirx.Buffer], beta: tirx.Buffer, partial: tirx.Buffer) -> None:
    """β_k, from the sums of the launch before, but for the first; the sums of |R_k|, but for the last."""
    last = k == spec.order
    extents = {"blockIdx.y": spec.batch, "blockIdx.x": 1 if last else spec.chunks, "threadIdx.x": THREADS}
    reads = [*(() if last else operands), *((beta, partial) if k else ())]
    writes = [*((beta,) if k else ()), *(() if last else (partial,))]
    with launch("means", extents, reads, writes) as (n, chunk, thread):
        shared = room("shared", (THREADS,), "float64", "shared")
        scales = [beta[n, index(i)] for i in range(k - 1)]
        if k:
            of_chunk = partial[index(k - 1), n, tirx.min(thread, index(spec.chunks - 1))]
            total = add_up(shared, (), thread, T.if_then_else(thread < spec.chunks, of_chunk, NOTHING))
            mean = room("mean", (1,), "float32")
            T.buffer_store(mean, tirx.Cast("float32", total / tirx.const(float(spec.size), "float64")), [index(0)])
            scales.append(mean[index(0)])
            with T.If(tirx.all(chunk == 0, thread == 0)), T.Then():
                T.buffer_store(beta, scales[-1], [n, index(k - 1)])
        if not last:
            total = add_up(shared, (), thread, _of_thread(spec, operands, scales, n, chunk, thread))
            with T.If(thread == 0), T.Then():
                T.buffer_store(partial, total, [index(k), n, chunk])


def _of_thread(
    spec: Sample,
    operands: Sequence[tirx.Buffer],
    scales: Sequence[tirx.Expr],
    n: tirx.Expr,
    chunk: tirx.Expr,
    thread: tirx.Expr,
) -> tirx.Expr:
    """A thread's part of Σ|R_k|: elements so far apart that neighbouring threads read neighbouring ones."""
    x, *line = operands

    def magnitude(i: tirx.Expr) -> tirx.Expr:
        at = (chunk * spec.elements + i) * THREADS + thread
        value = x[n, at]
        if line:
            channel = tirx.floormod(at, index(spec.channels))
            value = value * line[0][channel] + line[1][channel]
        # |R| − β with its sign dropped is |R − β·sign R| to the bit: the chain needs no select.
        residual = tirx.abs(value)
        for scale in scales:
            residual = tirx.abs(residual - scale)
        whole = spec.chunks * spec.elements * THREADS == spec.size
        return residual if whole else T.if_then_else(at < spec.size, residual, ZERO)

    return Sum().over(spec.elements, magnitude)

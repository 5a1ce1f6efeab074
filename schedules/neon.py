"""Counting differing bits with NEON: three instructions for 128 of them, and no loss but at the end.

    EOR     v = activation ^ weights      a word of the activation in every lane, a word of four filters
    CNT     v = the popcount of each byte
    UADALP  acc.8h += the bytes of v, pairwise

So a 16-bit lane grows by at most 16 a step, and two of them are one output channel: they are added up after the window.
LLVM makes of a popcount of 32-bit lanes CNT, UADDLP and UADALP, a quarter more work. With dot products it makes CNT and
UDOT against ones of it, three instructions as well, but no faster ones, and its loops over the second plane spill.

Floats in vectors of 32-bit ARM are not quite float32: subnormals count as zeros there, whatever the settings.

AArch64 has no name for UADALP in LLVM: an addition of UADDLP's result becomes one. ARMv7 has: VPADAL.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.errors import HorqError
from horq_tvm.ops import Geometry

from . import blocks

LANES = 4  # filters side by side, a 32-bit word each
HALVES = 2 * LANES
STEP = 16  # bits that a 16-bit lane counts at a time
MAX_ROW = (1 << 16) // STEP * 32 - 32  # elements of a row: as many words as no lane overflows for, 4095
STYLES = {"uadalp": True, "vpadal": False}
"""The styles of `horq.packed_bitserial` that are counted here, and whether AArch64 has them."""


class Shapes:
    """Extents of a count: planes uint32 [N,H,W,G,P,words], weight uint32 [G,B,kh,kw,words,4]."""

    def __init__(self, planes: Sequence[int], weight: Sequence[int], geometry: Geometry) -> None:
        self.planes, self.weight, self.geometry = tuple(planes), tuple(weight), geometry

    @property
    def output(self) -> tuple[int, ...]:
        """Of the counts, int32 [N,HO,WO,G,B,4]."""
        batch, height, width = self.planes[:3]
        return (batch, *self.geometry.output_size(height, width), *self.weight[:2], LANES)


def count(shapes: Shapes, plane: int, wide: bool) -> tirx.PrimFunc:
    """planes, weight → int32 [N,HO,WO,G,B,4], the popcounts of one plane over each window; `wide`: AArch64's names.

    Two blocks: `halves` adds up the window in 16-bit lanes, `flush` adds up the halves of each output channel.
    """
    words = prod(shapes.weight[2:5])
    if words * 32 > MAX_ROW:  # MAX_ROW is of whole words; channels that fill half of one could be many windows more
        raise HorqError(f"a row of {words} words can overflow 16-bit counts; accepted are up to {MAX_ROW // 32}")
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("count")
        planes = T.arg("planes", T.Buffer(_wide(shapes.planes), "uint32"))
        weight = T.arg("weight", T.Buffer(_wide(shapes.weight), "uint32"))
        counts = T.arg("counts", T.Buffer(_wide(shapes.output), "int32"))
        halves = T.sblock_alloc_buffer(_wide((*shapes.output[:5], HALVES)), "uint16")
        _halves(shapes, plane, wide, (planes, weight), halves)
        _flush(shapes, plane, wide, halves, counts)
    return builder.get()


def _halves(
    shapes: Shapes, plane: int, wide: bool, operands: tuple[tirx.Buffer, tirx.Buffer], halves: tirx.Buffer
) -> None:
    planes, weight = operands
    (sy, sx), (dy, dx) = shapes.geometry.strides, shapes.geometry.dilation
    spatial, reduced = (*shapes.output[:5], 1), shapes.weight[2:5]
    with T.grid(*_wide((*spatial, *reduced))) as loops:  # noqa: SIM117
        with T.sblock(f"halves{plane}"):
            n, y, x, g, b, v = _axes(T.axis.spatial, spatial, loops[:6])
            ky, kx, word = _axes(T.axis.reduce, reduced, loops[6:])
            at = (n, y * sy + ky * dy, x * sx + kx * dx, g, plane, word)
            every = T.Ramp(v * HALVES, _index(1), HALVES)
            T.reads(planes[at], weight[g, b, ky, kx, word, v * LANES : v * LANES + LANES])
            T.writes(halves[n, y, x, g, b, v * HALVES : v * HALVES + HALVES])
            with T.init():
                T.buffer_store(halves, T.Broadcast(tirx.const(0, "uint16"), HALVES), [n, y, x, g, b, every])
            filters = weight[g, b, ky, kx, word, T.Ramp(v * LANES, _index(1), LANES)]
            differing = T.reinterpret("uint8x16", T.Broadcast(planes[at], LANES) ^ filters)
            bits = T.call_llvm_pure_intrin("uint8x16", "llvm.ctpop", differing)
            total = _add_pairs(halves[n, y, x, g, b, every], bits, "uint16x8", wide)
            T.buffer_store(halves, total, [n, y, x, g, b, every])


def _flush(shapes: Shapes, plane: int, wide: bool, halves: tirx.Buffer, counts: tirx.Buffer) -> None:
    """A sum of one term, so that it is a reduction as the counts of other targets are: nothing is inlined into it."""
    spatial = (*shapes.output[:5], 1)
    with T.grid(*_wide((*spatial, 1))) as loops:  # noqa: SIM117
        with T.sblock(f"flush{plane}"):
            n, y, x, g, b, v = _axes(T.axis.spatial, spatial, loops[:6])
            _axes(T.axis.reduce, (1,), loops[6:])
            every = T.Ramp(v * LANES, _index(1), LANES)
            T.reads(halves[n, y, x, g, b, v * HALVES : v * HALVES + HALVES])
            T.writes(counts[n, y, x, g, b, v * LANES : v * LANES + LANES])
            with T.init():
                T.buffer_store(counts, T.Broadcast(tirx.const(0, "int32"), LANES), [n, y, x, g, b, every])
            pairs = halves[n, y, x, g, b, T.Ramp(v * HALVES, _index(1), HALVES)]
            total = _add_pairs(counts[n, y, x, g, b, every], pairs, "int32x4", wide)
            T.buffer_store(counts, total, [n, y, x, g, b, every])


def _add_pairs(total: tirx.Expr, values: tirx.Expr, dtype: str, wide: bool) -> tirx.Expr:
    """total + the sums of neighbouring lanes of `values`, each twice as wide."""
    if not wide:
        return T.call_llvm_pure_intrin(dtype, "llvm.arm.neon.vpadalu", total, values)
    return total + T.call_llvm_pure_intrin(dtype, "llvm.aarch64.neon.uaddlp", values)


def _index(value: int) -> tirx.Expr:
    return tirx.const(value, "int64")


def _wide(extents: Sequence[int]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(_index(extent) for extent in extents)


def _axes(kind, extents: Sequence[int], loops: Sequence[tirx.Var]) -> tuple[tirx.Var, ...]:  # type: ignore[no-untyped-def]
    return tuple(kind(_index(e), v, "int64") for e, v in zip(extents, loops, strict=True))


# --- The schedule -----------------------------------------------------------------------------------------------------


def work(sch: s_tir.Schedule, flush: blocks.Block) -> int:
    """How many words of 32 channels are counted for an output channel each."""
    (halves,) = sch.get_producers(flush)
    return blocks.work(sch, halves) * LANES


def accumulate(sch: s_tir.Schedule, flush: blocks.Block, at: blocks.Loop) -> None:
    """One plane's counts inside a tile, its pixels and vectors unrolled."""
    (halves,) = sch.get_producers(flush)
    sch.compute_at(flush, at, preserve_unit_loops=True)
    *_, x, _, b, _, run = sch.get_loops(flush)
    sch.reorder(run, x, b)
    sch.unroll(x)
    sch.unroll(b)
    sch.compute_at(halves, run, preserve_unit_loops=True)
    *_, x, _, b, _, ky, kx, word = sch.get_loops(halves)
    sch.reorder(ky, kx, word, x, b)
    sch.unroll(x)
    sch.unroll(b)
    for block, outermost in ((halves, ky), (flush, run)):
        zero = sch.decompose_reduction(block, outermost)
        for loop in sch.get_loops(zero)[-4:]:
            sch.unroll(loop)

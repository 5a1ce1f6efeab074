"""Counting differing bits without a vector popcount: one table look-up for four channels of many filters.

The 16 values that popcount(a ^ w) takes over the nibbles w are one 16-byte table per activation nibble a, and the byte
shuffle of x86 (PSHUFB) looks up a vector of weight nibbles in it, a byte lane per output channel:

    bytes[lane] += TABLE[a][w[lane]]

So four multiply-accumulates of each lane take a shuffle and an addition. What is loaded for it is shared: the weight
vector by the pixels of a tile, the table (a row of a 16-row constant, selected by the activation nibble) by its vectors
of output channels. Weights stay bits: byte i of a lane holds channels 8i..8i+7, its nibbles are split in registers.

A byte lane takes at most 63 such steps (63·4 = 252 < 256); after each run of them the bytes are flushed into 16-bit
sums. That takes no shuffle either: the even bytes of a vector are its 16-bit lanes modulo 256, the odd ones their
quotients, so byte lane 2j holds output channel j and byte lane 2j+1 holds channel v/2+j (`lane_order`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import Geometry

from . import blocks
from .tile import STACK_BYTES, Loop, Tile, rows

MAX_STEPS = 63  # nibbles that a byte can count: 4 bits each, 63·4 = 252
MAX_ROW = (1 << 16) - 1  # elements of a row that a 16-bit sum can count
STEPS_OF_WORD = 8
BYTES_OF_WORD = 4
SHUFFLES = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}


def table(lanes: int) -> NDArray[np.uint8]:
    """uint8 [16, lanes]: row a holds popcount(a ^ w) for w = 0..15, once in every 16 lanes, as PSHUFB reads it."""
    nibble = np.arange(16, dtype=np.uint8)
    differing = np.unpackbits((nibble[:, None] ^ nibble)[..., None], axis=-1).sum(-1, dtype=np.uint8)
    return np.tile(differing, lanes // 16)


def lane_order(lanes: int) -> NDArray[np.intp]:
    """The output channel of each byte lane: 0, v/2, 1, v/2+1, ..."""
    return np.arange(lanes).reshape(2, -1).T.ravel()


@dataclass(frozen=True)
class Chunk:
    """What one run of byte additions covers: taps and words of a window, each a divisor of the whole."""

    rows: int
    columns: int
    words: int

    @classmethod
    def of(cls, kh: int, kw: int, words: int) -> Chunk:
        """The longest run that cannot overflow a byte: within a tap, else whole taps of a row, else whole rows."""
        fit = MAX_STEPS // STEPS_OF_WORD
        inner = _divisor(words, fit)
        columns = _divisor(kw, fit // words) if inner == words else 1
        return cls(_divisor(kh, fit // (words * kw)) if columns == kw and inner == words else 1, columns, inner)

    @property
    def steps(self) -> int:
        """Additions to a byte before it is flushed."""
        return self.rows * self.columns * self.words * STEPS_OF_WORD


def _divisor(extent: int, limit: int) -> int:
    """The largest divisor of `extent` that is at most `limit`, at least 1."""
    return max(d for d in range(1, extent + 1) if extent % d == 0 and d <= max(limit, 1))


@dataclass(frozen=True)
class Shapes:
    """Extents of a count: planes uint32 [N,H,W,G,P,words], weight uint8 [G,B,kh,kw,4·words,v]."""

    planes: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry

    @property
    def lanes(self) -> int:
        return self.weight[5]

    @property
    def words(self) -> int:
        return self.planes[5]

    @property
    def chunk(self) -> Chunk:
        return Chunk.of(*self.weight[2:4], self.words)

    @property
    def output(self) -> tuple[int, ...]:
        """Of the counts, uint16 [N,HO,WO,G,B,v]."""
        batch, height, width = self.planes[:3]
        return (batch, *self.geometry.output_size(height, width), *self.weight[:2], self.lanes)


def count(shapes: Shapes, plane: int) -> tirx.PrimFunc:
    """planes, weight, table uint8 [16,v] → uint16 [N,HO,WO,G,B,v], the popcounts of one plane over each window.

    Two blocks: `nibbles` adds in bytes over a chunk, `flush` adds the chunks up, each all lanes of a vector at once.
    """
    kh, kw = shapes.weight[2:4]
    chunk = shapes.chunk
    chunks = (kh // chunk.rows, kw // chunk.columns, shapes.words // chunk.words)
    inner = (chunk.rows, chunk.columns, chunk.words, STEPS_OF_WORD)
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("count")
        planes = T.arg("planes", T.Buffer(_wide(shapes.planes), "uint32"))
        weight = T.arg("weight", T.Buffer(_wide(shapes.weight), "uint8"))
        lookup = T.arg("table", T.Buffer(_wide((16, shapes.lanes)), "uint8"))
        counts = T.arg("counts", T.Buffer(_wide(shapes.output), "uint16"))
        in_bytes = T.sblock_alloc_buffer(_wide((*shapes.output[:5], *chunks, shapes.lanes)), "uint8")
        _nibbles(shapes, plane, (planes, weight, lookup), in_bytes, (*shapes.output[:5], *chunks), inner)
        _flush(plane, in_bytes, counts, shapes.output[:5], chunks)
    return builder.get()


def _nibbles(
    shapes: Shapes,
    plane: int,
    operands: tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer],
    in_bytes: tirx.Buffer,
    spatial: tuple[int, ...],
    reduced: tuple[int, ...],
) -> None:
    """in_bytes[pixel, vector, chunk] = Σ TABLE[activation nibble][weight nibbles] over the chunk, a byte a step."""
    planes, weight, lookup = operands
    lanes, chunk = shapes.lanes, shapes.chunk
    (sy, sx), (dy, dx) = shapes.geometry.strides, shapes.geometry.dilation
    with T.grid(*_wide((*spatial, 1, *reduced))) as loops:  # noqa: SIM117
        with T.sblock(f"nibbles{plane}"):
            n, y, x, g, b, cy, cx, cw, v = _axes(T.axis.spatial, (*spatial, 1), loops[:9])
            ry, rx, rw, rk = _axes(T.axis.reduce, reduced, loops[9:])
            every = T.Ramp(v * lanes, _index(1), lanes)
            span = slice(v * lanes, v * lanes + lanes)
            ky, kx, word = cy * chunk.rows + ry, cx * chunk.columns + rx, cw * chunk.words + rw
            at = (n, y * sy + ky * dy, x * sx + kx * dx, g, plane, word)
            byte = word * BYTES_OF_WORD + rk // 2
            T.reads(planes[at], weight[g, b, ky, kx, byte, span], lookup[0:16, span])
            T.writes(in_bytes[n, y, x, g, b, cy, cx, cw, span])
            with T.init():
                T.buffer_store(in_bytes, _splat(0, "uint8", lanes), [n, y, x, g, b, cy, cx, cw, every])
            row = (planes[at] >> tirx.Cast("uint32", rk * 4)) & tirx.const(15, "uint32")
            filters = weight[g, b, ky, kx, byte, every] >> _splat(rk % 2 * 4, "uint8", lanes)
            nibbles = filters & _splat(15, "uint8", lanes)
            dtype = f"uint8x{lanes}"
            found = T.call_llvm_pure_intrin(dtype, SHUFFLES[lanes], lookup[tirx.Cast("int64", row), every], nibbles)
            # Never saturates; but plain additions LLVM regroups into (a + b + ...) + total: two registers a sum.
            total = T.call_llvm_pure_intrin(dtype, "llvm.uadd.sat", in_bytes[n, y, x, g, b, cy, cx, cw, every], found)
            T.buffer_store(in_bytes, total, [n, y, x, g, b, cy, cx, cw, every])


def _flush(
    plane: int, in_bytes: tirx.Buffer, counts: tirx.Buffer, spatial: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    """counts[pixel, vector] = Σ over chunks, even bytes into the lower half of the lanes, odd ones into the upper."""
    lanes = int(counts.shape[5])
    half = lanes // 2
    with T.grid(*_wide((*spatial, 1, *chunks))) as loops:  # noqa: SIM117
        with T.sblock(f"flush{plane}"):
            n, y, x, g, b, v = _axes(T.axis.spatial, (*spatial, 1), loops[:6])
            cy, cx, cw = _axes(T.axis.reduce, chunks, loops[6:])
            every = T.Ramp(v * lanes, _index(1), lanes)
            T.reads(in_bytes[n, y, x, g, b, cy, cx, cw, v * lanes : v * lanes + lanes])
            T.writes(counts[n, y, x, g, b, v * lanes : v * lanes + lanes])
            with T.init():
                T.buffer_store(counts, _splat(0, "uint16", lanes), [n, y, x, g, b, every])
            pairs = T.reinterpret(f"uint16x{half}", in_bytes[n, y, x, g, b, cy, cx, cw, every])
            for first, added in (
                (0, pairs & _splat(255, "uint16", half)),
                (half, pairs >> _splat(8, "uint16", half)),
            ):
                span = T.Ramp(v * lanes + first, _index(1), half)
                T.buffer_store(counts, counts[n, y, x, g, b, span] + added, [n, y, x, g, b, span])


def _index(value: int) -> tirx.Expr:
    return tirx.const(value, "int64")


def _wide(extents: Sequence[int]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(_index(extent) for extent in extents)


def _splat(value: tirx.Expr | int, dtype: str, lanes: int) -> tirx.Expr:
    return T.Broadcast(tirx.const(value, dtype) if isinstance(value, int) else tirx.Cast(dtype, value), lanes)


def _axes(kind, extents: Sequence[int], loops: Sequence[tirx.Var]) -> tuple[tirx.Var, ...]:  # type: ignore[no-untyped-def]
    return tuple(kind(_index(e), v, "int64") for e, v in zip(extents, loops, strict=True))


# --- The schedule -----------------------------------------------------------------------------------------------------


def choose(loop: Loop) -> Tile:
    """The tile with the least micro-operations a look-up; byte sums, weights and a table row are in registers."""
    found = [
        Tile(px, q, rows(loop.height))
        for q in range(loop.q_multiple, loop.blocks + 1, loop.q_multiple)
        if loop.blocks % q == 0
        for px in range(1, loop.width + 1)
        if px * q + q + 2 <= loop.registers and max(px * q * 2, q * 4) * loop.lanes < STACK_BYTES
    ]
    if not found:
        return Tile(1, loop.q_multiple, rows(loop.height))
    return min(found, key=lambda tile: _score(loop.width, tile))


def _score(width: int, tile: Tile) -> float:
    """Micro-operations a look-up: shuffle and add, index and load of a table row (3), load and split of weights (2)."""
    ragged = 1.02 if width % tile.px else 1.0
    return ceil(width / tile.px) * tile.px / width * ragged * (2 + 3 / tile.q + 2 / tile.px)


def work(sch: s_tir.Schedule, flush: blocks.Block) -> int:
    """How many words of 32 channels are counted for an output channel each."""
    (nibbles,) = sch.get_producers(flush)
    return blocks.work(sch, nibbles) * blocks.written_shape(sch, flush)[5] // STEPS_OF_WORD


def accumulate(sch: s_tir.Schedule, flush: blocks.Block, at: blocks.Loop) -> None:
    """One plane's counts inside a tile: chunk by chunk, pixels, vectors and the bytes of a word unrolled."""
    (nibbles,) = sch.get_producers(flush)
    sch.compute_at(flush, at, preserve_unit_loops=True)
    *_, x, _, b, _, cy, cx, cw = sch.get_loops(flush)
    sch.reorder(cy, cx, cw, x, b)
    sch.unroll(x)
    sch.unroll(b)
    sch.compute_at(nibbles, cw, preserve_unit_loops=True)
    *_, x, _, b, _, _, _, _, ry, rx, rw, rk = sch.get_loops(nibbles)
    sch.reorder(ry, rx, rw, rk, x, b)
    for loop in (rk, x, b):
        sch.unroll(loop)
    for block, outermost in ((nibbles, ry), (flush, cy)):
        zero = sch.decompose_reduction(block, outermost)
        for loop in sch.get_loops(zero)[-2:]:
            sch.unroll(loop)

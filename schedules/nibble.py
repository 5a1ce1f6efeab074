"""Counting differing bits without a vector popcount: one table look-up for four channels of many filters.

The 16 values that popcount(a ^ w) takes over the nibbles w are one 16-byte table per activation nibble a, and the byte
shuffle of x86 (PSHUFB) looks up a vector of weight nibbles in it, a byte lane per output channel:

    bytes[lane] += TABLE[a][w[lane]]

So four multiply-accumulates of each lane take a shuffle and an addition. What is loaded for it is shared: the weight
vector by the pixels of a tile, the table by its vectors of output channels. The tables of both nibbles of an activation
byte stand side by side in one row of 32 bytes, 256 rows: one index for two look-ups is what a core that issues four
instructions a cycle needs (llvm-mca: 1.01 cycles a look-up against 1.15 on Haswell, 1.20 against 1.58 on Skylake-SP).

Weights are stored as bits: a byte of a lane holds eight channels. To split it in registers takes a shift and two ANDs
for two look-ups a pixel of the tile, a sixth of all vector instructions. Where many pixels share the weights they are
split beforehand instead, once a run of the layer, into twice their size (`split`, `splits`); then the tile also has
registers left for more pixels.

A byte lane takes at most 63 such steps (63·4 = 252 < 256); after each run of them the bytes are flushed into 16-bit
sums. That takes no shuffle either: the even bytes of a vector are its 16-bit lanes modulo 256, the odd ones their
quotients, so byte lane 2j holds output channel j and byte lane 2j+1 holds channel v/2+j (`lane_order`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import Geometry

from . import blocks
from .decisions import Decide, by_default
from .tile import STACK_BYTES, Loop, Tile, decided, rows

MAX_STEPS = 63  # nibbles that a byte can count: 4 bits each, 63·4 = 252
MAX_ROW = (1 << 16) - 1  # elements of a row that a 16-bit sum can count
SPLIT_PIXELS = 16  # from the fourth tile of pixels on, the work that is saved exceeds that of writing weights anew
SPLIT_LANES = 32  # SSE overwrites an operand: it copies the table for each vector of filters, so it has one a tile
SPLIT_AXES = 5  # of weights split beforehand; no other operand has as many
MAX_BODIES = 256  # look-ups in a row of code
STEPS_OF_WORD = 8
BYTES_OF_WORD = 4
TABLE_SHAPE = (256, 2, 16)
SHUFFLES = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}


def table() -> NDArray[np.uint8]:
    """uint8 [256, 2, 16]: for each activation byte, popcount(n ^ w), w = 0..15, n its low and then its high nibble."""
    byte, nibble = np.arange(256, dtype=np.uint8), np.arange(16, dtype=np.uint8)
    differing = np.stack([byte & 15, byte >> 4], 1)[..., None] ^ nibble
    return np.unpackbits(differing[..., None], axis=-1).sum(-1, dtype=np.uint8)


def lane_order(lanes: int) -> NDArray[np.intp]:
    """The output channel of each byte lane: 0, v/2, 1, v/2+1, ..."""
    return np.arange(lanes).reshape(2, -1).T.ravel()


def run_length(words: int) -> int:
    """How many words of a window are added up in bytes at a time: the largest divisor that cannot overflow one."""
    return max(d for d in range(1, MAX_STEPS // STEPS_OF_WORD + 1) if words % d == 0)


def splits(lanes: int, pixels: int) -> bool:
    """Whether a layer of `pixels` outputs a channel counts from weights split beforehand."""
    return lanes >= SPLIT_LANES and pixels >= SPLIT_PIXELS


@dataclass(frozen=True)
class Shapes:
    """Extents of a count: planes uint32 [N,H,W,G,P,words], weight uint8 [G,B,4·kh·kw·words,v] or split, [...,2,v]."""

    planes: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry

    @property
    def lanes(self) -> int:
        return self.weight[-1]

    @property
    def split(self) -> bool:
        """Whether the weights come a nibble a byte."""
        return len(self.weight) == SPLIT_AXES

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs there are in a window, and the words of each."""
        words = self.weight[2] // BYTES_OF_WORD
        return words // run_length(words), run_length(words)

    @property
    def output(self) -> tuple[int, ...]:
        """Of the counts, uint16 [N,HO,WO,G,B,v]."""
        batch, height, width = self.planes[:3]
        return (batch, *self.geometry.output_size(height, width), *self.weight[:2], self.lanes)


def count(shapes: Shapes, plane: int) -> tirx.PrimFunc:
    """planes, weight, `table` → uint16 [N,HO,WO,G,B,v], the popcounts of one plane over each window.

    Two blocks: `nibbles` adds up a run of words in bytes, `flush` adds up the runs, each all lanes of a vector at once.
    """
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("count")
        planes = T.arg("planes", T.Buffer(_wide(shapes.planes), "uint32"))
        weight = T.arg("weight", T.Buffer(_wide(shapes.weight), "uint8"))
        lookup = T.arg("table", T.Buffer(_wide(TABLE_SHAPE), "uint8"))
        counts = T.arg("counts", T.Buffer(_wide(shapes.output), "uint16"))
        in_bytes = T.sblock_alloc_buffer(_wide((*shapes.output[:5], shapes.runs[0], shapes.lanes)), "uint8")
        _nibbles(shapes, plane, (planes, weight, lookup), in_bytes)
        _flush(shapes, plane, in_bytes, counts)
    return builder.get()


def split(shape: tuple[int, ...]) -> tirx.PrimFunc:
    """weight uint8 [G,B,4·kh·kw·words,v] → uint8 [G,B,4·kh·kw·words,2,v], low nibbles and high ones."""
    *outer, lanes = shape
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("split")
        weight = T.arg("weight", T.Buffer(_wide(shape), "uint8"))
        nibbles = T.arg("nibbles", T.Buffer(_wide((*outer, 2, lanes)), "uint8"))
        with T.grid(*_wide(outer)) as loops:  # noqa: SIM117
            with T.sblock("split"):
                at = _axes(T.axis.spatial, outer, loops)
                every, span = T.Ramp(_index(0), _index(1), lanes), slice(0, lanes)
                read, written, vector = (*at, span), (*at, slice(0, 2), span), (*at, every)
                T.reads(weight[read])
                T.writes(nibbles[written])
                bits = weight[vector]
                T.buffer_store(nibbles, bits & _splat(15, "uint8", lanes), [*at, 0, every])
                T.buffer_store(nibbles, bits >> _splat(4, "uint8", lanes), [*at, 1, every])
    return builder.get()


def _nibbles(
    shapes: Shapes, plane: int, operands: tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer], in_bytes: tirx.Buffer
) -> None:
    """in_bytes[pixel, vector, run] = Σ TABLE[activation nibble][weight nibbles] over the words of the run."""
    planes, weight, lookup = operands
    lanes, (runs, length) = shapes.lanes, shapes.runs
    (_, kw), words = shapes.geometry.kernel, shapes.planes[5]
    (sy, sx), (dy, dx) = shapes.geometry.strides, shapes.geometry.dilation
    spatial, reduced = (*shapes.output[:5], runs, 1), (length, STEPS_OF_WORD)
    with T.grid(*_wide((*spatial, *reduced))) as loops:  # noqa: SIM117
        with T.sblock(f"nibbles{plane}"):
            n, y, x, g, b, run, v = _axes(T.axis.spatial, spatial, loops[:7])
            of_run, step = _axes(T.axis.reduce, reduced, loops[7:])
            index = run * length + of_run  # of the window's words, tap by tap
            ky, kx, word = index // (kw * words), index // words % kw, index % words
            at = (n, y * sy + ky * dy, x * sx + kx * dx, g, plane, word)
            byte, half = index * BYTES_OF_WORD + step // 2, step % 2
            every, span = T.Ramp(v * lanes, _index(1), lanes), slice(v * lanes, v * lanes + lanes)
            stored = (g, b, byte, half) if shapes.split else (g, b, byte)
            read, vector = (*stored, span), (*stored, every)
            T.reads(planes[at], weight[read], lookup[tuple(slice(0, e) for e in TABLE_SHAPE)])
            T.writes(in_bytes[n, y, x, g, b, run, span])
            with T.init():
                T.buffer_store(in_bytes, _splat(0, "uint8", lanes), [n, y, x, g, b, run, every])
            activation = (planes[at] >> tirx.Cast("uint32", step // 2 * 8)) & tirx.const(255, "uint32")
            values = lookup[tirx.Cast("int64", activation), half, T.Ramp(_index(0), _index(1), 16)]
            nibbles = weight[vector]
            if not shapes.split:
                nibbles = (nibbles >> _splat(half * 4, "uint8", lanes)) & _splat(15, "uint8", lanes)
            dtype = f"uint8x{lanes}"
            found = T.call_llvm_pure_intrin(dtype, SHUFFLES[lanes], _repeat(values, lanes), nibbles)
            # Never saturates; but plain additions LLVM regroups into (a + b + ...) + total: two registers a sum.
            total = T.call_llvm_pure_intrin(dtype, "llvm.uadd.sat", in_bytes[n, y, x, g, b, run, every], found)
            T.buffer_store(in_bytes, total, [n, y, x, g, b, run, every])


def _flush(shapes: Shapes, plane: int, in_bytes: tirx.Buffer, counts: tirx.Buffer) -> None:
    """counts[pixel, vector] = Σ over runs, even bytes into the lower half of the lanes, odd ones into the upper."""
    lanes, half = shapes.lanes, shapes.lanes // 2
    spatial, runs = (*shapes.output[:5], 1), shapes.runs[0]
    with T.grid(*_wide((*spatial, runs))) as loops:  # noqa: SIM117
        with T.sblock(f"flush{plane}"):
            n, y, x, g, b, v = _axes(T.axis.spatial, spatial, loops[:6])
            (run,) = _axes(T.axis.reduce, (runs,), loops[6:])
            every, span = T.Ramp(v * lanes, _index(1), lanes), slice(v * lanes, v * lanes + lanes)
            T.reads(in_bytes[n, y, x, g, b, run, span])
            T.writes(counts[n, y, x, g, b, span])
            with T.init():
                T.buffer_store(counts, _splat(0, "uint16", lanes), [n, y, x, g, b, every])
            pairs = T.reinterpret(f"uint16x{half}", in_bytes[n, y, x, g, b, run, every])
            even, odd = pairs & _splat(255, "uint16", half), pairs >> _splat(8, "uint16", half)
            for first, added in ((0, even), (half, odd)):
                part = T.Ramp(v * lanes + first, _index(1), half)
                T.buffer_store(counts, counts[n, y, x, g, b, part] + added, [n, y, x, g, b, part])


def _index(value: int) -> tirx.Expr:
    return tirx.const(value, "int64")


def _wide(extents: Sequence[int]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(_index(extent) for extent in extents)


def _splat(value: tirx.Expr | int, dtype: str, lanes: int) -> tirx.Expr:
    return T.Broadcast(tirx.const(value, dtype) if isinstance(value, int) else tirx.Cast(dtype, value), lanes)


def _repeat(values: tirx.Expr, lanes: int) -> tirx.Expr:
    """16 bytes over and over: a load that broadcasts."""
    return values if lanes == 16 else T.Shuffle([values] * (lanes // 16), list(range(lanes)))


def _axes(kind, extents: Sequence[int], loops: Sequence[tirx.Var]) -> tuple[tirx.Var, ...]:  # type: ignore[no-untyped-def]
    return tuple(kind(_index(e), v, "int64") for e, v in zip(extents, loops, strict=True))


# --- The schedule -----------------------------------------------------------------------------------------------------


def choose(loop: Loop, decide: Decide = by_default) -> Tile:
    """The tile with the least work a look-up whose byte sums, split weights and a table row fit the registers."""
    found = [
        Tile(px, q, rows(loop.height))
        for q in range(loop.q_multiple, loop.blocks + 1, loop.q_multiple)
        if loop.blocks % q == 0
        for px in range(1, loop.width + 1)
        if px * q + (1 if loop.split else 2) * q + 3 <= loop.registers
        and max(px * q * 2, q * 4) * loop.lanes < STACK_BYTES
    ]
    tile = decided(loop, found, lambda tile: _score(loop, tile), decide)
    return replace(tile, row=_writes_row(loop.width, tile))


def _score(loop: Loop, tile: Tile) -> float:
    """Cost of a look-up, the mean over a row. A row that is written out ends in a tile as wide as what is left."""
    full, rest = divmod(loop.width, tile.px)
    if rest and _writes_row(loop.width, tile):
        ends = full * tile.px * _cost(loop, tile.px, tile.q) + rest * _cost(loop, rest, tile.q)
        return 1.05 * ends / loop.width  # more code
    condition = 1.5 if rest else 1.0  # of every step
    return _cost(loop, tile.px, tile.q) * condition * ceil(loop.width / tile.px) * tile.px / loop.width


def _cost(loop: Loop, px: int, q: int) -> float:
    """Instructions a look-up, those of the vector pipes counted twice.

    The shuffle and the addition; a table row, 1.5 for its index and a load, for q of them; a vector of weight nibbles,
    half a load and 1.5 to split it, for px of them. Of weights split beforehand it is a load, mostly from the second
    cache: there the numbers are those that fit a Zen 5 core, within 5%, on AVX2 and AVX-512BW.
    """
    few = 1 / (px * q) ** 2  # sums, which wait for each other
    if loop.split:
        return (4 + 3.5 / min(q, 2) + 3 / px) * (1 + few)
    copies = 0.0 if loop.lanes >= SPLIT_LANES else 1 - 1 / q  # of a table's register, by SSE
    return ((2 + copies + 2.5 / q + 2 / px) + (2 + copies + 1.5 / px)) * (1 + 2 * few)


def _writes_row(width: int, tile: Tile) -> bool:
    """Whether a row that no whole number of tiles makes up is written out, so that its last tile has no conditions."""
    return width % tile.px != 0 and width * tile.q * STEPS_OF_WORD <= MAX_BODIES


def is_split(sch: s_tir.Schedule, flush: blocks.Block) -> bool:
    """Whether the weights of a count come a nibble a byte."""
    (nibbles,) = sch.get_producers(flush)
    return any(len(read.source.shape) == SPLIT_AXES for read in sch.get(nibbles).reads)


def work(sch: s_tir.Schedule, flush: blocks.Block) -> int:
    """How many words of 32 channels are counted for an output channel each."""
    (nibbles,) = sch.get_producers(flush)
    return blocks.work(sch, nibbles) * blocks.written_shape(sch, flush)[5] // STEPS_OF_WORD


def accumulate(sch: s_tir.Schedule, flush: blocks.Block, at: blocks.Loop) -> None:
    """One plane's counts inside a tile: run by run, the pixels, the vectors and the steps of a word unrolled."""
    (nibbles,) = sch.get_producers(flush)
    sch.compute_at(flush, at, preserve_unit_loops=True)
    *_, x, _, b, _, run = sch.get_loops(flush)
    sch.reorder(run, x, b)
    sch.unroll(x)
    sch.unroll(b)
    sch.compute_at(nibbles, run, preserve_unit_loops=True)
    *_, x, _, b, _, _, word, step = sch.get_loops(nibbles)
    byte, half = sch.split(step, [BYTES_OF_WORD, 2])
    sch.reorder(word, byte, x, half, b)
    for loop in (byte, x, half, b):
        sch.unroll(loop)
    for block, outermost in ((nibbles, word), (flush, run)):
        zero = sch.decompose_reduction(block, outermost)
        for loop in sch.get_loops(zero)[-2:]:
            sch.unroll(loop)

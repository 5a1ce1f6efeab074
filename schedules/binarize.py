"""Residual binarisation into packed planes: one vector compare gives one word of a plane.

R_0 = x, H_i = sign(R_{i-1}), R_i = R_{i-1} − β_i·H_i (Li et al. 2017, eq. 9), in float32, rounded after each
subtraction. Since β_i·H_i is ±β_i exactly, a select and one subtraction a plane are that formula to the bit.

Written in TensorIR, because the mask of a 32-lane compare *is* the word, and te.compute cannot say so:
`reinterpret("uint32", Cast("uint1x32", r >= 0))` becomes a compare into a mask register on AVX-512 and compare + movmsk
before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS, Geometry, words_of

NAMED_ORDERS = 3  # up to here a residual is a name in the code; above, it is kept in memory


@dataclass(frozen=True)
class Binarization:
    """What one `horq.binarize` does, as plain numbers. `input_shape` is [N,H,W,C]."""

    input_shape: tuple[int, int, int, int]
    beta_shape: tuple[int, ...]
    order: int
    first: int
    scale: str
    geometry: Geometry

    @property
    def group_channels(self) -> int:
        return self.input_shape[3] // self.geometry.groups

    @property
    def output_shape(self) -> tuple[int, ...]:
        batch, height, width, _ = self.input_shape
        words = words_of(self.group_channels)
        if self.scale == "patch":
            height, width = self.geometry.output_size(height, width)
            words *= self.geometry.kernel[0] * self.geometry.kernel[1]
        return (batch, height, width, self.geometry.groups, self.order - self.first, words)


def binarize(spec: Binarization) -> tirx.PrimFunc:
    """x float32 [N,H,W,C], β float32 → planes uint32, see `horq.binarize`; one sblock a kind of word."""
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("binarize")
        x = T.arg("x", T.Buffer(_wide(spec.input_shape), "float32"))
        beta = T.arg("beta", T.Buffer(_wide(spec.beta_shape), "float32"))
        planes = T.arg("planes", T.Buffer(_wide(spec.output_shape), "uint32"))
        full, tail = divmod(spec.group_channels, WORD_BITS)
        if full:
            _words(spec, x, beta, planes, range(full), WORD_BITS)
        if tail:
            _words(spec, x, beta, planes, range(full, full + 1), tail)
    return builder.get()


def _words(spec: Binarization, x: tirx.Buffer, beta: tirx.Buffer, planes: tirx.Buffer, words: range, bits: int) -> None:
    """The sblock that packs `words` of every pixel and group, each from `bits` channels.

    Whole words have one axis over all groups, since what TVM can fuse into a tile of channels reads `32·word` onwards.
    """
    batch, height, width, groups, count, _ = spec.output_shape
    taps = spec.geometry.kernel if spec.scale == "patch" else (1, 1)
    whole = spec.group_channels % WORD_BITS == 0
    extents = _wide((batch, height, width, *taps, groups * len(words)))
    with T.grid(*extents) as loops, T.sblock("pack" if bits == WORD_BITS else "pack_tail"):
        n, y, x_, ry, rx, index = (T.axis.spatial(e, v, "int64") for e, v in zip(extents, loops, strict=True))
        g, j = tirx.floordiv(index, len(words)), tirx.floormod(index, len(words))
        channel = index * WORD_BITS if whole else g * spec.group_channels + (j + words.start) * WORD_BITS
        row, column, inside = _source(spec, y, x_, ry, rx)
        word = (ry * taps[1] + rx) * words_of(spec.group_channels) + words.start + j
        scales = [beta[index] for index in _beta_indices(spec, n, y, x_, g)]
        if inside is None:
            T.reads(x[n, row, column, channel : channel + bits], beta[_beta_region(spec, n, y, x_, g)])
        else:
            T.reads(
                x[n, 0 : spec.input_shape[1], 0 : spec.input_shape[2], channel : channel + bits],
                beta[_beta_region(spec, n, y, x_, g)],
            )
        T.writes(planes[n, y, x_, g, 0:count, word])
        parts = []
        for offset, lanes in _chunks(bits):
            value = _load(x, (n, row, column, channel + offset), lanes, inside)
            parts.append((offset, _plane_words(value, scales, lanes, spec.first)))
        for p in range(count):
            bitsets = [w[p] << tirx.const(offset, "uint32") if offset else w[p] for offset, w in parts]
            T.buffer_store(planes, _any(bitsets), [n, y, x_, g, p, word])


def _wide(extents: tuple[int, ...]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(tirx.const(extent, "int64") for extent in extents)


def _chunks(bits: int) -> Iterator[tuple[int, int]]:
    """Offsets and lane counts that cover `bits` channels: whole masks while they fit, then single bits."""
    offset = 0
    for lanes in (32, 16, 8):
        while bits - offset >= lanes:
            yield offset, lanes
            offset += lanes
    for rest in range(offset, bits):
        yield rest, 1


def _source(
    spec: Binarization, y: tirx.Expr, x: tirx.Expr, ry: tirx.Expr, rx: tirx.Expr
) -> tuple[tirx.Expr, tirx.Expr, tirx.Expr | None]:
    """Input row and column of a tap, and whether they are inside (None: always)."""
    if spec.scale != "patch":
        return y, x, None
    geometry, (_, height, width, _) = spec.geometry, spec.input_shape
    top, left, _, _ = geometry.padding
    row = y * geometry.strides[0] + ry * geometry.dilation[0] - top
    column = x * geometry.strides[1] + rx * geometry.dilation[1] - left
    if not any(geometry.padding):
        return row, column, None
    return row, column, tirx.all(row >= 0, row < height, column >= 0, column < width)


def _load(x: tirx.Buffer, index: tuple[tirx.Expr, ...], lanes: int, inside: tirx.Expr | None) -> tirx.Expr:
    """`lanes` channels of x from `index` on; zeros where the position is padding."""
    n, row, column, channel = index
    value = x[n, row, column, T.Ramp(channel, tirx.const(1, "int64"), lanes) if lanes > 1 else channel]
    if inside is None:
        return value
    return tirx.if_then_else(inside, value, _splat(tirx.const(0.0, "float32"), lanes))


def _splat(value: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.Broadcast(value, lanes) if lanes > 1 else value


def _plane_words(value: tirx.Expr, scales: list[tirx.Expr], lanes: int, first: int) -> list[tirx.Expr]:
    """The bits of each stored plane, in the low `lanes` bits of a uint32."""
    residual = value
    for beta in scales[:first]:  # a plane known to be all +1 (design.md, range analysis)
        residual = residual - _splat(beta, lanes)
    words = []
    for beta in scales[first:]:
        # Kept: R_{i-1} occurs twice in R_i. TVM's passes would walk 2^K copies of an expression, and its code generator
        # those of a name, which takes a minute at order 7.
        residual = _kept(residual, lanes) if len(scales) > NAMED_ORDERS else T.bind(residual)
        positive = residual >= _splat(tirx.const(0.0, "float32"), lanes)
        words.append(_mask(positive, lanes))
        residual = residual - tirx.Select(positive, _splat(beta, lanes), _splat(-beta, lanes))
    return words


def _kept(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """The value, stored and loaded again: a stack slot to TVM, a register to LLVM."""
    slot, span = T.sblock_alloc_buffer((lanes,), "float32"), T.Ramp(0, 1, lanes) if lanes > 1 else 0
    T.buffer_store(slot, value, [span])
    return slot[span]


def _mask(positive: tirx.Expr, lanes: int) -> tirx.Expr:
    if lanes == 1:
        return tirx.Cast("uint32", positive)
    word = T.reinterpret(f"uint{lanes}", tirx.Cast(f"uint1x{lanes}", positive))
    return word if lanes == 32 else tirx.Cast("uint32", word)


def _any(words: list[tirx.Expr]) -> tirx.Expr:
    result = words[0]
    for word in words[1:]:
        result = result | word
    return result


def _beta_indices(
    spec: Binarization, n: tirx.Expr, y: tirx.Expr, x: tirx.Expr, g: tirx.Expr
) -> list[tuple[tirx.Expr, ...]]:
    """Where β_1 … β_K of a pixel stand."""
    prefix = {"static": (tirx.const(0, "int64"),), "sample": (n,), "patch": (n, y, x, g)}[spec.scale]
    return [(*prefix, tirx.const(k, "int64")) for k in range(spec.order)]


def _beta_region(
    spec: Binarization, n: tirx.Expr, y: tirx.Expr, x: tirx.Expr, g: tirx.Expr
) -> tuple[tirx.Expr | slice, ...]:
    prefix = {"static": (tirx.const(0, "int64"),), "sample": (n,), "patch": (n, y, x, g)}[spec.scale]
    return (*prefix, slice(0, spec.order))

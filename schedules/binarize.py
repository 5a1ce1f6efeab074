"""Residual binarisation into packed planes: one vector compare gives one word of a plane.

R_0 = x, H_i = sign(R_{i-1}), R_i = R_{i-1} − β_i·H_i (Li et al. 2017, eq. 9), in float32, rounded after each
subtraction. Since β_i·H_i is ±β_i exactly, a select and one subtraction a plane are that formula to the bit.

Written in TensorIR, because the mask of a 32-lane compare *is* the word, and te.compute cannot say so:
`reinterpret("uint32", Cast("uint1x32", r >= 0))` becomes a compare into a mask register on AVX-512 and compare + movmsk
before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS, words_of

from .lanes import mask, span, splat, tail_lanes

NAMED_ORDERS = 3  # up to here a residual is a name in the code; above, it is kept in memory


@dataclass(frozen=True)
class Binarization:
    """What one `horq.binarize` of scale `sample` or `static` does, as plain numbers. `input_shape` is [N,H,W,C].

    β is [1,K] or [N,K]. With `affine`, x·factor + addend takes the place of x.
    """

    input_shape: tuple[int, int, int, int]
    beta_shape: tuple[int, ...]
    order: int
    first: int
    scale: str
    groups: int
    affine: bool

    @property
    def group_channels(self) -> int:
        return self.input_shape[3] // self.groups

    @property
    def output_shape(self) -> tuple[int, ...]:
        batch, height, width, _ = self.input_shape
        return (batch, height, width, self.groups, self.order - self.first, words_of(self.group_channels))


def binarize(spec: Binarization) -> tirx.PrimFunc:
    """x float32 [N,H,W,C], β float32, factor and addend float32 [C] → planes uint32; one sblock a kind of word."""
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        operands, planes = arguments(spec)
        full, tail = divmod(spec.group_channels, WORD_BITS)
        if full:
            _words(spec, operands, planes, range(full), WORD_BITS)
        if tail:
            _words(spec, operands, planes, range(full, full + 1), tail)
    return builder.get()


def arguments(spec: Binarization) -> tuple[tuple[tirx.Buffer, ...], tirx.Buffer]:
    """The parameters of `binarize` in the function that is being written: x, β, factor and addend if any; planes."""
    T.func_name("binarize")
    x = T.arg("x", T.Buffer(_wide(spec.input_shape), "float32"))
    beta = T.arg("beta", T.Buffer(_wide(spec.beta_shape), "float32"))
    channels = _wide(spec.input_shape)[3:]
    line = [T.arg(name, T.Buffer(channels, "float32")) for name in ("factor", "addend")[: 2 * spec.affine]]
    return (x, beta, *line), T.arg("planes", T.Buffer(_wide(spec.output_shape), "uint32"))


def _words(spec: Binarization, operands: tuple[tirx.Buffer, ...], planes: tirx.Buffer, words: range, bits: int) -> None:
    """The sblock that packs `words` of every pixel and group, each from `bits` channels.

    Whole words have one axis over all groups, since what TVM can fuse into a tile of channels reads `32·word` onwards.
    """
    x, beta, *line = operands
    batch, height, width, groups, count, _ = spec.output_shape
    whole = spec.group_channels % WORD_BITS == 0
    extents = _wide((batch, height, width, groups * len(words)))
    with T.grid(*extents) as loops, T.sblock("pack" if bits == WORD_BITS else "pack_tail"):
        n, y, x_, index = (T.axis.spatial(e, v, "int64") for e, v in zip(extents, loops, strict=True))
        g, j = tirx.floordiv(index, len(words)), tirx.floormod(index, len(words))
        channel = index * WORD_BITS if whole else g * spec.group_channels + (j + words.start) * WORD_BITS
        row = n if spec.scale == "sample" else tirx.const(0, "int64")
        scales = [beta[row, tirx.const(k, "int64")] for k in range(spec.order)]
        region = slice(channel, channel + bits)
        T.reads(x[n, y, x_, region], beta[row, 0 : spec.order], *(operand[region] for operand in line))
        T.writes(planes[n, y, x_, g, 0:count, words.start + j])
        parts = []
        for offset, lanes in tail_lanes(bits):
            at = span(channel + offset, lanes)
            value = x[n, y, x_, at]
            if line:
                value = value * line[0][at] + line[1][at]
            parts.append((offset, _plane_words(value, scales, lanes, spec.first)))
        for p in range(count):
            bitsets = [w[p] << tirx.const(offset, "uint32") if offset else w[p] for offset, w in parts]
            T.buffer_store(planes, _any(bitsets), [n, y, x_, g, p, words.start + j])


def _wide(extents: tuple[int, ...]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(tirx.const(extent, "int64") for extent in extents)


def _plane_words(value: tirx.Expr, scales: list[tirx.Expr], lanes: int, first: int) -> list[tirx.Expr]:
    """The bits of each stored plane, in the low `lanes` bits of a uint32."""
    residual = value
    for beta in scales[:first]:  # a plane known to be all +1 (design.md, range analysis)
        residual = residual - splat(beta, lanes)
    words = []
    for beta in scales[first:]:
        # Kept: R_{i-1} occurs twice in R_i. TVM's passes would walk 2^K copies of an expression, and its code generator
        # those of a name, which takes a minute at order 7.
        residual = _kept(residual, lanes) if len(scales) > NAMED_ORDERS else T.bind(residual)
        positive = residual >= splat(tirx.const(0.0, "float32"), lanes)
        words.append(mask(positive, lanes))
        residual = residual - tirx.Select(positive, splat(beta, lanes), splat(-beta, lanes))
    return words


def _kept(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """The value, stored and loaded again: a stack slot to TVM, a register to LLVM."""
    slot, at = T.sblock_alloc_buffer((lanes,), "float32"), span(0, lanes)
    T.buffer_store(slot, value, [at])
    return slot[at]


def _any(words: list[tirx.Expr]) -> tirx.Expr:
    result = words[0]
    for word in words[1:]:
        result = result | word
    return result

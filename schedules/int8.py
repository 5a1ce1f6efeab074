"""Int8 layers: an image quantised into rows of elements, and the dot products of a word of them with many filters.

Two instructions of x86 multiply small integers and add them up in 32-bit lanes without saturating:

    quads  VPDPBUSD  acc += u8·s8 + u8·s8 + u8·s8 + u8·s8       (AVX-512 VNNI, AVX-VNNI)
    pairs  PMADDWD   s16·s16 + s16·s16, then an addition        (SSE2 and everything after it)

VPMADDUBSW, the usual way without VNNI, saturates its 16-bit sums: 2·255·127 does not fit, so weights would lose a bit.
It brings nothing either: it needs PMADDWD behind it, so two multiplications for 4 products a lane, as two PMADDWDs do.

ARM multiplies bytes of one kind, so elements are q − 128, exact in int8 as the weights are:

    sdot     SDOT            acc += s8·s8 + s8·s8 + s8·s8 + s8·s8    (dot products: Cortex-A55, A75 and later)
    smull    SMULL, SADALP   s8·s8 in 16 bits, then acc += the sum of two neighbours; vmull: VMULL and VPADAL, ARMv7

One word of the activation is broadcast, a vector holds the words of v filters, and the tile nest is that of the other
convolutions (`x86.direct_convolution`). Rows and runs are explained in `ops/int8.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import s_tir, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm import reference_int8
from horq_tvm.ops import Geometry
from horq_tvm.ops.int8 import (
    ACTIVATION_DTYPE,
    ELEMENTS,
    WEIGHT_DTYPE,
    Activation,
    Int8Style,
    Rows,
    below_level,
    element_of_zero,
)
from horq_tvm.targets import Target

from . import blocks
from .decisions import Decide, by_default

LEAST_LANES = 4  # 128 bits of int32: the narrowest vector of all these instructions
VPDPBUSD = {4: "llvm.x86.avx512.vpdpbusd.128", 8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}
# Products of bytes in 16 bits, by their LLVM names.
SMULL = {"smull": "llvm.aarch64.neon.smull", "vmull": "llvm.arm.neon.vmulls"}
PMADDWD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
BITS = {"uint8": 8, "int8": 8, "int16": 16}
ROUND = 1.5 * 2**23  # x + ROUND is x rounded to an integer (halves to even), which its lowest bits then hold
FILL_BYTES = 64
PARALLEL_ELEMENTS = 1 << 16  # elements under which sharing a quantisation out costs more than it brings


def style(target: Target) -> Int8Style | None:
    """Which of the instructions a target has; None for a family without int8 kernels."""
    if target.family == "arm":
        if target.architecture != "aarch64":
            return "vmull"
        return "sdot" if "asimddp" in target.features else "smull"
    if target.family != "x86":
        return None
    vnni = "avx512_vnni" in target.features or ("avx_vnni" in target.features and target.vector_bits <= 256)
    return "quads" if vnni else "pairs"


# --- Quantisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantisation:
    """One `horq.quantize` as plain numbers. `shape` is [N,H,W,C], `planar` [N,C,H,W]; `lanes` floats in a vector.

    With `zero_points`, one a channel, the operand holds bytes, which are elements already; these pad it.
    """

    shape: tuple[int, ...]
    planar: bool
    activation: Activation
    rows: Rows
    geometry: Geometry
    style: Int8Style
    lanes: int
    zero_points: tuple[int, ...] = ()

    @property
    def image(self) -> tuple[int, int, int, int]:
        """The operand as [N, planes, H, row]: contiguous rows, one for each channel where it is planar."""
        n, a, b, c = self.shape
        return (n, a, b, c) if self.planar else (n, 1, a, b * c)

    @property
    def output(self) -> tuple[int, int, int]:
        return (self.shape[0], self.rows.height, self.rows.length)

    @property
    def zero_elements(self) -> tuple[int, ...]:
        """The element of the value 0: of an image of bytes one a channel, else one."""
        if self.zero_points:
            return tuple(level - below_level(self.style) for level in self.zero_points)
        return (element_of_zero(self.style, self.activation.zero_point),)

    @property
    def runs(self) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
        """(count, source step, target step) of two nested loops over a row, and the length of the runs inside."""
        if self.planar:
            return (1, 0, 0), (1, 0, 0), self.shape[3]
        width, channels = self.shape[2:]
        groups, stride = self.geometry.groups, self.geometry.strides[1]
        inner = channels // groups
        aligned = groups == 1 or self.rows.group in (0, inner)
        if not aligned:
            pixels = -(-width // stride)
            return (pixels, stride * channels, self.rows.pixel), (groups, inner, self.rows.group), inner
        if stride > 1:
            return (-(-width // stride), stride * channels, self.rows.pixel), (1, 0, 0), channels
        if self.rows.pixel != channels:
            return (width, channels, self.rows.pixel), (1, 0, 0), channels
        return (1, 0, 0), (1, 0, 0), width * channels


def quantise(spec: Quantisation) -> tirx.PrimFunc:
    """x float32 (uint8 with zero points) as `Quantisation.image` → elements [N,Hp,Row]; one block a row."""
    batch, height, length = spec.output
    _, planes, rows, row = spec.image
    top, left, _, _ = spec.geometry.padding
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("quantize")
        x = T.arg("x", T.Buffer(_wide(spec.image), "uint8" if spec.zero_points else "float32"))
        elements = T.arg("elements", T.Buffer(_wide(spec.output), ACTIVATION_DTYPE[spec.style]))
        with T.grid(*_wide((batch, height))) as loops, T.sblock("quantize_row"):
            n, y = (T.axis.spatial(_index(e), v, "int64") for e, v in zip((batch, height), loops, strict=True))
            source = y * spec.geometry.strides[0] - top
            T.reads(x[n, 0:planes, 0:rows, 0:row])
            T.writes(elements[n, y, 0:length])
            _fill(spec, elements, n, y)
            with T.If(tirx.all(source >= 0, source < rows)), T.Then():
                for plane in range(planes):
                    _row(spec, x, elements, (n, _index(plane), source), (n, y), plane, left * spec.rows.pixel)
    return builder.get()


def _fill(spec: Quantisation, elements: tirx.Buffer, n: tirx.Expr, y: tirx.Expr) -> None:
    """The whole row with the element of 0, where something of it is not written afterwards."""
    (outer, _, _), (inner, _, _), run = spec.runs
    if outer * inner * run * spec.image[1] == spec.rows.length and not any(spec.geometry.padding):
        return
    zeros = spec.zero_elements
    if spec.planar and spec.zero_points:
        for plane, zero in enumerate(zeros):
            _splash(spec, elements, (n, y), plane * spec.rows.plane, spec.rows.plane, zero)
    elif len(set(zeros)) > 1:
        _stripes(spec, elements, (n, y))
    else:
        _splash(spec, elements, (n, y), 0, spec.rows.length, zeros[0])


def _splash(
    spec: Quantisation, elements: tirx.Buffer, row: tuple[tirx.Expr, ...], begin: int, length: int, value: int
) -> None:
    """`length` elements of one value."""
    dtype = ACTIVATION_DTYPE[spec.style]
    for first, count, lanes in _spans(length, FILL_BYTES * 8 // BITS[dtype]):
        with T.grid(_index(count)) as i:
            at = _ramp(begin + first + i * lanes, lanes)
            T.buffer_store(elements, _splat(tirx.const(value, dtype), lanes), [*row, at])


def _stripes(spec: Quantisation, elements: tirx.Buffer, row: tuple[tirx.Expr, ...]) -> None:
    """The elements of 0 of the channels of all pixels, one after the other."""
    dtype = ACTIVATION_DTYPE[spec.style]
    with T.grid(_index(spec.rows.length // spec.rows.pixel)) as i:
        for channel, zero in enumerate(spec.zero_elements):
            T.buffer_store(elements, tirx.const(zero, dtype), [*row, i * spec.rows.pixel + channel])


def _row(
    spec: Quantisation,
    x: tirx.Buffer,
    elements: tirx.Buffer,
    source: tuple[tirx.Expr, ...],
    target: tuple[tirx.Expr, ...],
    plane: int,
    begin: int,
) -> None:
    """One row of one plane: its runs, each in vectors."""
    (outer, outer_from, outer_to), (inner, inner_from, inner_to), run = spec.runs
    with T.grid(*_wide((outer, inner))) as (i, j):
        origin = i * outer_from + j * inner_from
        written = i * outer_to + j * inner_to + (plane * spec.rows.plane + begin)
        for first, count, lanes in _spans(run, FILL_BYTES if spec.zero_points else spec.lanes):
            with T.grid(_index(count)) as k:
                offset = k * lanes + first
                read = (*source, _ramp(origin + offset, lanes))
                element = _element(spec, x[read], lanes)
                T.buffer_store(elements, element, [*target, _ramp(written + offset, lanes)])


def _spans(length: int, widest: int) -> Iterator[tuple[int, int, int]]:
    """(first, count, lanes): vectors that cover `length` elements. A last one may overlap the one before."""
    lanes = widest
    while lanes > length:
        lanes //= 2
    yield 0, length // lanes, lanes
    if length % lanes:
        yield length - lanes, 1, lanes


def _element(spec: Quantisation, value: tirx.Expr, lanes: int) -> tirx.Expr:
    """Of a float: clipped as one, so that no multiplication stands right before the rounding addition to fuse.

    A byte of an image is a level already.
    """
    dtype = _vector(ACTIVATION_DTYPE[spec.style], lanes)
    if spec.zero_points:
        if spec.style == "quads":
            return value
        if below_level(spec.style):  # − 128: the uppermost bit flipped
            return T.reinterpret(dtype, value ^ _splat(tirx.const(128, "uint8"), lanes))
        return tirx.Cast(dtype, value)
    scale, zero = spec.activation.scale, spec.activation.zero_point
    steps = value * _splat(_float(reference_int8.reciprocal(scale)), lanes)
    clipped = tirx.Min(tirx.Max(steps, _splat(_float(-zero), lanes)), _splat(_float(255 - zero), lanes))
    integer = T.reinterpret(_vector("int32", lanes), clipped + _splat(_float(ROUND), lanes))
    if spec.style != "pairs":
        integer = integer + _splat(tirx.const(element_of_zero(spec.style, zero), "int32"), lanes)
    return tirx.Cast(dtype, integer)


# --- The dot products -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """One `horq.packed_int8` as plain numbers: elements [N,Hp,Row], weight [G,B,kh,taps,words,v·e]."""

    elements: tuple[int, ...]
    weight: tuple[int, ...]
    rows: Rows
    geometry: Geometry
    output: tuple[int, int]
    style: Int8Style

    @property
    def lanes(self) -> int:
        return self.weight[5] // ELEMENTS[self.style]

    @property
    def sums(self) -> tuple[int, ...]:
        """int32 [N,HO,WO,G,B,v]."""
        return (self.elements[0], *self.output, *self.weight[:2], self.lanes)


def dot(spec: Dot) -> tirx.PrimFunc:
    """elements, weight, start int32 [G,B·v] → sums: start + Σ element·weight, all lanes of a vector at once."""
    per_word, lanes, rows = ELEMENTS[spec.style], spec.lanes, spec.rows
    sy, dy = spec.geometry.strides[0], spec.geometry.dilation[0]
    spatial, reduced = (*spec.sums[:5], 1), spec.weight[2:5]
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("dot")
        elements = T.arg("elements", T.Buffer(_wide(spec.elements), ACTIVATION_DTYPE[spec.style]))
        weight = T.arg("weight", T.Buffer(_wide(spec.weight), WEIGHT_DTYPE[spec.style]))
        start = T.arg("start", T.Buffer(_wide((spec.sums[3], spec.sums[4] * lanes)), "int32"))
        sums = T.arg("sums", T.Buffer(_wide(spec.sums), "int32"))
        with T.grid(*_wide((*spatial, *reduced))) as loops, T.sblock("dot"):
            n, y, x, g, b, v = (T.axis.spatial(_index(e), i, "int64") for e, i in zip(spatial, loops[:6], strict=True))
            ky, t, d = (T.axis.reduce(_index(e), i, "int64") for e, i in zip(reduced, loops[6:], strict=True))
            row, at = y * sy + ky * dy, x * rows.step + g * rows.group + t * rows.tap + d * per_word
            every, span = _ramp(v * lanes, lanes), slice(v * lanes, v * lanes + lanes)
            wide = v * (lanes * per_word)
            T.reads(
                elements[n, row, at : at + per_word],
                weight[g, b, ky, t, d, wide : wide + lanes * per_word],
                start[g, b * lanes : b * lanes + lanes],
            )
            T.writes(sums[n, y, x, g, b, span])
            with T.init():
                T.buffer_store(sums, start[g, _ramp(b * lanes, lanes)], [n, y, x, g, b, every])
            bits = per_word * BITS[ACTIVATION_DTYPE[spec.style]]
            word = T.reinterpret(f"int{bits}", elements[n, row, _ramp(at, per_word)])
            filters = weight[g, b, ky, t, d, _ramp(wide, lanes * per_word)]
            total = _multiply(spec.style, sums[n, y, x, g, b, every], word, filters, lanes)
            T.buffer_store(sums, total, [n, y, x, g, b, every])
    return builder.get()


def _multiply(kind: Int8Style, total: tirx.Expr, word: tirx.Expr, filters: tirx.Expr, lanes: int) -> tirx.Expr:
    """total + the products of a word's elements with those of each lane."""
    dtype = f"int32x{lanes}"
    if kind in SMULL:
        same = T.reinterpret(f"int8x{2 * lanes}", _splat(word, lanes))
        products = T.call_llvm_pure_intrin(f"int16x{2 * lanes}", SMULL[kind], same, filters)
        if kind == "vmull":
            return T.call_llvm_pure_intrin(dtype, "llvm.arm.neon.vpadals", total, products)
        return total + T.call_llvm_pure_intrin(dtype, "llvm.aarch64.neon.saddlp", products)
    if kind == "sdot":
        same = T.reinterpret(f"int8x{4 * lanes}", _splat(word, lanes))
        return T.call_llvm_pure_intrin(dtype, "llvm.aarch64.neon.sdot", total, same, filters)
    if kind == "quads":
        same = T.reinterpret(f"int8x{4 * lanes}", _splat(word, lanes))
        return T.call_llvm_pure_intrin(dtype, VPDPBUSD[lanes], total, same, filters)
    same = T.reinterpret(f"int16x{2 * lanes}", _splat(word, lanes))
    return total + T.call_llvm_pure_intrin(dtype, PMADDWD[lanes], same, filters)


def from_sums(sums: te.Tensor, factor: te.Tensor, channels: int) -> te.Tensor:
    """sums int32 [N,HO,WO,G,B,v], factor float32 [F] → float32 [N,HO,WO,F]."""
    groups, lanes = int(sums.shape[3]), int(sums.shape[5])
    per_group = channels // groups

    def affine(n, y, x, f):  # type: ignore[no-untyped-def]
        if groups == 1:
            integer = sums[n, y, x, 0, f // lanes, f % lanes]
        else:
            integer = sums[n, y, x, f // per_group, (f % per_group) // lanes, (f % per_group) % lanes]
        return integer.astype("float32") * factor[f]

    return te.compute((*(int(e) for e in sums.shape[:3]), channels), affine, name="int8")


# --- Schedules --------------------------------------------------------------------------------------------------------


def quantisation(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """Rows in parallel; what a row is made of is written out already."""
    sch = s_tir.Schedule(func)
    kernel = blocks.Kernel.of(sch).blocks
    if len(kernel) != 1 or blocks.name(sch, kernel[0]) != "quantize_row":
        return None
    rows = sch.fuse(*sch.get_loops(kernel[0]))
    *_, length = blocks.written_shape(sch, kernel[0])
    if int(sch.get(rows).extent) * length >= PARALLEL_ELEMENTS:
        sch.parallel(rows)
    return sch


# --- Spelling ---------------------------------------------------------------------------------------------------------


def _index(value: int) -> tirx.Expr:
    return tirx.const(value, "int64")


def _wide(extents: tuple[int, ...]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(_index(extent) for extent in extents)


def _ramp(begin: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.Ramp(begin, _index(1), lanes) if lanes > 1 else begin


def _splat(value: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.Broadcast(value, lanes) if lanes > 1 else value


def _float(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype

"""The first kernel of scale `patch`: each pixel once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS

from ..lanes import shared, span, splat, vector
from ..mean import NARROW, MeanOfMagnitudes, across
from .spec import UNROLLED, ZERO, Index, Patch, Piece, Words, each_of, slots, split, tiles, walk, whole, widths


def pixels(spec: Patch, affine: bool) -> tirx.PrimFunc:
    """x float32 [N,H,W,C] → sums float64, signs uint32 and at order 2 and up values float32, shapes as `spec` says.

    With `affine` the values are x·factor + addend, float32 [C] each.
    """
    (_, height, width, channels), (batch, rows, columns) = spec.image, spec.padded
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("binarize_pixels")
        x = T.arg("x", T.Buffer(spec.image, "float32"))
        line = [T.arg(name, T.Buffer((channels,), "float32")) for name in ("factor", "addend")[: 2 * affine]]
        found = [T.arg(name, T.Buffer(shape, dtype)) for name, (shape, dtype) in spec.found.items()]
        with shared(batch * rows, batch * rows * columns * channels) as index, T.sblock("pixels"):
            n, y = tirx.floordiv(index, rows), tirx.floormod(index, rows)
            T.reads(x[n, 0:height, 0:width, 0:channels], *(operand[0:channels] for operand in line))
            T.writes(*(buffer[whole(buffer, n, y)] for buffer in found))
            _Row(spec, x, line, dict(zip(spec.found, found, strict=True)), n, y).emit()
    return builder.get()


@dataclass(frozen=True)
class _Row:
    """Emits the code of one row of the padded image."""

    spec: Patch
    x: tirx.Buffer
    line: Sequence[tirx.Buffer]
    found: Mapping[str, tirx.Buffer]
    n: tirx.Expr
    y: tirx.Expr

    def emit(self) -> None:
        height, top = self.spec.image[1], self.spec.geometry.padding[0]
        if self.spec.padded[1] == height:
            self._real()
            return
        with T.If(tirx.all(self.y >= top, self.y < top + height)):
            with T.Then():
                self._real()
            with T.Else():
                self._padding(0, self.spec.padded[2])

    def _real(self) -> None:
        width, (_, left, _, right) = self.spec.image[2], self.spec.geometry.padding
        groups, depth = self.spec.geometry.groups, self.spec.depth
        self._padding(0, left)
        with tiles(width * groups) as (begin, size):
            lanes = min(NARROW, max(widths(depth)))
            partial = T.sblock_alloc_buffer((size, lanes), "float64")
            mean, kept_in = MeanOfMagnitudes(widths(depth)), slots(depth)
            with each_of(begin, size, width * groups) as (i, index):
                x, g = split(index, groups)
                self._pixel(x, g, mean, kept_in)
                mean.store(partial, i)
            with each_of(begin, size, width * groups) as (i, index):
                x, g = split(index, groups)
                T.buffer_store(self.found["sums"], across(partial, i, lanes), [self.n, self.y, x + left, g])
        self._padding(left + width, right)

    def _pixel(self, x: Index, g: Index, mean: MeanOfMagnitudes, kept_in: Mapping[int, tirx.Buffer]) -> None:
        """Values and signs of a real pixel's group, and the terms of its sum."""
        spec, (top, left, _, _) = self.spec, self.spec.geometry.padding
        words = Words(spec.depth)

        def visit(_ry: Index, _rx: Index, piece: Piece) -> None:
            at = span(g * spec.depth + piece.channel, piece.lanes)
            value = self.x[self.n, self.y - top, x, at]
            if self.line:
                factor, addend = self.line
                value = value * factor[at] + addend[at]
            slot, lanes = kept_in[piece.lanes], span(0, piece.lanes)
            T.buffer_store(slot, value, [lanes])
            positive = slot[lanes] >= splat(ZERO, piece.lanes)
            mean.add(tirx.abs(slot[lanes]), piece.lanes)
            if "values" in self.found:
                kept = _stored(spec.magnitudes, slot[lanes], positive, piece.lanes)
                T.buffer_store(self.found["values"], kept, [self.n, self.y, x + left, at])
            word = words.put(positive, piece)
            if word is not None:
                T.buffer_store(self.found["signs"], word, [self.n, self.y, self._word(x + left, g) + piece.word])

        mean.clear()
        walk(visit, (1, 1), spec.depth, UNROLLED // 2, mean.flush)

    def _padding(self, begin: int, count: int) -> None:
        """`count` pixels of zeros, whose sign is +1; bits beyond the channels are 0."""
        if not count:
            return
        spec, at = self.spec, [self.n, self.y]
        with T.serial(count) as i:
            column = i + begin
            if "values" in self.found:
                with T.serial(spec.image[3]) as c:
                    T.buffer_store(self.found["values"], ZERO, [*at, column, c])
            with T.serial(spec.geometry.groups) as g:
                T.buffer_store(self.found["sums"], tirx.const(0.0, "float64"), [*at, column, g])
                for word in range(spec.words):
                    ones = tirx.const((1 << min(WORD_BITS, spec.depth - word * WORD_BITS)) - 1, "uint32")
                    T.buffer_store(self.found["signs"], ones, [*at, self._word(column, g) + word])

    def _word(self, column: Index, g: Index) -> Index:
        """The first word of a pixel's group."""
        return (column * self.spec.geometry.groups + g) * self.spec.words


def _stored(magnitudes: bool, value: tirx.Expr, positive: tirx.Expr, lanes: int) -> tirx.Expr:
    """A value as `rows` reads it: without −0, or the magnitudes of `_Window.second_plane`."""
    if not magnitudes:
        zero = splat(ZERO, lanes)
        return tirx.Select(value == zero, zero, value)
    bits = T.reinterpret(vector("int32", lanes), tirx.abs(value))
    lower = bits - splat(tirx.const(1, "int32"), lanes)
    return T.reinterpret(vector("float32", lanes), tirx.Select(positive, bits, lower))

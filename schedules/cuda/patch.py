"""Scale `patch`: β and the planes of every im2col row, a row on as many warps as keep its values in registers.

A warp takes word after word of a row, its lanes the channels of a word. β_k = mean|R_{k-1}| is what all threads of the
row add up; the ballot of a word's signs is the word of plane k (Li et al. 2017, eq. 8 and 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS
from horq_tvm.schedules.patch import Patch

from .threads import ZERO, Sum, add_up, index, launch, room, wide

VALUES = 24  # of a row in the registers of a thread
ROW_WARPS = 32  # at most, however many values a thread then has
WARPS = 8  # of a block of several rows


@dataclass(frozen=True)
class Share:
    """How the threads of a block share `total` rows of `words` words: `warps` of them a row, `values` words a warp."""

    total: int
    words: int

    @property
    def warps(self) -> int:
        return min(ROW_WARPS, -(-self.words // VALUES))

    @property
    def values(self) -> int:
        return -(-self.words // self.warps)

    @property
    def rows(self) -> int:
        """Of a block. The last block may find too few: it does some rows twice, to the same end."""
        return max(1, min(WARPS // self.warps, self.total))

    @property
    def blocks(self) -> int:
        return -(-self.total // self.rows)


def rows(spec: Patch, affine: bool) -> tirx.PrimFunc:
    """x float32 [N,H,W,C] → β float32 and planes uint32, as the shapes of `spec` say.

    With `affine` the values are x·factor + addend, float32 [C] each.
    """
    return _kernel(spec, affine, given=False)


def rows_of_given(spec: Patch, affine: bool) -> tirx.PrimFunc:
    """x and β → planes, for β that are computed elsewhere; operands x, factor and addend, β."""
    return _kernel(spec, affine, given=True)


def _kernel(spec: Patch, affine: bool, given: bool) -> tirx.PrimFunc:
    batch, height, width, groups = spec.out
    taps = spec.geometry.kernel[0] * spec.geometry.kernel[1]
    share = Share(batch * height * width * groups, taps * spec.words)
    extents = {
        "blockIdx.x": share.blocks,
        "threadIdx.z": share.rows,
        "threadIdx.y": share.warps,
        "threadIdx.x": WORD_BITS,
    }
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("binarize_rows")
        x = T.arg("x", T.Buffer(wide(spec.image), "float32"))
        names = ("factor", "addend")[: 2 * affine]
        line = [T.arg(name, T.Buffer(wide(spec.image[3:]), "float32")) for name in names]
        beta = T.arg("beta", T.Buffer(wide(spec.beta_shape), "float32"))
        planes = T.arg("planes", T.Buffer(wide(spec.planes_shape), "uint32"))
        reads = [x, *line, *([beta] if given else [])]
        with launch("rows", extents, reads, [planes] if given else [beta, planes]) as threads:
            _Row(spec, share, (x, *line), threads).emit(beta, planes, given)
    return builder.get()


class _Row:
    """Emits the code of a thread: block, row in the block, warp of the row, lane."""

    def __init__(self, spec: Patch, share: Share, operands: Sequence[tirx.Buffer], threads: list[tirx.Expr]) -> None:
        block, self.row, self.warp, self.lane = threads
        self.spec, self.share, self.operands = spec, share, operands
        _, height, width, groups = spec.out
        at = tirx.min(block * share.rows + self.row, index(share.total - 1))
        pixel, g = tirx.floordiv(at, groups), tirx.floormod(at, groups)
        n, y = tirx.floordiv(pixel, height * width), tirx.floormod(tirx.floordiv(pixel, width), height)
        self.at = (n, y, tirx.floormod(pixel, width), g)
        self.values = room("values", (share.values,), "float32")
        self.scale = room("scale", (1,), "float32")
        self.word = room("word", (1,), "uint32")

    def emit(self, beta: tirx.Buffer, planes: tirx.Buffer, given: bool) -> None:
        spec, share, at = self.spec, self.share, index(0)
        with T.unroll(index(share.values)) as i:
            T.buffer_store(self.values, self._value(i), [i])
        if not given:
            shared = room("shared", (share.rows, share.warps * WORD_BITS), "float64", "shared")
            total = Sum()
        thread = self.warp * WORD_BITS + self.lane
        for k in range(spec.order):
            of_plane = (*self.at, index(k))
            if given:
                T.buffer_store(self.scale, beta[of_plane], [at])
            else:
                own = total.over(share.values, lambda i: tirx.abs(self.values[i]))
                mean = add_up(shared, (self.row,), thread, own) * tirx.const(1.0 / spec.length, "float64")
                T.buffer_store(self.scale, tirx.Cast("float32", mean), [at])
                with T.If(thread == 0), T.Then():
                    T.buffer_store(beta, self.scale[at], list(of_plane))
            with T.unroll(index(share.values)) as i:
                if k >= spec.first:
                    self._vote(i, planes, k - spec.first)
                if k + 1 < spec.order:
                    self._subtract(i)

    def _place(self, i: tirx.Expr) -> tuple[tirx.Expr, tirx.Expr, list[tirx.Expr]]:
        """Of this lane's i-th value: its word in the row, its channel in the group, the conditions that it is one."""
        word = i * self.share.warps + self.warp
        channel = tirx.floormod(word, self.spec.words) * WORD_BITS + self.lane
        real = [] if self.spec.depth % WORD_BITS == 0 else [channel < self.spec.depth]
        if self.share.words % self.share.warps:
            real.append(word < self.share.words)
        return word, channel, real

    def _value(self, i: tirx.Expr) -> tirx.Expr:
        """0 outside the image and where there is no value."""
        spec, (x, *line), (n, y, x_, g) = self.spec, self.operands, self.at
        word, channel, inside = self._place(i)
        tap = tirx.floordiv(word, spec.words)
        (_, kw), (sy, sx), (dy, dx) = spec.geometry.kernel, spec.geometry.strides, spec.geometry.dilation
        top, left, bottom, right = spec.geometry.padding
        row = y * sy + tirx.floordiv(tap, kw) * dy - top
        column = x_ * sx + tirx.floormod(tap, kw) * dx - left
        if top or bottom:
            inside += [row >= 0, row < spec.image[1]]
        if left or right:
            inside += [column >= 0, column < spec.image[2]]
        c = g * spec.depth + channel
        value = x[n, row, column, c]
        if line:
            value = value * line[0][c] + line[1][c]
        return T.if_then_else(tirx.all(*inside), value, ZERO) if inside else value

    def _vote(self, i: tirx.Expr, planes: tirx.Buffer, p: int) -> None:
        word, _, real = self._place(i)
        bit = tirx.all(*real, self.values[i] >= ZERO)
        T.buffer_store(self.word, T.call_extern("uint32", "horq_ballot", tirx.Cast("int32", bit)), [index(0)])
        mine = [self.lane == 0] + ([word < self.share.words] if self.share.words % self.share.warps else [])
        with T.If(tirx.all(*mine)), T.Then():
            T.buffer_store(planes, self.word[index(0)], [*self.at, index(p), word])

    def _subtract(self, i: tirx.Expr) -> None:
        """R − β·sign(R) takes the place of R; where there is no value, none counts in the mean."""
        value, scale = self.values[i], self.scale[index(0)]
        residual = value - tirx.Select(value >= ZERO, scale, -scale)
        _, _, real = self._place(i)
        T.buffer_store(self.values, T.if_then_else(tirx.all(*real), residual, ZERO) if real else residual, [i])

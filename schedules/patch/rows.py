"""The second kernel of scale `patch`: each window.

R_k = R_{k−1} − β_k·H_k (Li et al. 2017, eq. 9), in float32. Windows are gone through by tiles: first the sums of all,
lane by lane, then what the lanes add up to. A sum across lanes takes some 50 cycles until it is known, and right behind
each window there is nothing else for the core to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..lanes import shared, span, splat, vector
from ..mean import NARROW, MeanOfMagnitudes, across, pairwise
from .spec import UNROLLED, ZERO, Index, Patch, Piece, Words, each_of, slots, split, tiles, walk, whole, widths

WAYS = 3  # accumulators of a sum under a mask, whose additions depend on one another


def rows(spec: Patch) -> tirx.PrimFunc:
    """sums, signs and values → β float32 and planes uint32, as the shapes of `spec` say."""
    return _kernel(spec, "binarize_rows", given=False)


def rows_of_given(spec: Patch) -> tirx.PrimFunc:
    """sums, signs, values and β → planes, for β that are computed elsewhere; sums are not read."""
    return _kernel(spec, "binarize_rows_of_given", given=True)


def _kernel(spec: Patch, name: str, given: bool) -> tirx.PrimFunc:
    batch, height, width, groups = spec.out
    windows = width * groups
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name(name)
        found = {name: T.arg(name, T.Buffer(shape, dtype)) for name, (shape, dtype) in spec.found.items()}
        beta = T.arg("beta", T.Buffer(spec.beta_shape, "float32"))
        planes = T.arg("planes", T.Buffer(spec.planes_shape, "uint32"))
        with shared(batch * height, batch * height * windows * spec.length * spec.order) as index, T.sblock("rows"):
            n, y = tirx.floordiv(index, height), tirx.floormod(index, height)
            read = [*found.values(), *([beta] if given else [])]
            T.reads(*(buffer[whole(buffer, n)] for buffer in read))
            written = [planes] if given else [beta, planes]
            T.writes(*(buffer[whole(buffer, n, y)] for buffer in written))
            operands = _Operands(spec, found, beta, planes, given)
            with tiles(windows) as (begin, size):
                tile = _Tile(operands, n, y, begin, size)
                tile.first()
                for k in range(1, spec.order):
                    tile.further(k)
    return builder.get()


@dataclass(frozen=True)
class _Operands:
    """The buffers of a kernel, and whether β is one that it reads."""

    spec: Patch
    found: Mapping[str, tirx.Buffer]
    beta: tirx.Buffer
    planes: tirx.Buffer
    given: bool


@dataclass(frozen=True)
class _Tile:
    """Emits the code of `size` windows of an output row, from `begin` on; beyond the last window nothing is done."""

    operands: _Operands
    n: tirx.Expr
    y: tirx.Expr
    begin: tirx.Expr
    size: int

    @cached_property
    def spec(self) -> Patch:
        return self.operands.spec

    @cached_property
    def computed(self) -> bool:
        return not self.operands.given

    @cached_property
    def lanes(self) -> int:
        """Of a window's sum on the stack."""
        return min(NARROW, max(widths(self.spec.depth)))

    @cached_property
    def totals(self) -> tirx.Buffer:
        """Σ|x| of each window."""
        return T.sblock_alloc_buffer((self.size,), "float64")

    @cached_property
    def partial(self) -> tirx.Buffer:
        """A further sum of each window, lane by lane."""
        return T.sblock_alloc_buffer((self.size, self.lanes), "float64")

    @cached_property
    def below(self) -> tirx.Buffer:
        """How many magnitudes of each window are below β_1."""
        return T.sblock_alloc_buffer((self.size,), "int32")

    @cached_property
    def mean(self) -> MeanOfMagnitudes:
        return MeanOfMagnitudes(widths(self.spec.depth), WAYS if self.spec.magnitudes else 1)

    def each(self, visit: Callable[[tirx.Expr, _Window], None]) -> None:
        """`visit` for every window and its number in the tile."""
        _, _, width, groups = self.spec.out
        with each_of(self.begin, self.size, width * groups) as (i, index):
            visit(i, _Window(self.operands, self.n, self.y, *split(index, groups)))

    def first(self) -> None:
        """Σ|x| and, where there is no further plane to do it with, β_1 and plane 1."""
        if self.computed:
            self.each(lambda i, window: T.buffer_store(self.totals, window.total(), [i]))
        if self.spec.order == 1:
            self.each(self._first_plane)

    def _first_plane(self, i: tirx.Expr, window: _Window) -> None:
        if self.computed:
            window.store_beta(0, self.totals[i])
        if not self.spec.first:
            window.copy_signs()

    def further(self, k: int) -> None:
        """β_{k+1} and plane k+1; with k = 1 those of x as well."""

        def accumulate(i: tirx.Expr, window: _Window) -> None:
            if k == 1:
                self._first_plane(i, window)
            mean = self.mean if self.computed else None
            if mean is not None:
                mean.clear()
            if not self.spec.magnitudes:
                window.next_plane(k, mean)
            elif (below := window.second_plane(mean)) is not None:
                T.buffer_store(self.below, below, [i])
            if mean is not None:
                mean.store(self.partial, i)

        def finish(i: tirx.Expr, window: _Window) -> None:
            total = across(self.partial, i, self.lanes)
            if self.spec.magnitudes:
                excess = tirx.Cast("float64", self.below[i] * 2 - self.spec.length)
                total = self.totals[i] - total * tirx.const(2.0, "float64") + window.first_beta() * excess
                total = tirx.max(total, tirx.const(0.0, "float64"))
            window.store_beta(k, total)

        self.each(accumulate)
        if self.computed:
            self.each(finish)


@dataclass(frozen=True)
class _Window:
    """Emits the code of one window."""

    operands: _Operands
    n: tirx.Expr
    y: tirx.Expr
    x: Index
    g: Index

    @property
    def spec(self) -> Patch:
        return self.operands.spec

    @property
    def at(self) -> tuple[Index, ...]:
        return (self.n, self.y, self.x, self.g)

    def beta_at(self, k: int) -> tuple[Index, ...]:
        """Where β_{k+1} stands."""
        return (*self.at, k)

    def source(self, ry: Index, rx: Index) -> tuple[tirx.Expr, tirx.Expr]:
        """Row and column of a tap among the padded pixels."""
        (sy, sx), (dy, dx) = self.spec.geometry.strides, self.spec.geometry.dilation
        return self.y * sy + ry * dy, self.x * sx + rx * dx

    def value(self, ry: Index, rx: Index, piece: Piece) -> tirx.Expr:
        row, column = self.source(ry, rx)
        channel = span(self.g * self.spec.depth + piece.channel, piece.lanes)
        return self.operands.found["values"][self.n, row, column, channel]

    def word(self, ry: Index, rx: Index) -> Index:
        """The first word of a tap in a row."""
        return (ry * self.spec.geometry.kernel[1] + rx) * self.spec.words

    def sign_word(self, ry: Index, rx: Index) -> tuple[tirx.Expr, tirx.Expr]:
        """Where the signs of a tap begin."""
        row, column = self.source(ry, rx)
        return row, (column * self.spec.geometry.groups + self.g) * self.spec.words

    def total(self) -> tirx.Expr:
        """Σ|x|, from the sums of the window's pixels."""
        kh, kw = self.spec.geometry.kernel
        taps = [self.source(ry, rx) for ry in range(kh) for rx in range(kw)]
        return pairwise([self.operands.found["sums"][self.n, row, column, self.g] for row, column in taps])

    def store_beta(self, k: int, total: tirx.Expr) -> None:
        """β_{k+1} from a float64 sum over L."""
        mean = total * tirx.const(1.0 / self.spec.length, "float64")
        T.buffer_store(self.operands.beta, tirx.Cast("float32", mean), [*self.at, k])

    def first_beta(self) -> tirx.Expr:
        return tirx.Cast("float64", self.operands.beta[self.beta_at(0)])

    def copy_signs(self) -> None:
        """Plane 1. In explicit vectors: left alone, LLVM takes windows for lanes, and scatters."""
        geometry = self.spec.geometry
        kh, kw = geometry.kernel
        together = geometry.groups == 1 and geometry.dilation[1] == 1  # the taps of a row are neighbours
        run = (kw if together else 1) * self.spec.words
        for ry in range(kh):
            for rx in range(0, kw, kw if together else 1):
                row, begin = self.sign_word(ry, rx)
                for offset, lanes in _vectors(run):
                    copied = self.operands.found["signs"][self.n, row, span(begin + offset, lanes)]
                    target = [*self.at, 0, span(self.word(ry, rx) + offset, lanes)]
                    T.buffer_store(self.operands.planes, copied, target)

    def second_plane(self, total: MeanOfMagnitudes | None) -> tirx.Expr | None:
        """Plane 2 of order 2; the sum (`total`) and the number of what is below β_1. One comparison an element.

        With a = |x| and β = β_1, R_1 = x − β·sign(x) is negative where x >= 0 and a < β, and where x < 0 and a > β. To
        ask a < β of both, `values` holds of x < 0 the next number below a, which is < β just where a <= β. So H_2 is +1
        where that comparison and x >= 0 differ. And |R_1| = |a − β|, summed over the row, is

            Σ|a − β| = Σa − 2·Σ_{a<β} a + β·(2·n − L),    n the count of a < β,

        where an a that equals β counts for nothing, on whichever side. A number of `values` is off by 2⁻²³ at most.
        """
        spec, words = self.spec, Words(self.spec.depth)
        # Read once: the stores to planes could be stores to β, for all LLVM knows.
        scale = T.bind(self.operands.beta[self.beta_at(0)])
        below = T.sblock_alloc_buffer((1,), "int32") if total is not None else None

        def compare(ry: Index, rx: Index, piece: Piece) -> None:
            value = self.value(ry, rx, piece)
            less = value < splat(scale, piece.lanes)
            if total is not None:
                total.add(value, piece.lanes, less)
            word = words.put(less, piece)
            if word is None:
                return
            if below is not None:
                T.buffer_store(below, below[0] + tirx.Cast("int32", tirx.popcount(word)), [0])
            row, begin = self.sign_word(ry, rx)
            plane = word ^ self.operands.found["signs"][self.n, row, begin + piece.word]
            T.buffer_store(self.operands.planes, plane, [*self.at, 1 - spec.first, self.word(ry, rx) + piece.word])

        if below is not None:
            T.buffer_store(below, tirx.const(0, "int32"), [0])
        walk(compare, spec.geometry.kernel, spec.depth, UNROLLED // 2, total.flush if total else _nothing)
        return below[0] if below is not None else None

    def next_plane(self, k: int, mean: MeanOfMagnitudes | None) -> None:
        """Plane k+1 and Σ|R_k| (`mean`), from the residual chain: R_k anew from x, which costs less than to keep it.

        β_k·H_k is β_k with the sign bit of R_{k−1}: no zero in `values` has one, nor has the difference of two equal
        numbers, so the bit always means < 0.
        """
        spec, words, kept_in = self.spec, Words(self.spec.depth), slots(self.spec.depth)
        scales = [T.bind(self.operands.beta[self.beta_at(i)]) for i in range(k)]

        def binarise(ry: Index, rx: Index, piece: Piece) -> None:
            slot, lanes = kept_in[piece.lanes], span(0, piece.lanes)
            T.buffer_store(slot, self.value(ry, rx, piece), [lanes])
            for scale in scales:
                T.buffer_store(slot, slot[lanes] - _with_sign(scale, slot[lanes], piece.lanes), [lanes])
            if mean is not None:
                mean.add(tirx.abs(slot[lanes]), piece.lanes)
            word = words.put(slot[lanes] >= splat(ZERO, piece.lanes), piece)
            if word is not None:
                at = [*self.at, k - spec.first, self.word(ry, rx) + piece.word]
                T.buffer_store(self.operands.planes, word, at)

        walk(binarise, spec.geometry.kernel, spec.depth, UNROLLED // spec.order, mean.flush if mean else _nothing)


def _nothing() -> None:
    """What there is to do behind a stretch of code that sums nothing up."""


def _with_sign(scale: tirx.Expr, value: tirx.Expr, lanes: int) -> tirx.Expr:
    """β ≥ 0 with the sign bits of `value`."""
    bits = vector("uint32", lanes)
    sign = T.reinterpret(bits, value) & splat(tirx.const(0x80000000, "uint32"), lanes)
    return T.reinterpret(vector("float32", lanes), sign | T.reinterpret(bits, splat(scale, lanes)))


def _vectors(count: int) -> list[tuple[int, int]]:
    """Offsets and lanes that cover `count` words."""
    found, offset = [], 0
    for lanes in (16, 8, 4, 2, 1):
        while count - offset >= lanes:
            found.append((offset, lanes))
            offset += lanes
    return found

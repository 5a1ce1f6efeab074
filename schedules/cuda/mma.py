"""Counting differing bits on binary tensor cores: a tile of a convolution as a matrix product, bits in shared memory.

Output pixels are rows, a group's filters columns, and a window's words the depth:

    counts[p, m, g, f] = Σ_k popcount(window of pixel m, plane p, word k ^ weight[g, f, k])

A block of threads computes `Tile.m` × `Tile.n` of them for all planes at once, each warp a part of the tile, so that a
fragment of weights, once loaded, serves every plane. The bits of a stage (`Tile.steps` steps of 256) are gathered from
global into shared memory while those of the stage before are counted; words beyond the image, the window or the last
pixel are zeros, and so are the weights beyond a window, hence they cancel.

A step's words may be dealt to a fragment in any order that both operands share. The PTX ISA gives a thread words t and
t + 4 of a row, t its place in a group of four (mma.m16n8k256); here they are words 2t and 2t + 1, one load of 64 bits.
A row takes 8, 24, 40, ... words of shared memory, an odd multiple of 8: four rows, which is what half a warp reads in a
turn, then cover all 32 banks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import STEP_WORDS, Geometry
from horq_tvm.targets import WARP

from .threads import index, room, whole, wide

FRAGMENT_M, FRAGMENT_N = 16, 8
CHUNKS = (4, 2, 1)  # words that one asynchronous copy can move
BANKS = 32
COUNTS_SHIFT = 8  # a row of counts starts so many banks after the one before: half a warp writes pairs of four rows
WARPS = "horq.warps"  # the annotation of a tile's block that says how many it takes


@dataclass(frozen=True)
class Gemm:
    """Extents of a count: planes uint32 [N,H,W,G,P,words], weight uint32 [G,filters,depth]."""

    planes: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry

    @property
    def orders(self) -> int:
        return self.planes[4]

    @property
    def output(self) -> tuple[int, int]:
        """Height and width."""
        return self.geometry.output_size(*self.planes[1:3])

    @property
    def pixels(self) -> int:
        return self.planes[0] * prod(self.output)

    @property
    def filters(self) -> int:
        """Of a group."""
        return self.weight[1]

    @property
    def window(self) -> int:
        """Words of a window, without those that fill up the last step."""
        return prod(self.geometry.kernel) * self.planes[5]

    @property
    def steps(self) -> int:
        return self.weight[2] // STEP_WORDS

    @property
    def chunk(self) -> int:
        """Words of a plane that lie side by side, as many as one copy moves."""
        return next(words for words in CHUNKS if self.planes[5] % words == 0)


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes: m pixels × n filters by warps_m × warps_n warps, `steps` steps a stage."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    steps: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def fragments(self) -> tuple[int, int]:
        """Of a warp, along m and n."""
        return self.m // self.warps_m // FRAGMENT_M, self.n // self.warps_n // FRAGMENT_N

    @property
    def row(self) -> int:
        """Words from one row in shared memory to the next: an odd multiple of 8."""
        return STEP_WORDS * (self.steps | 1)


def grid(gemm: Gemm, tile: Tile) -> tuple[int, int, int]:
    """Blocks along pixels, groups, and filters."""
    return -(-gemm.pixels // tile.m), gemm.weight[0], -(-gemm.filters // tile.n)


def counts_shape(gemm: Gemm, tile: Tile) -> tuple[int, ...]:
    """Of a plane's counts, int32 [M,F], or [M,G,F] where there are groups; pixels and filters in whole tiles."""
    m, groups, n = grid(gemm, tile)
    return (m * tile.m, *([groups] if groups > 1 else []), n * tile.n)


def stages(gemm: Gemm, tile: Tile) -> int:
    return -(-gemm.steps // tile.steps)


def count(gemm: Gemm, tile: Tile) -> tirx.PrimFunc:
    """planes, weight → for each plane int32 `counts_shape`: the popcounts over each window; one sblock a tile."""
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name("count")
        planes = T.arg("planes", T.Buffer(wide(gemm.planes), "uint32"))
        weight = T.arg("weight", T.Buffer(wide(gemm.weight), "uint32"))
        shape = wide(counts_shape(gemm, tile))
        counts = [T.arg(f"counts{p}", T.Buffer(shape, "int32")) for p in range(gemm.orders)]
        extents = wide(grid(gemm, tile))
        with T.grid(*extents) as loops, T.sblock("mma"):
            mt, g, nt = (T.axis.spatial(e, v, "int64") for e, v in zip(extents, loops, strict=True))
            T.reads(planes[whole(planes)], weight[g, 0 : gemm.filters, 0 : gemm.weight[2]])
            m, n = mt * tile.m, nt * tile.n
            of_group = (g,) if gemm.weight[0] > 1 else ()
            written = (slice(m, m + tile.m), *of_group, slice(n, n + tile.n))
            T.writes(*(plane[written] for plane in counts))
            T.sblock_attr({WARPS: tile.warps})
            with T.attr(index(0), "pragma_unroll_explicit", tirx.const(False, "bool")):
                _Block(gemm, tile, (planes, weight), counts, (m, g, n)).emit()
    return builder.get()


class _Block:
    """The code of one block of threads. `at`: the tile's first pixel, its group, its first filter."""

    def __init__(
        self,
        gemm: Gemm,
        tile: Tile,
        operands: tuple[tirx.Buffer, tirx.Buffer],
        counts: Sequence[tirx.Buffer],
        at: tuple[tirx.Expr, tirx.Expr, tirx.Expr],
    ) -> None:
        self.gemm, self.tile, self.counts = gemm, tile, counts
        self.planes, self.weight = operands
        self.m, self.g, self.n = at
        self.stages = stages(gemm, tile)
        self.buffers = min(self.stages, 2)
        words = tile.steps * STEP_WORDS
        threads = tile.warps * WARP
        self.a_chunks, self.b_chunks = words // gemm.chunk, words // CHUNKS[0]
        self.a_turns = -(-gemm.orders * tile.m * self.a_chunks // threads)
        self.b_turns = -(-tile.n * self.b_chunks // threads)
        i, j = tile.fragments
        # In one dimension, or TVM would cut off the words of a row that nobody reads.
        self.a_shared = room("a_shared", (self.buffers * gemm.orders * tile.m * tile.row,), "uint32", "shared")
        self.b_shared = room("b_shared", (self.buffers * tile.n * tile.row,), "uint32", "shared")
        self.a_moved = room("a_moved", (self.a_turns * gemm.chunk,), "uint32")
        self.b_moved = room("b_moved", (self.b_turns * CHUNKS[0],), "uint32")
        self.sums = room("sums", (gemm.orders, i, j, 4), "int32")
        self.a, self.b, self.pair = room("a", (4,), "uint32"), room("b", (j, 2), "uint32"), room("pair", (2,), "uint32")

    def emit(self) -> None:
        """A barrier a stage: behind it, the next stage's bits are there and this one's are read."""
        with T.thread_binding(index(self.tile.warps), thread="threadIdx.y") as self.warp:  # noqa: SIM117
            with T.thread_binding(index(WARP), thread="threadIdx.x") as self.lane:
                self._clear()
                self._move(index(0), "horq_fetch")
                self._move(index(0), "horq_land")
                self._barrier()
                if self.stages > 1:
                    with T.serial(index(self.stages - 1)) as stage:
                        self._move(stage + 1, "horq_fetch")
                        self._multiply(stage)
                        self._move(stage + 1, "horq_land")
                        self._barrier()
                self._multiply(index(self.stages - 1))
                self._store()

    def _barrier(self) -> None:
        T.evaluate(T.call_extern("int32", "horq_landed"))
        T.evaluate(T.tvm_storage_sync("shared"))

    def _clear(self) -> None:
        i, j = self.tile.fragments
        with _unrolled(self.gemm.orders, i, j) as (p, x, y):
            zero = T.Broadcast(tirx.const(0, "int32"), 4)
            T.buffer_store(self.sums, zero, [p, x, y, T.Ramp(index(0), index(1), 4)])

    def _move(self, stage: tirx.Expr, how: str) -> None:
        """The bits of a stage from global to shared memory.

        Where the architecture copies asynchronously `horq_fetch` starts it and `horq_land` has nothing to do; else the
        first loads into registers and the second stores them, with the counting of the stage before in between.
        """
        self._move_weights(stage, how)
        self._move_planes(stage, how)

    def _move_weights(self, stage: tirx.Expr, how: str) -> None:
        gemm, tile, chunk = self.gemm, self.tile, CHUNKS[0]
        with _unrolled(self.b_turns) as (turn,):
            row, column, own = self._share(turn, tile.n, self.b_chunks)
            k = stage * (tile.steps * STEP_WORDS) + column * chunk
            inside = self._below(self.n + row, gemm.filters, tile.n) + self._below(k, gemm.weight[2], self._staged)
            source = self.weight[self.g, self.n + row, k]
            target = self.b_shared[(stage % self.buffers * tile.n + row) * tile.row + column * chunk]
            self._call(how, (self.b_moved, turn, chunk), target, source, inside, own)

    def _move_planes(self, stage: tirx.Expr, how: str) -> None:
        gemm, tile, chunk = self.gemm, self.tile, self.gemm.chunk
        with _unrolled(self.a_turns) as (turn,):
            row, column, own = self._share(turn, gemm.orders * tile.m, self.a_chunks)
            p, m = row // tile.m, row % tile.m
            k = stage * (tile.steps * STEP_WORDS) + column * chunk
            source, inside = self._pixel(self.m + m, p, k)
            target = self.a_shared[(stage % self.buffers * gemm.orders * tile.m + row) * tile.row + column * chunk]
            self._call(how, (self.a_moved, turn, chunk), target, source, inside, own)

    @property
    def _staged(self) -> int:
        """Words of all stages, some beyond the last step."""
        return self.tile.steps * STEP_WORDS

    def _share(self, turn: tirx.Expr, rows: int, chunks: int) -> tuple[tirx.Expr, tirx.Expr, tirx.Expr | None]:
        """A thread's row and chunk in a turn, and whether there is one (None: always)."""
        threads = self.tile.warps * WARP
        place = turn * threads + self.warp * WARP + self.lane
        return place // chunks, place % chunks, place < rows * chunks if rows * chunks % threads else None

    def _below(self, position: tirx.Expr, extent: int, step: int) -> list[tirx.Expr]:
        return [] if extent % step == 0 else [position < extent]

    def _pixel(self, m: tirx.Expr, p: tirx.Expr, k: tirx.Expr) -> tuple[tirx.Expr, list[tirx.Expr]]:
        """Word k of the window of output pixel m in plane p, and the conditions under which there is one."""
        gemm = self.gemm
        _, height, width, _, _, words = gemm.planes
        (_, kw), (sy, sx), (dy, dx) = gemm.geometry.kernel, gemm.geometry.strides, gemm.geometry.dilation
        top, left, bottom, right = gemm.geometry.padding
        rows, columns = gemm.output
        tap = k // words
        y = m // columns % rows * sy + tap // kw * dy - top
        x = m % columns * sx + tap % kw * dx - left
        inside = self._below(m, gemm.pixels, self.tile.m) + self._below(k, gemm.window, self._staged)
        if top or bottom:
            inside += [y >= 0, y < height]
        if left or right:
            inside += [x >= 0, x < width]
        return self.planes[m // (rows * columns), y, x, self.g, p, k % words], inside

    def _call(
        self,
        how: str,
        moved: tuple[tirx.Buffer, tirx.Expr, int],
        target: tirx.Expr,
        source: tirx.Expr,
        inside: Sequence[tirx.Expr],
        own: tirx.Expr | None,
    ) -> None:
        buffer, turn, chunk = moved
        addresses = [T.address_of(buffer[turn * chunk]), T.address_of(target)]
        with _where(own):
            if how == "horq_land":
                T.evaluate(T.call_extern("int32", f"{how}{chunk}", *addresses))
                return
            zero = tirx.const(0, "uint32")
            if chunk > 1:
                T.buffer_store(buffer, T.Broadcast(zero, chunk), [T.Ramp(turn * chunk, index(1), chunk)])
            else:
                T.buffer_store(buffer, zero, [turn])
            there = tirx.all(*inside).astype("int32") if inside else tirx.const(1, "int32")
            T.evaluate(T.call_extern("int32", f"{how}{chunk}", *addresses, T.address_of(source), there))

    def _multiply(self, stage: tirx.Expr) -> None:
        """The steps of a stage: a fragment of weights serves every plane and row."""
        tile, (across, down) = self.tile, self.tile.fragments
        buffer = stage % self.buffers
        row, word = self.lane // 4, self.lane % 4 * 2
        m = self.warp % tile.warps_m * (tile.m // tile.warps_m) + row
        n = self.warp // tile.warps_m * (tile.n // tile.warps_n) + row
        two = T.Ramp(index(0), index(1), 2)
        with _unrolled(tile.steps) as (step,):
            first = step * STEP_WORDS + word
            with _unrolled(down) as (j,):
                at = buffer * tile.n + n + j * FRAGMENT_N
                T.buffer_store(self.b, self.b_shared[T.Ramp(at * tile.row + first, index(1), 2)], [j, two])
            with _unrolled(self.gemm.orders, across) as (p, i):
                for half in range(2):
                    at = (buffer * self.gemm.orders + p) * tile.m + m + i * FRAGMENT_M + half * 8
                    T.buffer_store(self.pair, self.a_shared[T.Ramp(at * tile.row + first, index(1), 2)], [two])
                    for e in range(2):
                        T.buffer_store(self.a, self.pair[index(e)], [index(2 * e + half)])
                with _unrolled(down) as (j,):
                    fragments = self.sums[p, i, j, 0], self.a[index(0)], self.b[j, 0]
                    T.evaluate(T.call_extern("int32", "horq_mma", *(T.address_of(f) for f in fragments)))

    def _store(self) -> None:
        """A thread holds counts of columns 2t and 2t + 1 in rows r and r + 8 of a fragment."""
        tile, (across, down) = self.tile, self.tile.fragments
        m = self.m + self.warp % tile.warps_m * (tile.m // tile.warps_m) + self.lane // 4
        n = self.n + self.warp // tile.warps_m * (tile.n // tile.warps_n) + self.lane % 4 * 2
        group = (self.g,) if self.gemm.weight[0] > 1 else ()
        for p, counts in enumerate(self.counts):
            with _unrolled(across, down, 2) as (i, j, half):
                pair = self.sums[p, i, j, T.Ramp(half * 2, index(1), 2)]
                at = T.Ramp(n + j * FRAGMENT_N, index(1), 2)
                T.buffer_store(counts, pair, [m + i * FRAGMENT_M + half * 8, *group, at])


class _unrolled:  # noqa: N801
    """Nested loops, each unrolled by the compiler that comes after TVM."""

    def __init__(self, *extents: int) -> None:
        self.frames = [T.unroll(index(extent)) for extent in extents]

    def __enter__(self) -> list[tirx.Var]:
        return [frame.__enter__() for frame in self.frames]

    def __exit__(self, *error: object) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)


@contextmanager
def _where(condition: tirx.Expr | None) -> Iterator[None]:
    """The statements inside under a condition, if there is one."""
    if condition is None:
        yield
    else:
        with T.If(condition), T.Then():
            yield

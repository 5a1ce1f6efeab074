"""Float layers on CUDA: a convolution as a matrix product whose operands come tile by tile through shared memory.

    out[m, f] = Σ_k rows[m, k]·filters[k, f],   m a pixel of the output, k = (ry·kw + rx)·C/G + c

`rows` is never in memory: a block of threads gathers its tile of it from the image. Tiles are whole; what reaches past
the end is zero. Where there are few sums, each is shared out among threads; a window of few elements is one thread's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from tvm import relax, s_tir, te, tirx
from tvm.relax import BlockBuilder

from horq_tvm.ops import Geometry, shape_of
from horq_tvm.schedules import blocks
from horq_tvm.schedules import conv2d as direct
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import Target

from .planes import on_warps
from .tile import Card

DEPTH = 16  # of k, in shared memory at a time
ALONE = 1.5  # times longer, a guess
FEW_PIXELS = 8  # under which tiles would be empty for the most part
THREADS = 256
SIDE, SHARES = 16, 16  # threads of a block that share out sums: results × parts of each
FEW_RESULTS = 1 << 13  # threads, each with a whole sum, that would leave most of a card idle
GEMM = "gemm"  # the block, and what it is annotated with
TILE = "horq.tile"


@dataclass(frozen=True)
class Tile:
    """bm pixels × bn filters a block of threads, tm × tn a thread."""

    bm: int
    bn: int
    tm: int
    tn: int

    @property
    def threads(self) -> tuple[int, int]:
        """threadIdx.y, threadIdx.x."""
        return (self.bm // self.tm, self.bn // self.tn)


TILES = (
    Tile(128, 64, 8, 4),
    Tile(64, 64, 4, 4),
    Tile(64, 32, 4, 4),
    Tile(32, 64, 4, 4),
    Tile(32, 32, 2, 4),
    Tile(16, 64, 2, 4),
    Tile(64, 16, 4, 2),
    Tile(16, 32, 2, 2),
    Tile(16, 16, 2, 2),
)


@dataclass(frozen=True)
class Gemm:
    """One `horq.packed_conv2d` as plain numbers: x [N,H,W,C] (padded), weight [G,B,kh,kw,C/G,v]."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    channels: int

    @property
    def output(self) -> tuple[int, int]:
        return self.geometry.output_size(self.x[1], self.x[2])

    @property
    def pixels(self) -> int:
        return self.x[0] * prod(self.output)

    @property
    def depth(self) -> int:
        _, _, kh, kw, inner, _ = self.weight
        return kh * kw * inner

    @property
    def filters(self) -> int:
        """Of a group."""
        return self.channels // self.weight[0]


def choose(gemm: Gemm, card: Card) -> Tile:
    """The tile with the fewest multiply-accumulates on the busiest multiprocessor, those of small tiles costing more.

    A step of k loads tm + tn values from shared memory for tm·tn products. Where a block is alone on its
    multiprocessor, nothing is computed while it waits for memory.
    """

    def cost(tile: Tile) -> float:
        blocks_of_threads = ceil(gemm.pixels / tile.bm) * ceil(gemm.filters / tile.bn) * gemm.weight[0]
        turns = ceil(blocks_of_threads / card.multiprocessors)
        waits = ALONE if turns == 1 else 1
        return turns * waits * tile.bm * tile.bn * (1 + 1 / tile.tm + 1 / tile.tn)

    return min(TILES, key=cost)


def legalize(builder: BlockBuilder, call: relax.Call, card: Card) -> relax.Expr:
    """`horq.packed_conv2d`, and thereby dense layers."""
    x, weight = call.args
    spec = Gemm(shape_of(x), shape_of(weight), Geometry.of(call.attrs), int(call.attrs["channels"]))
    if spec.pixels < FEW_PIXELS:
        return builder.call_te(
            lambda a, b: direct.conv2d(a, b, spec.geometry, spec.channels), x, weight, primfunc_name_hint="conv2d"
        )
    return builder.call_te(lambda a, b: conv2d(spec, choose(spec, card), a, b), x, weight, primfunc_name_hint="conv2d")


def conv2d(spec: Gemm, tile: Tile, x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """→ float32 [N,HO,WO,F]."""
    height, width = spec.output
    groups, _, _, kw, inner, lanes = spec.weight
    (sy, sx), (dy, dx) = spec.geometry.strides, spec.geometry.dilation
    pixels, filters = (ceil(n / step) * step for n, step in ((spec.pixels, tile.bm), (spec.filters, tile.bn)))
    depth = ceil(spec.depth / DEPTH) * DEPTH
    zero = tirx.const(0.0, "float32")

    def row(g, m, k):  # type: ignore[no-untyped-def]
        n, y, x_ = m // (height * width), m // width % height, m % width
        ry, rx, c = k // (kw * inner), k // inner % kw, k % inner
        value = x[n, y * sy + ry * dy, x_ * sx + rx * dx, g * inner + c]
        return tirx.if_then_else(tirx.all(m < spec.pixels, k < spec.depth), value, zero)

    def filter_(g, k, f):  # type: ignore[no-untyped-def]
        value = weight[g, f // lanes, k // (kw * inner), k // inner % kw, k % inner, f % lanes]
        return tirx.if_then_else(tirx.all(f < spec.weight[1] * lanes, k < spec.depth), value, zero)

    rows = te.compute((groups, pixels, depth), row, name="rows")
    columns = te.compute((groups, depth, filters), filter_, name="filters")
    k = te.reduce_axis((0, depth), "k")
    sums = te.compute(
        (pixels, groups, filters),
        lambda m, g, f: te.sum(rows[g, m, k] * columns[g, k, f], axis=[k]),
        name=GEMM,
        attrs={TILE: [tile.bm, tile.bn, tile.tm, tile.tn]},
    )
    per_group = spec.filters
    return te.compute(
        (spec.x[0], height, width, spec.channels),
        lambda n, y, x_, f: sums[
            (n * height + y) * width + x_, f // per_group if groups > 1 else 0, f % per_group if groups > 1 else f
        ],
        name="conv2d",
    )


def tiles(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """Convolutions with their epilogue in one launch; planes behind it in another."""
    sch = s_tir.Schedule(func)
    if GEMM not in [blocks.name(sch, block) for block in blocks.Kernel.of(sch).blocks]:
        return None
    gemm = sch.get_sblock(GEMM)
    operands = ("rows", "filters")
    others = [b for b in blocks.Kernel.of(sch).blocks if blocks.name(sch, b) not in (GEMM, *operands)]
    master, *followers = _inline(sch, others)
    groups = blocks.spatial_extents(sch, gemm)[1]
    names = [blocks.name(sch, block) for block in (master, *followers)]
    tile = _tile_of(sch)
    _by_rows(sch, master, groups)
    # What a block reads at (g·c + i) // c it reads at g: TVM sees that here, but not when it moves the block.
    sch = s_tir.Schedule(s_tir.transform.StmtSimplify()(sch.mod))
    gemm, (master, *followers) = sch.get_sblock(GEMM), [sch.get_sblock(name) for name in names]
    sch.set_scope(gemm, 0, "local")
    m, g, f, k = sch.get_loops(gemm)
    mo, ty, mi = sch.split(m, [None, tile.threads[0], tile.tm])
    fo, tx, fi = sch.split(f, [None, tile.threads[1], tile.tn])
    ko, ki = sch.split(k, [None, DEPTH])
    sch.reorder(g, mo, fo, ty, tx, ko, ki, mi, fi)
    for loop, axis in ((g, "blockIdx.z"), (fo, "blockIdx.y"), (mo, "blockIdx.x"), (ty, "threadIdx.y")):
        sch.bind(loop, axis)
    sch.bind(tx, "threadIdx.x")
    for name in operands:
        _fetch(sch, sch.get_sblock(name), ko, tile)
    for loop in (mi, fi):
        sch.unroll(loop)
    sch.unroll(ki)
    sch.reverse_compute_at(master, tx, preserve_unit_loops=True)
    sch.decompose_reduction(gemm, ko)
    for block in followers:
        _follow(sch, block)
    return sch


def _tile_of(sch: s_tir.Schedule) -> Tile:
    """The tile that the padding was made for."""
    bm, bn, tm, tn = (int(v) for v in sch.get(sch.get_sblock(GEMM)).annotations[TILE])
    return Tile(bm, bn, tm, tn)


def _fetch(sch: s_tir.Schedule, block: blocks.Block, at: blocks.Loop, tile: Tile) -> None:
    """A tile of an operand into shared memory, by all threads, neighbours next to each other in memory."""
    sch.set_scope(block, 0, "shared")
    sch.compute_at(block, at)
    fused = sch.fuse(*sch.get_loops(block)[-2:])
    rows, columns = tile.threads
    _, ty, tx = sch.split(fused, [None, rows, columns])
    sch.bind(ty, "threadIdx.y")
    sch.bind(tx, "threadIdx.x")


def _inline(sch: s_tir.Schedule, others: Sequence[blocks.Block]) -> list[blocks.Block]:
    """Everything elementwise into what writes an output or is packed; the first of these computes."""
    kept = []
    for block in others:
        feeds_pack = any(blocks.packs(sch, consumer) for consumer in sch.get_consumers(block))
        if blocks.packs(sch, block) or feeds_pack or blocks.writes_output(sch, block):
            kept.append(block)
        else:
            sch.compute_inline(block)
    return kept


def _by_rows(sch: s_tir.Schedule, block: blocks.Block, groups: int) -> None:
    """The block's axes n, y, x, channel as pixel, group and channel of the group."""
    _, height, width, channels = blocks.spatial_extents(sch, block)
    inner = channels // groups

    def split(n: tirx.Expr, y: tirx.Expr, x: tirx.Expr, f: tirx.Expr) -> tuple[tirx.Expr, ...]:
        pixel = (n * height + y) * width + x
        return (pixel, f // inner, f % inner) if groups > 1 else (pixel, f)

    sch.transform_block_layout(block, split)


def _follow(sch: s_tir.Schedule, block: blocks.Block) -> None:
    """A launch of its own: planes by ballots, another result an element a thread."""
    if blocks.packs(sch, block):
        on_warps(sch, block)
    else:
        _bind(sch, sch.fuse(*sch.get_loops(block)))


def _bind(sch: s_tir.Schedule, loop: blocks.Loop) -> blocks.Loop:
    grid, thread = sch.split(loop, [None, THREADS])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


def windows(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """One sum or maximum with its epilogue: a thread for each result, or where these are few, several for each."""
    sch = s_tir.Schedule(func)
    every = blocks.Kernel.of(sch).blocks
    found = [i for i, block in enumerate(every) if blocks.is_reduction(sch, block)]
    if len(found) != 1 or blocks.packs(sch, every[found[0]]):
        return None
    before, reduction, others = every[: found[0]], every[found[0]], every[found[0] + 1 :]
    if len(blocks.spatial_extents(sch, reduction)) < 2 or any(
        blocks.writes_output(sch, block) or blocks.packs(sch, block) for block in before
    ):
        return None
    for block in before:
        sch.compute_inline(block)
    if blocks.writes_output(sch, reduction):
        master, *followers = [sch.cache_write(reduction, 0, "local"), *_inline(sch, others)]
    else:
        master, *followers = _inline(sch, others)
    results = prod(blocks.spatial_extents(sch, reduction))
    terms = blocks.work(sch, reduction) // results
    if results <= FEW_RESULTS and terms >= 2 * SHARES:
        _share_out(sch, reduction, master)
    else:
        # Apart from the rows: of an index taken from all of them at once TVM does not see what the window reads.
        *rows, column, channel = sch.get_loops(master)
        if rows:
            sch.bind(sch.fuse(*rows), "blockIdx.y")
        thread = _bind(sch, sch.fuse(column, channel))
        sch.set_scope(reduction, 0, "local")
        sch.compute_at(reduction, thread, preserve_unit_loops=True)
        _decompose(sch, reduction)
    for block in followers:
        _follow(sch, block)
    return sch


def _share_out(sch: s_tir.Schedule, reduction: blocks.Block, master: blocks.Block) -> None:
    """SIDE results a block of threads, each the sum of SHARES threads' sums, which meet in shared memory."""
    *rows, channel = sch.get_loops(master)
    if rows:
        sch.bind(sch.fuse(*rows), "blockIdx.y")
    grid, side = sch.split(channel, [None, SIDE])
    sch.bind(grid, "blockIdx.x")
    sch.bind(side, "threadIdx.x")
    sch.set_scope(reduction, 0, "shared")
    sch.compute_at(reduction, grid, preserve_unit_loops=True)
    axes = len(blocks.spatial_extents(sch, reduction))
    loops = sch.get_loops(reduction)[1 + bool(rows) :]
    sch.bind(sch.fuse(*loops[:axes]), "threadIdx.x")
    _, share = sch.split(sch.fuse(*loops[axes:]), [None, SHARES])
    sch.bind(share, "threadIdx.y")


def _decompose(sch: s_tir.Schedule, reduction: blocks.Block) -> None:
    """The initial value apart from the loop over the terms."""
    node = sch.get(reduction)
    terms = sum(int(v.iter_type) == tirx.IterVar.CommReduce for v in node.iter_vars)
    sch.decompose_reduction(reduction, sch.get_loops(reduction)[-terms])

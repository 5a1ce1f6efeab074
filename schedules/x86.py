"""Schedule rules for x86. Each takes a PrimFunc and returns its schedule, or None: not mine. First match wins.

What a rule leaves open it asks of `decide`: by default the analytic model's choice, else a tuner's (decisions.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import s_tir, tirx

from horq_tvm.targets import Target

from . import blocks, int8, nibble
from .decisions import Decide, by_default
from .tile import Loop, Tile, choose

Rule = Callable[[tirx.PrimFunc, Target, Decide], "s_tir.Schedule | None"]

ACCUMULATIONS = ("popcount", "flush", "multiply", "dot")
ORDERS = ("channels", "pixels")
SQUARES = (8, 16, 32)
UNITS = ("row", "pixel")  # of a binarisation by itself: what a thread takes at a time
UNROLL = ("none", "row")
MAX_UNROLLED_WINDOW = 16
UNROLLED_BODIES = 200  # more of them and the loop no longer fits the instruction cache
TRANSPOSE = 16  # elements along each side of a transposed square: a cache line
PARALLEL_WORK = 1 << 16  # inner operations under which sharing a kernel out costs more than it brings


def direct_convolution(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> s_tir.Schedule | None:
    """Bitserial and float convolutions with their epilogue, and the next layer's planes, in one tile nest."""
    sch = s_tir.Schedule(func)
    kernel = blocks.Kernel.of(sch)
    reductions = [b for b in kernel.reductions if blocks.name(sch, b).startswith(ACCUMULATIONS)]
    if not reductions:
        return None
    popcount = blocks.name(sch, reductions[0]).startswith("popcount")
    in_pairs = blocks.name(sch, reductions[0]).startswith("dot") and int8.style(target) == "pairs"
    in_bytes = blocks.name(sch, reductions[0]).startswith("flush")  # nibble.py: 16-bit sums, the start added afterwards
    for block in reductions if not in_bytes else ():
        blocks.fuse_start(sch, block)
    kept = blocks.inline_elementwise(sch)
    master, followers = kept[0], kept[1:]
    _, height, width, groups, per_group, lanes = blocks.written_shape(sch, reductions[0])
    packs = [b for b in followers if blocks.packs(sch, b)]
    loop = Loop(
        height=height,
        width=width,
        blocks=per_group,
        lanes=lanes,
        # What is counted or multiplied before it is added needs a register of its own, or two.
        registers=target.vector_registers - (2 if in_pairs or (popcount and target.popcount != "vpopcntdq") else 0),
        latency=8,
        q_multiple=max(1, 32 // lanes) if packs else 1,
        per_step=0.75 if popcount else 0.5,
        split=in_bytes and nibble.is_split(sch, reductions[0]),
    )
    tile = nibble.choose(loop, decide) if in_bytes else choose(loop, decide)
    work = nibble.work(sch, reductions[0]) if in_bytes else blocks.work(sch, reductions[0])

    nest = tile_nest(sch, master, tile, groups, lanes, work, decide)
    unroll = 1 if in_bytes else decide("unroll", unrolls(sch, reductions[0], tile), 1)
    for block in reductions:
        if in_bytes:
            nibble.accumulate(sch, block, nest.at)
        else:
            accumulate(sch, block, nest.at, unroll)
    nest.unroll(sch)
    for block in followers:
        # Byte lanes: a tile of floats is too large.
        follow(sch, block, nest.pixel if in_bytes else nest.at, tile, lanes)
    return sch


@dataclass(frozen=True)
class Nest:
    """The loops of a tile: `at` is around it, inside are its pixels, vectors of filters, and lanes."""

    at: s_tir.schedule.LoopRV
    pixel: s_tir.schedule.LoopRV
    filters: s_tir.schedule.LoopRV
    lane: s_tir.schedule.LoopRV

    def unroll(self, sch: s_tir.Schedule) -> None:
        blocks.vectorize(sch, self.lane)
        sch.unroll(self.pixel)
        sch.unroll(self.filters)


def tile_nest(
    sch: s_tir.Schedule, master: s_tir.SBlockRV, tile: Tile, groups: int, lanes: int, work: int, decide: Decide
) -> Nest:
    """The loops of the block that writes a convolution's output, by tiles; the outermost in parallel."""
    n, y, x, *f = sch.get_loops(master)
    channels, width = int(sch.get(f[0]).extent), int(sch.get(x).extent)
    if groups == 1:
        g, fo, fq, fv = sch.split(f[0], [1, None, tile.q, lanes])
    else:
        n, y, x, g, fo, fv = _by_group(sch, master, channels // groups, lanes)
        fo, fq = sch.split(fo, [None, tile.q])
    xo, xi = sch.split(x, [None, tile.px])
    yo, yi = sch.split(y, [None, tile.rows])
    # A tile's channels stay while it walks over the rows of a unit, or all channels are done at a tile's pixels.
    by_channel = decide("order", ORDERS, ORDERS[0]) == ORDERS[0]
    sch.reorder(n, yo, g, *((fo, yi, xo) if by_channel else (yi, xo, fo)), xi, fq, fv)
    at = xo if by_channel else fo
    if tile.row:
        sch.unroll(xo)
    elif width % tile.px:
        sch.annotate(xo, "pragma_loop_partition_hint", 1)
    if channels % (groups * tile.q * lanes):
        sch.annotate(fo, "pragma_loop_partition_hint", 1)
    outer = sch.fuse(n, yo)
    if work >= PARALLEL_WORK:
        sch.parallel(outer if int(sch.get(outer).extent) > 1 else g if groups > 1 or not by_channel else fo)
    return Nest(at, xi, fq, fv)


def _by_group(sch: s_tir.Schedule, master: s_tir.SBlockRV, per_group: int, lanes: int) -> list[s_tir.LoopRV]:
    """The block's loops n, y, x, group, vector, lane; a vector never crosses a group, see `tile.lanes`.

    By splitting the channels' loop the block would go on to read accumulators at f // per_group, and TVM takes the
    range of that over a tile to be the whole group: too many for the stack.
    """
    blocks_of_group = per_group // lanes

    def split(n: tirx.Expr, y: tirx.Expr, x: tirx.Expr, f: tirx.Expr) -> tuple[tirx.Expr, ...]:
        inner = f % per_group
        axes = (inner // lanes, inner % lanes) if blocks_of_group > 1 and lanes > 1 else (inner,)
        return (n, y, x, f // per_group, *axes)  # an axis of one element would not be an affine map of f to TVM

    sch.transform_block_layout(master, split)
    loops = sch.get_loops(master)
    if lanes == 1:
        return [*loops, sch.add_unit_loop(master)]
    return loops if blocks_of_group > 1 else [*loops[:4], sch.add_unit_loop(loops[4]), loops[4]]


def unrolls(sch: s_tir.Schedule, block: s_tir.SBlockRV, tile: Tile) -> list[int]:
    """How many steps of the innermost reduction may stand in a row: they divide it, and the code stays small."""
    innermost = int(sch.get(sch.get_loops(block)[-1]).extent)
    return [u for u in (1, 2, 3, 4, 8) if u == 1 or (innermost % u == 0 and u * tile.px * tile.q <= UNROLLED_BODIES)]


def accumulate(sch: s_tir.Schedule, block: s_tir.SBlockRV, at: s_tir.LoopRV, unroll: int) -> None:
    """One plane's (or the float) reduction inside a tile: pixels and vectors unrolled, lanes vectorised."""
    sch.compute_at(block, at, preserve_unit_loops=True)
    _, _, x, _, b, v, ry, rx, rc = sch.get_loops(block)[-9:]
    if unroll > 1:
        rc, step = sch.split(rc, [None, unroll])
        sch.reorder(ry, rx, rc, step, x, b, v)
        sch.unroll(step)
    else:
        sch.reorder(ry, rx, rc, x, b, v)
    blocks.vectorize(sch, v)  # before the reduction is split: afterwards neither half is a reduction to TVM
    sch.unroll(x)
    sch.unroll(b)
    init = sch.decompose_reduction(block, ry)
    *_, x, b, v = sch.get_loops(init)
    blocks.vectorize(sch, v)
    sch.unroll(x)
    sch.unroll(b)


def follow(sch: s_tir.Schedule, block: s_tir.SBlockRV, at: s_tir.LoopRV, tile: Tile, lanes: int) -> None:
    """A later block of the epilogue, or the packing of the next layer's planes, inside the tile."""
    sch.reverse_compute_at(block, at, preserve_unit_loops=True)
    if blocks.packs(sch, block):
        for loop in sch.get_loops(block)[-4:]:
            sch.unroll(loop)
        return
    *_, x, f = sch.get_loops(block)
    fq, fv = sch.split(f, [None, lanes])
    sch.unroll(x)
    sch.unroll(fq)
    blocks.vectorize(sch, fv)


def window_reduction(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> s_tir.Schedule | None:
    """Depthwise convolution, pooling and means over space: channels last and untouched, so they are the vector."""
    sch = s_tir.Schedule(func)
    reductions = blocks.Kernel.of(sch).reductions
    if len(reductions) != 1 or not blocks.keeps_last_axis(sch, reductions[0]):
        return None
    (reduction,) = reductions
    lanes = target.vector_bits // 32
    kept = [b for b in blocks.inline_elementwise(sch) if not b.same_as(reduction)]
    if any(blocks.packs(sch, b) for b in kept) or len(kept) > 1:
        return None
    master = kept[0] if kept else reduction
    loops = sch.get_loops(master)
    spatial = loops[: len(blocks.spatial_extents(sch, master))]
    *outer, c = spatial
    channels = int(sch.get(c).extent)
    lanes = decide("lanes", _lanes(lanes, channels), min(lanes, channels))
    co, cv = sch.split(c, [None, lanes])
    if channels % lanes:
        sch.annotate(co, "pragma_loop_partition_hint", 1)
    top = sch.fuse(*outer) if outer else co
    if blocks.work(sch, reduction) >= PARALLEL_WORK and outer:
        sch.parallel(top)
    if kept:
        sch.compute_at(reduction, co, preserve_unit_loops=True)
        blocks.vectorize(sch, cv)
        inner = sch.get_loops(reduction)
        count = len(blocks.spatial_extents(sch, reduction))
        axes = inner[-(len(sch.get(reduction).iter_vars)) :]
        cv, reduced = axes[count - 1], axes[count:]
    else:
        reduced = sch.get_loops(reduction)[-(len(loops) - len(spatial)) :]
    sch.reorder(*reduced, cv)
    blocks.vectorize(sch, cv)
    last = reduced[-1]
    if decide("unroll", UNROLL if int(sch.get(last).extent) <= MAX_UNROLLED_WINDOW else UNROLL[:1], UNROLL[0]) == "row":
        sch.unroll(last)
    init = sch.decompose_reduction(reduction, reduced[0])
    blocks.vectorize(sch, sch.get_loops(init)[-1])
    return sch


def _lanes(widest: int, channels: int) -> list[int]:
    """Channels side by side: a vector of the target, half of one, or several that take turns in the window's loops."""
    offered = {min(widest, channels), *(v for v in (widest // 2, widest, 2 * widest, 4 * widest) if 1 < v <= channels)}
    return sorted(offered)


def packing(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> s_tir.Schedule | None:
    """A binarisation by itself, with what comes before it computed word by word."""
    sch = s_tir.Schedule(func)
    kernel = blocks.Kernel.of(sch)
    packs = [b for b in kernel.blocks if blocks.packs(sch, b)]
    if not packs or kernel.reductions:
        return None
    for block in blocks.inline_elementwise(sch):
        if blocks.packs(sch, block):
            n, y, x, *_ = sch.get_loops(block)
            outer = sch.fuse(n, y, x) if decide("unit", UNITS, UNITS[0]) == "pixel" else sch.fuse(n, y)
            if blocks.work(sch, block) * 32 >= PARALLEL_WORK:
                sch.parallel(outer)
        elif blocks.writes_output(sch, block):
            _map(sch, block, target, decide)
        elif len(packs) == 1:
            sch.compute_at(block, sch.get_loops(packs[0])[-1])
            blocks.vectorize(sch, sch.get_loops(block)[-1])
        else:
            return None
    return sch


def elementwise(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> s_tir.Schedule | None:
    """Maps, pads, transposes, concatenations: rows in parallel, the last axis in vectors."""
    sch = s_tir.Schedule(func)
    kernel = blocks.Kernel.of(sch)
    if kernel.reductions or any(blocks.packs(sch, b) for b in kernel.blocks):
        return None
    for block in blocks.inline_elementwise(sch):
        _map(sch, block, target, decide)
    return sch


def _map(sch: s_tir.Schedule, block: s_tir.SBlockRV, target: Target, decide: Decide) -> None:
    """One elementwise block: outer axes fused and parallel, inner axis in vectors where it divides."""
    loops = sch.get_loops(block)
    if not loops:
        return
    *outer, last = loops
    extent, lanes = int(sch.get(last).extent), target.vector_bits // 32
    source = blocks.source_of_last_axis(sch, block)
    if source is not None and extent >= lanes:
        _transpose(sch, block, source, decide("square", SQUARES, TRANSPOSE))
        return
    if source is not None and len(outer) > 1:
        _interleave(sch, block, source)
        return
    # A block with loops of its own (the means of an image) has vectors of its own.
    if extent % lanes == 0 and isinstance(sch.get(block).body, tirx.BufferStore):
        wide = [v for v in (lanes, 2 * lanes, 4 * lanes) if extent % v == 0]
        rest, inner = sch.split(last, [None, decide("lanes", wide, lanes)])
        sch.vectorize(inner)
        outer = outer or [rest]
    if outer:
        top = sch.fuse(*outer)
        if blocks.work(sch, block) >= PARALLEL_WORK:
            sch.parallel(top)


def _transpose(sch: s_tir.Schedule, block: s_tir.SBlockRV, source: int, side: int) -> None:
    """A map that reads along loop `source` and writes along the last one, by squares that stay in the first cache."""
    loops = sch.get_loops(block)
    read, written = loops[source], loops[-1]
    ro, ri = sch.split(read, [None, min(side, int(sch.get(read).extent))])
    wo, wi = sch.split(written, [None, min(side, int(sch.get(written).extent))])
    outer = [ro if loop.same_as(read) else loop for loop in loops[:-1]]
    sch.reorder(*outer, wo, ri, wi)
    sch.vectorize(wi)
    top = sch.fuse(*outer)
    if blocks.work(sch, block) >= PARALLEL_WORK:
        sch.parallel(top)


def _interleave(sch: s_tir.Schedule, block: s_tir.SBlockRV, source: int) -> None:
    """A map that reads along loop `source` and writes a few values along the last one: RGB planes into pixels.

    The loop that is read along stays a loop of its own. Fused with the others, its index would be a division's
    remainder, and no vector could load along it.
    """
    *outer, last = sch.get_loops(block)
    read = outer.pop(source)
    sch.reorder(*outer, read, last)
    sch.unroll(last)
    top = sch.fuse(*outer)
    if blocks.work(sch, block) >= PARALLEL_WORK:
        sch.parallel(top)


def plain(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """Whatever is left (softmax, a product of two activations, bits of odd widths): loops as they are, rows parallel.

    Intermediate tensors stay; `ScheduleKernels` hands them in from outside.
    """
    sch = s_tir.Schedule(func)
    for block in blocks.Kernel.of(sch).blocks:
        loops = sch.get_loops(block)
        spatial = loops[: len(blocks.spatial_extents(sch, block))] if len(loops) > 1 else []
        if spatial and blocks.work(sch, block) >= PARALLEL_WORK:
            sch.parallel(spatial[0])
    return sch


RULES: tuple[Rule, ...] = (direct_convolution, window_reduction, packing, int8.quantisation, elementwise, plain)

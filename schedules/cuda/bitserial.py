"""Bitserial layers on CUDA: the tile kernel of mma.py with the float epilogue and the next planes in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import relax, s_tir, te, tirx
from tvm.relax import BlockBuilder

from horq_tvm.ops import shape_of
from horq_tvm.schedules import blocks
from horq_tvm.schedules.bitserial import Bitserial, from_counts
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import WARP, Target

from . import mma, pack
from .mma import BANKS, COUNTS_SHIFT, WARPS, Gemm
from .tile import Card, choose

COUNT = "mma"
THREADS = 128  # of a block, where each has an output


def legalize(builder: BlockBuilder, call: relax.Call, card: Card) -> relax.Expr:
    """`horq.packed_bitserial` of style `mma`: the counts of all planes from one kernel, the rest from te."""
    planes, weight, start, *factors = call.args
    spec = Bitserial.of(call.attrs)
    gemm = Gemm(shape_of(planes), shape_of(weight), spec.geometry)
    tile = choose(gemm, card)
    kernel = builder.add_func(mma.count(gemm, tile), "count")
    of_plane = relax.TensorType(mma.counts_shape(gemm, tile), "int32")
    found = builder.emit(relax.call_tir(kernel, [planes, weight], [of_plane] * gemm.orders))
    counts = [builder.emit(relax.TupleGetItem(found, p)) for p in range(gemm.orders)] if gemm.orders > 1 else [found]
    return builder.call_te(
        lambda *operands: from_counts(spec, _by_plane(spec, gemm, operands), *operands[gemm.orders :]),
        *counts,
        start,
        *factors,
        primfunc_name_hint="bitserial",
    )


def _by_plane(spec: Bitserial, gemm: Gemm, counts: Sequence[te.Tensor]) -> list[te.Tensor]:
    """int32 [N,HO,WO,G,1,F/G] of each plane, as `from_counts` takes them; without the filters that fill up a group.

    With them an index would be f % (more than F), of which TVM does not see that it is f.
    """
    rows, columns = gemm.output
    groups = gemm.weight[0]
    extents = (gemm.planes[0], rows, columns, groups, 1, spec.channels // groups)

    def of_plane(plane: te.Tensor) -> te.Tensor:
        def count(n, y, x, g, _b, f):  # type: ignore[no-untyped-def]
            at = ((n * rows + y) * columns + x, *([g] if groups > 1 else []), f)
            return plane[at]

        return te.compute(extents, count, name=f"of_{plane.op.name}")

    return [of_plane(plane) for plane in counts[: gemm.orders]]


def tensor_cores(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """A tile of counts a block of threads, in shared memory; then its threads are channels side by side."""
    sch = s_tir.Schedule(func)
    (count, *others) = blocks.Kernel.of(sch).blocks
    if blocks.name(sch, count) != COUNT:
        return None
    groups = blocks.spatial_extents(sch, count)[1]
    followers = _inline(sch, others)
    for block in followers:
        _by_rows(sch, block, groups)
    names = [blocks.name(sch, block) for block in followers]
    # What a block reads at (g·c + i) // c it reads at g: TVM sees that here, but not when it moves the block.
    sch = s_tir.Schedule(s_tir.transform.StmtSimplify()(sch.mod))
    _tiles(sch, sch.get_sblock(COUNT), [sch.get_sblock(name) for name in names])
    return s_tir.Schedule(pack.everywhere(blocks.function(sch)))


def popcounts(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """Groups of fewer filters than a product on tensor cores has: a thread counts the window of an output, in a loop.

    Its neighbours read the same window for the other filters, out of the first cache: too few to gather it for them.
    """
    sch = s_tir.Schedule(func)
    kernel = blocks.Kernel.of(sch)
    counts = kernel.reductions
    if not counts or not all(blocks.name(sch, block).startswith("popcount") for block in counts):
        return None
    # No planes follow: those of fewer than 32 channels a group are packed by themselves.
    (master,) = _inline(sch, [block for block in kernel.blocks if not blocks.is_reduction(sch, block)])
    output = sch.fuse(*sch.get_loops(master))
    block, thread = sch.split(output, [None, THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    for of_plane in counts:
        sch.set_scope(of_plane, 0, "local")
        sch.compute_at(of_plane, thread, preserve_unit_loops=True)
    return sch


def _tiles(sch: s_tir.Schedule, count: blocks.Block, followers: Sequence[blocks.Block]) -> None:
    warps = int(sch.get(count).annotations[WARPS])
    for plane in range(len(sch.get(count).writes)):
        sch.set_scope(count, plane, "shared")
        sch.storage_align(count, plane, -2, BANKS, COUNTS_SHIFT)
    m, g, n = sch.get_loops(count)
    for loop, axis in ((m, "x"), (n, "y"), (g, "z")):
        sch.bind(loop, f"blockIdx.{axis}")
    master, *others = followers
    sch.reverse_compute_at(master, n, preserve_unit_loops=True)
    row, *_, channel = sch.get_loops(master)[3:]
    turn, warp = sch.split(row, [None, warps])
    words, lane = sch.split(channel, [None, WARP])
    sch.reorder(turn, words, warp, lane)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    for block in others:
        sch.reverse_compute_at(block, lane, preserve_unit_loops=True)


def _inline(sch: s_tir.Schedule, others: Sequence[blocks.Block]) -> list[blocks.Block]:
    """Everything into what writes an output; a value that is packed as well as written stays in a register in between.

    Returns the block that computes, and behind it those that use its value.
    """
    kept = [block for block in others if blocks.writes_output(sch, block)]
    for block in others:
        if not any(block.same_as(k) for k in kept):
            sch.compute_inline(block)
    if len(kept) == 1:
        return kept
    value, packs = kept
    written = sch.cache_write(value, 0, "local", consumer_blocks=[packs])
    _, height, width, _ = blocks.written_shape(sch, value)
    sch.transform_layout(value, ("write", 0), lambda n, y, x, f: ((n * height + y) * width + x, f))
    return [value, written, packs]


def _by_rows(sch: s_tir.Schedule, block: blocks.Block, groups: int) -> None:
    """The block's axes n, y, x, channel (or word, lane) as pixel, group and channel of the group."""
    _, height, width, channels, *lanes = blocks.spatial_extents(sch, block)
    inner = channels * prod(lanes) // groups

    def split(n: tirx.Expr, y: tirx.Expr, x: tirx.Expr, channel: tirx.Expr) -> tuple[tirx.Expr, ...]:
        pixel = (n * height + y) * width + x
        return (pixel, channel // inner, channel % inner) if groups > 1 else (pixel, channel)

    if lanes:
        sch.transform_block_layout(block, lambda n, y, x, word, lane: split(n, y, x, word * WARP + lane))
    else:
        sch.transform_block_layout(block, split)

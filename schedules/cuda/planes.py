"""Planes that a launch of its own makes, not the tile of a convolution: a warp a word."""

from __future__ import annotations

from tvm import s_tir, tirx

from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import Target

from .pack import PACK

WARPS = 8  # of a block of threads, or as many as divide the words: there is no vote without a word


def ballots(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """`pack` with nothing but elementwise operators ahead of it."""
    sch = s_tir.Schedule(func)
    *others, pack = blocks.Kernel.of(sch).blocks
    if not blocks.packs(sch, pack) or not all(_elementwise(sch, block) for block in others):
        return None
    for block in others:
        sch.compute_inline(block)
    on_warps(sch, pack)
    return sch


def on_warps(sch: s_tir.Schedule, pack: blocks.Block) -> None:
    """Its words are shared out among warps; its last loop is the lanes."""
    assert blocks.name(sch, pack) == PACK
    *words, lane = sch.get_loops(pack)
    word = sch.fuse(*words)
    total = int(sch.get(word).extent)
    grid, warp = sch.split(word, [None, max(w for w in range(1, WARPS + 1) if total % w == 0)])
    for loop, axis in ((grid, "blockIdx.x"), (warp, "threadIdx.y"), (lane, "threadIdx.x")):
        sch.bind(loop, axis)


def _elementwise(sch: s_tir.Schedule, block: blocks.Block) -> bool:
    return not blocks.is_reduction(sch, block) and not blocks.writes_output(sch, block)

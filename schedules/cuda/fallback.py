"""What no rule of ours takes: correct, and fast where a kernel only moves or maps elements."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.dlight import gpu
from tvm.target import Target as TVMTarget

from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import MAX_THREADS, Target

from .planes import on_warps

DLIGHT = (gpu.GeneralReduction(), gpu.Fallback())


def fallback(func: tirx.PrimFunc, target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """The schedule of the first of dlight's rules that takes the kernel; where planes are packed, one of ours."""
    sch = s_tir.Schedule(func)
    if any(blocks.packs(sch, block) for block in blocks.Kernel.of(sch).blocks):
        return _around_planes(sch)
    tvm_target = TVMTarget({**target.tvm_target().export(), "max_threads_per_block": MAX_THREADS // 4})
    with tvm_target:
        for rule in DLIGHT:
            found = rule.apply(func, tvm_target, False)
            if found is not None:
                return found[0] if isinstance(found, list) else found
    return None


def _around_planes(sch: s_tir.Schedule) -> s_tir.Schedule:
    """A launch for each block that is no elementwise map: dlight knows nothing of whole warps."""
    for block in blocks.Kernel.of(sch).blocks:
        if blocks.packs(sch, block):
            on_warps(sch, block)
        elif blocks.is_reduction(sch, block) or blocks.writes_output(sch, block):
            _spread(sch, block)
        else:
            sch.compute_inline(block)
    return sch


def _spread(sch: s_tir.Schedule, block: blocks.Block) -> None:
    """A thread for each element of the block's result."""
    loops = sch.get_loops(block)
    count = len(blocks.spatial_extents(sch, block))
    grid, thread = sch.split(sch.fuse(*loops[:count]), [None, MAX_THREADS // 4])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    if loops[count:]:
        sch.decompose_reduction(block, loops[count])

"""What no rule of ours takes, by TVM's dlight: correct, and fast where a kernel only moves or maps elements."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.dlight import gpu
from tvm.target import Target as TVMTarget

from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import Target

from .planes import on_warps

DLIGHT = (gpu.Fallback(),)


def fallback(func: tirx.PrimFunc, target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """The schedule of the first of dlight's rules that takes the kernel; planes go to whole warps, which it has not."""
    sch = s_tir.Schedule(func)
    for block in blocks.Kernel.of(sch).blocks:
        if blocks.packs(sch, block):
            on_warps(sch, block)
    func = blocks.function(sch)
    tvm_target: TVMTarget = target.tvm_target()
    with tvm_target:
        for rule in DLIGHT:
            found = rule.apply(func, tvm_target, False)
            if found is not None:
                return found[0] if isinstance(found, list) else found
    return None

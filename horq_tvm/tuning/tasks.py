"""What there is to tune in a model: its kernels before they are scheduled, each kind once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from horq_tvm.relay_passes.schedule_kernels import RULE, schedule
from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Recorded
from horq_tvm.straightline import op_name, read_main
from horq_tvm.targets import Target


@dataclass(frozen=True)
class Task:
    """One kernel: its workload's key, its algorithm, how often a run of the model calls it, and for which layers.

    `work` is how often the bodies of its blocks run, the weight of a kernel that was not measured yet.
    """

    workload: str
    name: str
    func: tirx.PrimFunc
    rule: str
    calls: int
    layers: tuple[str, ...]
    work: int


def workload_key(func: tirx.PrimFunc) -> str:
    """The same for kernels that compute the same on the same shapes, whatever they are called and in which model."""
    for name in func.attrs.keys() if func.attrs else ():
        if name != "s_tir":
            func = func.without_attr(name)
    return f"{tvm_ffi.structural_hash(func) & (2**64 - 1):016x}"


def extract(algorithms: tvm.IRModule, target: Target, layer_of: Mapping[str, str]) -> list[Task]:
    """The tunable kernels of a module of `pipeline.kernels`, heaviest first. `layer_of` names the layer of a kernel."""
    called = Counter(
        value.args[0].name_hint for _, value in read_main(algorithms).bindings if op_name(value) == "relax.call_tir"
    )
    found: dict[str, Task] = {}
    for gvar, func in algorithms.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        key, name = workload_key(func), gvar.name_hint
        layer = (layer_of[name],) if name in layer_of else ()
        if key in found:
            known = found[key]
            found[key] = Task(
                key, known.name, known.func, known.rule, known.calls + called[name], known.layers + layer, known.work
            )
            continue
        decide = Recorded({})
        rule = str(schedule(func, target, decide).attrs[RULE])
        if any(len(options) > 1 for options in decide.offered.values()):
            found[key] = Task(key, name, func, rule, called[name], layer, _work(func))
    return sorted(found.values(), key=lambda task: (-task.work * task.calls, task.name))


def _work(func: tirx.PrimFunc) -> int:
    sch = s_tir.Schedule(func)
    return sum(blocks.work(sch, block) for block in blocks.Kernel.of(sch).blocks)

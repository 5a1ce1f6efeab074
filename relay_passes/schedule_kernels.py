"""ScheduleKernels: every PrimFunc gets its target's schedule, with parameters from a tuner or the analytic model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tvm
from tvm import relax, s_tir, tirx

from horq_tvm.emit.plan import IN_PLACE
from horq_tvm.errors import HorqError
from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Decide, Recorded, by_default
from horq_tvm.straightline import Writer, op_name, read_main
from horq_tvm.targets import Target

Choose = Callable[[tirx.PrimFunc], Decide]
"""Who decides what the rule of a kernel, not yet scheduled, leaves open."""

RULE = "horq.rule"  # the attribute that names the rule which took a kernel

# Rules whose schedules touch each element of an operand of the output's shape once, right where they write it.
ELEMENTWISE_RULES = frozenset({"direct_convolution", "elementwise"})

# Rules that may leave tensors in memory between their blocks.
HOISTED_RULES = frozenset({"plain", "fallback", "tiles", "windows"})


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """Replaces each PrimFunc by its schedule under the first rule of the target's family that takes it.

    Tensors that a plain schedule leaves between its blocks become further outputs of the kernel, so that the memory
    plan owns them: a kernel that allocates does not belong on a small device.
    """

    def __init__(self, target: Target, choose: Choose = lambda _func: by_default) -> None:
        self.target = target
        self.choose = choose

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        extra: dict[tvm.ir.GlobalVar, _Hoisted] = {}
        updated = dict(mod.functions_items())
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            decide = self.choose(func)
            scheduled = schedule(func, self.target, decide)
            if isinstance(decide, Recorded) and not decide.fits:
                scheduled = schedule(func, self.target)  # a stale record counts for nothing, nor do parts of it
            rule = str(scheduled.attrs[RULE])
            if rule in ELEMENTWISE_RULES and (pairs := blocks.in_place(scheduled)):
                scheduled = scheduled.with_attr(IN_PLACE, pairs)
            if rule in HOISTED_RULES and _in_memory(scheduled):
                del updated[gvar]
                extra[gvar] = _hoist(scheduled)
            else:
                updated[gvar] = scheduled
        scheduled_mod = tvm.IRModule(updated, attrs=mod.attrs)
        return _pass_workspaces(scheduled_mod, extra) if extra else scheduled_mod


def _rules(target: Target) -> tuple:
    if target.family == "x86":
        from horq_tvm.schedules import x86

        return x86.RULES
    if target.family == "arm":
        from horq_tvm.schedules import arm

        return arm.RULES
    if target.family == "cuda":
        from horq_tvm.schedules import cuda

        return cuda.RULES
    raise HorqError(
        f"target {target.name}: there are no schedules for the family {target.family!r}; accepted: x86, arm, cuda"
    )


def schedule(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> tirx.PrimFunc:
    """The function under the first rule that takes it; the attribute `horq.rule` says which. HorqError: none does."""
    attrs = dict(func.attrs) if func.attrs else {}
    for rule in _rules(target):
        found = rule(func, target, decide)
        if found is not None:
            # A block moved to other axes reads its operands at unsimplified indices, whose range TVM overestimates.
            (scheduled,) = tirx.transform.StmtSimplify()(found.mod).functions.values()
            kept = {k: v for k, v in attrs.items() if k != "global_symbol"}
            return scheduled.with_attrs({**kept, RULE: rule.__name__})
    raise HorqError(f"no schedule rule of the family {target.family} takes this kernel:\n{func.script()}")


@dataclass(frozen=True)
class _Hoisted:
    """A kernel whose intermediate tensors are parameters, and the types of these."""

    func: tirx.PrimFunc
    spaces: tuple[relax.TensorType, ...]


def _in_memory(func: tirx.PrimFunc) -> list[tirx.Buffer]:
    """The tensors allocated in the root block that are neither a thread's nor a block of threads' own."""
    return [buffer for buffer in func.body.block.alloc_buffers if buffer.scope() in ("", "global")]


def _hoist(func: tirx.PrimFunc) -> _Hoisted:
    """The function with the tensors in memory that its root block allocates as further parameters."""
    root = func.body.block
    buffers = _in_memory(func)
    body = s_tir.SBlockRealize(
        [],
        func.body.predicate,
        s_tir.SBlock(
            root.iter_vars,
            root.reads,
            root.writes,
            root.name_hint,
            root.body,
            root.init,
            [b for b in root.alloc_buffers if b not in buffers],
            root.match_buffers,
            root.annotations,
        ),
    )
    widened = tirx.PrimFunc([*func.params, *buffers], body, func.ret_type, attrs=func.attrs)
    spaces = tuple(relax.TensorType([int(e) for e in b.shape], str(b.dtype)) for b in buffers)
    return _Hoisted(widened, spaces)


def _pass_workspaces(mod: tvm.IRModule, hoisted: Mapping[tvm.ir.GlobalVar, _Hoisted]) -> tvm.IRModule:
    """main, with each call of a hoisted kernel given its further outputs."""
    program = read_main(mod)
    with Writer(mod, program) as writer:
        gvars = {old: writer.add_function(kernel.func, old.name_hint) for old, kernel in hoisted.items()}
        for var, value in program.bindings:
            kernel = hoisted.get(value.args[0]) if op_name(value) == "relax.call_tir" else None
            if kernel is None:
                writer.bind(var, value)
                continue
            (types,) = value.ty_args
            own = list(types.fields) if isinstance(types, relax.TupleType) else [types]
            operands = writer.resolve(value.args[1])
            call = writer.emit(relax.call_tir(gvars[value.args[0]], operands, out_ty=[*own, *kernel.spaces]))
            results = [relax.TupleGetItem(call, i) for i in range(len(own))]
            writer.map(var, results[0] if len(own) == 1 else relax.Tuple(results))
        return writer.finish(program.result)

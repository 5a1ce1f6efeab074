"""ScheduleKernels: every PrimFunc gets its target's schedule, default parameters chosen by the analytic model."""

from __future__ import annotations


import tvm
from tvm import relax, s_tir, tirx

from horq_tvm.errors import HorqError
from horq_tvm.straightline import Writer, op_name, read_main
from horq_tvm.targets import Target


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """Replaces each PrimFunc by its schedule under the first rule of the target's family that takes it.

    Tensors that a plain schedule leaves between its blocks become further outputs of the kernel, so that the memory plan
    owns them: a kernel that allocates does not belong on a small device.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rules = _rules(self.target)
        extra: dict[str, list[tirx.Buffer]] = {}
        updated = dict(mod.functions_items())
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            scheduled, rule = _schedule(func, self.target, rules)
            if rule == "plain":
                scheduled, extra[gvar.name_hint] = _hoist(scheduled)
            updated[gvar] = scheduled.with_attr("horq.rule", rule)
        return _pass_workspaces(tvm.IRModule(updated, attrs=mod.attrs), extra)


def _rules(target: Target) -> tuple:  # type: ignore[type-arg]
    if target.family == "x86":
        from horq_tvm.schedules import x86

        return x86.RULES
    raise HorqError(f"target {target.name}: there are no schedules for the family {target.family!r}; accepted: x86")


def _schedule(func: tirx.PrimFunc, target: Target, rules: tuple) -> tuple[tirx.PrimFunc, str]:  # type: ignore[type-arg]
    attrs = dict(func.attrs) if func.attrs else {}
    for rule in rules:
        schedule = rule(func, target)
        if schedule is not None:
            (scheduled,) = schedule.mod.functions.values()
            return scheduled.with_attrs({k: v for k, v in attrs.items() if k != "global_symbol"}), rule.__name__
    raise HorqError(f"no schedule rule of the family {target.family} takes this kernel:\n{func.script()}")


def _hoist(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[tirx.Buffer]]:
    """The function with the tensors allocated in its root block as further parameters."""
    root = func.body.block
    buffers = list(root.alloc_buffers)
    if not buffers:
        return func, []
    body = s_tir.SBlockRealize(
        [],
        func.body.predicate,
        s_tir.SBlock(
            root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, [], root.match_buffers,
            root.annotations,
        ),
    )
    attrs = func.attrs
    return tirx.PrimFunc([*func.params, *buffers], body, func.ret_type, attrs=attrs), buffers


def _pass_workspaces(mod: tvm.IRModule, extra: dict[str, list[tirx.Buffer]]) -> tvm.IRModule:
    """main, with each call of a hoisted kernel given its further outputs."""
    if not any(extra.values()):
        return mod
    program = read_main(mod)
    with Writer(mod, program) as writer:
        for var, value in program.bindings:
            buffers = extra.get(value.args[0].name_hint, []) if op_name(value) == "relax.call_tir" else []
            if not buffers:
                writer.bind(var, value)
                continue
            own = list(value.ty_args[0].fields) if isinstance(value.ty_args[0], relax.TupleType) else [value.ty_args[0]]
            spaces = [relax.TensorType([int(e) for e in b.shape], str(b.dtype)) for b in buffers]
            call = writer.emit(relax.call_tir(value.args[0], writer.resolve(value.args[1]), out_ty=[*own, *spaces]))
            results = [relax.TupleGetItem(call, i) for i in range(len(own))]
            writer.map(var, results[0] if len(own) == 1 else relax.Tuple(results))
        return writer.finish(program.result)



"""`FuseScales`: scales and planes computed at run time read what stands in memory anyway, and no more often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main

from .fuse_epilogue import is_channel_constant

READERS = frozenset({"horq.scales", "horq.binarize"})
LANES = 8  # channels have to be a multiple of it: what the kernels read a factor and an addend for in one vector


@tvm.transform.module_pass(opt_level=0, name="FuseScales")
class FuseScales:
    """`x·factor + addend` by channel, read by scales and binarisations alone, becomes two operands of theirs.

    That is done where x is needed elsewhere too (a shortcut), so that it stands in memory; if not, the two operators
    join the kernel that makes x. And with `patch`, `horq.scales` and the `horq.binarize` of its β become `horq.patch`.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        lines = {var: line for var in program.values if (line := _line(program, var)) is not None}
        gone = {member for line in lines.values() for member in line.members}
        partners = dict(_partners(program))
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                if var in gone or var in partners.values():
                    continue
                if op_name(value) not in READERS:
                    writer.bind(var, value)
                    continue
                source, others = value.args[0], list(value.args[1:])
                if source in lines:
                    source, others = lines[source].source, [*others, *lines[source].operands]
                if var in partners:
                    planes = program.values[partners[var]]
                    how = {"order": int(value.attrs["order"]), "first": int(planes.attrs["first"])}
                    both = writer.emit(ops.patch(source, *others, geometry=ops.Geometry.of(value.attrs), **how))
                    writer.map(var, writer.emit(relax.TupleGetItem(both, 0)))
                    writer.map(partners[var], writer.emit(relax.TupleGetItem(both, 1)))
                else:
                    writer.bind(var, relax.Call(value.op, [source, *others], value.attrs))
            return writer.finish(program.result)


def _partners(program: Program) -> Iterator[tuple[relax.Var, relax.Var]]:
    """Of each scale of `patch` the one binarisation that reads the same value with it."""
    for var, value in program.bindings:
        if op_name(value) != "horq.scales" or str(value.attrs["scale"]) != "patch":
            continue
        users = [user for user in program.users[var] if op_name(program.values[user]) == "horq.binarize"]
        if len(users) == 1 and program.values[users[0]].args[0] == value.args[0]:
            yield var, users[0]


@dataclass(frozen=True)
class _Line:
    """source·factor + addend, made by `members`."""

    source: relax.Var
    operands: tuple[relax.Expr, relax.Expr]
    members: tuple[relax.Var, ...]


def _line(program: Program, var: relax.Var) -> _Line | None:
    """How `var` is x·factor + addend, if it is and may be taken apart."""
    users = [program.values[user] for user in program.users[var]]
    if var in program.returned or not users or not all(_reads_at_run_time(user, var) for user in users):
        return None
    factor, addend, source, members = None, None, var, []
    if addend_of := _channelwise(program, source, "relax.add"):
        members.append(source)
        source, addend = addend_of
    if (factor_of := _channelwise(program, source, "relax.multiply")) and _only_user(program, source, members):
        members.append(source)
        source, factor = factor_of
    channels = ops.shape_of(var)[-1]
    if not members or channels % LANES or not _stands_in_memory(program, source):
        return None
    operands = tuple(
        constant(np.broadcast_to(default if array is None else array.ravel(), channels).astype("float32"))
        for array, default in ((factor, np.float32(1)), (addend, np.float32(0)))
    )
    return _Line(source, (operands[0], operands[1]), tuple(members))


def _reads_at_run_time(value: relax.Expr, var: relax.Var) -> bool:
    """Whether this is a reader of `var`, β not known at compile time."""
    return op_name(value) in READERS and str(value.attrs["scale"]) != "static" and value.args[0] == var


def _channelwise(program: Program, var: relax.Var, name: str) -> tuple[relax.Var, Array] | None:
    """The variable and the constant of a channel that operator `name` makes `var` of."""
    value = program.values.get(var)
    if value is None or op_name(value) != name:
        return None
    for x, other in (value.args, reversed(value.args)):
        array = array_of(other)
        same = isinstance(x, relax.Var) and ops.shape_of(x) == ops.shape_of(var)
        if same and array is not None and is_channel_constant(other):
            return x, array
    return None


def _only_user(program: Program, var: relax.Var, members: list[relax.Var]) -> bool:
    return not members or program.sole_user(var) == members[-1]


def _stands_in_memory(program: Program, var: relax.Var) -> bool:
    return var in program.params or var in program.returned or len(program.users[var]) > 1

"""`FuseEpilogue`: a layer and the elementwise operators behind it, up to the next layer's planes, in one kernel."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst as Constant

from horq_tvm import ops
from horq_tvm.straightline import Program, Writer, array_of, op_name, read_main, vars_of

ANCHORS = frozenset(
    {
        "horq.packed_bitserial",
        "horq.packed_conv2d",
        "horq.packed_depthwise",
        "horq.packed_int8",
        "relax.nn.avg_pool2d",
        "relax.nn.max_pool2d",
    }
)
TILED = frozenset({"horq.packed_bitserial", "horq.packed_conv2d", "horq.packed_int8"})
_RELAX = """
    abs add clip cos divide equal erf exp floor greater greater_equal less less_equal log maximum minimum multiply
    negative nn.gelu nn.gelu_tanh nn.leakyrelu nn.prelu nn.relu nn.silu power round rsqrt sigmoid sign sin sqrt square
    subtract tanh where
"""
ELEMENTWISE = frozenset(f"relax.{name}" for name in _RELAX.split())
LAYER_ATTR = "horq.layer"

# A value that forks and joins again (PReLU as max and min, hard swish) takes a handful of operators.
MAX_FORK = 8


def is_channel_constant(expr: relax.Expr) -> bool:
    """Whether `expr` is a constant scalar or one value a channel, the last axis."""
    array = array_of(expr)
    return array is not None and array.size == (array.shape[-1] if array.ndim else 1)


@tvm.transform.module_pass(opt_level=0, name="FuseEpilogue")
class FuseEpilogue:
    """Groups operators into private functions with attribute Primitive, the form that FuseOps gives.

    A group is an anchor and what follows it elementwise with operands that are ready by then: constants a channel, and
    tensors of the same shape (a residual). It ends in one float value, or goes on from there to the planes of a
    `static` binarisation; both are results where the float value is needed elsewhere too (the float value first).
    Elementwise operators without an anchor are grouped among themselves. Constants are arguments. The layer's name is
    the function's attribute "horq.layer".
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        groups = _Grouper(program).groups()
        with Writer(mod, program) as writer:
            for number, unit in _ordered(program, groups):
                if isinstance(unit, _Group):
                    _emit_group(writer, program, unit, number)
                else:
                    writer.bind(unit, program.values[unit])
            return writer.finish(program.result)


@dataclass(frozen=True)
class _Group:
    """Variables whose bindings make one kernel, in order, the anchor first, and those that are seen outside."""

    members: tuple[relax.Var, ...]
    outputs: tuple[relax.Var, ...]


class _Grouper:
    """Finds the groups. A group never depends on itself by way of others, earlier groups taken as single nodes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.position = {var: i for i, (var, _) in enumerate(program.bindings)}
        self.members_of: dict[relax.Var, list[relax.Var]] = {}

    def groups(self) -> list[_Group]:
        """Anchors come first, since an elementwise operator belongs to a kernel that is there anyway."""
        found = []
        for anchors, least in ((ANCHORS, 1), (ELEMENTWISE, 2)):
            for var, value in self.program.bindings:
                if op_name(value) in anchors and var not in self.members_of and _dtype(var) == "float32":
                    members = self._grow(var)
                    if len(members) >= least:
                        self.members_of.update(dict.fromkeys(members, members))
                        found.append(_Group(tuple(members), self._outputs(members)))
        return found

    def _grow(self, anchor: relax.Var) -> list[relax.Var]:
        members = [anchor]
        while more := self._to_next_join(members):
            members += more
        return members + self._to_planes(members)

    def _to_next_join(self, members: list[relax.Var]) -> list[relax.Var]:
        """The fewest operators behind the group's last value after which there is again one value that others see."""
        last = members[-1]
        added: list[relax.Var] = []
        while len(added) < MAX_FORK:
            seen = [last, *added]
            users = {user for var in seen for user in self.program.users[var] if user not in added}
            if not users or any(var in self.program.returned for var in seen[:-1] or seen):
                return []
            candidate = min(users, key=self.position.__getitem__)
            if not self._fits(candidate, [*members, *added]):
                return []
            added.append(candidate)
            if self._closed([last, *added]) and _dtype(candidate) == "float32":
                return added
        return []

    def _closed(self, seen: list[relax.Var]) -> bool:
        """Whether of `seen` only the last is used elsewhere."""
        inner = seen[:-1]
        if any(var in self.program.returned for var in inner):
            return False
        return all(user in seen for var in inner for user in self.program.users[var])

    def _to_planes(self, members: list[relax.Var]) -> list[relax.Var]:
        """The way from the last value over single-use elementwise operators to a static binarisation, if any."""
        for user in self.program.users[members[-1]]:
            way: list[relax.Var] = []
            step: relax.Var | None = user
            while step is not None and self._fits(step, [*members, *way]):
                way.append(step)
                step = self.program.sole_user(step)
            if step is not None and self._is_static_binarize(step, way[-1] if way else members[-1]):
                return [*way, step] if self._whole_words(members[0], step) else []
        return []

    def _whole_words(self, anchor: relax.Var, binarize: relax.Var) -> bool:
        """Whether a tile of the anchor's channels can hold whole words of the planes: both group by multiples of 32.

        A kernel that is no tile of channels (pooling) packs nothing; elementwise operators have no tile to fit.
        """
        value = self.program.values[anchor]
        planes = self.program.values[binarize]
        depths = [ops.shape_of(planes.args[0])[-1] // ops.Geometry.of(planes.attrs).groups]
        if op_name(value) in TILED:
            depths.append(int(value.attrs["channels"]) // ops.Geometry.of(value.attrs).groups)
        elif op_name(value) in ANCHORS:
            return False
        return all(depth % ops.WORD_BITS == 0 for depth in depths)

    def _is_static_binarize(self, var: relax.Var, x: relax.Var) -> bool:
        value = self.program.values[var]
        if op_name(value) != "horq.binarize" or var in self.members_of:
            return False
        return str(value.attrs["scale"]) == "static" and value.args[0] == x and array_of(value.args[1]) is not None

    def _fits(self, var: relax.Var, inside: list[relax.Var]) -> bool:
        """Whether the binding of `var` is elementwise over the group's shape, its other operands ready before it."""
        value, shape = self.program.values[var], ops.shape_of(inside[0])
        if var in self.members_of or op_name(value) not in ELEMENTWISE or ops.shape_of(var) != shape:
            return False
        if op_name(value) == "relax.nn.prelu" and int(value.attrs.axis) not in (-1, len(shape) - 1):
            return False
        tensors = [arg for arg in value.args if isinstance(arg, relax.Var | Constant) and not is_channel_constant(arg)]
        if any(ops.shape_of(arg) != shape for arg in tensors):
            return False
        outside = [arg for arg in tensors if isinstance(arg, relax.Var) and arg not in inside]
        return not self._depends(outside, set(inside))

    def _depends(self, operands: Iterable[relax.Var], group: set[relax.Var]) -> bool:
        """Whether one of `operands` is computed from a value of `group`."""
        todo, done = list(operands), set()
        while todo:
            var = todo.pop()
            if var in group:
                return True
            if var in done:
                continue
            members = self.members_of.get(var, [var])
            done.update(members)
            todo += [used for m in members if m in self.position for used in vars_of(self.program.values[m])]
        return False

    def _outputs(self, members: list[relax.Var]) -> tuple[relax.Var, ...]:
        users, returned = self.program.users, self.program.returned
        seen = [m for m in members if m in returned or any(user not in members for user in users[m])]
        return tuple(seen or members[-1:])


def _dtype(var: relax.Var) -> str:
    return str(var.ty.dtype) if isinstance(var.ty, relax.TensorType) else ""


def _ordered(program: Program, groups: list[_Group]) -> Iterator[tuple[int, _Group | relax.Var]]:
    """Groups, numbered, and the bindings in none, each where its last member stood or as soon after as it can be."""
    group_of = {var: group for group in groups for var in group.members}
    units: dict[int, _Group | relax.Var] = {}
    unit_of: dict[relax.Var, int] = {}
    for position, (var, _) in enumerate(program.bindings):
        group = group_of.get(var)
        if group is None or var == group.members[-1]:
            units[position] = group or var
            unit_of.update(dict.fromkeys(group.members if group else (var,), position))
    needs = {key: _needs(program, unit, unit_of) - {key} for key, unit in units.items()}
    users: dict[int, list[int]] = {key: [] for key in units}
    for key, needed in needs.items():
        for other in needed:
            users[other].append(key)
    missing = {key: len(needed) for key, needed in needs.items()}
    ready = [key for key, count in missing.items() if count == 0]
    number = 0
    while ready:
        key = heapq.heappop(ready)
        yield number, units[key]
        number += isinstance(units[key], _Group)
        for user in users[key]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)


def _needs(program: Program, unit: _Group | relax.Var, unit_of: dict[relax.Var, int]) -> set[int]:
    members = unit.members if isinstance(unit, _Group) else (unit,)
    return {unit_of[used] for var in members for used in vars_of(program.values[var]) if used in unit_of}


def _emit_group(writer: Writer, program: Program, group: _Group, number: int) -> None:
    """The group as a function of its operands, and its call in main."""
    anchor = program.values[group.members[0]]
    kind = op_name(anchor).rpartition(".")[2]
    attrs: dict[str, Any] = {"Primitive": True}
    if anchor.attrs is not None and op_name(anchor).startswith("horq."):
        attrs[LAYER_ATTR] = str(anchor.attrs["name"])
    function, operands = _function(program, group, attrs)
    called = writer.emit(relax.Call(writer.add_function(function, f"fused_{kind}_{number}"), operands))
    if len(group.outputs) == 1:
        writer.map(group.outputs[0], called)
        return
    for index, output in enumerate(group.outputs):
        writer.map(output, writer.emit(relax.TupleGetItem(called, index)))


def _function(program: Program, group: _Group, attrs: dict[str, Any]) -> tuple[relax.Function, list[relax.Expr]]:
    """The group's function, and in the order of its parameters the operands that main hands in."""
    operands: list[relax.Expr] = []
    params: list[relax.Var] = []
    inside: dict[relax.Var, relax.Expr] = {}

    def parameter(arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Var) and (arg in inside or arg in group.members):
            return inside.get(arg, arg)
        if not isinstance(arg, relax.Var | Constant):
            return arg  # a bound of a clip
        operands.append(arg)
        params.append(relax.Var(f"p{len(params)}", arg.ty))
        if isinstance(arg, relax.Var):
            inside[arg] = params[-1]
        return params[-1]

    values = [(var, program.values[var]) for var in group.members]
    calls = [(var, value, [parameter(arg) for arg in value.args]) for var, value in values]
    builder = relax.BlockBuilder()
    with builder.function("fused", params, attrs=attrs, private=True):
        with builder.dataflow():
            for var, value, args in calls:
                local = [inside.get(arg, arg) if isinstance(arg, relax.Var) else arg for arg in args]
                call = relax.Call(value.op, local, value.attrs, list(value.ty_args))
                last = group.outputs == (var,)
                inside[var] = builder.emit_output(call) if last else builder.emit(call)
            result = inside[group.outputs[0]]
            if len(group.outputs) > 1:
                result = builder.emit_output(relax.Tuple([inside[var] for var in group.outputs]))
        builder.emit_func_output(result)
    return builder.get()["fused"], operands

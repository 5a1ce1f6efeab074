"""`main` as what it is after import: a straight line of bindings. Passes read it, walk it once and write it anew.

program = read_main(mod)
with Writer(mod, program) as writer:
    for var, value in program.bindings:
        writer.bind(var, value)  # or emit something else in its place
    return writer.finish(program.result)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import GenericConst as Constant

from .errors import HorqError, UsageError

Array = np.ndarray[Any, Any]

# What a pass raises crosses TVM's C++ on its way to the caller; an error class unknown there becomes RuntimeError.
for _error in (HorqError, UsageError):
    tvm_ffi.register_error(_error.__name__, _error)


def constant(array: Array) -> relax.Expr:
    """A Relax constant of the array's own dtype and shape; `relax.const` by itself makes int32 of int64."""
    return relax.const(np.require(array, requirements="C"), str(array.dtype))


def array_of(expr: relax.Expr) -> Array | None:
    """The value of a constant, None for any other expression."""
    return expr.value.numpy() if isinstance(expr, Constant) else None


def op_name(expr: relax.Expr) -> str:
    """The name of the operator that `expr` calls, "" where it is no call of an operator."""
    return expr.op.name if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) else ""


def vars_of(expr: relax.Expr) -> Iterator[relax.Var]:
    """The variables that `expr` reads, in order, once for each time that it reads them."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from vars_of(arg)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from vars_of(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from vars_of(expr.tuple_value)


def substitute(expr: relax.Expr, values: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """`expr` with variables replaced; the same object where nothing changes."""
    if isinstance(expr, relax.Var):
        return values.get(expr, expr)
    if not any(var in values for var in vars_of(expr)):
        return expr
    if isinstance(expr, relax.Call):
        return relax.Call(expr.op, [substitute(arg, values) for arg in expr.args], expr.attrs, list(expr.ty_args))
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(field, values) for field in expr.fields])
    source = substitute(expr.tuple_value, values)
    return source.fields[expr.index] if isinstance(source, relax.Tuple) else relax.TupleGetItem(source, expr.index)


@dataclass(frozen=True)
class Program:
    """The bindings of `main` in order, tuples and aliases resolved; the result is a variable, a constant or a tuple."""

    params: tuple[relax.Var, ...]
    bindings: tuple[tuple[relax.Var, relax.Expr], ...]
    result: relax.Expr

    @cached_property
    def values(self) -> dict[relax.Var, relax.Expr]:
        """What each variable is bound to."""
        return dict(self.bindings)

    @cached_property
    def users(self) -> dict[relax.Var, list[relax.Var]]:
        """The variables whose binding reads a variable, in order, once each; uses by the result are in `returned`."""
        found: dict[relax.Var, list[relax.Var]] = {var: [] for var in (*self.params, *self.values)}
        for var, value in self.bindings:
            for used in dict.fromkeys(vars_of(value)):
                found[used].append(var)
        return found

    @cached_property
    def returned(self) -> frozenset[relax.Var]:
        """The variables that the result reads."""
        return frozenset(vars_of(self.result))

    def sole_user(self, var: relax.Var) -> relax.Var | None:
        """The one binding that reads `var`, None where there are more or the result reads it as well."""
        users = self.users[var]
        return users[0] if len(users) == 1 and var not in self.returned else None


def read_main(mod: tvm.IRModule) -> Program:
    """The straight line that `main` is. HorqError where it branches or matches shapes."""
    function = mod["main"]
    if not isinstance(function.body, relax.SeqExpr):
        return Program(tuple(function.params), (), function.body)
    aliases: dict[relax.Var, relax.Expr] = {}
    bindings: list[tuple[relax.Var, relax.Expr]] = []
    for block in function.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If | relax.Function):
                raise HorqError(f"main binds {binding.var.name} to control flow; a model has to be a straight line")
            value = substitute(binding.value, aliases)
            if isinstance(value, relax.Var | relax.Tuple | Constant):
                aliases[binding.var] = value
            else:
                bindings.append((binding.var, value))
    return Program(tuple(function.params), tuple(bindings), substitute(function.body.body, aliases))


class Writer:
    """Writes `main` anew, one dataflow block, the other functions kept.

    A variable of the old program stands for whatever it was bound or `map`ped to; every expression handed in may use
    both old and new variables.
    """

    def __init__(self, mod: tvm.IRModule, program: Program) -> None:
        main = mod.get_global_var("main")
        others = {gvar: func for gvar, func in mod.functions.items() if gvar != main}
        attrs = dict(mod["main"].attrs) if mod["main"].attrs else {}
        self.new: dict[relax.Var, relax.Expr] = {}
        self._attrs = mod.attrs
        self._builder = relax.BlockBuilder(tvm.IRModule(others))
        self._function = self._builder.function("main", list(program.params), attrs=attrs)
        self._dataflow = self._builder.dataflow()

    def __enter__(self) -> Writer:
        self._function.__enter__()
        self._dataflow.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:  # leave TVM's stack of builders as it was
            self._function.__exit__(kind, error, trace)

    def resolve(self, expr: relax.Expr) -> relax.Expr:
        """`expr` in terms of the new program."""
        return substitute(expr, self.new)

    def emit(self, value: relax.Expr) -> relax.Expr:
        """A new variable bound to `value`."""
        return self._builder.emit(substitute(value, self.new))

    def map(self, var: relax.Var, value: relax.Expr) -> None:
        """Lets the old variable `var` stand for the variable, constant or tuple `value`."""
        self.new[var] = value

    def bind(self, var: relax.Var, value: relax.Expr) -> None:
        """Emits `value` under the name that `var` had."""
        self.new[var] = self._builder.emit(substitute(value, self.new), name_hint=var.name)

    def add_function(self, function: relax.Function, name: str) -> tvm.ir.GlobalVar:
        """A new function beside main, under `name` or the next free one like it."""
        return self._builder.add_func(function, name)

    def finish(self, result: relax.Expr) -> tvm.IRModule:
        """The module with main returning `result`; the last call on a writer."""
        output = self._builder.emit_output(substitute(result, self.new))
        self._dataflow.__exit__(None, None, None)
        self._builder.emit_func_output(output)
        self._function.__exit__(None, None, None)
        mod = self._builder.get()
        return mod.with_attrs(dict(self._attrs)) if self._attrs else mod


def fields_of(result: relax.Expr) -> Sequence[relax.Expr]:
    """The results of main, one by one."""
    return list(result.fields) if isinstance(result, relax.Tuple) else [result]

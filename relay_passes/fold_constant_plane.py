"""`FoldConstantPlane`: behind a ReLU the first plane is all +1, so it is neither computed nor stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.straightline import Program, Writer, array_of, op_name, read_main

BITSERIAL = ("horq.bitserial_conv2d", "horq.bitserial_dense")

# Never negative, whatever the operand; −0.0 counts, since sign(−0.0) = +1.
_ALWAYS = "abs exp nn.relu nn.softmax sigmoid sqrt square"
# Not negative if no operand is.
_IF_ALL = """
    add concat expand_dims flatten max mean min minimum multiply nn.adaptive_avg_pool2d nn.avg_pool2d nn.gelu
    nn.leakyrelu nn.max_pool2d nn.pad nn.prelu nn.silu permute_dims reshape split squeeze sum tanh
"""
ALWAYS = frozenset(f"relax.{name}" for name in _ALWAYS.split())
IF_ALL = frozenset(f"relax.{name}" for name in _IF_ALL.split())


def non_negative_vars(program: Program) -> set[relax.Var]:
    """The variables of main that range analysis proves >= 0 in every element, for finite inputs."""
    known: set[relax.Var] = set()
    for var, value in program.bindings:
        if _non_negative(value, known):
            known.add(var)
    return known


def _non_negative(expr: relax.Expr, known: set[relax.Var]) -> bool:
    array = array_of(expr)
    if array is not None:
        return bool(np.all(array >= 0))
    if isinstance(expr, relax.Var):
        return expr in known
    if isinstance(expr, relax.Tuple):
        return all(_non_negative(field, known) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _non_negative(expr.tuple_value, known)
    return isinstance(expr, relax.Call) and _non_negative_call(expr, known)


def _non_negative_call(call: relax.Call, known: set[relax.Var]) -> bool:
    name, args = op_name(call), list(call.args)
    if name in ALWAYS:
        return True
    if name == "relax.maximum":
        return any(_non_negative(arg, known) for arg in args)
    if name == "relax.clip":
        low, high = (float(bound.value) for bound in args[1:])
        return low >= 0 or (high >= 0 and _non_negative(args[0], known))
    if name == "relax.divide":
        divisor = array_of(args[1])
        return divisor is not None and bool(np.all(divisor > 0)) and _non_negative(args[0], known)
    if name == "relax.multiply" and isinstance(args[0], relax.Var) and args[0] == args[1]:
        return True
    if name == "relax.where":
        return all(_non_negative(arg, known) for arg in args[1:])
    if name == "relax.strided_slice":  # what follows the first operand is integers
        return _non_negative(args[0], known)
    if name == "relax.nn.pad" and float(call.attrs.pad_value) < 0:
        return False
    tensors = [arg for arg in args if not isinstance(arg, relax.ShapeExpr)]
    return name in IF_ALL and all(_non_negative(arg, known) for arg in tensors)


@tvm.transform.module_pass(opt_level=0, name="FoldConstantPlane")
class FoldConstantPlane:
    """horq.binarize of a value >= 0, order 2 or more → `first=1` on it and on the bitserial ops that read its planes.

    With x >= 0, H_1 = sign(x) is +1 everywhere, and S_1 a constant of filter and border class. The padded elements of
    `patch` are 0 and so +1 too. Planes that something else reads (a tap) stay whole. At order 1 there would be no plane
    left; `relu_fed_layers` names those layers.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        known = non_negative_vars(program)
        folded = {var for var, value in program.bindings if self._folds(program, var, value, known)}
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                if var in folded:
                    writer.bind(var, ops.binarize(*value.args, first=1, **_how(value)))
                elif op_name(value) in BITSERIAL and value.args[0] in folded:
                    dense = op_name(value) == "horq.bitserial_dense"
                    how = {"name": str(value.attrs["name"]), "dense": dense, **_how(value)}
                    writer.bind(var, ops.bitserial(*value.args, first=1, **how))
                else:
                    writer.bind(var, value)
            return writer.finish(program.result)

    def _folds(self, program: Program, var: relax.Var, value: relax.Expr, known: set[relax.Var]) -> bool:
        if op_name(value) != "horq.binarize" or int(value.attrs["order"]) < 2 or int(value.attrs["first"]):
            return False
        users = [program.values[user] for user in program.users[var]]
        only_layers = all(op_name(user) in BITSERIAL for user in users) and var not in program.returned
        return only_layers and _non_negative(value.args[0], known)


def _how(value: relax.Call) -> dict[str, Any]:
    attrs = value.attrs
    return {"order": int(attrs["order"]), "scale": str(attrs["scale"]), "geometry": ops.Geometry.of(attrs)}


def relu_fed_layers(mod: tvm.IRModule) -> tuple[str, ...]:
    """The layers of order 1 whose input is never negative: all their signs are +1, so they carry no information."""
    program = read_main(mod)
    known = non_negative_vars(program)
    names = []
    for _, value in program.bindings:
        if op_name(value) in BITSERIAL and int(value.attrs["order"]) == 1:
            binarized = program.values.get(value.args[0])
            if binarized is not None and _non_negative(binarized.args[0], known):
                names.append(str(value.attrs["name"]))
    return tuple(names)

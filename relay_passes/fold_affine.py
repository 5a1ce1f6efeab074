"""`FoldAffine`: biases, normalisation and shifts become part of the layer before them, or one multiply and add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main, vars_of

from .fuse_epilogue import is_channel_constant

BITSERIAL = ("horq.bitserial_conv2d", "horq.bitserial_dense")
FLOAT_LAYERS = ("horq.conv2d", "horq.dense")


@dataclass(frozen=True)
class Affine:
    """x → x·factor + shift, float64 scalars or one value a channel; the program says it in `steps` operators."""

    factor: Array
    shift: Array
    steps: int = 1

    def after(self, first: Affine) -> Affine:
        """This one, applied to the result of `first`."""
        shift = first.shift * self.factor + self.shift
        return Affine(first.factor * self.factor, shift, first.steps + self.steps)


IDENTITY = Affine(np.array(1.0), np.array(0.0), steps=0)


def affine_of(value: relax.Expr) -> tuple[relax.Var, Affine] | None:
    """The variable that `value` is an affine of, by constants a channel, and that affine; None for anything else."""
    name = op_name(value)
    if name == "relax.negative":
        return (
            (value.args[0], Affine(-IDENTITY.factor, IDENTITY.shift)) if isinstance(value.args[0], relax.Var) else None
        )
    if name not in ("relax.add", "relax.subtract", "relax.multiply", "relax.divide"):
        return None
    left, right = value.args
    x, other = (left, right) if isinstance(left, relax.Var) else (right, left)
    if not isinstance(x, relax.Var) or not is_channel_constant(other):
        return None
    array = array_of(other)
    assert array is not None  # is_channel_constant says so
    c = array.astype("float64").reshape(-1 if array.size > 1 else ())
    if name == "relax.add":
        return x, Affine(IDENTITY.factor, c)
    if name == "relax.subtract":
        return x, Affine(IDENTITY.factor, -c) if x is left else Affine(-IDENTITY.factor, c)
    if name == "relax.multiply":
        return x, Affine(c, IDENTITY.shift)
    return (x, Affine(1 / c, IDENTITY.shift)) if x is left and np.all(c) else None


@tvm.transform.module_pass(opt_level=0, name="FoldAffine")
class FoldAffine:
    """Chains of add, subtract, multiply, divide and negative with constants a channel, in float64, rounded once.

    Behind a bitserial op they go into its α and bias (which stay float64 until weights are packed); behind a float
    layer the factor goes into the weights and the shift stays, as one add; elsewhere they become one multiply and one
    add. A value that something else reads as well (a shortcut, a tap) ends the chain.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        with Writer(mod, program) as writer:
            folder = _Folder(program, writer)
            for var, value in program.bindings:
                if not folder.hold(var, value):
                    folder.settle(value)
                    writer.bind(var, value)
            folder.settle(program.result)
            return writer.finish(program.result)


class _Folder:
    """Holds chains of affines back, and the layer in front of one, until something else reads the last value."""

    def __init__(self, program: Program, writer: Writer) -> None:
        self.program = program
        self.writer = writer
        self._held: dict[relax.Var, tuple[relax.Var, Affine]] = {}

    def hold(self, var: relax.Var, value: relax.Expr) -> bool:
        """Takes a binding that is an affine, or a layer that only an affine reads."""
        if self._is_layer(value) and self._continues(var):
            self._held[var] = var, IDENTITY
            return True
        found = self._affine(var, value)
        if found is None:
            return False
        x, affine = found
        if x in self._held and self.program.sole_user(x) is not None:
            base, first = self._held.pop(x)
        else:
            self.settle(x)
            base, first = x, IDENTITY
        self._held[var] = base, affine.after(first)
        return True

    def settle(self, expr: relax.Expr) -> None:
        """Writes what is held of the variables that `expr` reads."""
        for var in vars_of(expr):
            if var in self._held:
                self._write(var, *self._held.pop(var))

    def _affine(self, var: relax.Var, value: relax.Expr) -> tuple[relax.Var, Affine] | None:
        found = affine_of(value)
        if found is None or str(var.ty.dtype) != "float32" or ops.shape_of(found[0]) != ops.shape_of(var):
            return None
        return found

    def _continues(self, var: relax.Var) -> bool:
        user = self.program.sole_user(var)
        return user is not None and self._affine(user, self.program.values[user]) is not None

    def _is_layer(self, value: relax.Expr) -> bool:
        return op_name(value) in BITSERIAL or (op_name(value) in FLOAT_LAYERS and array_of(value.args[1]) is not None)

    def _write(self, var: relax.Var, base: relax.Var, affine: Affine) -> None:
        layer = self.program.values.get(base)
        if layer is not None and self._is_layer(layer) and base not in self.writer.new:
            self.settle(layer)
            fold = _into_bitserial if op_name(layer) in BITSERIAL else _into_float
            self._apply(var, fold(layer, affine))
        elif affine.steps == 1:
            self.writer.bind(var, self.program.values[var])
        else:
            self._apply(var, (base, affine))

    def _apply(self, var: relax.Var, folded: tuple[relax.Expr, Affine]) -> None:
        """Lets `var` be the affine of the first value; a layer is written out, what does nothing is not."""
        value, affine = folded
        if np.any(affine.factor != 1):
            value = relax.op.multiply(self._written(value), constant(affine.factor.astype("float32")))
        if np.any(affine.shift != 0):
            value = relax.op.add(self._written(value), constant(affine.shift.astype("float32")))
        self.writer.map(var, self._written(value))

    def _written(self, value: relax.Expr) -> relax.Expr:
        return self.writer.emit(value) if isinstance(value, relax.Call) else self.writer.resolve(value)


def _into_bitserial(layer: relax.Call, affine: Affine) -> tuple[relax.Call, Affine]:
    planes, weight, alpha, bias, beta = layer.args
    scaled = constant(array_of(alpha) * affine.factor)
    shifted = constant(array_of(bias) * affine.factor + affine.shift)
    return relax.Call(layer.op, [planes, weight, scaled, shifted, beta], layer.attrs), IDENTITY


def _into_float(layer: relax.Call, affine: Affine) -> tuple[relax.Call, Affine]:
    x, weight = layer.args
    if np.any(affine.factor != 1):
        array = array_of(weight)
        assert array is not None  # the folder asks before
        factor = affine.factor.reshape(-1, *[1] * (array.ndim - 1))
        weight = constant((array.astype("float64") * factor).astype("float32"))
    return relax.Call(layer.op, [x, weight], layer.attrs), Affine(IDENTITY.factor, affine.shift)

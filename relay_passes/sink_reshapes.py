"""`SinkReshapes`: elementwise operators move ahead of the reshape of a dense layer, so that they follow its kernel."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst as Constant

from horq_tvm import ops
from horq_tvm.straightline import Writer, array_of, constant, op_name, read_main, vars_of

from .fuse_epilogue import ELEMENTWISE, is_channel_constant


@tvm.transform.module_pass(opt_level=0, name="SinkReshapes")
class SinkReshapes:
    """op(reshape(u, s), ...) → reshape(op(u, ...), s) for elementwise `op`, where the reshape keeps the last axis.

    A dense layer is a convolution over an image of its rows, between two reshapes. With the second one sunk, the bias,
    activation and residual stand right behind the layer, and the first one of the next dense layer cancels it. A
    reshape is no work in the end (an alias), so one more for a residual's other operand costs nothing.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        with Writer(mod, program) as writer:
            sinker = _Sinker(writer)
            for var, value in program.bindings:
                if op_name(value) == "relax.reshape":
                    sinker.reshape(var, value)
                elif op_name(value) not in ELEMENTWISE or not sinker.move_ahead(var, value):
                    sinker.settle(value)
                    writer.bind(var, value)
            sinker.settle(program.result)
            return writer.finish(program.result)


class _Sinker:
    """Holds reshapes back until something needs their result."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        # Of an old variable that is a reshape: the new value that is reshaped, of the same last axis.
        self.source: dict[relax.Expr, relax.Expr] = {}

    def reshape(self, var: relax.Var, value: relax.Call) -> None:
        """Takes var = reshape(x, s); where x is a reshape itself, that one is skipped."""
        source = self._source(value.args[0])
        if ops.shape_of(source)[-1:] == ops.shape_of(var)[-1:]:
            self._hold(var, source)
        else:
            self.writer.bind(var, relax.op.reshape(source, ops.shape_of(var)))

    def move_ahead(self, var: relax.Var, value: relax.Call) -> bool:
        """Takes var = op(...) to before the reshape of an operand; False where that is not possible."""
        shape = ops.shape_of(var)
        sources = [ops.shape_of(self.source[arg]) for arg in value.args if arg in self.source]
        inner = next((found for found in sources if found != shape), None)
        if inner is None or not all(self._can_move(arg, shape) for arg in value.args):
            return False
        if op_name(value) == "relax.nn.prelu" and int(value.attrs.axis) not in (-1, len(shape) - 1):
            return False
        args = [self._moved(arg, inner) for arg in value.args]
        if op_name(value) == "relax.nn.prelu":
            moved = relax.op.nn.prelu(*args, axis=len(inner) - 1)
        else:
            moved = relax.Call(value.op, args, value.attrs, list(value.ty_args))
        self._hold(var, self.writer.emit(moved))
        return True

    def settle(self, expr: relax.Expr) -> None:
        """Writes the reshapes that `expr` reads."""
        for var in vars_of(expr):
            if var in self.source and var not in self.writer.new:
                self.writer.bind(var, relax.op.reshape(self.source[var], ops.shape_of(var)))

    def _hold(self, var: relax.Var, source: relax.Expr) -> None:
        self.source[var] = source
        if ops.shape_of(source) == ops.shape_of(var):
            self.writer.map(var, source)

    def _source(self, arg: relax.Expr) -> relax.Expr:
        return self.source[arg] if arg in self.source else self.writer.resolve(arg)

    def _can_move(self, arg: relax.Expr, shape: tuple[int, ...]) -> bool:
        if not isinstance(arg, relax.Var | Constant) or is_channel_constant(arg):
            return True
        return ops.shape_of(arg) == shape

    def _moved(self, arg: relax.Expr, inner: tuple[int, ...]) -> relax.Expr:
        """The operand for an operator over `inner`."""
        array = array_of(arg)
        if array is not None:
            return constant(array.reshape(-1 if is_channel_constant(arg) else inner))
        if not isinstance(arg, relax.Var):
            return arg  # a bound of a clip
        source = self._source(arg)
        return source if ops.shape_of(source) == inner else self.writer.emit(relax.op.reshape(source, inner))

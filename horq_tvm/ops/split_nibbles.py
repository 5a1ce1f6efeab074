"""`horq.split_nibbles`: bits that are stored eight a byte, laid out as a byte shuffle takes them, four a byte."""

from __future__ import annotations

from tvm import relax

from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    *outer, lanes = shape_of(expr.args[0])
    return tensor((*outer, 2, lanes), "uint8")


SPLIT_NIBBLES = register("horq.split_nibbles", 1, _infer)


def split_nibbles(weight: relax.Expr) -> relax.Call:
    """weight uint8 [...,v] → uint8 [...,2,v]: the low nibble of every byte, then the high one."""
    return call(SPLIT_NIBBLES, [weight])

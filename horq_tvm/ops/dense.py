"""`horq.dense`: a float dense layer that carries its name (canonical form)."""

from __future__ import annotations

from tvm import relax

from .registry import call, register, shape_of, tensor


def _infer(expr: relax.Call) -> relax.TensorType:
    return tensor((*shape_of(expr.args[0])[:-1], shape_of(expr.args[1])[0]), "float32")


DENSE = register("horq.dense", 2, _infer)


def dense(x: relax.Expr, weight: relax.Expr, *, name: str, affines: int = 0) -> relax.Call:
    """x float32 [..., L], weight float32 [F, L] → float32 [..., F]. `affines`: see `horq.name`."""
    return call(DENSE, [x, weight], name=name, affines=affines)

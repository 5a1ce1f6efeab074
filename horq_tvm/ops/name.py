"""`horq.name`: the identity on a weight that carries its layer's name through TVM's own passes."""

from __future__ import annotations

from tvm import relax

from .registry import call, register

NAME = register("horq.name", 1, lambda expr: expr.args[0].ty)


def name(weight: relax.Expr, *, name: str, affines: int = 0) -> relax.Call:
    """weight of any shape and dtype → the same tensor. `NameLayers` consumes every one of them.

    `affines`: so many operators behind the product, the α and the bias of the layer's node, belong to the layer.
    """
    return call(NAME, [weight], name=name, affines=affines)

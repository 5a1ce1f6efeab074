"""±1 weights of HORQ nodes as bits in the ONNX file, a thirty-second of their size, for any ONNX runtime.

ONNX has no type of one bit. The weights become an initialiser of bytes, and standard operators in the graph, which a
runtime evaluates once when it loads the model, expand them:

    bits uint8 [n,1] → BitShift by 0…7 → Mod 2 → Cast, ·2, −1 → Reshape → Slice to the count → Reshape → W float32
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from horq_tvm import onnx_functions
from horq_tvm.errors import HorqError


def pack_signs(model: ModelProto) -> ModelProto:
    """A copy of `model` in which the weight initialisers of its HORQ nodes are bits. It computes the same to the bit.

    What is packed already, as any weight that is computed, stays as it is.

    Raises:
        HorqError: the weight of a HORQ node is an initialiser that holds other values than ±1.
    """
    packed = ModelProto()
    packed.CopyFrom(model)
    graph = packed.graph
    users = {node.input[1]: node.name for node in graph.node if node.domain == onnx_functions.DOMAIN}
    expanded: list[NodeProto] = []
    kept: list[TensorProto] = []
    for tensor in graph.initializer:
        if tensor.name not in users:
            kept.append(tensor)
            continue
        weight = numpy_helper.to_array(tensor)
        if not np.all(np.abs(weight) == 1):
            raise HorqError(f"node {users[tensor.name]!r}: its weight {tensor.name!r} holds other values than ±1")
        kept.extend(_constants(tensor.name, weight))
        expanded.extend(_expansion(tensor.name))
    nodes = [*expanded, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return packed


def _constants(name: str, weight: np.ndarray) -> Iterator[TensorProto]:
    """What `_expansion` takes: bit i of byte j is value 8·j + i in C order, 1 means +1."""
    bits = np.packbits(weight.reshape(-1) > 0, bitorder="little")
    for role, values in (
        ("bits", bits[:, None]),
        ("shifts", np.arange(8, dtype=np.uint8)),
        ("two", np.uint8(2)),
        ("step", np.float32(2)),
        ("one", np.float32(1)),
        ("flat", np.array([-1])),
        ("first", np.array([0])),
        ("count", np.array([weight.size])),
        ("shape", np.array(weight.shape)),
    ):
        yield numpy_helper.from_array(np.asarray(values), f"{name}.{role}")


def _expansion(name: str) -> Iterator[NodeProto]:
    """The nodes that compute the weight `name` from its `_constants`; what comes between is called after it."""
    steps: tuple[tuple[str, tuple[str, ...], str, dict[str, str | int]], ...] = (
        ("BitShift", ("bits", "shifts"), "shifted", {"direction": "RIGHT"}),
        ("Mod", ("shifted", "two"), "digits", {}),
        ("Cast", ("digits",), "units", {"to": TensorProto.FLOAT}),
        ("Mul", ("units", "step"), "doubled", {}),
        ("Sub", ("doubled", "one"), "signs", {}),
        ("Reshape", ("signs", "flat"), "padded", {}),
        ("Slice", ("padded", "first", "count"), "values", {}),
        ("Reshape", ("values", "shape"), "", {}),
    )
    for op, inputs, result, attributes in steps:
        output = f"{name}.{result}" if result else name
        yield helper.make_node(op, [f"{name}.{part}" for part in inputs], [output], output, **attributes)

"""The HORQ layers of an ONNX file one by one: a model of them side by side, and the constants they compute with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from horq_tvm.onnx_functions import DOMAIN

Array = NDArray[Any]


@dataclass(frozen=True)
class Operands:
    """A node's weight ±1 [F,C/g,kh,kw] (dense: [F,L]), α [F], β [K] and bias [F], and its attributes."""

    weight: Array
    alpha: Array
    beta: Array | None
    bias: Array | None
    attributes: Mapping[str, Any]

    @property
    def geometry(self) -> dict[str, Any]:
        """As `reference.conv2d` takes it; a dense layer is a 1×1 convolution."""
        if self.weight.ndim == 2:
            return {}
        names = {"strides": "strides", "padding": "pads", "dilation": "dilations", "groups": "group"}
        return {ours: self.attributes[theirs] for ours, theirs in names.items() if theirs in self.attributes}


def horq_nodes(model: onnx.ModelProto) -> dict[str, Any]:
    """The HORQ nodes by name, in the file's order."""
    return {node.name: node for node in model.graph.node if node.domain == DOMAIN}


def alone(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A model of the HORQ nodes named in `shapes`: node L from input L.x, of that shape, to output L.y."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = []
    for name in shapes:
        node = onnx.NodeProto()
        node.CopyFrom(horq_nodes(model)[name])
        node.input[0], node.output[0] = f"{name}.x", f"{name}.y"
        nodes.append(node)
    before, constants = _constant_part(model, [name for node in nodes for name in list(node.input)[1:] if name])
    graph = helper.make_graph(
        [*before, *nodes],
        "layers",
        [helper.make_tensor_value_info(f"{name}.x", kind, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(f"{name}.y", kind, None) for name in shapes],
        constants,
    )
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def operands(model: onnx.ModelProto) -> dict[str, Operands]:
    """The constants of every HORQ node, those that the file computes (weights kept as bits) computed."""
    helper, nodes = onnx.helper, horq_nodes(model)
    wanted = list(dict.fromkeys(name for node in nodes.values() for name in list(node.input)[1:] if name))
    before, constants = _constant_part(model, wanted)
    copies = [helper.make_node("Identity", [name], [f"{name}.copy"]) for name in wanted]
    outputs = [helper.make_tensor_value_info(f"{name}.copy", onnx.TensorProto.FLOAT, None) for name in wanted]
    graph = helper.make_graph([*before, *copies], "constants", [], outputs, constants)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    value = dict(zip(wanted, session.run(None, {}), strict=True))
    found = {}
    for layer, node in nodes.items():
        given = [value.get(name) for name in [*list(node.input)[1:], "", "", ""][:4]]
        assert given[0] is not None
        assert given[1] is not None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        found[layer] = Operands(given[0], given[1], given[2], given[3], attributes)
    return found


def _constant_part(model: onnx.ModelProto, wanted: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """The nodes that compute `wanted`, in order, and the initialisers below them."""
    producers = {output: node for node in model.graph.node for output in node.output}
    needed, stack = set[str](), list(wanted)
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += producers[name].input if name in producers else ()
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    missing = needed - {*producers, "", *(tensor.name for tensor in constants)}
    assert not missing, f"not constant: {missing}"
    return nodes, constants


def as_image(rows: Array) -> Array:
    """A dense layer's tensor as that of the 1×1 convolution [N,1,M,L] which the compiler makes of it."""
    return rows if rows.ndim == 4 else np.reshape(rows, (len(rows), 1, -1, rows.shape[-1]))

"""A chain of residual binary layers as ONNX, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def chain(layers: int, channels: int, size: int) -> tuple[onnx.ModelProto, dict[str, Any], np.ndarray]:
    """stem, then `layers` times y ← conv(y) + y, a mean and a head; its plan (`static`, order 2) and an input."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}

    def weight(name: str, *shape: int) -> str:
        weights[name] = (rng.standard_normal(shape) * 0.1).astype("float32")
        return name

    conv = {"pads": [1, 1, 1, 1]}
    nodes = [helper.make_node("Conv", ["x", weight("w", channels, 3, 3, 3)], ["y0"], name="stem", **conv)]
    for i in range(layers):
        name = weight(f"w{i}", channels, channels, 3, 3)
        nodes.append(helper.make_node("Conv", [f"y{i}", name], [f"c{i}"], name=f"conv{i}", **conv))
        nodes.append(helper.make_node("Add", [f"c{i}", f"y{i}"], [f"y{i + 1}"]))
    nodes.append(helper.make_node("GlobalAveragePool", [f"y{layers}"], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", weight("head", 10, channels)], ["y"], name="head", transB=1))
    shape = [1, 3, size, size]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    layer = {"order": 2, "scale": "static", "betas": [0.8, 0.4]}
    plan = {"version": 1, "layers": {f"conv{i}": layer for i in range(layers)}}
    return model, plan, rng.standard_normal(shape).astype("float32")

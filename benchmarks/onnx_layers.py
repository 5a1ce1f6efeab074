"""The float layers of fragments.py as ONNX models of one layer, NCHW, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .fragments import Conv

OPSET = 17
IR_VERSION = 10


def conv_model(path: Path, conv: Conv, batch: int, weight: np.ndarray, bias: np.ndarray) -> Path:
    """ReLU(Conv(x) + bias); weight as ours, [F,kh,kw,C/g]."""
    window = {"strides": list(conv.geometry.strides), "pads": list(conv.geometry.padding), "group": conv.groups}
    nodes = [
        helper.make_node("Conv", ["x", "weight", "bias"], ["c"], name="layer", **window),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    constants = {"weight": np.ascontiguousarray(weight.transpose(0, 3, 1, 2)), "bias": bias}
    return _save(path, nodes, (batch, conv.channels, conv.size, conv.size), constants)


def dense_model(path: Path, batch: int, weight: np.ndarray, bias: np.ndarray) -> Path:
    """x·Wᵀ + bias, weight [F,L]."""
    nodes = [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], name="layer", transB=1)]
    return _save(path, nodes, (batch, weight.shape[1]), {"weight": weight, "bias": bias})


def pool_model(path: Path, conv: Conv, batch: int) -> Path:
    """Max over the windows of `conv`."""
    window = {
        "kernel_shape": list(conv.geometry.kernel),
        "strides": list(conv.geometry.strides),
        "pads": list(conv.geometry.padding),
    }
    nodes = [helper.make_node("MaxPool", ["x"], ["y"], name="layer", **window)]
    return _save(path, nodes, (batch, conv.channels, conv.size, conv.size), {})


def _save(
    path: Path, nodes: Sequence[onnx.NodeProto], shape: tuple[int, ...], constants: dict[str, np.ndarray]
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION), path)
    return path

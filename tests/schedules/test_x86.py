"""Tiles of channels within groups: an accumulator is that of a tile, whatever the group's size is divisible by."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import horq_tvm
from horq_tvm import reference

RNG = np.random.default_rng(0)


def layer(channels: int, filters: int, groups: int, size: tuple[int, int]) -> tuple[onnx.ModelProto, np.ndarray]:
    weight = RNG.standard_normal((filters, channels // groups, 3, 3)).astype("float32")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", pads=[1, 1, 1, 1], group=groups)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, channels, *size])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), weight


@pytest.mark.filterwarnings("ignore:.*not trained for HORQ")
@pytest.mark.parametrize("target", ["native", "x86-64"])
@pytest.mark.parametrize(
    ("filters", "groups", "size"), [(300, 3, (9, 11)), (282, 3, (3, 8)), (300, 2, (6, 6)), (20, 2, (5, 3))]
)
def test_groups_that_no_wide_vector_divides(filters: int, groups: int, size: tuple[int, int], target: str) -> None:
    """100 filters a group in vectors of 4 once took the accumulators of all groups for those of one tile."""
    model, weight = layer(6 if groups == 3 else 4, filters, groups, size)
    compiled = horq_tvm.build(model, target, plan={"version": 1, "layers": {"c": {"order": 2, "scale": "sample"}}})
    x = RNG.standard_normal(compiled.load().inputs[0].shape).astype("float32")
    signs, alpha = reference.binarize_weights(weight)
    expected = reference.conv2d(x, signs, alpha, order=2, scale="sample", padding=(1, 1, 1, 1), groups=groups)
    sure = ~expected.doubtful
    assert np.all(np.abs(compiled(x)["y"] - expected.output)[sure] <= expected.tolerance[sure])

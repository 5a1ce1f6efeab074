"""Quantisation of constants by the ONNX operators' own rules, against onnx's evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from horq_tvm.frontend.onnx import linear


@pytest.mark.parametrize("kind", [None, onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT16])
def test_without_a_zero_point_output_dtype_says_what_comes_out(kind: int | None) -> None:
    attrs: dict[str, Any] = {} if kind is None else {"output_dtype": kind}
    x, scale = np.array([-1.0, 1.0, -2.0, 400.0], "float32"), np.array(0.5, "float32")
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"], **attrs)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xs"],
        [onnx.helper.make_tensor_value_info("y", kind or onnx.TensorProto.UINT8, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x, "s": scale})
    found = linear.evaluate("QuantizeLinear", [x, scale], attrs)
    assert found is not None
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)

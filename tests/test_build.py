"""`horq_tvm.build` from Python: what it warns of and reports, and the calibration data that it takes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import horq_tvm
from horq_tvm import agreement, calibration, onnx_functions, pipeline, targets
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.relay_passes.expose_scales import EXPOSED
from horq_tvm.specs import LayerConfig, TensorSpec

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype("float32")


def graph(nodes: Sequence[NodeProto], weights: dict[str, Array], x: str = "x", *outputs: str) -> ModelProto:
    """An ONNX model from the image `x` [1,3,8,8] to `outputs` ("y" by default)."""
    image = helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 3, 8, 8])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ("y",)]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    found = helper.make_graph(nodes, "g", [image], results, constants)
    return helper.make_model(found, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def conv(x: str, name: str, y: str) -> NodeProto:
    return helper.make_node("Conv", [x, f"{name}.w"], [y], name=name, pads=[1, 1, 1, 1])


def three_convs(x: str = "x", between: str = "Tanh") -> ModelProto:
    """first, `between`, middle, last; of eight channels. Only the middle one is rewritten by default."""
    nodes = [
        conv(x, "first", "a"),
        helper.make_node(between, ["a"], ["b"]),
        conv("b", "middle", "c"),
        conv("c", "last", "y"),
    ]
    weights = {"first.w": normal(8, 3, 3, 3), "middle.w": normal(8, 8, 3, 3), "last.w": normal(4, 8, 3, 3)}
    return graph(nodes, weights, x)


def test_a_model_without_layers_says_so() -> None:
    with pytest.warns(UserWarning, match="no layer was rewritten: the model has no conv or dense layer"):
        horq_tvm.build(graph([helper.make_node("Relu", ["x"], ["y"])], {}), target="x86-64")


def test_taps_are_a_list() -> None:
    with pytest.raises(UsageError, match="taps: found the text 'middle'; accepted: a list of layer names"):
        horq_tvm.build(three_convs(), taps="middle")


def test_an_input_may_be_called_self() -> None:
    compiled = horq_tvm.build(three_convs("self"), order="float", target="x86-64")
    image = normal(1, 3, 8, 8)
    np.testing.assert_array_equal(compiled(self=image)["y"], compiled(image)["y"])


def test_a_cosine_that_does_not_exist_is_none() -> None:
    with pytest.warns(UserWarning, match="cosine of the outputs undefined"):
        report = horq_tvm.build(three_convs(between="Log"), target="x86-64").report
    assert report["cosine"] is None
    assert 0 <= report["agreement"] <= 1


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_bits_count_as_packed_however_they_lie(target: str) -> None:
    given = horq_tvm.build(three_convs(), order="float", target=target).report["bytes"]
    with pytest.warns(UserWarning, match="not trained"):
        bits = horq_tvm.build(three_convs(), target=target).report["bytes"]
    assert given["weights_packed"] == 0
    assert bits["weights_packed"] >= 9 * 8 * 4  # a word a tap and filter
    assert bits["weights_float"] <= given["weights_float"] - 4 * 8 * 8 * 9 + 1000


def horq_model() -> ModelProto:
    """`three_convs` with the middle layer trained for order 2, `sample`."""
    model = three_convs()
    weight = np.where(numpy_helper.to_array(model.graph.initializer[1]) >= 0, 1, -1).astype("float32")
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "middle.w"))
    model.graph.initializer.append(numpy_helper.from_array(np.abs(normal(8)), "alpha"))
    attributes = {"order": 2, "scale": "sample", "pads": [1, 1, 1, 1]}
    node = helper.make_node(
        "HorqConv2d", ["b", "middle.w", "alpha", "", ""], ["c"], name="middle", domain="horq",
        overload=onnx_functions.overload(2, "sample"), **attributes,
    )  # fmt: skip
    model.graph.node[2].CopyFrom(node)
    return onnx_functions.add_functions(model)


def test_a_trained_layer_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = horq_tvm.build(horq_model(), target="x86-64").report
    assert (report["agreement"], report["cosine"]) == (None, None)


def test_a_trained_layer_at_another_order_is_not_trained_for_it() -> None:
    plan = {"version": 1, "layers": {"middle": {"order": 1, "scale": "sample"}}}
    with pytest.warns(UserWarning, match="1 layer was rewritten that was not trained for HORQ"):
        report = horq_tvm.build(horq_model(), plan=plan, target="x86-64").report
    assert report["cosine"] < 1


def test_what_a_rewrite_costs_is_measured_against_the_trained_model() -> None:
    """A plan that says what the model says anyway costs nothing; the last layer's rewrite is what is measured."""
    model = horq_model()
    same = {"version": 1, "layers": {"middle": {"order": 2, "scale": "sample"}}}
    assert horq_tvm.build(model, plan=same, target="x86-64").report["cosine"] is None
    more = {"version": 1, "layers": {"last": {"order": 4, "scale": "sample"}}}
    with pytest.warns(UserWarning, match="^1 layer was rewritten"):
        by_plan = horq_tvm.build(model, plan=more, target="x86-64")
    given = horq_tvm.build(model, target="x86-64")
    inputs = tuple(TensorSpec(**spec) for spec in given.report["inputs"])
    expected = [_cosine(by_plan(**feed)["y"], given(**feed)["y"]) for feed in agreement.batches(inputs, None)]
    assert by_plan.report["cosine"] == pytest.approx(np.mean(expected), abs=1e-6)


def _cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


# --- Calibration data -------------------------------------------------------------------------------------------------

IMAGES, FACTOR = TensorSpec("x", (2, 3), "float32"), TensorSpec("s", (), "float32")


def test_batches_are_of_the_models_own_size_and_the_last_is_filled_up() -> None:
    data = {"x": np.arange(15.0).reshape(5, 3), "s": np.array([1.0, 2.0, 3.0])}
    found = list(agreement.batches((IMAGES, FACTOR), data))
    assert [float(feed["s"]) for feed in found] == [1, 2, 3]
    assert all(feed["x"].dtype == np.float32 and feed["s"].shape == () for feed in found)
    np.testing.assert_array_equal(found[2]["x"], data["x"][[4, 0]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no array 'x'; found: none"),
        ({"x": np.zeros((4, 2)), "s": np.zeros(2)}, r"'x' has shape \(4, 2\); accepted: \(samples, 3\)"),
        ({"x": np.zeros((0, 3)), "s": np.zeros(2)}, r"'x' has shape \(0, 3\)"),
        ({"x": np.zeros((4, 3)), "s": np.float32(1)}, r"'s' has shape \(\); accepted: \(samples\)"),
        ({"x": np.zeros((4, 3)), "s": np.zeros(5)}, "'x' for 2, 's' for 5; accepted: for as many"),
    ],
)
def test_data_that_does_not_fit(data: dict[str, Array], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(agreement.batches((IMAGES, FACTOR), data))


def test_random_integers_are_drawn_from_their_range() -> None:
    pixels = TensorSpec("x", (1, 3, 8, 8), "uint8")
    drawn = np.concatenate([feed["x"].ravel() for feed in agreement.batches((pixels,), None)])
    assert drawn.dtype == np.uint8
    assert drawn.max() > 200


def siblings() -> tuple[Any, ...]:
    """Two convs that read one value, and what `calibration` needs of their model."""
    nodes = [
        conv("x", "first", "a"),
        conv("a", "left", "l"),
        conv("a", "right", "r"),
        helper.make_node("Add", ["l", "r"], ["b"]),
        conv("b", "last", "y"),
    ]
    widths = {"first": (8, 3), "left": (8, 8), "right": (8, 8), "last": (4, 8)}
    imported = import_onnx(graph(nodes, {f"{name}.w": normal(*size, 3, 3) for name, size in widths.items()}))
    return imported, pipeline.canonicalise()(imported.mod)


def test_a_layer_with_its_own_scales_keeps_them_while_its_sibling_is_calibrated() -> None:
    _, canonical = siblings()
    configs = {"left": LayerConfig(2, "static"), "right": LayerConfig(2, "sample")}
    exposed = calibration._exposed(canonical, configs, ["left"])
    assert [list(map(str, names)) for names in exposed.attrs[EXPOSED]] == [["left"]]
    assert str(exposed).count("horq.scales") == 1


def test_what_is_all_zero_calibrates_to_zeros_and_runs() -> None:
    imported, canonical = siblings()
    configs = {"left": LayerConfig(2, "static")}
    data = {"x": np.zeros((3, 3, 8, 8), "float32")}
    host = targets.resolve("x86-64")
    fitted = calibration.fit(canonical, imported.inputs, host, configs, data, lambda _message: None)
    assert fitted["left"].betas == (0.0, 0.0)


def test_an_image_smaller_than_the_window() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="wide")
    with pytest.raises(HorqError, match=r"Conv \(node 'wide'\).*found an image of \[8, 8\].*a window, \[9, 9\]"):
        import_onnx(graph([node], {"w": normal(4, 3, 9, 9)}))

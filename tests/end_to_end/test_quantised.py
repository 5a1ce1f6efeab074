"""Models that bring their own quantisation (QuantizeLinear, DequantizeLinear) against ONNX Runtime on the same file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

import horq_tvm
from horq_tvm import ops, pipeline
from horq_tvm.errors import HorqError
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.ops.int8 import Activation, activation_of
from horq_tvm.relay_passes.spell_fake_quantize import SpellFakeQuantize
from horq_tvm.rest import own_activations
from horq_tvm.straightline import array_of, op_name, read_main
from tests.relay_passes.program import module

Array = np.ndarray[Any, Any]
SHAPE = (1, 3, 12, 14)


def samples(count: int = 8) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal(SHAPE).astype("float32")} for _ in range(count)]


class Reader:
    def __init__(self) -> None:
        self.rest: Iterator[dict[str, Array]] = iter(samples())

    def get_next(self) -> dict[str, Array] | None:
        return next(self.rest, None)


def model(nodes: list[onnx.NodeProto], weights: dict[str, Array], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("x", kind, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def floating() -> onnx.ModelProto:
    """Two convolutions with a shortcut around the second, a pool, a grouped one, a mean and a dense layer."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 3, 3, 3), "b": (8, 8, 3, 3), "g": (16, 4, 3, 3), "l": (10, 16)}
    weights = {f"{name}.w": rng.standard_normal(shape).astype("float32") * 0.3 for name, shape in shapes.items()}
    weights |= {f"{name}.b": rng.standard_normal(shape[0]).astype("float32") for name, shape in shapes.items()}
    weights["a.w"][3] *= 0.01  # a filter for which one scale of all is far too large

    def conv(name: str, x: str, y: str, **attrs: Any) -> list[onnx.NodeProto]:
        given = {"pads": [1] * 4, **attrs}
        return [
            helper.make_node("Conv", [x, f"{name}.w", f"{name}.b"], [f"{y}.c"], name=name, **given),
            helper.make_node("Relu", [f"{y}.c"], [y]),
        ]

    nodes = [
        *conv("a", "x", "p"),
        *conv("b", "p", "q"),
        helper.make_node("Add", ["p", "q"], ["s"]),
        helper.make_node("MaxPool", ["s"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        *conv("g", "m", "r", group=2),
        helper.make_node("GlobalAveragePool", ["r"], ["v"]),
        helper.make_node("Flatten", ["v"], ["f"]),
        helper.make_node("Gemm", ["f", "l.w", "l.b"], ["y"], name="l", transB=1),
    ]
    return model(nodes, weights)


@pytest.fixture(scope="module", params=[("QUInt8", True), ("QUInt8", False), ("QInt8", True)], ids=str)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The network as ONNX Runtime quantises it: activations in either type, weights a channel or a tensor."""
    folder = tmp_path_factory.mktemp("qdq")
    kind, per_channel = request.param
    onnx.save(floating(), folder / "float.onnx")
    quantization.quantize_static(
        str(folder / "float.onnx"),
        str(folder / "qdq.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=quantization.QuantType[kind],
        weight_type=quantization.QuantType.QInt8,
    )
    return onnx.load(folder / "qdq.onnx")


def peer(proto: onnx.ModelProto, x: Array, *, fused: bool) -> Array:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    return np.asarray(result)


@pytest.mark.parametrize("rest", ["float32", "int8"])
def test_the_same_file_in_onnxruntime(quantised: onnx.ModelProto, rest: str) -> None:
    """Outputs lie on a grid of 256 steps: nearly all are the same step, and none is more than two away."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is guessed, so nothing is warned of
        compiled = horq_tvm.build(quantised, order="float", rest=rest)
    found, expected = [], []
    loaded = compiled.load()
    for sample in samples():
        for fused in (False, True):
            found.append(loaded(sample["x"])["y"])
            expected.append(peer(quantised, sample["x"], fused=fused))
    step = np.diff(np.unique(expected)).min()
    apart = np.abs(np.array(found) - np.array(expected)) / step
    assert (apart < 0.01).mean() > 0.95
    assert apart.max() < 2.01
    if rest == "int8":
        cost = compiled.report["rest"]
        assert cost["calibration"] == "the model's own quantisation of 4 layers"
        assert cost["agreement"] == 1.0
        assert cost["cosine"] > 0.9999
        assert {layer["rest"] for layer in compiled.report["layers"]} == {"int8"}


def test_scales_and_integers_are_the_models_own(quantised: onnx.ModelProto) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    producers = {node.output[0]: node for node in quantised.graph.node}
    layers = int8_layers(quantised)
    assert set(layers) == {"a", "b", "g", "l"}
    for node in quantised.graph.node:
        if node.name in layers:
            read, weight = (producers[name] for name in node.input[:2])
            low = {"uint8": 0, "int8": -128}[str(weights[read.input[2]].dtype)]
            own = Activation(float(weights[read.input[1]]), int(weights[read.input[2]]) - low)
            assert activation_of(layers[node.name].attrs) == own
            integers = weights[weight.input[0]]
            found = array_of(layers[node.name].args[1])
            np.testing.assert_array_equal(found if found.ndim == 2 else found.transpose(0, 3, 1, 2), integers)


def int8_layers(proto: onnx.ModelProto) -> dict[str, Any]:
    """The int8 layers that a model becomes, by name."""
    imported = import_onnx(proto)
    rewritten = pipeline.rewrite({})(pipeline.canonicalise()(imported.mod))
    own = own_activations(rewritten, {"a", "b", "g", "l"})
    program = read_main(pipeline.quantize_rest(own, imported.weight_scales)(rewritten))
    return {
        str(v.attrs["name"]): v for _, v in program.bindings if op_name(v) in ("horq.int8_conv2d", "horq.int8_dense")
    }


def test_weights_whose_largest_is_not_127_keep_their_integers() -> None:
    """Quantised anew, 100 steps would become 127."""
    rng = np.random.default_rng(5)
    integers = rng.integers(-100, 101, (4, 3, 3, 3)).astype("int8")
    integers[1, 0, 0, 0] = -128
    weights = {
        "s": np.float32(0.02),
        "z": np.uint8(117),
        "w": integers,
        "ws": np.array([0.1, 0.2, 0.05, 0.3], "float32"),
        "wz": np.zeros(4, "int8"),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"], name="a"),
    ]
    proto = model(nodes, weights)
    layer = int8_layers(proto)["a"]
    np.testing.assert_array_equal(array_of(layer.args[1]).transpose(0, 3, 1, 2), integers)
    for rest in ("float32", "int8"):
        loaded = horq_tvm.build(proto, order="float", rest=rest).load()
        for sample in samples(2):
            expected = peer(proto, sample["x"], fused=False)
            found = loaded(sample["x"])["y"]
            # A half may go to either step (we multiply by 1/s): all but a few are equal, and these differ by a step.
            close = np.abs(found - expected) < 1e-5 * np.abs(expected).max()
            assert close.mean() > 0.99
            assert np.abs(found - expected).max() < 1.1 * 0.02 * 128 * 0.3


@pytest.mark.parametrize("back", [["q", "s"], ["q", "s", ""], ["q", "s", "zero"]])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.INT4, TensorProto.UINT4])
def test_no_zero_point_and_narrow_weights(kind: int, back: list[str]) -> None:
    """A pair without a zero point is a pair (uint8, 0 is 0); weights of 4 bits are folded like those of 8."""
    rng = np.random.default_rng(6)
    low, high = {TensorProto.INT8: (-128, 128), TensorProto.INT4: (-8, 8), TensorProto.UINT4: (0, 16)}[kind]
    integers = rng.integers(low, high, (4, 3, 3, 3))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
        helper.make_node("DequantizeLinear", back, ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"], name="a"),
    ]
    steps = np.array([0.1, 0.2, 0.05, 0.3], "float32")
    proto = model(nodes, {"s": np.float32(0.02), "ws": steps, "zero": np.uint8(0)})
    proto.opset_import[0].version = 21
    proto.graph.initializer.append(helper.make_tensor("w", kind, integers.shape, integers.ravel()))
    layer = int8_layers(proto)["a"]
    assert activation_of(layer.attrs) == Activation(float(np.float32(0.02)), 0)
    np.testing.assert_array_equal(array_of(layer.args[1]).transpose(0, 3, 1, 2), integers)
    x = 0.02 * rng.integers(-40, 300, SHAPE).astype("float32")  # in the middle of its step
    expected = peer(proto, x, fused=False)
    for rest in ("float32", "int8"):
        found = horq_tvm.build(proto, order="float", rest=rest)(x)["y"]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_bytes_that_are_dequantised_are_an_image() -> None:
    filters = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype("float32")
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"], name="a", pads=[1] * 4),
    ]
    proto = model(nodes, {"s": np.float32(1 / 128), "z": np.uint8(127), "w": filters}, TensorProto.UINT8)
    x = np.random.default_rng(0).integers(0, 256, SHAPE, dtype="uint8")
    with pytest.warns(UserWarning, match="run in int8"):
        loaded = horq_tvm.build(proto, order="float", rest="int8").load()
    expected = peer(proto, x, fused=False)
    np.testing.assert_allclose(loaded(x)["y"], expected, atol=0.01 * np.abs(expected).max())
    assert next(step.name for step in loaded.profile(x, runs=1)).startswith("quantize")


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_two_apart(kind: str, channels: int) -> None:
    """One scale or one a channel, every type; a Reshape between them, so that they are no pair."""
    ends = np.iinfo(kind)
    scale = np.linspace(0.01, 0.05, channels).astype("float32")
    zero = np.full(channels, (ends.min + ends.max) // 2 + 3, kind)
    scale, zero = (scale[0], zero[0]) if channels == 1 else (scale, zero)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("Reshape", ["q", "shape"], ["m"]),
        helper.make_node("DequantizeLinear", ["m", "s", "z"], ["y"], axis=1),
    ]
    proto = model(nodes, {"s": scale, "z": zero, "shape": np.array([1, 3, 14, 12])})
    proto.opset_import[0].version = 21
    loaded = horq_tvm.build(proto, order="float").load()
    x = samples(1)[0]["x"] * 3
    np.testing.assert_array_equal(loaded(x)["y"], peer(proto, x, fused=False))


def test_a_pair_of_constants_folds() -> None:
    weights = {"s": np.float32(0.1), "z": np.int8(3), "w": np.random.default_rng(0).standard_normal((4, 3, 3, 3))}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["x", "d"], ["y"], name="a"),
    ]
    proto = model(nodes, {name: np.asarray(v, "float32") if name == "w" else v for name, v in weights.items()})
    imported = import_onnx(proto)
    operators = {op_name(value) for _, value in read_main(imported.mod).bindings}
    assert operators == {"horq.name", "relax.nn.conv2d"}
    np.testing.assert_array_equal(imported.weight_scales["a"], np.full(4, np.float32(0.1)))


def test_binary_layers_of_a_quantised_model(quantised: onnx.ModelProto) -> None:
    with pytest.warns(UserWarning, match="not trained for HORQ"):
        compiled = horq_tvm.build(quantised, order=2, rest="int8")
    by_name = {layer["name"]: (layer["order"], layer["rest"]) for layer in compiled.report["layers"]}
    assert by_name == {"a": (None, "int8"), "b": (2, None), "g": (2, None), "l": (None, "int8")}
    assert np.isfinite(compiled(samples(1)[0]["x"])["y"]).all()


def test_halves_and_ends_as_onnx_has_them() -> None:
    x = np.concatenate([np.arange(-600, 600) / 2, [np.inf, -np.inf]]).astype("float32").reshape(1, -1)

    def body(emit: Any, v: Any) -> Any:
        return emit(ops.fake_quantize(v, scale=1.0, zero_point=100, low=0, high=255))

    mod = tvm.transform.Sequential([SpellFakeQuantize()])(module([x.shape], body))
    assert all(op_name(value) != "horq.fake_quantize" for _, value in read_main(mod).bindings)
    proto = model(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"s": np.float32(1.0), "z": np.uint8(100)},
    )
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.input[0].type.tensor_type.shape.dim[2:]
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = x.shape[1]
    found = horq_tvm.build(proto, order="float")(x)["y"]
    np.testing.assert_array_equal(found, np.clip(np.rint(x) + 100, 0, 255) - 100)
    np.testing.assert_array_equal(found, peer(proto, x, fused=False))


def test_scales_that_are_computed_are_an_error(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    with pytest.raises(HorqError, match="found a scale computed from the model's inputs; accepted are constants"):
        horq_tvm.build(model(nodes, {"z": np.uint8(0)}), order="float")

"""The rest in int8, end to end: which layers, on what ranges, what it costs, and what the library says of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

import horq_tvm
from horq_tvm import reference_int8, rest
from horq_tvm.cli import main
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.layers import NOT_CONSTANT, Layer
from horq_tvm.ops.int8 import MAX_ROW
from horq_tvm.runtime.loader import read_manifest
from tests.networks import HORQ_LAYERS, cifar_resnet

Array = np.ndarray[Any, Any]
SHAPE = (1, 3, 8, 8)


# --- Which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Layer("stem", "conv2d", (64, 7, 7, 3), reads_input=True), None),
        (Layer("grouped", "conv2d", (8, 3, 3, 5), groups=2), None),
        (Layer("grouped", "conv2d", (10, 3, 3, 5), groups=2), "int8 takes groups of a multiple of 4 filters, not 5"),
        (Layer("depthwise", "conv2d", (8, 3, 3, 1), groups=8), "int8 has no depthwise kernel"),
        (Layer("grey", "conv2d", (8, 3, 3, 1)), None),
        (Layer("head", "dense", (10, MAX_ROW)), None),
        (Layer("head", "dense", (10, MAX_ROW + 1)), "can overflow"),
        (Layer("attention", "dense", opaque=NOT_CONSTANT), NOT_CONSTANT),
    ],
    ids=lambda value: value.name if isinstance(value, Layer) else None,
)
def test_why_a_layer_stays_float(layer: Layer, reason: str | None) -> None:
    found = rest.reason_for_float32(layer)
    assert found is None if reason is None else reason in str(found)


# --- Networks ---------------------------------------------------------------------------------------------------------


class Mobile(nn.Module):
    """[1,3,16,16] → [1,10] over a depthwise layer, a grouped one and a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(16, 32, 1, 2)
        self.down = nn.Conv2d(32, 32, 3, 2, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(torch.relu(self.grouped(torch.relu(self.depthwise(x))))) + self.shortcut(x)
        return self.head(torch.relu(y).mean((2, 3)))


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    torch.manual_seed(0)
    return Mobile().eval()


def inputs(count: int, size: int = 16, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype("float32")


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_float_network_in_int8(mobile: nn.Module) -> None:
    """No warning with calibration data; the reported cosine is the outputs', and depthwise is float with a reason."""
    x = inputs(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        given: dict[str, Any] = {"order": "float", "example_inputs": (torch.from_numpy(x[:1]),)}
        compiled = horq_tvm.build(mobile, rest="int8", calibration={"x": x}, **given)
    model = compiled.load()
    found = np.concatenate([model(x[i : i + 1])[model.outputs[0].name] for i in range(len(x))])
    expected = mobile(torch.from_numpy(x)).detach().numpy()
    per_image = [cosine(a, b) for a, b in zip(found, expected, strict=True)]
    assert min(per_image) > 0.99
    cost = compiled.report["rest"]
    assert cost["calibration"] == "the calibration data (16 batches)"
    assert cost["cosine"] == pytest.approx(np.mean(per_image), abs=1e-4)
    assert cost["agreement"] == np.mean(found.argmax(1) == expected.argmax(1))
    by_name = {layer["name"]: layer for layer in compiled.report["layers"]}
    assert {name: layer["rest"] for name, layer in by_name.items()} == {
        "stem.0": "int8",
        "depthwise": "float32",
        "grouped": "int8",
        "shortcut": "int8",
        "down": "int8",
        "head": "int8",
    }
    assert by_name["depthwise"]["reason"] == "order is float; int8 has no depthwise kernel"
    assert by_name["head"]["reason"] == "order is float"


def test_a_binary_network_with_its_rest_in_int8() -> None:
    """Random ranges are said in a warning; binary layers stay what they were; two builds are the same bytes."""
    module, x = cifar_resnet(2, "sample"), inputs(1, 32)
    given: dict[str, Any] = {"example_inputs": (torch.from_numpy(x),)}
    with pytest.warns(UserWarning, match=r"4 layers run in int8 on the ranges of 8 random inputs: .* cosine"):
        compiled, again = (horq_tvm.build(module, rest="int8", **given) for _ in range(2))
    assert compiled.library.read_bytes() == again.library.read_bytes()
    plain = horq_tvm.build(module, **given)
    assert compiled.report["rest"]["cosine"] > 0.99
    assert "rest" not in plain.report
    manifest = read_manifest(compiled.library)
    assert {layer.name for layer in manifest.layers if layer.rest is None} == set(HORQ_LAYERS)
    assert {layer.rest for layer in manifest.layers if layer.order is None} == {"int8"}
    assert {layer.rest for layer in read_manifest(plain.library).layers} == {None, "float32"}
    outputs = [next(iter(c(x).values())) for c in (compiled, plain)]
    assert not np.array_equal(*outputs)
    assert cosine(*outputs) > 0.98


@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_another_target_gives_the_same_integers(mobile: nn.Module, target: str) -> None:
    """Only the float steps between the layers may part, and a step of 1/255 where one of them moves a rounding."""
    x = inputs(4)
    given: dict[str, Any] = {"order": "float", "rest": "int8", "calibration": {"x": x}}
    given["example_inputs"] = (torch.from_numpy(x[:1]),)
    here, there = (horq_tvm.build(mobile, name, **given).load() for name in ("native", target))
    for image in x:
        a, b = (next(iter(model(image[None]).values())) for model in (here, there))
        assert cosine(a, b) > 0.9999


# --- Single layers, from ONNX -----------------------------------------------------------------------------------------


def one_conv(weight: Array) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


WEIGHT = np.random.default_rng(1).standard_normal((8, 3, 3, 3)).astype("float32")


def test_the_range_is_that_of_the_calibration_data() -> None:
    x = 0.3 * inputs(4, 8) + 0.1
    model = horq_tvm.build(one_conv(WEIGHT), order="float", rest="int8", calibration={"x": x}).load()
    scale, zero = reference_int8.activation_scale(float(x.min()), float(x.max()))
    for image in (x[:1], 5 * x[:1]):  # the second one is clipped
        _, expected = reference_int8.conv2d(image, WEIGHT, scale, zero, padding=(1, 1, 1, 1))
        np.testing.assert_array_equal(model(image)["y"], expected)


def test_inputs_that_are_not_finite_have_no_range() -> None:
    x = inputs(2, 8)
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(HorqError, match="layer conv: calibration: the range nan to nan is not finite"):
        horq_tvm.build(one_conv(WEIGHT), order="float", rest="int8", calibration={"x": x})


def test_an_unknown_rest() -> None:
    with pytest.raises(UsageError, match="rest: found 'int4'; accepted: float32, int8"):
        horq_tvm.build(one_conv(WEIGHT), rest="int4")  # type: ignore[arg-type]


# --- The command line -------------------------------------------------------------------------------------------------


def test_build_inspect_and_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    model, library, data = (str(tmp_path / name) for name in ("m.onnx", "m.so", "x.npz"))
    onnx.save(one_conv(WEIGHT), model)
    np.savez(data, x=inputs(4, 8))
    words = ["--order", "float", "--rest", "int8", "--calibration", data]
    assert main(["build", model, "-o", library, *words, "--json", str(tmp_path / "m.json")]) == 0
    text = capsys.readouterr().out
    assert "1, 0 of them binary, 1 int8" in text
    assert "against a float32 rest, on the calibration data (4 batches), which gave the ranges" in text
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["rest"]["cosine"] > 0.999
    assert main(["inspect", library]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("conv ")]
    assert line.split()[:4] == ["conv", "conv2d", "-", "int8"]
    assert main(["bench", library, "--seconds", "0.01", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rest"] == "int8"
    assert main(["build", model, "-o", library, "--rest", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err

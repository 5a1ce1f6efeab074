"""The trained examples: small, run by any ONNX runtime, compiled to the same answers, as accurate as they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import horq_tvm
from horq_tvm import datasets, zoo

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "pretrained"
FILES = sorted(FOLDER.glob("*.onnx"))
IMAGES = 8


def _network(path: Path) -> str:
    return path.name.partition("-")[0]


def _images(path: Path) -> np.ndarray:
    """Blurred noise from 0 to 255: smooth as an image is."""
    shape = (IMAGES, *zoo.NETWORKS[_network(path)].image)
    noise = np.random.default_rng(0).uniform(0, 255, shape)
    for axis in (2, 3):
        noise = (np.roll(noise, 1, axis) + noise + np.roll(noise, -1, axis)) / 3
    return noise.astype(np.float32)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_there_is_one_for_either_dataset() -> None:
    assert {_network(path) for path in FILES} == {"mnist", "resnet20"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_small_and_packed(path: Path) -> None:
    assert path.stat().st_size < 300_000
    graph = onnx.load(path).graph
    onnx.checker.check_model(onnx.load(path), full_check=True)
    given = {tensor.name for tensor in graph.initializer}
    horq = [node for node in graph.node if node.domain == "horq"]
    assert len(horq) == {"mnist": 2, "resnet20": 18}[_network(path)]
    assert all(node.input[1] not in given and f"{node.input[1]}.bits" in given for node in horq)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_compiled_is_what_onnx_runtime_computes(path: Path, tmp_path: Path) -> None:
    x = _images(path)
    model = horq_tvm.build(path, input_shapes={"image": x.shape})
    model.export(tmp_path / "model.so")
    found = horq_tvm.load(tmp_path / "model.so")(x)["scores"]
    (expected,) = _session(path).run(None, {"image": x})
    # A sign in doubt may flip, which moves the scores of its image a little.
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    orders = {layer["order"] for layer in model.report["layers"]} - {None}
    assert orders == {int(re.search(r"-k(\d)", path.stem)[1])}


def _told() -> dict[str, tuple[float, str]]:
    """What the folder's README says of each file: its accuracy in percent, and the run it is of."""
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| `(\S+\.onnx)` \|.*\| ([\d.]+) % \| (\S+) \|$", text, re.M)
    return {name: (float(value), run) for name, value, run in rows}


def test_the_readme_tells_the_accuracies_that_were_measured() -> None:
    results = json.loads((ROOT / "docs" / "accuracy.json").read_text())["runs"]
    told = _told()
    assert sorted(told) == [path.name for path in FILES]
    for name, (accuracy, run) in told.items():
        assert accuracy == round(100 * results[run]["accuracy"], 2)
        assert name.removesuffix(".onnx") == "-".join([results[run]["network"], f"k{results[run]['order']}"])


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_as_accurate_as_told(path: Path) -> None:
    """On the whole test set, compiled."""
    data = datasets.load({"mnist": "mnist", "resnet20": "cifar10"}[_network(path)])
    batch = 100
    model = horq_tvm.build(path, input_shapes={"image": (batch, *data.test_images.shape[1:])}).load()
    right = sum(
        int((model(images.astype(np.float32))["scores"].argmax(1) == labels).sum())
        for images, labels in zip(
            np.split(data.test_images, len(data.test_images) // batch),
            np.split(data.test_labels, len(data.test_labels) // batch),
            strict=True,
        )
    )
    # A flipped sign may turn an image in a thousand.
    assert abs(100 * right / len(data.test_labels) - _told()[path.name][0]) <= 0.1

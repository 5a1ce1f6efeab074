"""ONNX Runtime as a peer, on a small network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from horq_tvm import peers
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import TensorSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv, Relu, Conv; inputs and outputs of dynamic batch."""
    rng = np.random.default_rng(3)
    weights = {"w1": rng.standard_normal((8, 3, 3, 3)), "w2": rng.standard_normal((4, 8, 3, 3))}
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w1"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w2"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [onnx.numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()],
    )
    path = tmp_path_factory.mktemp("peers") / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return peers.random_feeds([TensorSpec("image", SHAPE, "float32")])


def test_random_feeds_are_seeded_and_typed() -> None:
    specs = [TensorSpec("f", (2, 3), "float16"), TensorSpec("u", (100,), "uint8"), TensorSpec("b", (9,), "bool")]
    first, again, other = peers.random_feeds(specs), peers.random_feeds(specs), peers.random_feeds(specs, seed=1)
    for spec in specs:
        assert (first[spec.name].dtype.name, first[spec.name].shape) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(first[spec.name], again[spec.name])
    assert (first["u"] != other["u"]).any()
    assert first["u"].max() > 127


def test_int8_comes_in_both_forms_and_is_near_float(model: Path, feeds: dict[str, np.ndarray]) -> None:
    [expected] = peers.float32(model, feeds).call()
    forms = peers.int8(model, feeds)
    assert [(peer.engine, peer.form) for peer in forms] == [
        ("onnxruntime-int8", "QDQ"),
        ("onnxruntime-int8", "QOperator"),
    ]
    for peer in forms:
        [output] = peer.call()
        assert peer.calibration == "32 seeded normal samples"
        error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 0.05  # not exact, so it is not the float model, and not far


def test_int8_of_external_weights_and_of_an_old_opset(
    model: Path, feeds: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """torch.onnx.export writes the weights beside the model; a scale a channel came with opset 13."""
    external, old = tmp_path / "external.onnx", tmp_path / "old.onnx"
    onnx.save(onnx.load(model), external, save_as_external_data=True, location="weights", size_threshold=0)
    proto = onnx.load(model)
    proto.opset_import[0].version = 9
    onnx.save(proto, old)
    [expected] = peers.int8(model, feeds)[0].call()
    for path in (external, old):
        for peer in peers.int8(path, feeds):
            [output] = peer.call()
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_calibration_data_is_used(model: Path, feeds: dict[str, np.ndarray]) -> None:
    [expected] = peers.float32(model, feeds).call()
    tiny = {"image": np.full((5, *SHAPE[1:]), 1e-3, "float32")}
    peer = peers.int8(model, feeds, calibration=tiny)[0]
    [output] = peer.call()
    assert peer.calibration == "the calibration data"
    # Calibrated on values near 0, everything saturates: the data was looked at.
    assert np.linalg.norm(output - expected) > 0.5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("calibration", "complaint"),
    [
        (
            {"img": np.zeros((4, *SHAPE[1:]), "float32")},
            "calibration: found img; accepted: one array for each of image",
        ),
        (
            {"image": np.zeros((4, 3, 9, 8), "float32")},
            r"image has shape \(4, 3, 9, 8\); accepted: \(samples, 3, 8, 8\)",
        ),
        ({"image": np.zeros((1, *SHAPE[1:]), "float32")}, "fewer samples than one batch"),
    ],
)
def test_calibration_that_does_not_fit(
    model: Path, feeds: dict[str, np.ndarray], calibration: dict[str, np.ndarray], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        peers.int8(model, feeds, calibration=calibration)


def test_models_that_are_none(model: Path, feeds: dict[str, np.ndarray], tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(HorqError, match=r"text\.onnx: ONNX Runtime failed in loading it"):
        peers.float32(text, feeds)
    with pytest.raises(HorqError, match=r"text\.onnx: ONNX Runtime failed in quantising"):
        peers.int8(text, feeds)
    with pytest.raises(UsageError, match=r"missing\.onnx: no such file"):
        peers.float32(tmp_path / "missing.onnx", feeds)
    with pytest.raises(UsageError, match="its inputs are image; the library's are x"):
        peers.float32(model, {"x": feeds["image"]})
    with pytest.raises(HorqError, match="failed in running it"):
        peers.float32(model, {"image": feeds["image"][:, :2]})


def test_horq_nodes_are_noticed(model: Path, tmp_path: Path) -> None:
    assert not peers.holds_horq_nodes(model)
    proto = onnx.load(model)
    proto.graph.node[0].domain = "horq"
    onnx.save(proto, tmp_path / "horq.onnx")
    assert peers.holds_horq_nodes(tmp_path / "horq.onnx")

"""The comparison of engines: what it counts, and that it is fooled by nothing that a broken engine would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples import engines
from examples.layerwise import Fed
from horq_tvm import datasets, zoo
from horq_tvm.nn import HorqConv2d

torch.set_num_threads(1)


def _tiny(layers: zoo.Layers, classes: int) -> nn.Module:
    """A HORQ conv and a HORQ dense layer behind a flatten, whose order of channels an engine may choose."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2),
        nn.BatchNorm2d(6),
        layers.conv(6, 5, 2),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        layers.linear(5 * 2 * 2, 8),
        nn.Linear(8, classes),
    )


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 8, 8)).astype(np.uint8)
    labels = np.zeros(200, np.int64)
    monkeypatch.setattr(datasets, "load", lambda *_: datasets.Dataset("mnist", images, labels, images, labels))
    monkeypatch.setitem(zoo.NETWORKS, "mnist", zoo.Architecture(_tiny, (1, 8, 8), 10))
    monkeypatch.setattr(engines, "BATCH", 50)


def _checkpoint(folder: Path, order: zoo.Order, scale: str = "static") -> Path:
    torch.manual_seed(0)
    model = zoo.build("mnist", order, scale).train()
    for _ in range(20):
        model(torch.randn(20, 1, 8, 8))
    settings = {"network": "mnist", "order": order, "scale": scale}
    path = folder / "tiny.pt"
    torch.save({"settings": settings, "model": model.state_dict(), "epoch": 1, "optimiser": {}, "history": []}, path)
    return path


@pytest.mark.parametrize("scale", ["static", "sample", "patch"])
def test_engines_agree(tmp_path: Path, scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = _checkpoint(tmp_path, 2, scale), tmp_path / "x.json"
    assert engines.main(["mnist", str(path), "--images", "200", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    records, checks = found[:4], found[4:]
    assert [r["engines"][1] for r in records] == ["ONNX Runtime", "horq-tvm", "horq-tvm", "horq-tvm, fused"]
    assert all(r["images"] == r["equal_predictions"] == 200 for r in records)
    assert all(r["flipped"] <= 2 and 0 <= r["worst"] < 1e-5 for r in records[:3])
    assert records[3]["flipped"] is records[3]["worst"] is None  # fused kernels show no signs
    assert capsys.readouterr().out.count("| 100.00% |") == 4
    # Windows of 2×2 at 2×2 places of 6 channels, or the 3×3 values themselves; 20 values into the dense layer; K = 2.
    values = 2 * ({"patch": 96}.get(scale, 54) + 20)
    assert [(c["engine"], c["images"], c["signs"], c["outputs"]) for c in checks] == [
        (name, 200, 200 * values, 200 * (20 + 8)) for name in ("ONNX Runtime", "horq-tvm")
    ]
    assert all(c["wrong"] == c["outside"] == 0 and c["worst"] <= 1 for c in checks)
    assert checks[0]["worst"] == 0  # the contract's own order of operations


def _trace(scores: list[list[float]], x: Tensor) -> engines.Trace:
    return engines.Trace(np.array(scores, np.float32), {"conv": Fed(x, None, torch.zeros(2, 1, 1, 1))})


def _tally(change: Callable[[np.ndarray, Tensor], None]) -> engines.Agreement:
    """Two images in two engines of which the second one's scores and inputs are changed in place."""
    layer = HorqConv2d(2, 1, 1, order=2, scale="sample").eval()
    x = torch.tensor([[1.0, -3.0], [2.0, 5.0]]).reshape(2, 2, 1, 1)
    scores = [[4.0, 1.0], [-8.0, 2.0]]
    one, other = _trace(scores, x), _trace(scores, x.clone())
    change(other.scores, other.layers["conv"].input)
    flips = engines.compare_layers({"a": one, "b": other}, {"conv": layer}, {})
    tally = engines.Tally("a", "b")
    tally.add(one, other, flips["a", "b"])
    return tally.agreement()


def test_equal_engines() -> None:
    assert _tally(lambda scores, x: None) == engines.Agreement(("a", "b"), 2, 2, 0, 2, 0.0)


def test_a_score_is_measured_against_the_largest_of_its_image() -> None:
    def change(scores: np.ndarray, x: Tensor) -> None:
        scores[1, 1] += 0.5

    found = _tally(change)
    assert found == engines.Agreement(("a", "b"), 2, 2, 0, 2, 0.0625)
    assert not found.holds


def test_a_flip_excuses_its_image_alone() -> None:
    def change(scores: np.ndarray, x: Tensor) -> None:
        x[0, 0] = -1.0
        scores[0] = (0, 9)

    found = _tally(change)
    assert found == engines.Agreement(("a", "b"), 2, 1, 1, 1, 0.0)
    assert not found.holds  # half of the predictions is less than 99.9%


def test_another_prediction_without_a_flip() -> None:
    def change(scores: np.ndarray, x: Tensor) -> None:
        scores[0] = scores[0, ::-1].copy()

    assert not _tally(change).holds


def test_without_signs_predictions_alone_count() -> None:
    tally = engines.Tally("a", "b")
    tally.add(_trace([[1, 0]], torch.ones(1, 2, 1, 1)), engines.Trace(np.array([[5.0, 0.0]]), {}), None)
    assert tally.agreement() == engines.Agreement(("a", "b"), 1, 1, None, None, None)
    assert tally.agreement().holds
    tally.add(_trace([[1, 0]], torch.ones(1, 2, 1, 1)), engines.Trace(np.array([[0.0, 5.0]]), {}), None)
    assert not tally.agreement().holds


def test_a_network_without_horq_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["mnist", str(_checkpoint(tmp_path, "float"))]) == 2
    assert "holds no HORQ layer; accepted: one of an order K" in capsys.readouterr().err


def test_images_of_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _checkpoint(tmp_path, 2)
    monkeypatch.setitem(zoo.NETWORKS, "mnist", zoo.Architecture(_tiny, (1, 9, 9), 10))
    assert engines.main(["mnist", str(path), "--images", "100"]) == 2
    assert capsys.readouterr().err == "engines: mnist takes images of [1, 9, 9]; mnist's are [1, 8, 8]\n"

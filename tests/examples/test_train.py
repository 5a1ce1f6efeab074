"""The trainer on made-up images that are learnt at once: stopped and resumed, started from others, taught, exported."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from examples import train
from horq_tvm import datasets, zoo
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import SCALES, Scale

TRAIN, TEST = 320, 40


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small datasets whose labels are where an image is bright, and a network of one HORQ layer for them.

    What is compiled is traced, but runs without code generation, which takes a compiler of C++ and half a minute.
    """
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_(model, backend="aot_eager", **how))
    monkeypatch.setattr(datasets, "load", lambda name, folder=None: _dataset(name))
    monkeypatch.setitem(zoo.NETWORKS, "mnist", zoo.Architecture(_tiny(1), (1, 8, 8), 10))
    monkeypatch.setitem(zoo.NETWORKS, "resnet20", zoo.Architecture(_tiny(3), (3, 8, 8), 10))


def _dataset(name: str) -> datasets.Dataset:
    random, channels = np.random.default_rng(0), 3 if name == "cifar10" else 1

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 4, count)
        images = random.integers(0, 90, (count, channels, 8, 8))
        for image, label in zip(images, labels, strict=True):
            image[:, 4 * (label // 2) :][:, :4, 4 * (label % 2) :][:, :, :4] += 150
        return images.astype(np.uint8), labels.astype(np.int64)

    return datasets.Dataset(name, *part(TRAIN), *part(TEST))


def _tiny(channels: int) -> Any:
    return lambda layers, classes: nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        layers.conv(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def _given(out: Path, *words: str, dataset: str = "mnist", network: str = "mnist") -> Any:
    options = ["--batch", "32", "--epochs", "2", "--threads", "1", "--rate", "0.01", "--out", str(out)]
    return train.arguments([dataset, network, *options, *words])


def _run(out: Path, *words: str, **names: str) -> dict[str, Any]:
    return train.run(_given(out, *words, **names), Console(file=io.StringIO()))


def _trainer(out: Path, *words: str, **names: str) -> train.Trainer:
    given = _given(out, *words, **names)
    out.mkdir(exist_ok=True)
    settings = train.settings_of(given)
    data = train.Images(datasets.load(settings.dataset), settings.seed, settings.views)
    return train.Trainer(settings, train.Places(out, given.start, given.teacher), data)


def _data(name: str = "cifar10", views: int = 8) -> train.Images:
    return train.Images(_dataset(name), seed=0, views=views)


def test_a_run_from_start_to_files(tmp_path: Path) -> None:
    result = _run(tmp_path, "--order", "2", "--epochs", "4")
    assert result["accuracy"] > 0.9
    assert [record["epoch"] for record in result["history"]] == [1, 2, 3, 4]
    assert result["command"] == (
        "python examples/train.py mnist mnist --order 2 --scale static --epochs 4 --seed 0 --batch 32 --rate 0.01"
    )
    assert json.loads((tmp_path / "mnist-k2-static-seed0.json").read_text()) == result
    (layer,) = result["layers"]
    assert 0 < layer["activations"] < 0.4
    assert not list(tmp_path.glob(".*"))


def test_estimator_and_running_scales_are_trained_with_and_named(tmp_path: Path) -> None:
    words = ("--order", "2", "--ste", "tanh", "--beta", "running", "--tag", "x")
    trainer = _trainer(tmp_path, *words)
    layer = trainer.model[2]
    assert (layer.options.ste, layer.options.beta) == ("tanh", "running")
    list(trainer.epochs(lambda: None))
    result = trainer.finish()
    assert (tmp_path / "mnist-k2-static-tanh-running-seed0-x.json").is_file()
    assert (result["ste"], result["beta"]) == ("tanh", "running")
    assert " --ste tanh --beta running" in result["command"]
    plain = _run(tmp_path / "plain", "--order", "2", "--tag", "x")
    assert plain["history"][0]["loss"] != result["history"][0]["loss"]


def test_a_checkpoint_from_before_there_were_estimators_is_of_the_default_one(tmp_path: Path) -> None:
    next(_trainer(tmp_path, "--order", "2").epochs(lambda: None))
    path = tmp_path / "mnist-k2-static-seed0.pt"
    found = torch.load(path)
    del found["settings"]["ste"], found["settings"]["beta"]
    torch.save(found, path)
    assert len(_run(tmp_path, "--order", "2")["history"]) == 2


def test_the_onnx_file_has_the_accuracy_of_the_json(tmp_path: Path) -> None:
    result = _run(tmp_path, "--order", "1", "--scale", "sample")
    session = onnxruntime.InferenceSession(tmp_path / "mnist-k1-sample-seed0.onnx", providers=["CPUExecutionProvider"])
    data = _data("mnist")
    scores = session.run(None, {"image": data.test.float().numpy()})[0]
    assert np.mean(scores.argmax(1) == data.test_labels.numpy()) == result["accuracy"]


@pytest.mark.parametrize(
    "words", [("--order", "2"), ("--order", "2", "--compile"), ("--order", "float"), ("--order", "bw", "--bf16")]
)
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path: Path, words: tuple[str, ...]) -> None:
    names = {"dataset": "cifar10", "network": "resnet20"}
    whole = _trainer(tmp_path / "whole", "--epochs", "3", *words, **names)
    list(whole.epochs(lambda: None))
    first = _trainer(tmp_path / "parts", "--epochs", "3", *words, **names)
    next(first.epochs(lambda: None))
    second = _trainer(tmp_path / "parts", "--epochs", "3", *words, **names)
    assert [record["epoch"] for record in second.epochs(lambda: None)] == [2, 3]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)
    assert [r["loss"] for r in second.history] == [r["loss"] for r in whole.history]


def test_compiled_training_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps but the first, which fits β, are compiled."""
    steps, compile_ = [], torch.compile

    def counted(model: nn.Module, **how: Any) -> Any:
        compiled = compile_(model, **how)
        return lambda images: steps.append(1) or compiled(images)

    monkeypatch.setattr(torch, "compile", counted)
    names = {"dataset": "cifar10", "network": "resnet20"}
    plain = _run(tmp_path / "plain", "--order", "2", **names)
    result = _run(tmp_path / "compiled", "--order", "2", "--compile", **names)
    assert result["command"].endswith(" --compile")
    assert len(steps) == 2 * (TRAIN // 32) - 1
    for found, expected in zip(result["history"], plain["history"], strict=True):
        assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-2)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = _run(tmp_path, "--order", "2")
    assert _run(tmp_path, "--order", "2")["history"] == first["history"]


def test_scales_stand_still_in_the_last_epoch(tmp_path: Path) -> None:
    trainer, seen = _trainer(tmp_path, "--order", "2", "--epochs", "3"), []
    for _ in trainer.epochs(lambda: None):
        seen.append(trainer.model[2].beta.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


def test_norms_are_estimated_anew(tmp_path: Path) -> None:
    """Mean and variance are those of the training images under the last weights, not a trail of the earlier ones."""
    trainer = _trainer(tmp_path, "--order", "float")
    list(trainer.epochs(lambda: None))
    norm, data = trainer.model[1], trainer.data
    with torch.no_grad():
        stem = trainer.model[0](data.normalised(data.train))
    torch.testing.assert_close(norm.running_mean, stem.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert norm.momentum == 0.1


def test_warm_start_and_teacher(tmp_path: Path) -> None:
    names = {"dataset": "cifar10", "network": "resnet20"}
    _run(tmp_path, "--order", "float", **names)
    teacher = str(tmp_path / "resnet20-float-seed0.pt")
    _run(tmp_path, "--order", "3", "--start", teacher, "--teacher", teacher, **names)
    start = str(tmp_path / "resnet20-k3-static-seed0.pt")
    trainer = _trainer(tmp_path, "--order", "1", "--start", start, "--teacher", teacher, **names)
    torch.testing.assert_close(trainer.model[2].weight, torch.load(start)["model"]["2.weight"], rtol=0, atol=0)
    # One file a view: what the first pupil has asked for is read by the second.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("teacher-*.npy")}
    assert len(files) == 2
    list(trainer.epochs(lambda: None))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("teacher-*.npy")} == files
    result = trainer.finish()
    assert result["start"] == "resnet20-k3-static-seed0.pt"
    assert " --start runs/resnet20-k3-static-seed0.pt --teacher runs/resnet20-float-seed0.pt" in result["command"]
    assert (tmp_path / "teacher-resnet20-k1-static-seed0.onnx").is_file()


def test_teacher_speaks_of_the_same_view(tmp_path: Path) -> None:
    names = {"dataset": "cifar10", "network": "resnet20"}
    _run(tmp_path, "--order", "float", **names)
    data = _data()
    teacher = train.Teacher(tmp_path / "resnet20-float-seed0.pt", "resnet20", data, tmp_path, bf16=False)
    rows = torch.tensor([7, 300, 12])
    with torch.no_grad():
        expected = teacher.model(data.view(1, rows))
    torch.testing.assert_close(teacher.logits(1)[rows], expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(teacher.logits(0)[rows], expected, rtol=2e-3, atol=2e-3)


def test_views_are_flipped_crops() -> None:
    """Each row of a view is one of the 2·81 flipped crops of its image, and views differ."""
    data = _data()
    rows = torch.tensor([5, 17])
    padded = F.pad(data.train[rows], [train.CROP] * 4)
    for row, image in enumerate(data.view(3, rows)):
        crops = padded[row].unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        candidates = data.normalised(torch.cat([crops, crops.flip(-1)]))
        assert (candidates == image).flatten(1).all(1).any()
    assert torch.equal(data.view(3, rows), data.view(3, rows))
    assert not torch.equal(data.view(3, rows), data.view(4, rows))


def test_an_epoch_sees_every_image_once() -> None:
    data = _data()
    batches = data.batches(1, 32)
    assert sorted(torch.cat(batches).tolist()) == list(range(TRAIN))
    assert not torch.equal(torch.cat(batches), torch.cat(data.batches(2, 32)))
    assert len(data.batches(1, 300)) == 1


def test_normalised() -> None:
    values = _data().normalised(_data().train)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)


def test_rate() -> None:
    assert train.rate_at(0) == 0
    assert train.rate_at(train.WARM_UP) == 1
    assert train.rate_at(train.WARM_UP / 2) == 0.5
    assert math.isclose(train.rate_at((1 + train.WARM_UP) / 2), 0.5)
    assert math.isclose(train.rate_at(1), 0, abs_tol=1e-9)


def test_loss_of_a_perfect_pupil_is_its_hard_part() -> None:
    scores, labels = torch.randn(4, 10), torch.arange(4)
    hard = F.cross_entropy(scores, labels)
    torch.testing.assert_close(train.loss_of(scores, labels, None, 0.5), hard)
    torch.testing.assert_close(train.loss_of(scores, labels, scores + 3, 0.5), hard / 2)
    assert train.loss_of(scores, labels, scores.roll(1, 0), 0.5) > hard / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--order", "0"), "order 0; accepted are 1 to 8"),
        (("--order", "-1"), "order -1; accepted are 1 to 8"),
        (("--order", "many"), "order 'many'; accepted: an int, 'float' or 'bw'"),
        (("--scale", "image"), "scale 'image'; accepted are"),
        (("--ste", "soft"), "ste 'soft'; accepted are residual, window, approxsign, tanh, identity"),
        (("--beta", "fixed"), "beta 'fixed'; accepted are learned, running"),
        (
            ("--compile", "--scale", "patch"),
            "--compile with --scale patch --beta learned; accepted: static with a learned",
        ),
        (("--compile", "--beta", "running"), "--compile with --scale static --beta running; accepted: static with a"),
        (("--epochs", "0"), "--epochs 0; accepted: 1 or more"),
        (("--batch", "1000"), "--batch 1000; accepted: at most the 320 training images"),
        (("--start", "nothing.pt"), "nothing.pt: there is no such checkpoint"),
        (("--teacher", "nothing.pt"), "nothing.pt: there is no such checkpoint"),
    ],
)
def test_mistakes(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _run(tmp_path, *words)


def test_images_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resnet20 takes images of \[3, 8, 8\]; mnist's are \[1, 8, 8\]"):
        _run(tmp_path, network="resnet20")


def test_checkpoint_of_another_network(tmp_path: Path) -> None:
    _run(tmp_path, "--order", "float")
    path = tmp_path / "mnist-float-seed0.pt"
    with pytest.raises(UsageError, match="found a checkpoint of mnist; accepted: one of resnet20"):
        _run(tmp_path, "--start", str(path), dataset="cifar10", network="resnet20")


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(HorqError, match="x.pt: found no checkpoint of this script"):
        _run(tmp_path, "--start", str(tmp_path / "x.pt"))


def test_checkpoint_of_another_script(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(HorqError, match="x.pt: found no checkpoint of this script"):
        _run(tmp_path, "--start", str(tmp_path / "x.pt"))


def test_other_settings_in_the_same_folder(tmp_path: Path) -> None:
    _run(tmp_path, "--order", "2")
    with pytest.raises(UsageError, match="found a run with epochs=2, wanted 3; remove it or name another --out"):
        _run(tmp_path, "--order", "2", "--epochs", "3")


def test_a_rate_that_is_too_high(tmp_path: Path) -> None:
    with pytest.raises(HorqError, match="the loss is nan in epoch 1; try a lower --rate"):
        _run(tmp_path, "--order", "float", "--rate", "1e30")


@pytest.mark.parametrize("scale", ["sample", "patch"])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 2, 3, padding=1), nn.Linear(5, 2)])
def test_what_planes_lose_follows_the_norm_identity(layer: nn.Module, scale: Scale) -> None:
    """‖R_K‖² = ‖X‖² − L·Σ β_i² wherever the means are the values' own (design: theory)."""
    x = torch.randn(1, 3, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(1, 5)
    values = F.unfold(x, 3, padding=1)[0].T if scale == "patch" and x.dim() == 4 else x.reshape(1, -1)
    explained, residual = torch.zeros(()), values
    for order in (1, 2, 3):
        beta = residual.abs().mean(1, keepdim=True)
        explained = explained + values.shape[1] * beta.square().sum()
        residual = residual - beta * torch.where(residual >= 0, 1.0, -1.0)
        expected = 1 - explained / values.square().sum()
        assert math.isclose(train.lost(layer, x, order, scale), expected.item(), rel_tol=1e-4)


def test_fitted_scales_lose_less_than_means_do() -> None:
    x, layer = torch.randn(1, 4096), nn.Linear(4096, 1)
    assert math.isclose(train.lost(layer, x, 1, "static"), train.lost(layer, x, 1, "sample"), rel_tol=1e-3)
    assert train.lost(layer, x, 3, "static") < 0.8 * train.lost(layer, x, 3, "sample")


def test_binary_weights_tell_what_planes_would_lose(tmp_path: Path) -> None:
    points = _run(tmp_path, "--order", "bw")["approximation"]
    assert [(p["scale"], p["order"]) for p in points] == [(s, k) for s in SCALES for k in range(1, 9)]
    for scale in SCALES:
        errors = [p["error"] for p in points if p["scale"] == scale]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < errors[0] < 1
    assert _run(tmp_path, "--order", "float")["approximation"] == []

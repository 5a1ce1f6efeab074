"""Train a network of the zoo on MNIST or CIFAR-10, in HORQ form or as the float it is measured against.

    python examples/train.py cifar10 resnet20 --order float --epochs 8 --out runs
    python examples/train.py cifar10 resnet20 --order 2 --scale static --epochs 5 --out runs \\
        --teacher runs/resnet20-float-seed0.pt --start runs/resnet20-k3-static-seed0.pt

Writes NAME.pt after every epoch, from which the same command goes on if it was stopped, and at the end NAME.onnx,
which takes pixels from 0 to 255, and NAME.json (accuracies, times, the command, the machine; examples/accuracy.py makes
tables of them). With a teacher, teacher-NAME.onnx is its float network. Everything random follows from --seed and the
number of the epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from horq_tvm import datasets, zoo
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.export import to_onnx
from horq_tvm.files import replacing
from horq_tvm.nn import freeze_scales, keep_freed_memory, quantisation_error, warm_start
from horq_tvm.nn.options import Beta, Ste
from horq_tvm.nn.quantise import STES, fitted_scales, quantise
from horq_tvm.onnx_bits import pack_signs
from horq_tvm.specs import MAX_ORDER, SCALES, Scale
from horq_tvm.torch_ops import im2col, residual_scales

# Pixels of padding that a crop moves in.
CROP = 4
TEMPERATURE = 2.0
WARM_UP = 0.05
# Of all steps: from here on no weight decay, which would keep latent weights near the sign's edge and flipping.
DECAY_UNTIL = 0.75
NORM_IMAGES = 6_400
# Of the test set, after every epoch but the last, which is measured on all of it.
GLIMPSED_IMAGES = 2_000
MEASURED_IMAGES = 256
APPROXIMATED_IMAGES = 64


@dataclass(frozen=True)
class Settings:
    """What a result depends on; a checkpoint of other settings is not resumed."""

    dataset: str
    network: str
    order: zoo.Order
    scale: Scale
    epochs: int
    seed: int
    batch: int
    rate: float
    decay: float
    views: int
    soft: float
    bf16: bool
    start: str | None
    teacher: str | None
    tag: str
    # Runs from before there was a choice have these.
    ste: Ste = "residual"
    beta: Beta = "learned"
    compile: bool = False

    @property
    def label(self) -> str:
        """The layers: `float`, `bw`, or order and scale, with what is trained unlike the default."""
        if not isinstance(self.order, int):
            return self.order
        unusual = [value for value, usual in ((self.ste, "residual"), (self.beta, "learned")) if value != usual]
        return "-".join([f"k{self.order}", self.scale, *unusual])

    @property
    def name(self) -> str:
        return "-".join([self.network, self.label, f"seed{self.seed}", *([self.tag] if self.tag else [])])

    @property
    def command(self) -> str:
        """The command that makes this result again, in the default folder; else what is at its default is left out."""
        usual, words = arguments([self.dataset, self.network]), []
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            always = field.name in ("order", "seed") or (field.name == "scale" and isinstance(self.order, int))
            if always or (value is not None and str(value) != str(getattr(usual, field.name))):
                folder = f"{usual.out}/" if field.name in ("start", "teacher") else ""
                words.append(f"--{field.name}" if value is True else f"--{field.name} {folder}{value}")
        return " ".join([f"python examples/train.py {self.dataset} {self.network}", *words])


@dataclass(frozen=True)
class Places:
    """Where things are: of no consequence to the result."""

    out: Path
    start: Path | None
    teacher: Path | None

    def file(self, settings: Settings, ending: str) -> Path:
        return self.out / f"{settings.name}{ending}"


# --- Data -------------------------------------------------------------------------------------------------------------


class Images:
    """A dataset in memory as uint8, normalised and augmented a batch at a time.

    CIFAR-10 is flipped and cropped, by a view's own seed: an epoch has the view `epoch % views`, so that a teacher need
    see each view of an image only once, whatever is trained with it.
    """

    def __init__(self, data: datasets.Dataset, seed: int, views: int) -> None:
        self.name = data.name
        self.seed = seed
        self.augment = data.name == "cifar10"
        self.views = views if self.augment else 1
        self.train, self.labels = torch.tensor(data.train_images), torch.tensor(data.train_labels)
        self.test, self.test_labels = torch.tensor(data.test_images), torch.tensor(data.test_labels)
        values = data.train_images[::10].astype(np.float32)
        self.mean = torch.from_numpy(values.mean((0, 2, 3), keepdims=True))
        self.deviation = torch.from_numpy(values.std((0, 2, 3), keepdims=True))
        if self.augment:
            height, width = self.train.shape[2:]
            padded = F.pad(self.train, [CROP] * 4)
            # Every crop as a view, [N,C,2·CROP+1,2·CROP+1,H,W], of which a batch picks one an image.
            self._crops = padded.unfold(2, height, 1).unfold(3, width, 1)

    def __len__(self) -> int:
        return len(self.train)

    def check_fits(self, network: str) -> None:
        """Raises UsageError for a network of images of another size."""
        wanted, found = list(zoo.architecture(network).image), list(self.train.shape[1:])
        if wanted != found:
            raise UsageError(f"{network} takes images of {wanted}; {self.name}'s are {found}")

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 → float32 of mean 0 and deviation 1 by channel."""
        return (images - self.mean) / self.deviation

    def view(self, number: int, rows: Tensor) -> Tensor:
        """The rows of one view of the training images, float32."""
        if not self.augment:
            return self.normalised(self.train[rows])
        drawn = torch.Generator().manual_seed(1000 * self.seed + number)
        y, x = torch.randint(2 * CROP + 1, (2, len(self)), generator=drawn)
        flipped = torch.rand(len(self), generator=drawn)[rows] < 0.5
        images = self._crops[rows, :, y[rows], x[rows]]
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return self.normalised(images).contiguous(memory_format=torch.channels_last)

    def batches(self, epoch: int, size: int) -> list[Tensor]:
        """The rows of an epoch's batches, of which each is whole."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
        return list(order[: len(self) // size * size].split(size))


# --- Model ------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a Trainer saved. Raises UsageError for a file that is not there, HorqError for any other file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise HorqError(f"{path}: found no checkpoint of this script ({type(error).__name__})") from error
    if not isinstance(found, dict) or not {"settings", "epoch", "model", "optimiser", "history"} <= found.keys():
        raise HorqError(f"{path}: found no checkpoint of this script; accepted: a .pt file that it wrote")
    return found


def restored(path: Path, network: str) -> nn.Module:
    """The model of a checkpoint. Raises UsageError for one of another network."""
    found = read_checkpoint(path)
    settings = found["settings"]
    if settings["network"] != network:
        raise UsageError(f"{path}: found a checkpoint of {settings['network']}; accepted: one of {network}")
    model = zoo.build(network, settings["order"], settings["scale"])
    model.load_state_dict(found["model"])
    return model


def network_of(settings: Settings) -> nn.Module:
    """The network that the settings name, untrained. Raises UsageError for one that there is not."""
    return zoo.build(settings.network, settings.order, settings.scale, ste=settings.ste, beta=settings.beta)


def accuracy(model: nn.Module, data: Images, images: int) -> float:
    """The share of the first so many test images that the model in eval mode gets right."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for rows in torch.arange(images).split(250):
            scores = model(data.normalised(data.test[rows]))
            right += int((scores.argmax(1) == data.test_labels[rows]).sum())
    return right / images


def estimate_norms(model: nn.Module, data: Images, batch: int) -> None:
    """Mean and variance of every batch normalisation anew, over training images and with the weights as they are now.

    The running ones lag behind signs that flip until the last step. All else is in eval mode, as it will be used.
    """
    model.eval()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
        norm.train()
    with torch.no_grad():
        for rows in data.batches(0, batch)[: max(1, NORM_IMAGES // batch)]:
            model(data.view(0, rows))
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


class Normalise(nn.Module):
    """Pixels float32 [N,C,H,W], 0 to 255, to what the network was trained on."""

    def __init__(self, data: Images) -> None:
        super().__init__()
        self.register_buffer("mean", data.mean)
        self.register_buffer("scale", 1 / data.deviation)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) * self.scale


def of_pixels(model: nn.Module, data: Images) -> nn.Module:
    """The network as it is shipped, with the normalisation in it; its layers keep their names."""
    return nn.Sequential(OrderedDict(normalise=Normalise(data), **dict(model.named_children()))).eval()


class Teacher:
    """The logits of a float network on each view of the training images, computed once and kept in files."""

    def __init__(self, path: Path, network: str, data: Images, folder: Path, bf16: bool) -> None:
        self.model, self._data, self._bf16 = restored(path, network).eval(), data, bf16
        self.model.to(memory_format=torch.channels_last)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        kind = "-bf16" if bf16 else ""
        self._file = lambda view: folder / f"teacher-{digest}-seed{data.seed}-view{view}{kind}.npy"

    def logits(self, view: int) -> Tensor:
        """float32 [N, classes]."""
        path = self._file(view)
        if not path.exists():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                rows = torch.arange(len(self._data)).split(250)
                found = torch.cat([self.model(self._data.view(view, part)) for part in rows])
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, found.half().numpy())
        return torch.from_numpy(np.load(path)).float()


# --- Training ---------------------------------------------------------------------------------------------------------


def optimiser_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, whose decay is on weights alone: not on biases, slopes and scales."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate)


def rate_at(progress: float) -> float:
    """The factor on the rate at that share of all steps: linear warm-up, then half a cosine to 0."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def loss_of(scores: Tensor, labels: Tensor, taught: Tensor | None, soft: float) -> Tensor:
    """Cross entropy, mixed with the teacher's by `soft` (Hinton et al. 2015, softened by TEMPERATURE)."""
    hard = F.cross_entropy(scores, labels)
    if taught is None:
        return hard
    wanted = F.log_softmax(taught / TEMPERATURE, 1)
    given = F.log_softmax(scores / TEMPERATURE, 1)
    distance = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return (1 - soft) * hard + soft * TEMPERATURE**2 * distance


def _one_graph(model: nn.Module) -> nn.Module:
    """The model compiled whole; what PyTorch cannot trace is an error rather than slow."""
    compiled: nn.Module = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


class Trainer:
    """One run from its settings to its files; `epochs` may be left at any time and comes back to the last whole one."""

    def __init__(self, settings: Settings, places: Places, data: Images) -> None:
        self.settings, self.places, self.data = settings, places, data
        torch.manual_seed(settings.seed)
        # oneDNN's convolutions take channels last: from any other layout they copy in and out.
        self.model = network_of(settings).to(memory_format=torch.channels_last)
        self._trained: nn.Module = self.model
        self.history: list[dict[str, float]] = []
        self._checkpoint = places.file(settings, ".pt")
        self.teacher = places.teacher and Teacher(places.teacher, settings.network, data, places.out, settings.bf16)
        if places.start and not self._checkpoint.exists():
            # All but β where the orders differ, which the first batch fits anew.
            warm_start(self.model, restored(places.start, settings.network).state_dict())
        self.optimiser = optimiser_of(self.model, settings)
        if self._checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        found = read_checkpoint(self._checkpoint)
        for field in dataclasses.fields(Settings):
            kept = found["settings"].get(field.name, None if field.default is dataclasses.MISSING else field.default)
            if kept != (value := getattr(self.settings, field.name)):
                raise UsageError(
                    f"{self._checkpoint}: found a run with {field.name}={kept!r}, wanted {value!r}; "
                    "remove it or name another --out"
                )
        self.model.load_state_dict(found["model"])
        self.optimiser.load_state_dict(found["optimiser"])
        self.history = found["history"]
        if self.settings.compile:
            self._trained = _one_graph(self.model)

    def epochs(self, advance: Any) -> Iterator[dict[str, float]]:
        """The epochs that are left; each yields its record once it is on disk."""
        for epoch in range(len(self.history), self.settings.epochs):
            # β stands still in the last tenth, at least in the last epoch of several: what follows adapts to it.
            if self.settings.epochs > 1 and epoch >= min(self.settings.epochs - 1, 0.9 * self.settings.epochs):
                freeze_scales(self.model)
            began = time.perf_counter()
            loss = self._epoch(epoch, advance)
            seconds = time.perf_counter() - began
            images = min(GLIMPSED_IMAGES, len(self.data.test))
            if epoch == self.settings.epochs - 1:
                estimate_norms(self.model, self.data, self.settings.batch)
                images = len(self.data.test)
            right = accuracy(self.model, self.data, images)
            self.history.append(
                {"epoch": epoch + 1, "loss": loss, "accuracy": right, "test_images": images, "seconds": seconds}
            )
            self._save()
            yield self.history[-1]

    def _epoch(self, epoch: int, advance: Any) -> float:
        """Train on one view of all images; the mean loss. Raises HorqError where it is not finite."""
        settings, view = self.settings, epoch % self.data.views
        taught = self.teacher.logits(view) if self.teacher else None
        batches, total = self.data.batches(epoch, settings.batch), 0.0
        self.model.train()
        for step, rows in enumerate(batches):
            progress = (epoch + step / len(batches)) / settings.epochs
            for group in self.optimiser.param_groups:
                group["lr"] = settings.rate * rate_at(progress)
                group["weight_decay"] = group["weight_decay"] if progress < DECAY_UNTIL else 0.0
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                scores = self._trained(self.data.view(view, rows))
            soft = None if taught is None else taught[rows]
            loss = loss_of(scores.float(), self.data.labels[rows], soft, settings.soft)
            if not torch.isfinite(loss):
                raise HorqError(f"{settings.name}: the loss is {loss.item()} in epoch {epoch + 1}; try a lower --rate")
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            total += loss.item()
            if settings.compile and self._trained is self.model:
                # Not before the first step, which fits β: from there on nothing in a step depends on values.
                self._trained = _one_graph(self.model)
            advance()
        return total / len(batches)

    def _save(self) -> None:
        with replacing(self._checkpoint) as partial:
            torch.save(
                {
                    "settings": dataclasses.asdict(self.settings),
                    "epoch": len(self.history),
                    "model": self.model.state_dict(),
                    "optimiser": self.optimiser.state_dict(),
                    "history": self.history,
                },
                partial,
            )

    def finish(self) -> dict[str, Any]:
        """Export, measure, and write the JSON, which says that the run is complete; returns it."""
        example = self.data.test[:1].float()
        path = self.places.file(self.settings, ".onnx")
        model = to_onnx(of_pixels(self.model, self.data), example, path, ["image"], ["scores"], dynamic_batch=True)
        with replacing(path) as partial:
            partial.write_bytes(pack_signs(model).SerializeToString(deterministic=True))
        if self.teacher:
            twin = self.places.out / f"teacher-{path.name}"
            to_onnx(of_pixels(self.teacher.model, self.data), example, twin, ["image"], ["scores"], dynamic_batch=True)
        result = self.result()
        with replacing(self.places.file(self.settings, ".json")) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def result(self) -> dict[str, Any]:
        seconds = sum(record["seconds"] for record in self.history)
        batch = self.data.normalised(self.data.test[:MEASURED_IMAGES])
        errors = quantisation_error(self.model, batch) if isinstance(self.settings.order, int) else ()
        return {
            **dataclasses.asdict(self.settings),
            "label": self.settings.label,
            "accuracy": self.history[-1]["accuracy"],
            "history": self.history,
            "seconds": seconds,
            "images_per_second": self.settings.epochs * len(self.data) / seconds,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": [dataclasses.asdict(error) for error in errors],
            "approximation": approximation(self.model, batch[:APPROXIMATED_IMAGES]),
            "command": self.settings.command,
            "hardware": hardware(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


@torch.no_grad()
def approximation(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """‖X − X̂‖²/‖X‖² of the float activations before binary weights, for every order and scale; means over the layers.

    The orders are compared on the same X here, which those that were trained each on its own cannot be. `static` scales
    are fitted to the images.
    """
    inputs: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, (zoo.BinaryWeightConv2d, zoo.BinaryWeightLinear))]
    hooks = [m.register_forward_pre_hook(lambda m, x: inputs.append((m, x[0].clone()))) for m in layers]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return [
        {"order": order, "scale": scale, "error": float(np.mean([lost(m, x, order, scale) for m, x in inputs]))}
        for scale in SCALES
        for order in range(1, MAX_ORDER + 1)
        if inputs
    ]


def lost(layer: nn.Module, x: Tensor, order: int, scale: Scale) -> float:
    """‖X − X̂‖²/‖X‖² of a layer's input; with `patch`, X is all its windows."""
    axes = tuple(range(1, x.dim()))
    if scale == "patch":
        axes = (-1,)
        if isinstance(layer, nn.Conv2d):
            padding = (*layer.padding, *layer.padding)
            x, axes = im2col(x, layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups), (2,)
    if scale == "static":
        beta = fitted_scales(x, order).reshape(-1, *[1] * x.dim())
    else:
        beta = residual_scales(x, order, axes)
    return float((x - quantise(x, beta)).square().sum() / x.square().sum())


def hardware() -> str:
    """The processor's name, its cores, and how many threads train."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"


# --- Command line -----------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=list(datasets.SOURCES))
    add("network", help=f"{', '.join(zoo.NETWORKS)}; its images must be those of the dataset")
    add("--order", default="2", help="K, 1 to 8; bw: binary weights, float activations; float (default: 2)")
    add("--scale", default="static", help="patch, sample or static (default: static)")
    add("--ste", default="residual", help=f"straight-through estimator: {', '.join(STES)} (default: residual)")
    add("--beta", default="learned", help="how static scales go on: learned or running (default: learned)")
    add("--epochs", type=int, default=10, help="passes over the training images in all (default: 10)")
    add("--seed", type=int, default=0, help="of weights, batches and augmentation (default: 0)")
    add("--out", type=Path, default=Path("runs"), help="folder of checkpoints and results (default: runs)")
    add("--data", type=Path, help="folder with the dataset's files (default: fetched once into the cache)")
    add("--start", type=Path, help="checkpoint of the same network of another order to start from")
    add("--teacher", type=Path, help="checkpoint of the float network to learn from")
    add("--tag", default="", help="end of the results' names, where one network is trained in two ways")
    add("--soft", type=float, default=0.5, help="weight of the teacher against the labels (default: 0.5)")
    add("--batch", type=int, default=128, help="images a step (default: 128)")
    add("--rate", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
    add("--decay", type=float, default=1e-2, help="weight decay, 0 in the last quarter (default: 0.01)")
    add("--views", type=int, default=8, help="augmented views of an image before they repeat (default: 8)")
    add("--bf16", action="store_true", help="autocast convolutions to bfloat16 in training, and the teacher's")
    add("--compile", action="store_true", help="fuse what lies between convolutions (torch.compile; needs g++)")
    add("--threads", type=int, default=os.cpu_count(), help="of PyTorch (default: all cores)")
    return parser.parse_args(argv)


def settings_of(given: argparse.Namespace) -> Settings:
    """Raises UsageError for a number that is out of its range."""
    for name, least in (("epochs", 1), ("batch", 2), ("views", 1), ("threads", 1)):
        if getattr(given, name) < least:
            raise UsageError(f"--{name} {getattr(given, name)}; accepted: {least} or more")
    order = int(given.order) if given.order.lstrip("-").isdigit() else given.order
    if given.compile and isinstance(order, int) and (given.scale == "patch" or given.beta == "running"):
        raise UsageError(
            f"--compile with --scale {given.scale} --beta {given.beta}; accepted: static with a learned beta, sample"
        )
    return Settings(
        **{f.name: getattr(given, f.name) for f in dataclasses.fields(Settings) if f.name not in FILES_AND_ORDER},
        order=order,
        # By name: a moved folder does not make another run.
        start=given.start and given.start.name,
        teacher=given.teacher and given.teacher.name,
    )


FILES_AND_ORDER = ("order", "start", "teacher")


def run(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train what `given` says, or finish it; the result that NAME.json holds."""
    settings = settings_of(given)
    network_of(settings)  # mistakes are told before data are fetched
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    data = Images(datasets.load(settings.dataset, given.data), settings.seed, settings.views)
    data.check_fits(settings.network)
    if settings.batch > len(data):
        raise UsageError(f"--batch {settings.batch}; accepted: at most the {len(data)} training images")
    trainer = Trainer(settings, Places(given.out, given.start, given.teacher), data)
    steps = len(data) // settings.batch
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        done = len(trainer.history) * steps
        task = progress.add_task(settings.name, total=settings.epochs * steps, completed=done)
        for record in trainer.epochs(lambda: progress.advance(task)):
            seconds, images = record["seconds"], record["test_images"]
            console.print(
                f"{settings.name} epoch {record['epoch']}/{settings.epochs}: loss {record['loss']:.4f}, "
                f"{record['accuracy']:.2%} of {images} right, {seconds:.0f} s ({len(data) / seconds:.0f} images/s)"
            )
    return trainer.finish()


def main() -> int:
    given = arguments()
    try:
        result = run(given, Console())
    except HorqError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{given.out}: {result['label']} {result['accuracy']:.2%} on all test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())

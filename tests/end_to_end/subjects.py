"""Networks that are run whole on machines that are not this one (ARM under qemu, cards on PoCL), and real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_images

from examples import digits as digits_example
from horq_tvm import zoo
from horq_tvm.export import to_onnx
from horq_tvm.specs import Scale
from tests.end_to_end.taps import Array
from tests.networks import cifar_images, cifar_resnet

Maker = Callable[[Path], tuple[Path, Array]]
"""Writes a network's ONNX file (input `image`, output `scores`) into a folder: the path, and images for it."""

FLATTENED = {("mnist-k2", "dense"): (64, 6, 6)}
"""The [C,H,W] whose flattening the layer reads: a library has its rows in the order H, W, C."""

IMAGES = 32
PRETRAINED = Path(__file__).resolve().parents[2] / "examples" / "pretrained"


def digits(count: int) -> Array:
    """Scanned digits, of ten writers, at MNIST's size: float32 [count,1,28,28] from 0 to 255."""
    images = torch.from_numpy(load_digits().images[:count, None].astype("float32") * (255 / 16))
    inner = torch.nn.functional.interpolate(images, size=(20, 20), mode="bilinear")
    return torch.nn.functional.pad(inner, (4, 4, 4, 4)).numpy()


def photos(count: int) -> Array:
    """Pieces of two photos at CIFAR's size: float32 [count,3,32,32] from 0 to 255."""
    pieces = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(photo.astype("float32")).permute(2, 0, 1)[None, :, :416, :640]
        small = torch.nn.functional.avg_pool2d(whole, 2)
        tiles = small.unfold(2, 32, 64).unfold(3, 32, 64).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
        pieces.append(tiles[: (count + 1) // 2])
    return torch.cat(pieces)[:count].numpy()


def trained_file(model: str) -> Maker:
    """One of the trained networks, on real images."""
    images = digits if model.startswith("mnist") else photos
    return lambda _folder: (PRETRAINED / f"{model}.onnx", images(IMAGES))


def digits_network(folder: Path) -> tuple[Path, Array]:
    """examples/digits.py's network after an epoch, on scans that it was not trained on."""
    data = digits_example.digits(seed=0)
    torch.manual_seed(0)
    network = digits_example.network(2)
    digits_example.train(network, data, 1, lambda: None)
    to_onnx(network, data.test_images[:1], folder / "digits.onnx", ["image"], ["scores"], dynamic_batch=True)
    return folder / "digits.onnx", data.test_images[:IMAGES].numpy()


def cifar(order: int, scale: Scale, images: int, folder: Path) -> tuple[Path, Array]:
    """Groups and strides, and an affine ahead of each binarisation."""
    x = cifar_images(images, seed=5)
    to_onnx(cifar_resnet(order, scale), x, folder / "cifar.onnx", ["image"], ["scores"])
    return folder / "cifar.onnx", x.numpy()


def resnet18(order: int, size: int, folder: Path) -> tuple[Path, Array]:
    """Untrained, its statistics and β those of two photos, a head that tells them apart."""
    torch.manual_seed(0)
    network = zoo.build("resnet18", order=order)
    shots = [torch.from_numpy(photo[:, :427].astype("float32")) for photo in load_sample_images().images]
    x = torch.nn.functional.interpolate(torch.stack(shots).permute(0, 3, 1, 2), size=(size, size), mode="area")
    x = (x - x.mean()) / x.std()
    with torch.no_grad():
        network.train()(x)
        network.eval().head.bias -= network(x).mean(0)
    to_onnx(network, x, folder / "resnet18.onnx", ["image"], ["scores"])
    return folder / "resnet18.onnx", x.numpy()

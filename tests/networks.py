"""Small networks that several tests compile, export and compare: seeded, untrained, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from horq_tvm import reference
from horq_tvm.nn import HorqConv2d, HorqLayer

Convolution = Callable[..., nn.Module]


class Block(nn.Module):
    """PReLU(BN(conv(BN(x))) + shortcut(x)): what a HORQ conv binarises is signed, and every one has its shortcut."""

    def __init__(self, conv: Convolution, channels: int, filters: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = conv(channels, filters, 3, stride, 1, groups=groups)
        self.bn2 = nn.BatchNorm2d(filters)
        self.act = nn.PReLU(filters)
        self.shortcut = (
            nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters))
            if stride > 1 or channels != filters
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv(self.bn1(x))) + self.shortcut(x))


class CifarResNet(nn.Module):
    """float32 [N,3,32,32] → [N,10]: float stem and head, five blocks of 16, 32 and 48 channels, one of them grouped."""

    def __init__(self, conv: Convolution) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(Block(conv, 16, 16, 1), Block(conv, 16, 16, 1, groups=2))
        self.layer2 = nn.Sequential(Block(conv, 16, 32, 2), Block(conv, 32, 32, 1))
        self.layer3 = nn.Sequential(Block(conv, 32, 48, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(self.pool(x).flatten(1))


# The HORQ layers of `cifar_resnet`, in order; the twin's convolutions of the same names are float.
HORQ_LAYERS: Sequence[str] = (
    "layer1.0.conv",
    "layer1.1.conv",
    "layer2.0.conv",
    "layer2.1.conv",
    "layer3.0.conv",
)


def binary_weight(layer: HorqLayer) -> tuple[np.ndarray, np.ndarray]:
    """B and α of a layer's latent weights, by the reference: int8 of the weight's shape and float32 [F]."""
    weight = layer.weight.detach().numpy()
    if layer.options.balance:
        means = weight.mean(axis=tuple(range(1, weight.ndim)), keepdims=True, dtype=np.float64)
        weight = weight - means.astype(np.float32)
    return reference.binarize_weights(weight)


def cifar_resnet(order: int = 2, scale: str = "sample", seed: int = 0) -> nn.Module:
    """A CIFAR-shaped ResNet in HORQ form, float32 [N,3,32,32] → [N,10], in eval mode."""

    def conv(*args: int, groups: int = 1) -> nn.Module:
        return HorqConv2d(*args, groups=groups, order=order, scale=scale)

    return _settled(lambda: CifarResNet(conv), seed)


def cifar_resnet_float(seed: int = 0) -> nn.Module:
    """The float twin of `cifar_resnet`: the same topology and layer names with `nn.Conv2d`."""

    def conv(*args: int, groups: int = 1) -> nn.Module:
        return nn.Conv2d(*args, groups=groups, bias=False)

    return _settled(lambda: CifarResNet(conv), seed)


def cifar_images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images, float32 [count,3,32,32]: noise alone would average out before the head."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def _settled(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network with affines that matter, and with the statistics (and β) that seeded images give it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.momentum = None  # the plain mean of what it sees
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, 0.0, 0.5)
        with torch.no_grad():
            model.train()(cifar_images(16, seed + 1))
    return model.eval()

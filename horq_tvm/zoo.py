"""Architectures that binary networks really use, in HORQ form: `zoo.build("resnet20", order=2, scale="static")`.

The order says what a network's inner convolutions are: an int K, K planes of activations and binary weights; "bw",
binary weights and float activations, the limit K → ∞, which parts what activations cost from what weights cost; or
"float", the twin that both are measured against. All three have the same topology and the same nonlinearities, which
are PReLUs: the quantiser alone comes and goes.

The residual networks' block is x + PReLU(conv(BN(x))) with a shortcut around every convolution (Liu et al. 2018,
"Bi-Real Net") and a PReLU behind it (Martinez et al. 2020, "Training binary neural networks with real-to-binary
convolutions"): what is quantised is a normalised, signed value, and the shortcut carries the float one past it. First
and last layers, and the 1×1 convolutions that widen a shortcut, stay float as is customary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horq_tvm.errors import UsageError
from horq_tvm.nn import HorqConv2d, HorqLinear, PReLU
from horq_tvm.nn.options import Beta, HorqOptions, Ste
from horq_tvm.nn.quantise import BinaryWeight, balanced
from horq_tvm.specs import Scale
from horq_tvm.torch_ops import filter_scales

Order = int | Literal["float", "bw"]


def _binary(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """α·B of the layer's latent weights; with gradients in training, in operators that export in eval."""
    if not layer.training:
        weight = balanced(layer.weight)
        alpha = filter_scales(weight).reshape(-1, *[1] * (weight.dim() - 1))
        return torch.where(weight >= 0, alpha, -alpha)
    with torch.autocast(layer.weight.device.type, enabled=False):
        return BinaryWeight.apply(layer.weight, True)


class BinaryWeightConv2d(nn.Conv2d):
    """A convolution with α·B for its weights, those of a HORQ layer, and with float activations."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _binary(self), self.bias)


class BinaryWeightLinear(nn.Linear):
    """A dense layer with α·B for its weights, those of a HORQ layer, and with float activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _binary(self), self.bias)


@dataclass(frozen=True)
class Layers:
    """The inner layers of a network of one order; the options of HORQ layers mean nothing to the others.

    Raises UsageError for an order, scale, `ste` or `beta` that there is not.
    """

    order: Order
    scale: Scale = "static"
    ste: Ste = "residual"
    beta: Beta = "learned"

    def __post_init__(self) -> None:
        if isinstance(self.order, int):
            HorqOptions(self.order, self.scale, self.ste, self.beta, True)
        elif self.order not in ("float", "bw"):
            raise UsageError(f"order {self.order!r}; accepted: an int, 'float' or 'bw'")

    @property
    def _options(self) -> dict[str, Any]:
        return {"order": self.order, "scale": self.scale, "ste": self.ste, "beta": self.beta}

    def conv(self, channels: int, filters: int, kernel: int, **window: Any) -> nn.Module:
        """A convolution without bias; `window` is its stride and padding."""
        if isinstance(self.order, int):
            return HorqConv2d(channels, filters, kernel, **window, **self._options)
        kind = BinaryWeightConv2d if self.order == "bw" else nn.Conv2d
        return kind(channels, filters, kernel, **window, bias=False)

    def linear(self, features: int, filters: int) -> nn.Module:
        """A dense layer without bias."""
        if isinstance(self.order, int):
            return HorqLinear(features, filters, bias=False, **self._options)
        kind = BinaryWeightLinear if self.order == "bw" else nn.Linear
        return kind(features, filters, bias=False)


class Block(nn.Module):
    """shortcut(x) + PReLU(conv3×3(BN(x))); a shortcut that narrows the image or widens it is a pool and a float 1×1."""

    def __init__(self, layers: Layers, channels: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = layers.conv(channels, filters, 3, stride=stride, padding=1)
        self.act = PReLU(filters)
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        widen = nn.Sequential(nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters))
        self.shortcut = pool if channels == filters else nn.Sequential(pool, *widen)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.act(self.conv(self.norm(x)))


def _named(**layers: nn.Module) -> nn.Sequential:
    """The layers one behind the other, by the names that plans and reports then call them."""
    return nn.Sequential(OrderedDict(layers))


def _stem(channels: int, filters: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False)
    return _named(conv=conv, norm=nn.BatchNorm2d(filters), act=nn.ReLU())


def _stages(layers: Layers, widths: tuple[int, ...], convolutions: int) -> dict[str, nn.Module]:
    """layer1, layer2, ... of so many blocks each, of which all but the first halve the image at their start."""
    stages: dict[str, nn.Module] = {}
    for stage, filters in enumerate(widths):
        first = Block(layers, widths[max(0, stage - 1)], filters, 2 if stage else 1)
        rest = (Block(layers, filters, filters) for _ in range(convolutions - 1))
        stages[f"layer{stage + 1}"] = nn.Sequential(first, *rest)
    return stages


def _classifier(channels: int, classes: int) -> dict[str, nn.Module]:
    """BN, ReLU, the mean over the image, and a float dense layer: [N,C,H,W] → [N,classes]."""
    return {
        "norm": nn.BatchNorm2d(channels),
        "act": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(channels, classes),
    }


def mnist(layers: Layers, classes: int = 10) -> nn.Module:
    """[N,1,28,28] → [N,10]: float 5×5 stem, HORQ 3×3 convolution and dense layer, float head.

    What Li et al. 2017 trained on MNIST is not told in layers. This is LeNet-5's shape with strides for its pools and
    widths that fill words of 32 bits.
    """
    return _named(
        stem=nn.Conv2d(1, 32, 5, 2, bias=False),
        norm1=nn.BatchNorm2d(32),
        conv=layers.conv(32, 64, 3, stride=2, padding=1),
        act1=PReLU(64),
        flatten=nn.Flatten(),
        norm2=nn.BatchNorm1d(64 * 6 * 6),
        dense=layers.linear(64 * 6 * 6, 256),
        act2=PReLU(256),
        norm3=nn.BatchNorm1d(256),
        head=nn.Linear(256, classes),
    )


def vgg_small(layers: Layers, classes: int = 10) -> nn.Module:
    """[N,3,32,32] → [N,10]: convolutions of 2×128, 2×256 and 2×512 filters, the first float (LQ-Net); no shortcuts."""
    body: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 128, 3, padding=1, bias=False), "act1": PReLU(128)}
    channels = 128
    for i, (filters, pool) in enumerate(((128, True), (256, False), (256, True), (512, False), (512, True)), start=2):
        body[f"norm{i}"] = nn.BatchNorm2d(channels)
        body[f"conv{i}"] = layers.conv(channels, filters, 3, padding=1)
        body[f"act{i}"] = PReLU(filters)
        if pool:
            body[f"pool{i}"] = nn.MaxPool2d(2)
        channels = filters
    return _named(**body, norm=nn.BatchNorm2d(512), flatten=nn.Flatten(), head=nn.Linear(512 * 4 * 4, classes))


def resnet20(layers: Layers, classes: int = 10) -> nn.Module:
    """[N,3,32,32] → [N,10]: 18 convolutions of 16, 32 and 64 channels (He et al. 2016), a shortcut around each."""
    return _named(stem=_stem(3, 16, 3), **_stages(layers, (16, 32, 64), 6), **_classifier(64, classes))


def resnet10(layers: Layers, classes: int = 10) -> nn.Module:
    """[N,3,32,32] → [N,10]: 8 convolutions of 32, 64, 128 and 192 channels, a shortcut around each.

    Less than half as deep as `resnet20` and twice as wide and more, for about as long a training step (58 against 41
    million multiplications an image, but fewer values between them). docs/accuracy.md has both.
    """
    return _named(stem=_stem(3, 32, 3), **_stages(layers, (32, 64, 128, 192), 2), **_classifier(192, classes))


def resnet18(layers: Layers, classes: int = 1000) -> nn.Module:
    """[N,3,224,224] → [N,1000]: 16 convolutions of 64 to 512 channels (He et al. 2016), a shortcut around each."""
    stem = {"stem": _stem(3, 64, 7, 2), "maxpool": nn.MaxPool2d(3, 2, 1)}
    return _named(**stem, **_stages(layers, (64, 128, 256, 512), 4), **_classifier(512, classes))


def quicknet(layers: Layers, classes: int = 1000) -> nn.Module:
    """[N,3,224,224] → [N,1000]: after Larq's QuickNet (Bannink et al. 2021), with the block of the other networks.

    The stem reduces the image by 4 at little cost (3×3 to 8 channels, depthwise, 1×1); between sections of four blocks
    a max pool and a 1×1 float convolution take the place of Larq's blur pool.
    """
    reduce = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
    body: dict[str, nn.Module] = {"stem": _stem(3, 8, 3, 2), "reduce": reduce, "norm1": nn.BatchNorm2d(8)}
    channels = 8
    for i, width in enumerate((64, 128, 256, 512), start=1):
        body[f"transition{i}"] = _transition(channels, width, pool=i > 1)
        body[f"section{i}"] = nn.Sequential(*(Block(layers, width, width) for _ in range(4)))
        channels = width
    return _named(**body, **_classifier(512, classes))


def _transition(channels: int, filters: int, pool: bool) -> nn.Sequential:
    widen = {"conv": nn.Conv2d(channels, filters, 1, bias=False), "norm": nn.BatchNorm2d(filters)}
    return _named(act=nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1), **widen) if pool else _named(**widen)


@dataclass(frozen=True)
class Architecture:
    """How a network is made, what one image of it is, [C,H,W], and its classes."""

    make: Callable[[Layers, int], nn.Module]
    image: tuple[int, int, int]
    classes: int


NETWORKS = {
    "mnist": Architecture(mnist, (1, 28, 28), 10),
    "vgg_small": Architecture(vgg_small, (3, 32, 32), 10),
    "resnet20": Architecture(resnet20, (3, 32, 32), 10),
    "resnet10": Architecture(resnet10, (3, 32, 32), 10),
    "resnet18": Architecture(resnet18, (3, 224, 224), 1000),
    "quicknet": Architecture(quicknet, (3, 224, 224), 1000),
}


def architecture(network: str) -> Architecture:
    """The network of that name. Raises UsageError that lists those there are."""
    if network not in NETWORKS:
        raise UsageError(f"network {network!r}; accepted: {', '.join(NETWORKS)}")
    return NETWORKS[network]


def build(
    network: str,
    order: Order,
    scale: Scale = "static",
    classes: int | None = None,
    *,
    ste: Ste = "residual",
    beta: Beta = "learned",
) -> nn.Module:
    """A network of NETWORKS, untrained: order 1 to 8 with its scale, "bw" or "float", which have none.

    `ste` and `beta` are how HORQ layers train: see `horq_tvm.nn.HorqConv2d`.

    Raises:
        UsageError: a network, order, scale, `ste` or `beta` that there is not.
    """
    found = architecture(network)
    return found.make(Layers(order, scale, ste, beta), classes or found.classes)


def example(network: str, images: int = 1) -> Tensor:
    """Seeded normal images float32 [N,C,H,W] of the size that the network takes, for exports and benchmarks."""
    return torch.randn(images, *architecture(network).image, generator=torch.Generator().manual_seed(0))

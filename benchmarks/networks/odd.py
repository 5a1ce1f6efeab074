"""A MobileNet-like network whose channel counts no vector divides: what no schedule was fitted to."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from horq_tvm.nn import PReLU
from horq_tvm.zoo import Architecture, Layers

NAME = "mobilenet_odd"
IMAGE_SIZE = 112
STEM = 21
EXPANSION = 3
LAST = 453
# (blocks, stride of the first, filters); MobileNetV2's shape (Sandler et al. 2018), its widths made odd
STAGES = ((1, 1, 21), (2, 2, 27), (3, 2, 45), (3, 2, 87), (2, 1, 111), (2, 2, 150))


class InvertedResidual(nn.Module):
    """x + project(depthwise(expand(x))), the two 1×1 convolutions in HORQ form behind a BN; x where shapes allow it."""

    def __init__(self, layers: Layers, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        wide = EXPANSION * inputs
        self.adds = stride == 1 and inputs == filters
        self.body = nn.Sequential(
            OrderedDict(
                norm1=nn.BatchNorm2d(inputs),
                expand=layers.conv(inputs, wide, 1),
                act1=PReLU(wide),
                depthwise=nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
                act2=PReLU(wide),
                norm2=nn.BatchNorm2d(wide),
                project=layers.conv(wide, filters, 1),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return x + y if self.adds else y


def mobilenet_odd(layers: Layers, classes: int = 1000) -> nn.Module:
    """[N,3,112,112] → [N,1000]: a float 3×3 stem, 13 inverted residuals, a HORQ 1×1 convolution, float dense head."""
    blocks: list[nn.Module] = []
    inputs = STEM
    for count, stride, filters in STAGES:
        for i in range(count):
            blocks.append(InvertedResidual(layers, inputs, filters, 1 if i else stride))
            inputs = filters
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, STEM, 3, 2, 1, bias=False),
            act=PReLU(STEM),
            blocks=nn.Sequential(*blocks),
            norm=nn.BatchNorm2d(inputs),
            last=layers.conv(inputs, LAST, 1),
            act_last=PReLU(LAST),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(LAST, classes),
        )
    )


ARCHITECTURE = Architecture(mobilenet_odd, (3, IMAGE_SIZE, IMAGE_SIZE), 1000)

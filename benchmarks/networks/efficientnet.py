"""EfficientNet-Lite0 as a PyTorch module whose parameters are named as the published state dict names them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

IMAGE_SIZE = 224
MEAN, DEVIATION = 127.0, 128.0  # of all channels: what the network reads is (pixel − MEAN) / DEVIATION
EPSILON = 1e-3

# (blocks, kernel, stride of the first, expansion, filters), Tan and Le 2019, table 1; Lite has no squeeze-excitation,
# and ReLU6 for swish.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME: as many outputs as ⌈inputs / stride⌉, an odd padding's larger half at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel, _), (stride, _), size = self.kernel_size, self.stride, x.shape[-1]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return super().forward(functional.pad(x, (total // 2, total - total // 2) * 2) if total else x)


class Block(nn.Module):
    """Expand by 1×1, convolve channel by channel, project by 1×1; the input added where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._expand_conv = nn.Conv2d(inputs, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(wide, EPSILON) if expansion > 1 else None
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, EPSILON)
        self._project_conv = nn.Conv2d(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, EPSILON)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """[N,3,224,224], normalised → scores of the 1000 classes of ImageNet [N,1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, EPSILON)
        blocks, inputs = [], 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for i in range(count):
                blocks.append(Block(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, EPSILON)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        scores: torch.Tensor = self._fc(x.mean((2, 3)))
        return scores


class Pixels(nn.Module):
    """uint8 [N,3,H,W] → scores: the network with its normalisation in front of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.network((pixels.to(torch.float32) - MEAN) / DEVIATION)
        return scores


def with_weights(state: Mapping[str, torch.Tensor]) -> EfficientNetLite0:
    """The network in eval mode with a state dict's parameters, every one of which it must have."""
    network = EfficientNetLite0().eval()
    network.load_state_dict(dict(state))
    return network

"""The activations that binary networks use in place of a ReLU: per-channel shifts (ReActNet, Liu et al., ECCV 2020).

Both are elementwise with per-channel constants, so that the compiler folds them into the layer before and the
binarisation behind them: they cost nothing in the library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RSign(nn.Module):
    """x + shift_c, x[N,C,...] → the same: where the signs of the HORQ layer behind it change is learned per channel.

    ReActNet's RSign is sign(x − threshold_c). The sign is the HORQ layer's, so that what is left of it is the shift,
    and with K planes it moves all their thresholds at once. Put it straight before a HORQ layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + _per_channel(self.shift, x)

    def extra_repr(self) -> str:
        return str(self.shift.numel())


class RPReLU(nn.Module):
    """PReLU(x − before_c; slope_c) + after_c, x[N,C,...] → the same: kink and range lie where training puts them."""

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))
        self.after = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x - _per_channel(self.before, x), self.slope) + _per_channel(self.after, x)

    def extra_repr(self) -> str:
        return str(self.slope.numel())


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """value[C] so that it broadcasts against x[N,C,...]."""
    return value.reshape(-1, *[1] * (x.dim() - 2))

"""The activations that binary networks use in place of a ReLU: per-channel slopes and shifts.

All are elementwise with per-channel constants, so that the compiler folds them into the layer before and the
binarisation behind them: they cost nothing in the library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class PReLU(nn.PReLU):
    """`nn.PReLU`, x[N,C,...] with one slope or one a channel, whose backward pass on a CPU is several times faster.

    PyTorch's own takes as long there as that of a 3×3 convolution of 64 channels in bfloat16. Computes in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _prelu(x, self.weight, self.training)


class RSign(nn.Module):
    """x + shift_c, x[N,C,...] → the same: where the signs of the HORQ layer behind it change is learned per channel.

    ReActNet's RSign (Liu et al., ECCV 2020) is sign(x − threshold_c). The sign is the HORQ layer's, so that the shift
    is what is left of it; with K planes it moves all their thresholds at once. Put it straight before a HORQ layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + _per_channel(self.shift, x)

    def extra_repr(self) -> str:
        return str(self.shift.numel())


class RPReLU(nn.Module):
    """PReLU(x − before_c; slope_c) + after_c, x[N,C,...] → the same: kink and range lie where training puts them.

    ReActNet's (Liu et al., ECCV 2020); put it behind a HORQ layer, or behind the sum with its shortcut.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))
        self.after = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = _prelu(x - _per_channel(self.before, x), self.slope, self.training)
        return y + _per_channel(self.after, x)

    def extra_repr(self) -> str:
        return str(self.slope.numel())


def _prelu(x: Tensor, slope: Tensor, training: bool) -> Tensor:
    """PReLU; in eval PyTorch's own operator, which is what exports as one."""
    return _PReLU.apply(x, slope) if training else F.prelu(x, slope)


class _PReLU(torch.autograd.Function):
    """max(x, 0) + slope_c·min(x, 0) of x[N,C,...], float32 inside and in the result, by vectorised operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        x = x.float()
        return x.clamp(max=0).mul_(_per_channel(slope, x)).add_(x.clamp(min=0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        kept, slope = ctx.saved_tensors
        x, factor = kept.float(), _per_channel(slope, kept)
        grad_x = grad_slope = None
        if ctx.needs_input_grad[0]:
            above = (x > 0).to(grad.dtype)
            grad_x = above.mul_(1 - factor).add_(factor).mul_(grad).to(kept.dtype)
        if ctx.needs_input_grad[1]:
            axes = [axis for axis in range(x.dim()) if axis != 1 or slope.numel() == 1]
            grad_slope = x.clamp(max=0).mul_(grad).sum(axes).reshape(slope.shape)
        return grad_x, grad_slope


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """value[C], or [1] for all, so that it broadcasts against x[N,C,...]."""
    return value.reshape(-1, *[1] * (x.dim() - 2))

"""The convolution of `patch` in training, in which every window has scales of its own.

A window's values are quantised by its own β, so that there is no one quantised image to convolve. Instead every window
gets pixels of its own: laid side by side they are an image of HO·kh by WO·kw, over which the convolution goes in steps
of its kernel. It is made some images at a time, so that it stays in the cache: what makes a plain unfold slow is
memory, not arithmetic. Nothing of it is kept for the backward pass but β.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from horq_tvm.nn.options import Ste
from horq_tvm.nn.quantise import passed_through
from horq_tvm.torch_ops import output_size, pad_zeros, sign

# So many values of windows at a time for each thread: 2 MB of float32. With half and with twice as many it is slower.
_CHUNK_VALUES = 1 << 19


@dataclass(frozen=True)
class Window:
    """A convolution's geometry; padding is (top, left, bottom, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def outputs(self, x: Tensor) -> tuple[int, int]:
        """(HO, WO) for x[N,C,H,W]."""
        return output_size(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation)


def patch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, order: int, ste: Ste, window: Window) -> Tensor:
    """x[N,C,H,W] with the float weight α·B [F,C/g,kh,kw] → [N,F,HO,WO], with straight-through gradients.

    float32, or where autocast is on, of its dtype; β and the residuals are float32 in any case.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        y = _PatchConv2d.apply(x.float(), weight, order, ste, window, dtype)
    return y if bias is None else y + bias.reshape(-1, 1, 1).to(y.dtype)


class _PatchConv2d(torch.autograd.Function):
    """Σ over a window of α·B and its own X̂ = Σ β_i·H_i.

    The gradient of α·B is exact. That of X is the one of a convolution with α·B, passed through `ste` with the scales
    that a value has on average over the windows that hold it: one transposed convolution, where each window's own reach
    would take one product a tap. Neighbouring windows share most of their values, and so nearly their scales.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, order: int, ste: Ste, window: Window, dtype: torch.dtype
    ) -> Tensor:
        image = _padded_image(x, window)
        first = _first_scales(image, window)
        betas = first.new_empty((order, *first.shape))
        betas[0] = first
        filters = weight.to(dtype)
        parts = [
            F.conv2d(_quantised(*part, known=1).to(dtype), filters, None, window.kernel, 0, 1, window.groups)
            for part in _chunks(image, betas, window)
        ]
        ctx.save_for_backward(x, weight, betas)
        ctx.ste, ctx.window = ste, window
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, betas = ctx.saved_tensors
        window: Window = ctx.window
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            scales = _mean_scales(betas, x, window)
            grad_x = passed_through(_input_gradient(grad, x, weight, window), x, scales, ctx.ste)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, weight, betas, window)
        return grad_x, grad_weight, None, None, None, None


def _padded_image(x: Tensor, window: Window) -> Tensor:
    """x[N,C,H,W] with its padding as [N,H,W,C], contiguous, without −0.0, whose sign would be taken for −."""
    return (pad_zeros(x, window.padding).permute(0, 2, 3, 1) + 0.0).contiguous()


def _first_scales(image: Tensor, window: Window) -> Tensor:
    """β_1 = mean|X| of every window of a padded image [N,H,W,C], as a box sum: [N,HO,1,WO,1,G,1]."""
    means = image.abs().unflatten(3, (window.groups, -1)).mean(-1).double().permute(0, 3, 1, 2)
    ones = means.new_ones((1, 1, *window.kernel))
    sums = F.conv2d(means.flatten(0, 1)[:, None], ones, None, window.stride, 0, window.dilation)
    by_group = (sums.unflatten(0, means.shape[:2])[:, :, 0] / ones.numel()).float()
    return by_group.permute(0, 2, 3, 1)[:, :, None, :, None, :, None]


def _chunks(image: Tensor, betas: Tensor, window: Window) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some images at a time: the windows and their signs as views [n,HO,kh,WO,kw,G,C/g], and their part of betas."""
    _, _, outputs_down, _, outputs_across, *_ = betas.shape
    channels = image.shape[3]
    (kernel_down, kernel_across), groups = window.kernel, window.groups
    shape = (outputs_down, kernel_down, outputs_across, kernel_across, groups, channels // groups)
    batch, row, column, _ = image.stride()
    (down, across), (spread_down, spread_across) = window.stride, window.dilation
    steps = (batch, row * down, row * spread_down, column * across, column * spread_across, channels // groups, 1)
    count = max(1, _CHUNK_VALUES * torch.get_num_threads() // torch.Size(shape).numel())
    for part, signs, beta in zip(image.split(count), sign(image).split(count), betas.split(count, 1), strict=True):
        yield part.as_strided((len(part), *shape), steps), signs.as_strided((len(part), *shape), steps), beta


def _quantised(windows: Tensor, signs: Tensor, betas: Tensor, known: int) -> Tensor:
    """X̂ of windows [n,HO,kh,WO,kw,G,C/g] with betas[K,n,HO,1,WO,1,G,1], as an image [n,C,HO·kh,WO·kw].

    The first `known` of the betas are read, the others are computed and written.
    """
    total = torch.empty(windows.shape, device=windows.device)
    torch.mul(betas[0], signs, out=total)  # a quarter of copysign's time
    if len(betas) > 1:
        residual, plane = windows - total, torch.empty_like(total)
        for i, scale in enumerate(betas[1:], start=1):
            if i >= known:
                # Over the channels in float32, over the taps in float64: all of it in float64 takes a fifth longer.
                by_tap = torch.abs(residual, out=plane).mean(6, keepdim=True)
                scale.copy_(by_tap.mean((2, 4), keepdim=True, dtype=torch.float64))
            torch.copysign(scale, residual, out=plane)
            total.add_(plane)
            if i < len(betas) - 1:
                residual.sub_(plane)
    return total.flatten(5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, betas: Tensor, window: Window) -> Tensor:
    """Σ g·X̂ over all windows, which are quantised once more."""
    total, start = torch.zeros_like(weight), 0
    for part in _chunks(_padded_image(x, window), betas, window):
        quantised = _quantised(*part, known=len(betas)).to(grad.dtype)
        g = grad[start : start + len(quantised)]
        total += torch.nn.grad.conv2d_weight(quantised, weight.shape, g, window.kernel, 0, 1, window.groups)
        start += len(quantised)
    return total


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """What a float convolution of the padded x with `weight` hands back to x, float32."""
    top, left, bottom, right = window.padding
    shape = (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
    filters = weight.to(grad.dtype)
    padded = torch.nn.grad.conv2d_input(shape, filters, grad, window.stride, 0, window.dilation, window.groups)
    return padded[..., top : top + x.shape[2], left : left + x.shape[3]].float()


def _mean_scales(betas: Tensor, x: Tensor, window: Window) -> Tensor:
    """The scales of a value on average over the windows that hold it: betas[K,N,HO,1,WO,1,G,1] → [K,N,C or 1,H,W]."""
    height, width = x.shape[2:]
    top, left, bottom, right = window.padding
    maps = betas.flatten(2, 3).flatten(3, 4)[..., 0].permute(0, 1, 4, 2, 3)  # [K,N,G,HO,WO]
    ones = betas.new_ones((1, 1, *window.kernel))
    stacked = torch.cat([maps.flatten(0, 2)[:, None], maps.new_ones((1, 1, *maps.shape[3:]))])
    spread = F.conv_transpose2d(stacked, ones, None, window.stride, 0, 0, 1, window.dilation)
    # Rows and columns behind the last window get the zeros that they would have got from it.
    beyond = (top + height + bottom - spread.shape[2], left + width + right - spread.shape[3])
    spread = F.pad(spread, (0, beyond[1], 0, beyond[0]))[:, 0, top : top + height, left : left + width]
    # Where no window reaches there is no gradient either.
    means = (spread[:-1] / spread[-1].clamp(min=1)).unflatten(0, maps.shape[:3])
    return means if window.groups == 1 else means.repeat_interleave(x.shape[1] // window.groups, 2)

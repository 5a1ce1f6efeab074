"""The convolution of `patch` in training, in which every window has scales of its own.

A window's values are quantised by its own β, so that there is no one quantised image to convolve. Two facts make it
cheap. β_i is one number a window, and so a factor of its output: Σ_i β_i·(H_i ∗ α·B), with planes of ±1. And H_1 is the
sign of X in every window, so that its product is a plain convolution. The other planes differ from window to window and
are unfolded, some images at a time so that they stay in the cache: what makes a plain unfold slow is memory, not
arithmetic. Nothing of it is kept for the backward pass but β.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from horq_tvm.nn.options import Ste
from horq_tvm.nn.quantise import passed_through
from horq_tvm.torch_ops import output_size, pad_zeros, sign

# So many values of windows at a time for each thread: 2 MB of float32. With half and with twice as many it is slower.
_CHUNK_VALUES = 1 << 19
# The integers of a float's size, its sign bit, and the bits of 1.
_BITS = {
    torch.float32: (torch.int32, -(1 << 31), 0x3F80_0000),
    torch.bfloat16: (torch.int16, -(1 << 15), 0x3F80),
    torch.float16: (torch.int16, -(1 << 15), 0x3C00),
}


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
        betas = image.new_empty((order, len(x), *window.outputs(x), window.groups))
        betas[0] = _first_scales(image, window)
        filters = weight.to(dtype)
        signs = sign(image)
        first = F.conv2d(
            _channels_first(signs).to(dtype), filters, None, window.stride, 0, window.dilation, window.groups
        )
        y = _by_group(first, window) * betas[0, ..., None]
        for rows, i, plane in _later_planes(image, signs, betas, window, dtype, known=1):
            product = F.conv2d(plane, filters, None, window.kernel, 0, 1, window.groups)
            y[rows].addcmul_(betas[i, rows, ..., None], _by_group(product, window).float())
        ctx.save_for_backward(x, weight, betas)
        ctx.ste, ctx.window = ste, window
        return _channels_first(y.flatten(3)).to(dtype)

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


def _channels_first(image: Tensor) -> Tensor:
    """[N,H,W,C] as [N,C,H,W], the same memory."""
    return image.permute(0, 3, 1, 2)


def _by_group(y: Tensor, window: Window) -> Tensor:
    """[N,F,HO,WO] as [N,HO,WO,G,F/G]."""
    return y.permute(0, 2, 3, 1).unflatten(3, (window.groups, -1))


def _first_scales(image: Tensor, window: Window) -> Tensor:
    """β_1 = mean|X| of every window of a padded image [N,H,W,C], as a box sum: [N,HO,WO,G]."""
    sums = image.abs().unflatten(3, (window.groups, -1)).mean(-1).double()
    for axis in (1, 2):
        taps = range(window.kernel[axis - 1])
        sums = sum(
            (sums[_tap(sums.shape[axis], axis, t, window)] for t in taps[1:]),
            sums[_tap(sums.shape[axis], axis, 0, window)],
        )
    return (sums / (window.kernel[0] * window.kernel[1])).float()


def _later_planes(
    image: Tensor, signs: Tensor, betas: Tensor, window: Window, dtype: torch.dtype, known: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """H_2, H_3, ... of all windows of some images at a time: (which images, i − 1, ±1 as [n,C,HO·kh,WO·kw] in `dtype`).

    The windows lie side by side, so that a convolution in steps of its kernel goes over them: a matrix product of few
    columns is slower. The first `known` of betas[K,N,HO,WO,G] are read, the others are computed and written before
    their plane is handed out. The next plane may be written over it.
    """
    order, _, outputs_down, outputs_across, groups = betas.shape
    (kernel_down, kernel_across), channels = window.kernel, image.shape[3] // groups
    shape = (outputs_down, kernel_down, outputs_across, kernel_across, groups, channels)
    batch, row, column, _ = image.stride()
    (down, across), (spread_down, spread_across) = window.stride, window.dilation
    steps = (batch, row * down, row * spread_down, column * across, column * spread_across, channels, 1)
    count = max(1, _CHUNK_VALUES * torch.get_num_threads() // torch.Size(shape).numel())
    for start in range(0, len(image) if order > 1 else 0, count):
        rows = slice(start, start + count)
        values, first = (part[rows].as_strided((len(part[rows]), *shape), steps) for part in (image, signs))
        scales = betas[:, rows, :, None, :, None, :, None]
        residual = image.new_empty(values.shape)
        scratch = torch.empty_like(residual)
        torch.addcmul(values, first, scales[0], value=-1, out=residual)
        for i in range(1, order):
            if i >= known:
                # Over neighbouring taps in float32, then in float64: all of it in float64 takes a fifth longer.
                betas[i, rows] = torch.abs(residual, out=scratch).mean((4, 6)).mean(2, dtype=torch.float64)
            plane = _signs_into(scratch if dtype == scratch.dtype else torch.empty_like(scratch, dtype=dtype), residual)
            yield rows, i, _channels_first(plane.flatten(5).flatten(3, 4).flatten(1, 2))
            if i < order - 1:
                residual.sub_(torch.copysign(scales[i], residual, out=scratch))


def _signs_into(out: Tensor, x: Tensor) -> Tensor:
    """±1 by the sign bit of x, which is nowhere −0.0. In integers, a third of copysign's time."""
    kind, sign_bit, one = _BITS[out.dtype]
    if out.dtype == x.dtype:
        bits = torch.bitwise_and(x.view(kind), sign_bit, out=out.view(kind))
    else:
        bits = out.copy_(x).view(kind).bitwise_and_(sign_bit)
    bits.bitwise_or_(one)
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, betas: Tensor, window: Window) -> Tensor:
    """Σ g·X̂ over all windows, whose planes are computed once more."""
    image = _padded_image(x, window)
    signs = sign(image)
    by_group = _by_group(grad, window)

    def scaled(i: int, rows: slice) -> Tensor:
        return _channels_first((by_group[rows] * betas[i, rows, ..., None]).flatten(3)).to(grad.dtype)

    values = _channels_first(signs).to(grad.dtype)
    every = slice(None)
    total = conv2d_weight(
        values, weight.shape, scaled(0, every), window.stride, 0, window.dilation, window.groups
    ).float()
    for rows, i, plane in _later_planes(image, signs, betas, window, grad.dtype, known=len(betas)):
        total += conv2d_weight(plane, weight.shape, scaled(i, rows), window.kernel, 0, 1, window.groups)
    return total


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """What a float convolution of the padded x with `weight` hands back to x, float32."""
    top, left, bottom, right = window.padding
    shape = (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
    filters = weight.to(grad.dtype)
    padded = conv2d_input(shape, filters, grad, window.stride, 0, window.dilation, window.groups)
    return padded[..., top : top + x.shape[2], left : left + x.shape[3]].float()


def _mean_scales(betas: Tensor, x: Tensor, window: Window) -> Tensor:
    """The scales of a value on average over the windows that hold it: betas[K,N,HO,WO,G] → [K,N,C or 1,H,W]."""
    height, width = x.shape[2:]
    top, left, bottom, right = window.padding
    sums = torch.cat([betas.movedim(4, 2).flatten(0, 2), betas.new_ones((1, *betas.shape[2:4]))])
    for axis, extent in ((1, top + height + bottom), (2, left + width + right)):
        spread = sums.new_zeros((*sums.shape[:axis], extent, *sums.shape[axis + 1 :]))
        for tap in range(window.kernel[axis - 1]):
            spread[_tap(extent, axis, tap, window)] += sums
        sums = spread
    sums = sums[:, top : top + height, left : left + width]
    # Where no window reaches there is no gradient either.
    means = (sums[:-1] / sums[-1].clamp(min=1)).unflatten(0, (*betas.shape[:2], window.groups))
    return means if window.groups == 1 else means.repeat_interleave(x.shape[1] // window.groups, 2)


def _tap(extent: int, axis: int, tap: int, window: Window) -> tuple[slice, ...]:
    """What one row (axis 1) or column (axis 2) of all windows covers of an image of that extent."""
    taps, step, spread = window.kernel[axis - 1], window.stride[axis - 1], window.dilation[axis - 1]
    covered = (extent - spread * (taps - 1) - 1) // step * step + 1
    return (*[slice(None)] * axis, slice(tap * spread, tap * spread + covered, step))

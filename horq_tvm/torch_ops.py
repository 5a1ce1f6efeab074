"""HORQ layers as PyTorch operators: what `torch.export` keeps as one node, and the arithmetic that training shares.

Importing this module registers `torch.ops.horq.horq_conv2d` and `torch.ops.horq.horq_linear`, whose schemas are part of
the file formats. Both are the inference form: weights are ±1 already, α and β are given, and each plane is convolved by
itself, so that S_i is an exact integer. They have no gradient; `horq_tvm.nn` trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from horq_tvm.errors import UsageError
from horq_tvm.specs import MAX_ORDER, SCALES

# `patch` in eval unfolds its input: so many float32 values at a time, 64 MB of them.
_UNFOLDED_VALUES = 1 << 24


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (−0.0 too), else −1, in x's dtype."""
    # copysign is one pass of vector instructions, `where` of two numbers is ten times slower; −0.0 + 0.0 is +0.0.
    return torch.copysign(x.new_ones(()), x + 0.0)


def filter_scales(weight: Tensor) -> Tensor:
    """α_f = mean|W_f| of weight[F, ...] as [F]: the mean in float64, rounded once."""
    return weight.abs().double().flatten(1).mean(1).to(weight.dtype)


def mean_magnitude(x: Tensor, axes: Sequence[int]) -> Tensor:
    """mean|x| over `axes`, which stay as ones; in float64, rounded once to x's dtype."""
    return x.abs().mean(tuple(axes), keepdim=True, dtype=torch.float64).to(x.dtype)


def residual_scales(x: Tensor, order: int, axes: Sequence[int]) -> Tensor:
    """β_i = mean|R_{i-1}| over `axes` of float32 x → [K, ...], broadcasting against x (Li et al. 2017).

    R is rounded to float32 after each subtraction; the means are taken in float64 and rounded once.
    """
    residual, scales = x + 0.0, []
    for i in range(order):
        scales.append(mean_magnitude(residual, axes))
        if i < order - 1:
            residual -= torch.copysign(scales[-1], residual)
    return torch.stack(scales)


def planes_of(x: Tensor, beta: Tensor) -> Iterator[Tensor]:
    """The planes H_i = sign(R_{i-1}), R_i = R_{i-1} − β_i·H_i, of R_0 = x; β[K, ...] broadcasts against x."""
    residual = x
    for i, scale in enumerate(beta):
        plane = sign(residual)
        if i < len(beta) - 1:
            residual = residual - scale * plane
        yield plane


def pad_zeros(x: Tensor, padding: Sequence[int]) -> Tensor:
    """x[..., H, W] with (top, left, bottom, right) zeros around."""
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


def im2col(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The windows of x[N,C,H,W] as columns [N,G,L,HO·WO], L = C/g·kh·kw in this order; a padded position is 0."""
    columns = F.unfold(pad_zeros(x, padding), tuple(kernel), tuple(dilation), 0, tuple(stride))
    return columns.unflatten(1, (groups, -1))


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(HO, WO) of an image of (H, W)."""
    top, left, bottom, right = padding
    height, width = (
        (extent + pad - spread * (taps - 1) - 1) // step + 1
        for extent, pad, spread, taps, step in zip(
            size, (top + bottom, left + right), dilation, kernel, stride, strict=True
        )
    )
    return height, width


@torch.library.custom_op(
    "horq::horq_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor alpha, Tensor? beta, Tensor? bias, int order, str scale, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups) -> Tensor",
)
def horq_conv2d(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    order: int,
    scale: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Y[n,f] = α_f · Σ_i β_i · S_i + bias_f (design of the semantics: `horq_tvm.reference`), float32 [N, F, HO, WO].

    Args:
        x: [N, C, H, W], float32; weight: [F, C/groups, kh, kw] of ±1; alpha: [F]; bias: [F].
        beta: [K], for `static` alone.
        padding: at the top, left, bottom, right: what contributes nothing; with `patch`, values of 0 in the window.

    Raises:
        UsageError: an order, scale, shape or dtype that the operator does not have; an input that is not finite.
    """
    _check_conv2d(x, weight, alpha, beta, bias, order, scale, groups)
    check_finite(x)
    if scale == "patch":
        total = _patch_sums(x, weight, order, stride, padding, dilation, groups)
    else:

        def convolve(plane: Tensor) -> Tensor:
            return F.conv2d(pad_zeros(plane, padding), weight, None, stride, 0, dilation, groups)

        total = _plane_by_plane(convolve, x, order, beta, (1, 2, 3))
    return _affine(total, alpha, bias, channel_axis=1)


@horq_conv2d.register_fake
def _(x, weight, alpha, beta, bias, order, scale, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    _check_conv2d(x, weight, alpha, beta, bias, order, scale, groups)
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size))


@torch.library.custom_op(
    "horq::horq_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor alpha, Tensor? beta, Tensor? bias, int order, str scale) -> Tensor",
)
def horq_linear(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, bias: Tensor | None, order: int, scale: str
) -> Tensor:
    """The dense form: x[N, ..., L] or [L], weight[F, L] of ±1 → float32 [N, ..., F] or [F].

    `sample` scales are per image n, `patch` scales per row of the last axis; a vector is one image and one row.

    Raises:
        UsageError: an order, scale, shape or dtype that the operator does not have; an input that is not finite.
    """
    _check_linear(x, weight, alpha, beta, bias, order, scale)
    check_finite(x)
    total = _plane_by_plane(lambda plane: F.linear(plane, weight), x, order, beta, linear_mean_axes(x.dim(), scale))
    return _affine(total, alpha, bias, channel_axis=-1)


@horq_linear.register_fake
def _(x, weight, alpha, beta, bias, order, scale):  # type: ignore[no-untyped-def]
    _check_linear(x, weight, alpha, beta, bias, order, scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_mean_axes(rank: int, scale: str) -> tuple[int, ...]:
    """The axes of a dense layer's input of `rank` axes over which a mean is taken."""
    return (-1,) if scale == "patch" or rank == 1 else tuple(range(1, rank))


def _plane_by_plane(
    product: Callable[[Tensor], Tensor], x: Tensor, order: int, beta: Tensor | None, axes: Sequence[int]
) -> Tensor:
    """Σ β_i · S_i in plane order, in float32, with S_i = round(product(H_i)); β_i is the mean over `axes` if not given.

    A convolution by Winograd's or Fourier's way returns S_i only nearly; its nearest integer is S_i itself.
    """
    residual, total = x, None
    for i in range(order):
        scale = mean_magnitude(residual, axes) if beta is None else beta[i]
        plane = sign(residual)
        term = scale * product(plane).round_()
        total = term if total is None else total + term
        residual = residual - scale * plane
    assert total is not None
    return total


def _patch_sums(
    x: Tensor,
    weight: Tensor,
    order: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Σ β_i · S_i of `patch` [N,F,HO,WO]: a matrix product over the columns, some images at a time."""
    filters = weight.reshape(groups, -1, weight[0].numel())
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    total = x.new_empty((x.shape[0], weight.shape[0], *size))
    images = max(1, _UNFOLDED_VALUES // max(1, groups * weight[0].numel() * size[0] * size[1]))
    for part, out in zip(x.split(images), total.split(images), strict=True):
        columns = im2col(part, weight.shape[2:], stride, padding, dilation, groups)
        out.copy_(_plane_by_plane(lambda plane: filters @ plane, columns, order, None, (2,)).reshape(out.shape))
    return total


def _affine(total: Tensor, alpha: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    channels = [1] * total.dim()
    channels[channel_axis] = -1
    y = total * alpha.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def check_finite(x: Tensor) -> None:
    """Raises UsageError for NaN or infinite values: a sign would make numbers of them that look like any other."""
    # One pass that keeps nothing; a sum that overflows is looked at again.
    if not torch.isfinite(x.detach().sum()) and not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise UsageError(f"the input of a HORQ layer holds {count} NaN or infinite values; accepted: finite ones")


def check_order_and_scale(order: int, scale: str) -> None:
    """Raises UsageError for an order or a scale that no layer has."""
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order <= MAX_ORDER:
        raise UsageError(f"order {order}; accepted are 1 to {MAX_ORDER}")
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r}; accepted are {', '.join(SCALES)}")


def _check_conv2d(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    order: int,
    scale: str,
    groups: int,
) -> None:
    check_order_and_scale(order, scale)
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise UsageError(
            f"horq_conv2d: x{list(x.shape)}, weight{list(weight.shape)}, {groups} groups; "
            "accepted are x[N,C,H,W] and weight[F,C/groups,kh,kw], F a multiple of groups"
        )
    _check_operands("horq_conv2d", x, weight, alpha, beta, bias, order, scale)


def _check_linear(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, bias: Tensor | None, order: int, scale: str
) -> None:
    check_order_and_scale(order, scale)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"horq_linear: x{list(x.shape)}, weight{list(weight.shape)}; accepted are x[...,L] and weight[F,L]"
        )
    _check_operands("horq_linear", x, weight, alpha, beta, bias, order, scale)


def _check_operands(
    op: str, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, bias: Tensor | None, order: int, scale: str
) -> None:
    if (beta is not None) != (scale == "static"):
        raise UsageError(f"{op}: beta is {'given' if beta is not None else 'missing'} with scale {scale!r}")
    filters = (weight.shape[0],)
    for name, value, shape in (("alpha", alpha, filters), ("beta", beta, (order,)), ("bias", bias, filters)):
        if value is not None and tuple(value.shape) != shape:
            raise UsageError(f"{op}: {name} has shape {list(value.shape)}; accepted: {list(shape)}")
    for name, value in (("x", x), ("weight", weight), ("alpha", alpha), ("beta", beta), ("bias", bias)):
        if value is not None and value.dtype != torch.float32:
            raise UsageError(f"{op}: {name} is {value.dtype}; accepted: torch.float32")

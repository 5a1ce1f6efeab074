"""HORQ layers as PyTorch operators: what `torch.export` keeps as one node, and the arithmetic that training shares.

Importing this module registers `torch.ops.horq.horq_conv2d` and `torch.ops.horq.horq_linear`, whose schemas are part of
the file formats. Both are the inference form: weights are ±1 already, α and β are given, and each plane is convolved by
itself, so that S_i is an exact integer. They have no gradient; `horq_tvm.nn` trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from horq_tvm.errors import UsageError
from horq_tvm.specs import MAX_ORDER

# `patch` is not among them: its planes differ from window to window, which these two forms cannot say.
TRAINED_SCALES = ("sample", "static")


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (−0.0 too), else −1, in x's dtype."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def filter_scales(weight: Tensor) -> Tensor:
    """α_f = mean|W_f| of weight[F, ...] as [F]: the mean in float64, rounded once. Differentiable."""
    return weight.abs().double().flatten(1).mean(1).to(weight.dtype)


def sample_scales(x: Tensor, order: int) -> Tensor:
    """β_i = mean|R_{i-1}| of each image over all its other axes, x[N, ...] → [K, N] (Li et al. 2017).

    R is rounded to x's dtype after each subtraction; the means are taken in float64 and rounded once.
    """
    residual, scales = x, []
    for _ in range(order):
        beta = residual.abs().double().flatten(1).mean(1).to(x.dtype)
        scales.append(beta)
        residual = residual - beta.reshape(-1, *[1] * (x.dim() - 1)) * sign(residual)
    return torch.stack(scales)


def residual_planes(x: Tensor, beta: Tensor) -> Tensor:
    """H_i = sign(R_{i-1}), R_i = R_{i-1} − β_i·H_i with R_0 = x[N, ...] → ±1 planes [K, N, ...] in x's dtype.

    beta is [K] or [K, N], in x's dtype.
    """
    residual, planes = x, []
    for scale in per_image(beta, x.dim()):
        planes.append(sign(residual))
        residual = residual - scale * planes[-1]
    return torch.stack(planes)


def per_image(beta: Tensor, rank: int) -> Tensor:
    """beta[K] or [K, N] as [K, N or 1, 1, ...], which broadcasts over K planes of tensors of `rank` axes."""
    return beta.reshape(beta.shape[0], -1, *[1] * (rank - 1))


def pad_zeros(x: Tensor, padding: Sequence[int]) -> Tensor:
    """x[..., H, W] with (top, left, bottom, right) zeros around."""
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


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
        padding: zeros at the top, left, bottom, right, put on after quantisation.

    Raises:
        UsageError: an order, scale, shape or dtype that the operator does not have.
    """
    _check_conv2d(x, weight, alpha, beta, bias, order, scale, groups)

    def convolve(planes: Tensor) -> Tensor:
        return F.conv2d(pad_zeros(planes, padding), weight, None, stride, 0, dilation, groups)

    return _plane_by_plane(convolve, x, alpha, beta, bias, order, channel_axis=1)


@horq_conv2d.register_fake
def _(x, weight, alpha, beta, bias, order, scale, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    _check_conv2d(x, weight, alpha, beta, bias, order, scale, groups)
    top, left, bottom, right = padding
    height, width = (
        (size + pad - spread * (taps - 1) - 1) // step + 1
        for size, pad, spread, taps, step in zip(
            x.shape[2:], (top + bottom, left + right), dilation, weight.shape[2:], stride, strict=True
        )
    )
    return x.new_empty((x.shape[0], weight.shape[0], height, width))


@torch.library.custom_op(
    "horq::horq_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor alpha, Tensor? beta, Tensor? bias, int order, str scale) -> Tensor",
)
def horq_linear(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, bias: Tensor | None, order: int, scale: str
) -> Tensor:
    """The dense form: x[N, ..., L], weight[F, L] of ±1 → float32 [N, ..., F]. `sample` scales are per image n.

    Raises:
        UsageError: an order, scale, shape or dtype that the operator does not have.
    """
    _check_linear(x, weight, alpha, beta, bias, order, scale)
    return _plane_by_plane(lambda planes: F.linear(planes, weight), x, alpha, beta, bias, order, channel_axis=-1)


@horq_linear.register_fake
def _(x, weight, alpha, beta, bias, order, scale):  # type: ignore[no-untyped-def]
    _check_linear(x, weight, alpha, beta, bias, order, scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _plane_by_plane(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    order: int,
    channel_axis: int,
) -> Tensor:
    """α · Σ β_i · S_i + bias in plane order, in float32, with S_i = round(product(H_i)).

    A convolution by Winograd's or Fourier's way returns S_i only nearly; its nearest integer is S_i itself.
    """
    beta = sample_scales(x, order) if beta is None else beta
    planes = residual_planes(x, beta)
    sums = product(planes.flatten(0, 1)).round().unflatten(0, planes.shape[:2])
    scales = per_image(beta, x.dim())
    y = scales[0] * sums[0]
    for i in range(1, order):
        y = y + scales[i] * sums[i]
    channels = [1] * x.dim()
    channels[channel_axis] = -1
    y = y * alpha.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def check_order_and_scale(order: int, scale: str) -> None:
    """Raises UsageError for an order or a scale that no trained layer has."""
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"order {order}; accepted are 1 to {MAX_ORDER}")
    if scale not in TRAINED_SCALES:
        raise UsageError(f"scale {scale!r}; a layer is trained with one of: {', '.join(TRAINED_SCALES)}")


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
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"horq_linear: x{list(x.shape)}, weight{list(weight.shape)}; accepted are x[N,...,L] and weight[F,L]"
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

"""X̂ = Σ β_i·H_i and α·B with straight-through gradients: what a HORQ layer convolves in training."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from horq_tvm import reference
from horq_tvm.errors import UsageError
from horq_tvm.nn.options import Ste
from horq_tvm.torch_ops import filter_scales, planes_of, sign

MIN_BETA = 1e-6
"""The least β of `static`. A plane of β = 0 would be dead, and one of β < 0 would undo the plane before it."""
STES: tuple[str, ...] = get_args(Ste)
"""The straight-through estimators: see `ResidualQuantise`."""
# So many values of a batch are enough to fit K numbers to, and the fit stays a matter of milliseconds.
_FIT_VALUES = 1 << 16
_TRACK_VALUES = 1 << 14


class ResidualQuantise(torch.autograd.Function):
    """X̂ = Σ β_i·H_i of float32 or bfloat16 x, float32 inside and in the result; β[K,...] broadcasts against x.

    The gradient of X is g·d(x), where d is, by `ste`,

        residual     1[|x| <= Σβ_i + β_K]: the outermost level is Σβ_i, and what lies within β_K of it is still rounded
                     to it rather than cut off
        window       1[|x| <= Σβ_i]: each plane's β·sign(r) has the slope of clip(r, −β, β), the chain rule taken
                     through the residuals. Some plane's window |R_{i−1}| <= β_i holds x exactly where |x| <= Σβ_i
        approxsign   each plane has the slope max(0, 2 − 2|r|/β) of Bi-Real Net's ApproxSign (Liu et al., ECCV 2018)
        tanh         each plane has the slope 1 − tanh²(r/β) (Differentiable Soft Quantization; IR-Net at t = 1)
        identity     1

    With slopes s_i the chain rule through R_i = R_{i−1} − β_i·H_i gives d = 1 − Π(1 − s_i). ∂X̂/∂β_i = H_i, the signs
    held fixed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, ste: Ste) -> Tensor:
        ctx.save_for_backward(x, beta)
        ctx.ste = ste
        return quantise(x, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, beta = ctx.saved_tensors
        grad_x = grad_beta = None
        if ctx.needs_input_grad[0]:
            grad_x = passed_through(grad, x, beta, ctx.ste).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_beta = _plane_sums(grad, x, beta).reshape(beta.shape)
        return grad_x, grad_beta, None


def quantise(x: Tensor, beta: Tensor) -> Tensor:
    """Σ β_i·H_i in float32, summed in plane order; β[K,...] broadcasts against x.

    In place where it can be: on a CPU, touching fresh memory costs more than the arithmetic.
    """
    residual = x.float() + 0.0  # the sign of −0.0 is +1
    total = torch.copysign(beta[0], residual)
    plane = total
    for i, scale in enumerate(beta[1:]):
        residual.sub_(plane)
        plane = _copysign(scale, residual, plane if i else torch.empty_like(residual))
        total.add_(plane)
    return total


def _copysign(scale: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """scale·sign(x) into `out`, unless a compiler is to find its own places."""
    return torch.copysign(scale, x) if torch.compiler.is_compiling() else torch.copysign(scale, x, out=out)


def _plane_sums(grad: Tensor, x: Tensor, beta: Tensor) -> Tensor:
    """Σ g·H_i over all of x [K]. The planes are computed again: keeping them is K times the activations of training."""
    residual, sums = x.float() + 0.0, []
    plane = torch.empty_like(residual)
    for i, scale in enumerate(beta):
        plane = _copysign(scale, residual, plane)
        if i < len(beta) - 1:
            residual.sub_(plane)
        sums.append(plane.mul_(grad).sum() / scale.squeeze())
    return torch.stack(sums)


def passed_through(grad: Tensor, x: Tensor, beta: Tensor, ste: Ste) -> Tensor:
    """g·d(x) as `ResidualQuantise` has it."""
    if ste == "identity":
        return grad
    if ste in ("residual", "window"):
        reach = beta.sum(0) + beta[-1] if ste == "residual" else beta.sum(0)
        return x.float().abs().le_(reach).mul_(grad)
    slope = _tanh_slope if ste == "tanh" else _approxsign_slope
    residual, blocked = x.float() + 0.0, torch.ones((), device=x.device)
    for scale in beta:
        blocked = blocked * (1 - slope(residual / scale))
        residual -= torch.copysign(scale, residual)
    return grad * (1 - blocked)


def _tanh_slope(t: Tensor) -> Tensor:
    return 1 - torch.tanh(t).square()


def _approxsign_slope(t: Tensor) -> Tensor:
    return (2 - 2 * t.abs()).clamp(min=0)


class PositiveScales(torch.autograd.Function):
    """max(β, MIN_BETA) of β[K]; a gradient that would lower a β that is there already is dropped, no other."""

    @staticmethod
    def forward(ctx: Any, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return beta.clamp(min=MIN_BETA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (beta,) = ctx.saved_tensors
        return torch.where((beta <= MIN_BETA) & (grad > 0), 0.0, grad)


class BinaryWeight(torch.autograd.Function):
    """α·B of latent float32 weights [F,...]: B = sign(W), α_f = mean|W_f|.

    With `balance` the mean of each filter is taken off W first, so that a filter has about as many +1 as −1 and carries
    the most information (IR-Net, Qin et al., CVPR 2020). The gradient through the sign is passed on where |W| <= 1
    (XNOR-Net, Rastegari et al. 2016, section 3.1); α and the mean have their own:

        ∂/∂W = α·g·1[|W| <= 1] + B·mean(g·B), less its mean over the filter with `balance`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, balance: bool) -> Tensor:
        weight = balanced(weight) if balance else weight
        signs, alpha = sign(weight), filter_scales(weight).reshape(-1, *[1] * (weight.dim() - 1))
        ctx.save_for_backward(weight, signs, alpha)
        ctx.balance = balance
        return signs * alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, signs, alpha = ctx.saved_tensors
        axes = tuple(range(1, weight.dim()))
        grad = alpha * grad * (weight.abs() <= 1) + signs * (grad * signs).mean(axes, keepdim=True)
        return grad - grad.mean(axes, keepdim=True) if ctx.balance else grad, None


def balanced(weight: Tensor) -> Tensor:
    """Weights [F,...] less the mean of their filter, taken in float64."""
    axes = tuple(range(1, weight.dim()))
    return weight - weight.mean(axes, keepdim=True, dtype=torch.float64).to(weight.dtype)


def fitted_scales(x: Tensor, order: int) -> Tensor:
    """β[K] >= MIN_BETA of the least Σ‖X − Σ β_i·H_i‖² over an even selection of x's values, float32 on x's device."""
    values = _selection(x, _FIT_VALUES).cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("the batch that beta is fitted to holds NaN or infinite values; accepted: finite ones")
    fitted = np.maximum(reference.fit_static_scales(values, order), MIN_BETA)
    return torch.from_numpy(fitted).to(x.device, torch.float32)


def tracked_scales(x: Tensor, beta: Tensor) -> Tensor:
    """The least-squares β[K] for the planes H that `beta`[K] gives x: one step of `reference.fit_static_scales`.

    Where the step would make a β less than MIN_BETA it is not taken: `beta` itself comes back.
    """
    values = _selection(x, _TRACK_VALUES)
    planes = torch.stack(list(planes_of(values, beta.reshape(-1, 1))))
    fitted = torch.linalg.lstsq(planes @ planes.T, (planes @ values)[:, None]).solution[:, 0]
    return fitted if bool((fitted >= MIN_BETA).all()) else beta


def _selection(x: Tensor, count: int) -> Tensor:
    """At most `count` values of x, evenly spread, as float32 [M]."""
    values = x.detach().flatten()
    return values[:: max(1, -(-values.numel() // count))].float()

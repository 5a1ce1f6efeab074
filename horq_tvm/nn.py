"""HORQ-aware training in PyTorch: `HorqConv2d`, a drop-in for `nn.Conv2d`.

    Y = α · Σ_i β_i · (H_i ∗ B) + bias,    B = sign(W),  α_f = mean|W_f|,  H_i = sign(R_{i-1}),  R_i = R_{i-1} − β_i·H_i

(High-Order Residual Quantization, Li et al., ICCV 2017.) In training it is one float convolution of X̂ = Σ β_i·H_i with
α·B, with straight-through gradients. In eval it is `torch.ops.horq.horq_conv2d`, plane by plane, which is what
`torch.export` keeps and what the compiler reproduces. The layer quantises whatever it is given: feed it the output of a
batch normalisation rather than of a ReLU, behind which the first plane is +1 everywhere and says nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from horq_tvm import reference
from horq_tvm.errors import UsageError
from horq_tvm.torch_ops import (
    check_order_and_scale,
    filter_scales,
    horq_conv2d,
    pad_zeros,
    per_image,
    residual_planes,
    sample_scales,
    sign,
)

# The least β of `static`. A plane of β = 0 would be dead, and one of β < 0 would undo the plane before it.
MIN_BETA = 1e-6
# So many values of the first batch are enough to fit K numbers to, and the fit stays a matter of milliseconds.
_FIT_VALUES = 1 << 16


class HorqConv2d(nn.Module):
    """A convolution of K-plane residual-binarised activations with binary weights: float32 [N,C,H,W] → [N,F,HO,WO].

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as for `nn.Conv2d`.
        padding: zeros put around the quantised input: an int, (vertical, horizontal), or (top, left, bottom, right).
        order: K, the number of activation planes, 1 to 8.
        scale: where β lives. `sample`: β_i = mean|R_{i-1}| of each image. `static`: K learned constants, `beta`, which
            the first training batch sets to its least-squares fit; until then they are NaN.

    `weight` holds the latent float weights, whose sign and mean magnitude are the layer's. An optimiser's weight decay
    does not belong on `beta`.

    Raises:
        UsageError: an order, a scale or a geometry that there is not; in eval, `static` without a training batch yet.
    """

    weight: nn.Parameter | None
    beta: nn.Parameter | None
    bias: nn.Parameter | None
    weight_sign: Tensor
    alpha: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        order: int = 2,
        scale: str = "sample",
    ) -> None:
        super().__init__()
        check_order_and_scale(order, scale)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise UsageError(f"groups={groups} does not divide {in_channels} and {out_channels} channels")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _integers("kernel_size", kernel_size, (2,), least=1)
        self.stride = _integers("stride", stride, (2,), least=1)
        self.padding = _integers("padding", padding, (2, 4), least=0)
        self.dilation = _integers("dilation", dilation, (2,), least=1)
        self.order, self.scale = order, scale
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.beta = nn.Parameter(torch.full((order,), math.nan)) if scale == "static" else None
        self._beta_known = False
        # What eval computes with. They follow from `weight` and are no part of the state dict.
        self.register_buffer("weight_sign", torch.empty_like(self.weight.data), persistent=False)
        self.register_buffer("alpha", torch.empty(out_channels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Latent weights uniform in ±1/√L, L = C/groups·kh·kw, and the bias 0."""
        assert self.weight is not None
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._settle()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self._train(x)
        if self.scale == "static" and not self._beta_known:
            raise UsageError(
                "HorqConv2d(scale='static') has no beta yet; run a training batch through it or load a state dict"
            )
        if self.weight is not None and not torch.compiler.is_exporting():
            # Latent weights changed in place since eval() must count. An exporter sees constants only in buffers.
            self._settle()
        return horq_conv2d(
            x,
            self.weight_sign,
            self.alpha,
            self.beta,
            self.bias,
            self.order,
            self.scale,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _train(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.scale == "sample":
            beta = sample_scales(x.detach(), self.order)
        else:
            if not self._beta_known:
                self._fit_beta(x)
            beta = self.beta
        quantised = _ResidualQuantise.apply(x, beta)
        weight = filter_scales(self.weight).reshape(-1, 1, 1, 1) * _Sign.apply(self.weight)
        return F.conv2d(
            pad_zeros(quantised, self.padding), weight, self.bias, self.stride, 0, self.dilation, self.groups
        )

    @torch.no_grad()
    def _fit_beta(self, x: Tensor) -> None:
        """Set beta to the least Σ‖X − Σ β_i·H_i‖² over an even selection of x's values."""
        assert self.beta is not None
        values = x.detach().flatten()
        values = values[:: math.ceil(values.numel() / _FIT_VALUES)].float().cpu().numpy()
        fitted = np.maximum(reference.fit_static_scales(values, self.order), MIN_BETA)
        self.beta.copy_(torch.from_numpy(fitted))
        self._beta_known = True

    def train(self, mode: bool = True) -> HorqConv2d:
        """As `nn.Module.train`. Raises UsageError for training a frozen layer, which has no latent weights."""
        if mode and self.weight is None:
            raise UsageError("a frozen HorqConv2d has no latent weights to train; train the model it was frozen from")
        super().train(mode)
        if not mode and self.weight is not None:
            self._settle()
        return self

    @torch.no_grad()
    def _settle(self) -> None:
        """Bring what eval computes with up to date with the parameters."""
        assert self.weight is not None
        self.weight_sign.copy_(sign(self.weight))
        self.alpha.copy_(filter_scales(self.weight))
        if self.beta is not None:
            # Training, too, computes with no less than this.
            self.beta.clamp_(min=MIN_BETA)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.beta is not None:
            self._beta_known = bool(torch.isfinite(self.beta).all())
        if self.weight is not None:
            self._settle()

    def freeze_(self) -> None:
        """Drop the latent weights for good: ±1 weights, α, β and bias stay, in the state dict too, and eval alone."""
        self.eval()
        self.weight = None
        for name in ("weight_sign", "alpha"):
            self.register_buffer(name, getattr(self, name))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"order={self.order}, scale={self.scale!r}"
        )


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose HORQ layers keep only what inference needs; `model` stays as it is.

    Its HORQ layers cannot be trained any more. Raises UsageError if one has no β yet.
    """
    frozen = copy.deepcopy(model).eval()
    for name, layer in frozen.named_modules():
        if isinstance(layer, HorqConv2d):
            if layer.beta is not None and not layer._beta_known:
                raise UsageError(
                    f"layer {name!r} (static) has no beta yet; run a training batch through the model first"
                )
            layer.freeze_()
    return frozen


class _ResidualQuantise(torch.autograd.Function):
    """X̂ = Σ β_i·H_i of x[N, ...] with beta[K] or [K, N]; the straight-through estimator of the whole quantiser.

    ∂X̂/∂X = 1 where |X| <= Σ β_i + β_K, else 0: the outermost level is Σ β_i, and what lies within β_K of it is still
    rounded to it rather than cut off. ∂X̂/∂β_i = H_i, the signs held fixed. A β below MIN_BETA counts as MIN_BETA, and a
    gradient that would lower it further is dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta)
        beta = beta.clamp(min=MIN_BETA) if beta.dim() == 1 else beta
        return _weighted_planes(x, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, raw = ctx.saved_tensors
        beta = raw.clamp(min=MIN_BETA) if raw.dim() == 1 else raw
        grad_x = grad_beta = None
        if ctx.needs_input_grad[0]:
            scales = per_image(beta, x.dim())
            grad_x = grad * (x.abs() <= scales.sum(0) + scales[-1])
        if ctx.needs_input_grad[1]:
            # The planes are computed again rather than kept: K times the activations is what training would hold.
            grad_beta = (residual_planes(x, beta) * grad).flatten(1).sum(1)
            grad_beta = torch.where((raw <= MIN_BETA) & (grad_beta > 0), 0.0, grad_beta)
        return grad_x, grad_beta


def _weighted_planes(x: Tensor, beta: Tensor) -> Tensor:
    """Σ β_i·H_i, summed in plane order."""
    planes, scales = residual_planes(x, beta), per_image(beta, x.dim())
    total = scales[0] * planes[0]
    for i in range(1, len(planes)):
        total = total + scales[i] * planes[i]
    return total


class _Sign(torch.autograd.Function):
    """sign(W), whose gradient is passed on where |W| <= 1 (XNOR-Net, Rastegari et al. 2016, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return sign(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() <= 1)


def _integers(name: str, value: int | Sequence[int], lengths: tuple[int, ...], least: int) -> tuple[int, ...]:
    """`value` as a tuple of the greatest of `lengths`: one int stands for all, a pair for (vertical, horizontal)."""
    full = max(lengths)
    values = (value,) * full if isinstance(value, int) else tuple(value)
    if len(values) not in (*lengths, full) or any(not isinstance(v, int) or v < least for v in values):
        raise UsageError(
            f"{name}={value!r}; accepted: an int or {' or '.join(map(str, lengths))} ints, each >= {least}"
        )
    # (top, left, bottom, right) of (vertical, horizontal)
    return values * (full // len(values))

"""`HorqConv2d` and `HorqLinear`, drop-ins for `nn.Conv2d` and `nn.Linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horq_tvm.errors import UsageError
from horq_tvm.nn.options import Beta, HorqOptions, Ste, pair, sides
from horq_tvm.nn.patch import Window, patch_conv2d
from horq_tvm.nn.quantise import (
    MIN_BETA,
    BinaryWeight,
    PositiveScales,
    ResidualQuantise,
    balanced,
    fitted_scales,
    tracked_scales,
)
from horq_tvm.specs import Scale
from horq_tvm.torch_ops import (
    check_finite,
    filter_scales,
    horq_conv2d,
    horq_linear,
    linear_mean_axes,
    pad_zeros,
    residual_scales,
    sign,
)

# How far a running β moves towards the fit of each batch.
_MOMENTUM = 0.1


class HorqLayer(nn.Module):
    """What `HorqConv2d` and `HorqLinear` have in common: latent weights [F, ...], scales and the options.

    Options:
        order: K, the number of activation planes, 1 to 8.
        scale: where β lives. `static`: K constants, which the first training batch sets to their least-squares fit;
            until then they are NaN. `sample`: β_i = mean|R_{i-1}| of each image. `patch`: of each window or row.
        ste: the straight-through estimator, one for the whole quantiser; see `quantise.ResidualQuantise`.
        beta: how the constants of `static` go on after the first batch: `learned` by gradient, `running` with an
            exponential average of each batch's least-squares fit. `freeze_scales` ends both.
        balance: take a filter's mean off its latent weights before their sign (IR-Net).

    `weight` holds the latent float weights, whose sign and mean magnitude are the layer's. `weight_sign` and `alpha`
    are what eval computes with. An optimiser's weight decay does not belong on `beta`.

    Raises:
        UsageError: an option or a geometry that there is not; an input that is not finite; in eval, `static` without a
            training batch yet.
    """

    weight: nn.Parameter | None
    beta: nn.Parameter | None
    bias: nn.Parameter | None
    weight_sign: Tensor
    alpha: Tensor

    def __init__(self, shape: tuple[int, ...], bias: bool, options: HorqOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.beta = None
        if options.scale == "static":
            learned = options.beta == "learned"
            self.beta = nn.Parameter(torch.full((options.order,), math.nan), requires_grad=learned)
        self.beta_known = False
        self.beta_frozen = False
        # They follow from `weight` and are no part of the state dict.
        self.register_buffer("weight_sign", torch.empty(shape), persistent=False)
        self.register_buffer("alpha", torch.empty(shape[0]), persistent=False)
        self.reset_parameters()

    @property
    def order(self) -> int:
        """K, the number of activation planes."""
        return self.options.order

    @property
    def scale(self) -> Scale:
        """Where β lives: `patch`, `sample` or `static`."""
        return self.options.scale

    def reset_parameters(self) -> None:
        """Latent weights uniform in ±1/√L, L being the length of a filter, and the bias 0."""
        assert self.weight is not None
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.settle_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if not torch.compiler.is_compiling():
                check_finite(x)
            with torch.autocast(x.device.type, enabled=False):
                weight = self.binary_weight()
            return self._train(x, weight)
        self.check_beta()
        if self.weight is not None and not torch.compiler.is_exporting():
            # Latent weights changed in place since eval() must count. An exporter sees constants only in buffers.
            self.settle_()
        return self._infer(x)

    def _train(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _infer(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def binary_weight(self) -> Tensor:
        """α·B, with gradients to the latent weights; of the latent weights' shape."""
        assert self.weight is not None
        return BinaryWeight.apply(self.weight, self.options.balance)

    def quantised(self, x: Tensor, mean_axes: tuple[int, ...]) -> Tensor:
        """X̂ of `sample` or `static`, or of `patch` where a row is what `mean_axes` spans; float32, with gradients."""
        with torch.autocast(x.device.type, enabled=False):
            if self.beta is None:
                scales = residual_scales(x.detach().float(), self.order, mean_axes)
            else:
                self._update_beta(x)
                scales = PositiveScales.apply(self.beta).reshape(-1, *[1] * x.dim())
            return ResidualQuantise.apply(x, scales, self.options.ste)

    @torch.no_grad()
    def _update_beta(self, x: Tensor) -> None:
        """Fit β to the first batch, and where it runs, follow every other."""
        assert self.beta is not None
        if not self.beta_known:
            self.beta.copy_(fitted_scales(x, self.order))
            self.beta_known = True
        elif self.options.beta == "running" and not self.beta_frozen:
            self.beta.lerp_(tracked_scales(x, self.beta), _MOMENTUM)

    def check_beta(self, name: str = "") -> None:
        """Raises UsageError where β is missing; `name` is the layer's in the message."""
        if self.beta is not None and not self.beta_known:
            layer = f"layer {name!r} (static)" if name else f"{type(self).__name__}(scale='static')"
            raise UsageError(f"{layer} has no beta yet; run a training batch through it or load a state dict")

    def train(self, mode: bool = True) -> HorqLayer:
        """As `nn.Module.train`. Raises UsageError for training a frozen layer, which has no latent weights."""
        if mode and self.weight is None:
            name = type(self).__name__
            raise UsageError(f"a frozen {name} has no latent weights to train; train the model it was frozen from")
        super().train(mode)
        if not mode and self.weight is not None:
            self.settle_()
        return self

    @torch.no_grad()
    def settle_(self) -> None:
        """Bring what eval computes with up to date with the parameters."""
        assert self.weight is not None
        weight = balanced(self.weight) if self.options.balance else self.weight
        self.weight_sign.copy_(sign(weight))
        self.alpha.copy_(filter_scales(weight))
        if self.beta is not None:
            # Training, too, computes with no less than this.
            self.beta.clamp_(min=MIN_BETA)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.beta is not None:
            self.beta_known = bool(torch.isfinite(self.beta).all())
        if self.weight is not None:
            self.settle_()

    def freeze_(self) -> None:
        """Drop the latent weights for good: ±1 weights, α, β and bias stay, in the state dict too, and eval alone."""
        self.eval()
        self.weight = None
        for name in ("weight_sign", "alpha"):
            self.register_buffer(name, getattr(self, name))

    def extra_repr(self) -> str:
        options = self.options
        shown = f"bias={self.bias is not None}, order={options.order}, scale={options.scale!r}, ste={options.ste!r}"
        return f"{shown}, beta={options.beta!r}, balance={options.balance}"


class HorqConv2d(HorqLayer):
    """A convolution of K-plane residual-binarised activations with binary weights: float32 [N,C,H,W] → [N,F,HO,WO].

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as for `nn.Conv2d`.
        padding: an int, (vertical, horizontal), or (top, left, bottom, right). It contributes nothing; with `patch`, it
            is values of 0 in the window, which are quantised like the others.
        order, scale, ste, beta, balance: see `HorqLayer`.
    """

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
        scale: Scale = "static",
        ste: Ste = "residual",
        beta: Beta = "learned",
        balance: bool = True,
    ) -> None:
        options = HorqOptions(order, scale, ste, beta, balance)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise UsageError(f"groups={groups} does not divide {in_channels} and {out_channels} channels")
        kernel = pair("kernel_size", kernel_size)
        super().__init__((out_channels, in_channels // groups, *kernel), bias, options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kernel
        self.stride = pair("stride", stride)
        self.padding = sides("padding", padding)
        self.dilation = pair("dilation", dilation)

    def _train(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.scale == "patch":
            window = Window(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
            return patch_conv2d(x, weight, self.bias, self.order, self.options.ste, window)
        quantised = self.quantised(x, (1, 2, 3))
        top, left, bottom, right = self.padding
        if (top, left) == (bottom, right):
            return F.conv2d(quantised, weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        padded = pad_zeros(quantised, self.padding)
        return F.conv2d(padded, weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _infer(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return horq_conv2d(x, self.weight_sign, self.alpha, self.beta, self.bias, self.order, self.scale, *geometry)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {super().extra_repr()}"
        )


class HorqLinear(HorqLayer):
    """The dense layer: float32 [N,...,L] → [N,...,F], or a vector [L] → [F].

    `sample` scales are per image n over all other axes, `patch` scales per row of the last axis. Arguments as
    `nn.Linear` has them, the bias apart, which is left out as a batch normalisation mostly follows; for the rest see
    `HorqLayer`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        order: int = 2,
        scale: Scale = "static",
        ste: Ste = "residual",
        beta: Beta = "learned",
        balance: bool = True,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise UsageError(f"{in_features} to {out_features} features; accepted are 1 and more")
        super().__init__((out_features, in_features), bias, HorqOptions(order, scale, ste, beta, balance))
        self.in_features, self.out_features = in_features, out_features

    def _train(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.quantised(x, linear_mean_axes(x.dim(), self.scale)), weight, self.bias)

    def _infer(self, x: Tensor) -> Tensor:
        return horq_linear(x, self.weight_sign, self.alpha, self.beta, self.bias, self.order, self.scale)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"

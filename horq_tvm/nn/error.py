"""How much of its activations and weights each layer's quantisation loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horq_tvm.errors import UsageError
from horq_tvm.nn.layers import HorqConv2d, HorqLayer, HorqLinear
from horq_tvm.nn.quantise import MIN_BETA, quantise
from horq_tvm.torch_ops import im2col, linear_mean_axes, pad_zeros, residual_scales


@dataclass(frozen=True)
class LayerError:
    """Relative errors of a layer on a batch: ‖X − X̂‖²/‖X‖², ‖W − αB‖²/‖W‖², ‖Y − Y_float‖²/‖Y_float‖².

    Y_float is what the latent float weights give for the layer's float input. With `patch` X is all windows, the
    padding included.
    """

    name: str
    order: int
    scale: str
    activations: float
    weights: float
    output: float


@torch.no_grad()
def quantisation_error(model: nn.Module, batch: Tensor | Sequence[Tensor]) -> tuple[LayerError, ...]:
    """Run `model` in eval on `batch` and say what each HORQ layer's quantisation loses, in the order they are run.

    A layer that is run more than once counts with its last run. The model stays in the mode it was in.

    Raises:
        UsageError: no HORQ layer in the model, or a frozen one, whose latent weights are gone.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HorqLayer)}
    frozen = [name for name, layer in layers.items() if layer.weight is None]
    if not layers or frozen:
        found = f"layer {frozen[0]!r} is frozen" if frozen else f"{type(model).__name__} has no HORQ layer"
        raise UsageError(f"{found}; accepted is a model of HORQ layers with their latent weights")
    errors: dict[str, LayerError] = {}

    def measure(name: str, layer: HorqLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        errors.pop(name, None)
        errors[name] = _layer_error(name, layer, inputs[0], output)

    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(partial(measure, name)) for name, layer in layers.items()]
    try:
        model.eval()(*((batch,) if isinstance(batch, Tensor) else batch))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return tuple(errors.values())


def _layer_error(name: str, layer: HorqLayer, x: Tensor, y: Tensor) -> LayerError:
    assert layer.weight is not None
    weight = layer.weight.detach()
    binary = layer.alpha.reshape(-1, *[1] * (weight.dim() - 1)) * layer.weight_sign
    values, axes = x, linear_mean_axes(x.dim(), layer.scale)
    if isinstance(layer, HorqConv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        expected = F.conv2d(pad_zeros(x, layer.padding), weight, layer.bias, layer.stride, 0, *geometry[2:])
        axes = (1, 2, 3)
        if layer.scale == "patch":
            values, axes = im2col(x, layer.kernel_size, *geometry), (2,)
    else:
        assert isinstance(layer, HorqLinear)
        expected = F.linear(x, weight, layer.bias)
    if layer.beta is None:
        beta = residual_scales(values, layer.order, axes)
    else:
        beta = layer.beta.clamp(min=MIN_BETA).reshape(-1, *[1] * values.dim())
    return LayerError(
        name,
        layer.order,
        layer.scale,
        _relative(values, quantise(values, beta)),
        _relative(weight, binary),
        _relative(expected, y),
    )


def _relative(exact: Tensor, approximate: Tensor) -> float:
    """‖exact − approximate‖² / ‖exact‖², 0 where both are 0."""
    lost = (exact - approximate).double().square().sum().item()
    return lost / exact.double().square().sum().item() if lost else 0.0

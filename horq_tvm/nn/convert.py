"""`convert`: the convolutions and dense layers of any PyTorch model, swapped for HORQ layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from horq_tvm.errors import UsageError
from horq_tvm.nn.dataflow import Role, layer_roles
from horq_tvm.nn.layers import HorqConv2d, HorqLayer, HorqLinear
from horq_tvm.nn.options import Beta, HorqOptions, Ste
from horq_tvm.specs import Scale

_SWAPPED = {nn.Conv2d: "conv2d", nn.Linear: "linear"}


def convert(
    model: nn.Module,
    *,
    order: int = 2,
    scale: Scale = "sample",
    skip: Collection[str] = (),
    ste: Ste = "residual",
    beta: Beta = "learned",
    balance: bool = True,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
) -> nn.Module:
    """A copy of `model` with HORQ layers for its `nn.Conv2d` and `nn.Linear`, weights and biases taken over.

    Float stay: layers that the model's input reaches, or that reach its output, with no other layer between; depthwise
    ones; those in `skip` (qualified names); and what a HORQ layer cannot be, such as padding by reflection. The copy is
    no use untrained: train it, from these weights.

    Args:
        order, scale, ste, beta, balance: of every HORQ layer; see `HorqLayer`.
        example_inputs: needed where `torch.fx` cannot trace the model's forward, which `torch.export` then does.

    Warns of each HORQ layer that a ReLU feeds: its first plane is +1 everywhere.

    Raises:
        UsageError: an unknown name in `skip`, a model that cannot be traced, nothing to convert (with each layer's
            reason).
    """
    options = HorqOptions(order, scale, ste, beta, balance)
    converted = copy.deepcopy(model)
    layers = {name: layer for name, layer in converted.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    unknown = sorted(set(skip) - layers.keys())
    if unknown:
        raise UsageError(f"skip: no layer {', '.join(unknown)} in the model; there are {', '.join(layers) or 'none'}")
    roles = layer_roles(converted, example_inputs) if layers else {}
    reasons = {name: _reason_to_stay_float(name, layer, roles.get(layer), skip) for name, layer in layers.items()}
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(f"{type(model).__name__} has nothing to convert: {listed or 'no nn.Conv2d and no nn.Linear'}")
    _swap(converted, {layers[name]: _horq_layer(layers[name], options) for name in chosen})
    _warn_of_relus([name for name in chosen if roles[layers[name]].after_relu])
    return converted


def _swap(model: nn.Module, swapped: Mapping[nn.Module, HorqLayer]) -> None:
    """Put the new layers where the old ones are, in every place where a shared one is."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # named_children leaves out a second name
            if child in swapped:
                setattr(parent, attribute, swapped[child])


def _reason_to_stay_float(name: str, layer: nn.Module, role: Role | None, skip: Collection[str]) -> str | None:
    """Why a layer is not converted; None where it is."""
    if name in skip:
        return "it is in skip"
    if type(layer) not in _SWAPPED:
        return f"it is a {type(layer).__name__}, whose forward may be its own"
    if role is None:
        return "the model's forward does not call it"
    if role.reads_input:
        return "it reads the model's input"
    if role.feeds_output:
        return "it feeds the model's output"
    if isinstance(layer, nn.Conv2d):
        if layer.in_channels == layer.groups:
            return "it is depthwise"
        if layer.padding_mode != "zeros":
            return f"its padding_mode is {layer.padding_mode!r}; accepted is 'zeros'"
    return None


def _horq_layer(layer: nn.Module, options: HorqOptions) -> HorqLayer:
    """The HORQ layer of the same shape with the same weights, bias, device and mode."""
    chosen = {name: getattr(options, name) for name in options.__dataclass_fields__}
    if isinstance(layer, nn.Conv2d):
        new: HorqLayer = HorqConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            _padding(layer),
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            **chosen,
        )
    else:
        assert isinstance(layer, nn.Linear)
        new = HorqLinear(layer.in_features, layer.out_features, layer.bias is not None, **chosen)
    new.to(layer.weight.device)
    assert new.weight is not None
    new.weight.data.copy_(layer.weight.data)
    if layer.bias is not None:
        assert new.bias is not None
        new.bias.data.copy_(layer.bias.data)
    new.settle_()
    return new.train(layer.training)


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), of "same" and "valid" too; the odd one of "same" lies at the bottom and right."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        down, across = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        return down // 2, across // 2, down - down // 2, across - across // 2
    vertical, horizontal = layer.padding
    return vertical, horizontal, vertical, horizontal


def _warn_of_relus(names: Sequence[str]) -> None:
    for name in names:
        warnings.warn(
            f"layer {name!r} is fed by a ReLU: nothing it sees is negative, so that its first plane is +1 everywhere "
            "and K planes hold what K − 1 could (none with K = 1). Feed it the output of a batch normalisation or of "
            "horq_tvm.nn.RSign, and put horq_tvm.nn.RPReLU in the ReLU's place",
            stacklevel=3,
        )

"""What happens to a trained model's HORQ layers together: scales held fixed, latent weights dropped, orders changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from horq_tvm.errors import UsageError
from horq_tvm.nn.layers import HorqLayer


def freeze_scales(model: nn.Module) -> None:
    """Hold every β of `static` where it is, learned or running: for the last epochs, in which the weights settle to it.

    In place. Raises UsageError for a layer whose β no batch has set yet.
    """
    for name, layer in _with_beta(model):
        layer.check_beta(name)
        assert layer.beta is not None
        layer.beta.requires_grad_(False)
        layer.beta.grad = None
        layer.beta_frozen = True


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose HORQ layers keep only what inference needs; `model` stays as it is.

    Its HORQ layers cannot be trained any more. Raises UsageError if one has no β yet.
    """
    for name, layer in _with_beta(model):
        layer.check_beta(name)
    frozen = copy.deepcopy(model).eval()
    for layer in frozen.modules():
        if isinstance(layer, HorqLayer):
            layer.freeze_()
    return frozen


def warm_start(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load the state dict of the same network of another order or scale → names of the layers whose β is fitted anew.

    All but β is taken over. A β of as many planes is kept; any other is fitted to the next training batch.

    Raises:
        UsageError: a state dict of another network: names or shapes that are not the model's.
    """
    own, taken, refitted = model.state_dict(), dict(state), []
    for name, layer in _horq_layers(model):
        key = f"{name}.beta" if name else "beta"
        found = taken.get(key)
        if layer.beta is None:
            taken.pop(key, None)
        elif found is None or found.shape != layer.beta.shape:
            taken[key] = own[key].new_full(own[key].shape, float("nan"))
            refitted.append(name)
    wrong = sorted(own.keys() ^ taken.keys()) or [n for n in own if own[n].shape != taken[n].shape]
    if wrong:
        raise UsageError(
            f"the state dict is of another network: {len(wrong)} names or shapes differ, {wrong[0]!r} the first; "
            f"accepted is one of {type(model).__name__} with these layers"
        )
    model.load_state_dict(taken)
    return tuple(refitted)


def _horq_layers(model: nn.Module) -> list[tuple[str, HorqLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, HorqLayer)]


def _with_beta(model: nn.Module) -> list[tuple[str, HorqLayer]]:
    return [(name, layer) for name, layer in _horq_layers(model) if layer.beta is not None]

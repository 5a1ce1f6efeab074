"""The quantisation errors that are reported, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from horq_tvm import reference
from horq_tvm.errors import UsageError
from horq_tvm.nn import HorqConv2d, HorqLinear, freeze, quantisation_error
from horq_tvm.specs import SCALES, Scale

torch.set_num_threads(1)


def _network(order: int, scale: Scale) -> nn.Sequential:
    torch.manual_seed(0)
    conv = HorqConv2d(4, 6, 3, 2, (1, 0, 2, 1), groups=2, bias=True, order=order, scale=scale)
    model = nn.Sequential(nn.Identity(), conv, nn.Flatten(), HorqLinear(conv(_batch()).flatten(1).shape[1], 3))
    model.train()(_batch())
    return model


def _batch() -> Tensor:
    return torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1))


def _relative(exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.square(exact - found, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_errors_are_those_of_the_reference(scale: Scale, order: int) -> None:
    model = _network(order, scale)
    conv, x = model[1], _batch()
    found = quantisation_error(model, x)
    assert [(e.name, e.order, e.scale) for e in found] == [("1", order, scale), ("3", 2, "static")]
    values = x.numpy()
    if scale == "patch":
        values = reference.patches(values, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        factors = np.moveaxis(reference.patch_scales(x.numpy(), order, (3, 3), (2, 2), conv.padding, (1, 1), 2), -1, 0)
        factors = factors[..., None]
    elif scale == "sample":
        factors = reference.sample_scales(values, order).T.reshape(order, -1, 1, 1, 1)
    else:
        factors = conv.beta.detach().numpy().reshape(order, 1, 1, 1, 1)
    _, rest = reference.residual_binarize(values, order, factors)
    assert found[0].activations == pytest.approx(_relative(values, values - rest), rel=1e-4)
    weight = conv.weight.detach().numpy()
    binary = (conv.alpha.reshape(-1, 1, 1, 1) * conv.weight_sign).numpy()
    assert found[0].weights == pytest.approx(_relative(weight, binary), rel=1e-4)
    assert 0 < found[0].weights < 1
    exact = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 1, 2)), conv.weight, conv.bias, 2, 0, 1, 2)
    with torch.no_grad():
        output = conv.eval()(x).numpy()
    assert found[0].output == pytest.approx(_relative(exact.detach().numpy(), output), rel=1e-4)


def test_more_planes_lose_less() -> None:
    errors = [quantisation_error(_network(order, "sample"), _batch())[0].activations for order in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_zeros_lose_nothing() -> None:
    model = nn.Sequential(HorqLinear(4, 2, scale="sample"))
    (error,) = quantisation_error(model, torch.zeros(2, 4))
    assert (error.activations, error.output) == (0, 0)


def test_the_model_stays_as_it_was() -> None:
    model = _network(2, "static")
    model[0].eval()
    quantisation_error(model, _batch())
    assert [module.training for module in model] == [False, True, True, True]
    assert not model[1]._forward_hooks


def test_a_model_without_latent_weights_is_named() -> None:
    with pytest.raises(UsageError, match="Sequential has no HORQ layer; accepted"):
        quantisation_error(nn.Sequential(nn.ReLU()), _batch())
    with pytest.raises(UsageError, match="layer '1' is frozen; accepted"):
        quantisation_error(freeze(_network(1, "static")), _batch())

"""A layer on an engine's input: what is counted, and that a wrong plane, β or output of an engine is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.layerwise import Fed, LayerCheck, LayerTally, Seen, output_of
from horq_tvm import reference
from horq_tvm.nn import HorqConv2d, HorqLayer, HorqLinear
from horq_tvm.specs import SCALES, Scale
from horq_tvm.torch_ops import planes_of

torch.set_num_threads(1)


def _layer(scale: Scale, dense: bool = False, order: int = 3) -> tuple[HorqLayer, Tensor]:
    """A trained layer with a bias, and an input."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"bias": True, "order": order, "scale": scale}
    layer: HorqLayer = HorqLinear(12, 5, **how) if dense else HorqConv2d(4, 6, 3, 2, (1, 0, 1, 2), groups=2, **how)
    x = torch.randn(3, 12) if dense else torch.randn(3, 4, 7, 6)
    layer(x)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    return layer.eval(), x


def _checked(layer: HorqLayer, fed: Fed) -> LayerCheck:
    tally = LayerTally("other")
    tally.add(layer, Seen.of(layer, fed.input), fed)
    return tally.check(len(fed.input))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_output_and_tolerance_are_the_oracles(scale: Scale, dense: bool) -> None:
    layer, x = _layer(scale, dense)
    seen = Seen.of(layer, x)
    output, tolerance = output_of(layer, seen.scales, seen.planes)
    torch.testing.assert_close(output.reshape(layer(x).shape), layer(x), rtol=0, atol=0)
    assert layer.bias is not None
    beta = None if layer.beta is None else layer.beta.detach()
    operands = (x, layer.weight_sign, layer.alpha, beta, layer.bias.detach())
    how: dict[str, Any] = {"order": layer.order, "scale": scale}
    if isinstance(layer, HorqConv2d):
        how |= {"strides": layer.stride, "padding": layer.padding, "groups": layer.groups}
    oracle = (reference.dense if dense else reference.conv2d)(*operands, **how)
    torch.testing.assert_close(tolerance.reshape(layer(x).shape), torch.from_numpy(oracle.tolerance))


@pytest.mark.parametrize("scale", SCALES)
def test_an_equal_engine(scale: Scale) -> None:
    layer, x = _layer(scale)
    found = _checked(layer, Fed(x, None, layer(x)))
    size = Seen.of(layer, x).values.numel()
    assert found == LayerCheck("other", 3, 3 * size, 0, 0, 0, layer(x).numel(), 0, 0.0, 0.0)
    assert found.holds


def test_one_output_beside_what_follows_from_the_planes() -> None:
    layer, x = _layer("sample")
    y = layer(x).detach().clone()
    y[1, 2, 0, 0] += 2e-6 * y.abs().max() * layer.order
    found = _checked(layer, Fed(x, None, y))
    assert found.outside == 1
    assert found.worst > 1
    assert not found.holds


def test_a_sign_that_another_mean_flips_is_wrong_unless_in_doubt() -> None:
    layer = HorqConv2d(4, 2, 1, order=2, scale="sample").eval()
    # β_1 = 2: the residuals are −1, 1 and ±5e-7 or ±2e-3.
    for step, doubtful in ((5e-7, 2), (2e-3, 0)):
        x = torch.tensor([1.0, 3.0, 2 - step, 2 + step]).reshape(1, 4, 1, 1)
        theirs = Seen.of(layer, x).scales.clone()
        theirs[0] += 2 * step  # beyond the greatest of the two
        found = _checked(layer, Fed(x, theirs, output_of(layer, theirs, tuple(planes_of(x, theirs)))[0]))
        assert (found.doubtful, found.differing, found.wrong, found.outside) == (doubtful, 1, 1 - doubtful // 2, 0)
        assert found.means == pytest.approx(step, rel=0.3)
        assert found.holds == (doubtful == 2)


def test_signs_of_later_planes_tell_images_apart() -> None:
    """β_1 = 2 leaves (−1, −1) of the first image of one and (1, 1) of the other's, whose first planes are equal."""
    layer = HorqConv2d(2, 1, 1, order=2, scale="sample").eval()
    one = torch.tensor([[1.0, -3.0], [1.0, -3.0]]).reshape(2, 2, 1, 1)
    other = torch.tensor([[3.0, -1.0], [1.5, -3.0]]).reshape(2, 2, 1, 1)
    assert Seen.of(layer, one).flipped(Seen.of(layer, other)).tolist() == [True, False]

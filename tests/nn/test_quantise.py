"""The straight-through estimators and the binary weights against plain autograd through what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from horq_tvm.nn.quantise import (
    MIN_BETA,
    BinaryWeight,
    PositiveScales,
    ResidualQuantise,
    fitted_scales,
    quantise,
    tracked_scales,
)
from horq_tvm.torch_ops import planes_of, residual_scales

torch.set_num_threads(1)

BETA = torch.tensor([0.8, 0.45, 0.2])


def _values(count: int = 4001, reach: float = 3.0) -> Tensor:
    """An even grid whose points lie on no threshold."""
    return torch.linspace(-reach, reach + 1e-4, count)


def _approxsign(t: Tensor) -> Tensor:
    """The primitive of max(0, 2 − 2|t|), Bi-Real Net's ApproxSign."""
    t = t.clamp(-1, 1)
    return 2 * t - t * t.abs()


SOFT: dict[str, Callable[[Tensor], Tensor]] = {
    "window": lambda t: t.clamp(-1, 1),
    "approxsign": _approxsign,
    "tanh": torch.tanh,
}


def _gradient(x: Tensor, beta: Tensor, ste: str) -> Tensor:
    x = x.clone().requires_grad_()
    ResidualQuantise.apply(x, beta.reshape(-1, *[1] * x.dim()), ste).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("ste", list(SOFT))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_slopes_are_those_of_soft_signs_chained_through_the_residuals(ste: str, order: int) -> None:
    x, beta = _values().requires_grad_(), BETA[:order]
    residual, total = x, torch.zeros(())
    for scale in beta:
        soft = scale * SOFT[ste](residual / scale)
        plane = torch.copysign(scale, residual.detach()) + soft - soft.detach()
        residual, total = residual - plane, total + plane
    total.sum().backward()
    torch.testing.assert_close(_gradient(x.detach(), beta, ste), x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ste", "reach"), [("residual", 1.45 + 0.2), ("window", 1.45)])
def test_windows_of_the_whole_quantiser(ste: str, reach: float) -> None:
    x = _values()
    torch.testing.assert_close(_gradient(x, BETA, ste), (x.abs() <= reach).float())


def test_identity_passes_everything() -> None:
    assert torch.equal(_gradient(100 * _values(), BETA, "identity"), torch.ones(4001))


def test_the_gradient_of_beta_is_the_planes() -> None:
    x, g = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    beta = BETA.reshape(-1, 1, 1, 1, 1).clone().requires_grad_()
    (ResidualQuantise.apply(x, beta, "residual") * g).sum().backward()
    planes = torch.stack(list(planes_of(x, beta.detach())))
    torch.testing.assert_close(beta.grad.flatten(), (planes * g).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_quantised_values_are_the_sum_of_the_planes_in_order() -> None:
    x = torch.cat([_values(), torch.tensor([0.0, -0.0, 0.8, -0.8])])
    total = torch.zeros(())
    for scale, plane in zip(BETA, planes_of(x, BETA.reshape(-1, 1)), strict=True):
        total = total + scale * plane
    assert torch.equal(quantise(x, BETA.reshape(-1, 1)), total)
    assert quantise(x, BETA.reshape(-1, 1))[-3] > 0  # −0.0 is +1


def test_bfloat16_goes_in_and_float32_comes_out() -> None:
    x = _values().bfloat16().requires_grad_()
    y = ResidualQuantise.apply(x, BETA.reshape(-1, 1), "residual")
    assert torch.equal(y, quantise(x.detach().float(), BETA.reshape(-1, 1)))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(4, 5).requires_grad_()
    before = x.detach().clone()
    for ste in ("residual", "tanh"):
        ResidualQuantise.apply(x, BETA.reshape(-1, 1, 1).requires_grad_(), ste).sum().backward()
    assert torch.equal(x.detach(), before)


def test_positive_scales_drop_what_would_lower_them() -> None:
    beta = torch.tensor([0.5, -0.1, -0.1]).requires_grad_()
    y = PositiveScales.apply(beta)
    assert y.tolist() == [0.5, pytest.approx(MIN_BETA), pytest.approx(MIN_BETA)]
    y.backward(torch.tensor([1.0, 1.0, -1.0]))
    assert beta.grad.tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 3, 2), (6, 11)])
def test_binary_weight_by_autograd(balance: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = (1.5 * torch.randn(shape) + 0.3).requires_grad_()
    g = torch.randn(shape)
    axes = tuple(range(1, len(shape)))
    centred = weight - weight.mean(axes, keepdim=True) if balance else weight
    clipped = centred.clamp(-1, 1)
    signs = torch.where(centred >= 0, 1.0, -1.0) + clipped - clipped.detach()
    expected = centred.abs().mean(axes, keepdim=True) * signs
    (expected_grad,) = torch.autograd.grad((expected * g).sum(), weight)
    found = BinaryWeight.apply(weight, balance)
    (grad,) = torch.autograd.grad((found * g).sum(), weight)
    assert (clipped.detach().abs() == 1).any()  # some gradients are cut off
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    if balance:
        torch.testing.assert_close(grad.sum(axes), torch.zeros(6), rtol=0, atol=1e-5)


def test_tracked_scales_settle_where_the_fit_does() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    means = beta = residual_scales(x, 3, (0,)).flatten()
    for _ in range(100):
        beta = beta.lerp(tracked_scales(x, beta), 0.1)
    tracked, fitted, start = (
        (x - quantise(x, b.reshape(-1, 1))).square().mean().item() for b in (beta, fitted_scales(x, 3), means)
    )
    assert tracked <= 1.01 * fitted < 0.7 * start


def test_tracked_scales_stay_where_a_step_would_turn_one_negative() -> None:
    # Every |x| is below β_1, so that the second plane is the first one's opposite, and one number is fitted by two.
    x = torch.tensor([0.66, 0.27, 0.06, 0.62, -0.45, -0.17])
    beta = torch.tensor([1.37, 0.61])
    assert torch.equal(tracked_scales(x, beta), beta)
